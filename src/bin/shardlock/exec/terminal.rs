//! The terminal in which the tool is part of a job.
//!
//! The command then stays in the process group of the tool. So the terminal treats them as one: both can read from it,
//! ^C and ^Z reach both, and so do other processes of the job, such as a pager at the end of a pipeline.

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
    /// The controlling terminal, if there is one. The standard streams may be something else all the same.
    pub(super) fn of_this_process() -> Option<Self> {
        let file = OpenOptions::new().read(true).write(true).open("/dev/tty").ok()?;
        Some(Self {
            file,
            job: own_group()?,
        })
    }

    /// Makes the tool's job the foreground again if the group that is it is gone, or a part of a command that has
    /// ended: an interactive shell that was killed, for example, has not done so itself. TTOU must be ignored.
    pub(super) fn take_back(&self, is_of_command: impl FnOnce(Pid) -> bool) {
        let Ok(foreground) = tcgetpgrp(&self.file) else {
            // It was closed.
            return;
        };
        let is_gone = || test_kill_process_group(foreground) == Err(Errno::SRCH);
        if foreground != self.job && (is_gone() || is_of_command(foreground)) {
            tcsetpgrp(&self.file, self.job).ok();
        }
    }
}

/// The process group of this process, unless it is one from outside of its namespace.
fn own_group() -> Option<Pid> {
    #[expect(unsafe_code, reason = "the safe interface panics if there is none")]
    // SAFETY: it only returns a number.
    Pid::from_raw(unsafe { libc::getpgrp() })
}

/// Whether a process leads the session of this process.
pub(super) fn leads_our_session(process: Pid) -> bool {
    #[expect(
        unsafe_code,
        reason = "the safe interface panics if the session is from outside of the namespace"
    )]
    // SAFETY: it only returns a number.
    Pid::from_raw(unsafe { libc::getsid(0) }).is_some_and(|leader| leader == process)
}
