//! The terminal, where standard input is one: only the process group in its foreground can read from it, and gets ^C
//! and ^Z. The command has a group of its own, so it is lent the foreground.

use std::io;

use rustix::process::{Pid, getpgrp, getpid};
use rustix::stdio::stdin;
use rustix::termios::{isatty, tcgetpgrp, tcsetpgrp};
use tokio::process::Command;

/// The foreground of the terminal, as far as it is ours to lend. Dropping it takes it back.
pub(super) struct Terminal {
    is_lent: bool,
}

impl Terminal {
    /// Lends the foreground to a command that is about to be started as the leader of a group, if there is a terminal
    /// and its foreground is ours.
    pub(super) fn lend_to(command: &mut Command) -> Self {
        let is_lent = is_ours();
        if is_lent {
            #[expect(
                unsafe_code,
                reason = "only the child can take the foreground before it reads for the first time"
            )]
            // SAFETY: between fork and exec the closure makes system calls; it neither allocates nor locks.
            unsafe {
                command.pre_exec(take_foreground);
            }
        }
        Self { is_lent }
    }

    pub(super) const fn is_lent(&self) -> bool {
        self.is_lent
    }

    /// Lends the foreground to the group again, after a shell has given it to us anew.
    pub(super) fn lend_again(&mut self, group: Pid) {
        if !self.is_lent && is_ours() {
            self.is_lent = tcsetpgrp(stdin(), group).is_ok();
        }
    }

    /// Takes the foreground back.
    pub(super) fn take_back(&mut self) {
        if std::mem::take(&mut self.is_lent) {
            // A terminal that was closed meanwhile has no foreground to take.
            ignoring_ttou(|| tcsetpgrp(stdin(), getpgrp())).ok();
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.take_back();
    }
}

/// Whether there is a terminal and its foreground is ours.
fn is_ours() -> bool {
    isatty(stdin()) && tcgetpgrp(stdin()) == Ok(getpgrp())
}

/// Makes the calling process, which leads its group, the foreground of its terminal.
fn take_foreground() -> io::Result<()> {
    // A command that did not get it, since the terminal was closed just now, runs without.
    ignoring_ttou(|| tcsetpgrp(stdin(), getpid())).ok();
    Ok(())
}

/// A process in the background that sets the foreground is stopped by TTOU, unless it ignores that meanwhile.
fn ignoring_ttou<T>(set: impl FnOnce() -> T) -> T {
    #[expect(unsafe_code, reason = "no safe interface ignores a signal")]
    // SAFETY: no handler of ours is installed or removed by it, and it may be called between fork and exec.
    let before = unsafe { libc::signal(libc::SIGTTOU, libc::SIG_IGN) };
    let result = set();
    if before != libc::SIG_ERR {
        #[expect(unsafe_code, reason = "no safe interface ignores a signal")]
        // SAFETY: as above; this is what was there before.
        unsafe {
            libc::signal(libc::SIGTTOU, before);
        }
    }
    result
}
