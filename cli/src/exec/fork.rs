//! Forks `shardlock exec` into two processes.
//!
//! # Implementation details
//!
//! SIGKILL gives a process no chance to end its children, so the tool consists of two processes.
//! The *front* is the process that the caller started. It forwards signals, stops and continues
//! with the command, reaps orphans if it is the first process of a container, and exits with the
//! command's code. The *keeper*, a child of the front, holds the lock and is the parent of the
//! command. Each cleans up after the other:
//!
//! - If the front is killed, its pipe to the keeper closes. The keeper kills the command with all
//!   its descendants, and releases the lock only once all of them are gone.
//! - If the keeper is killed, the front adopts the orphans and kills them. The lease expires with
//!   its TTL.
//!
//! The keeper has its own process group and its own name (`lock-keeper`), so a signal to the tool's
//! group, or to all processes with the tool's name, does not end both at once. If both are killed
//! at the same moment, the kernel kills the command itself (on Linux) but not the command's
//! descendants.
//!
//! The front has a single thread, no runtime and no connections. Its signals are blocked and
//! fetched one by one. This also shows which signals come from the terminal, because the terminal
//! sends those to the command as well.

use std::io;

use anyhow::{Context, anyhow};
use rustix::process::{Pid, Signal, getpid, setpgid};

use super::front::Front;
use super::keeper::Keeper;
use super::signals::{BlockedSignals, FORWARDED};
use super::terminal::Terminal;
use super::{process, process_tree};
use crate::disposition;

/// Which of the two processes is running.
pub(super) enum Role {
    Front(Box<Front>),
    Keeper(Keeper),
}

/// Forks into the front and the keeper. Call this while the process has a single thread.
pub(super) fn fork() -> anyhow::Result<Role> {
    let (read_end, write_end) = io::pipe().context("a pipe can't be created")?;
    let (front, terminal) = (getpid(), Terminal::controlling());
    let inherited = process::children(front);
    process_tree::adopt_orphans();
    // If CHILD were ignored, the kernel would reap the keeper and its exit code would be lost.
    disposition::set_default(Signal::CHILD);
    // Block before the fork, so that no later signal is missed.
    let signals = BlockedSignals::block(FORWARDED.into_iter().filter(|&signal| !disposition::is_ignored(signal)))
        .context("signals can't be blocked")?;
    #[expect(unsafe_code, reason = "no safe interface forks")]
    // SAFETY: the process has a single thread, so its memory is consistent in the child.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()).context("the process that holds the lock can't be forked"),
        0 => {
            signals.unblock().context("signals can't be unblocked")?;
            setpgid(None, None).context("a process group can't be created")?;
            process_tree::adopt_orphans();
            name_this_process();
            let ignored_ttou = disposition::is_ignored(Signal::TTOU);
            disposition::ignore(Signal::TTOU);
            Ok(Role::Keeper(Keeper {
                front,
                signal_pipe: read_end,
                terminal,
                ignored_ttou,
            }))
        }
        keeper => Ok(Role::Front(Box::new(Front {
            keeper: Pid::from_raw(keeper).ok_or_else(|| anyhow!("fork returned {keeper}"))?,
            signal_pipe: write_end,
            signals,
            terminal,
            inherited,
            last_from_terminal: None,
        }))),
    }
}

/// Renames the process so that `killall shardlock` and `pkill shardlock` do not match it.
#[cfg(target_os = "linux")]
fn name_this_process() {
    // Best effort: the name only guards against mistakes.
    std::fs::write("/proc/self/comm", "lock-keeper").ok();
}

#[cfg(not(target_os = "linux"))]
fn name_this_process() {}
