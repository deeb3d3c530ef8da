//! The controlling terminal of the tool.
//!
//! In a terminal, the command stays in the process group of the tool, so the terminal treats the
//! two as one job. Both can read from the terminal, and ^C and ^Z reach both, as well as the other
//! processes of the job, such as a pager at the end of a pipeline.

use std::fs::{File, OpenOptions};

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process_group};
use rustix::termios::{tcgetpgrp, tcsetpgrp};

pub(super) struct Terminal {
    file: File,
    /// The process group of the tool.
    pub(super) job: Pid,
}

impl Terminal {
    /// Opens the controlling terminal, if there is one. The standard streams may still be
    /// redirected.
    pub(super) fn controlling() -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/tty").ok()?;
        Some(Self {
            file,
            job: own_group()?,
        })
    }

    /// Makes the tool's job the foreground job again, if the current foreground group is gone or
    /// belongs to the command, which has ended.
    ///
    /// An interactive shell that was killed, for example, did not restore the foreground itself.
    /// TTOU must be ignored when this is called.
    pub(super) fn restore_foreground(&self, is_of_command: impl FnOnce(Pid) -> bool) {
        let Ok(foreground) = tcgetpgrp(&self.file) else {
            // The terminal was closed.
            return;
        };
        let is_gone = || test_kill_process_group(foreground) == Err(Errno::SRCH);
        if foreground != self.job && (is_gone() || is_of_command(foreground)) {
            tcsetpgrp(&self.file, self.job).ok();
        }
    }
}

/// The process group of this process, or `None` if the group is from outside the PID namespace.
fn own_group() -> Option<Pid> {
    #[expect(
        unsafe_code,
        reason = "the safe interface panics if the group is outside the namespace"
    )]
    // SAFETY: `getpgrp` takes no arguments and can't fail.
    Pid::from_raw(unsafe { libc::getpgrp() })
}

/// Returns whether a process leads the session of this process.
pub(super) fn leads_own_session(process: Pid) -> bool {
    #[expect(
        unsafe_code,
        reason = "the safe interface panics if the session is outside the namespace"
    )]
    // SAFETY: `getsid` accesses no memory of this process.
    Pid::from_raw(unsafe { libc::getsid(0) }).is_some_and(|leader| leader == process)
}
