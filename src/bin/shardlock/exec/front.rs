//! The process that was started as `shardlock exec`, and how it makes another one that does the work.
//!
//! # Implementation details
//!
//! SIGKILL gives a process no chance to end its children, so the tool is two processes. The *front* is the one that
//! the caller knows: it passes signals on, stops and continues with the command, reaps orphans if it is the first
//! process of a container, and exits with the command's code. The *keeper*, its child, holds the lock and is the parent
//! of the command. Either cleans up after the other:
//!
//! - If the front is killed, the pipe from it ends. The keeper kills the command with everything that it has started,
//!   and releases the lock when all of it is gone, not before.
//! - If the keeper is killed, the front, which adopts its orphans, kills them. The lease runs out with its TTL.
//!
//! The keeper has a process group and a name (`lock-keeper`) of its own, so that a signal to the tool's group, or to
//! all processes with the tool's name, does not end both at once. Where both are killed at the same moment the kernel
//! kills the command itself (on Linux), but not what the command has started.
//!
//! The front has no other threads, no runtime and no connection. Signals are blocked in it and fetched one by one,
//! which also shows which of them come from the terminal: the terminal has sent these to the command, too.

use std::io::{self, PipeReader, PipeWriter, Write};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process, setpgid, wait};

use super::signals::{Blocked, FORWARDED, Sender, stop_this_process};
use super::terminal::Terminal;
use super::{orders, tree};
use crate::disposition;
use crate::exit::{self, Failure};
use crate::output;

/// Which of the two processes this is.
pub(super) enum Side {
    Front(Box<Front>),
    Keeper(Keeper),
}

/// What the process that was started by the caller has to know.
pub(super) struct Front {
    keeper: Pid,
    orders: PipeWriter,
    signals: Blocked,
    terminal: Option<Terminal>,
    /// Children of whatever this process was before it became the tool. They are no part of the command.
    inherited: Vec<Pid>,
    /// The last signal from the terminal.
    typed: Option<Signal>,
}

/// What the process that does the work has to know.
pub(super) struct Keeper {
    pub(super) front: Pid,
    pub(super) orders: PipeReader,
    /// The terminal in which the front is a job, if there is one.
    pub(super) terminal: Option<Terminal>,
    /// Whether TTOU was ignored when the tool was started. The keeper ignores it: it is in the background of the
    /// terminal, where its messages must not stop it.
    pub(super) ignored_ttou: bool,
}

/// Becomes two processes. To be called while the process has one thread.
pub(super) fn split() -> anyhow::Result<Side> {
    let (read_orders, write_orders) = io::pipe().context("a pipe can't be made")?;
    let (front, terminal) = (getpid(), Terminal::of_this_process());
    let inherited = tree::children(front);
    tree::adopt_orphans();
    // With it ignored, the kernel would reap the keeper and its exit code.
    disposition::set_default(Signal::CHILD);
    // Before the fork, so that nothing that comes after it is missed.
    let signals = Blocked::block(FORWARDED.into_iter().filter(|&signal| !disposition::is_ignored(signal)))
        .context("signals can't be blocked")?;
    #[expect(unsafe_code, reason = "no safe interface forks")]
    // SAFETY: the process has one thread, so its memory is consistent in the child.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()).context("a process for the lock can't be made"),
        0 => {
            signals.unblock().context("signals can't be unblocked")?;
            setpgid(None, None).context("a process group can't be made")?;
            tree::adopt_orphans();
            name_this_process();
            let ignored_ttou = disposition::is_ignored(Signal::TTOU);
            disposition::ignore(Signal::TTOU);
            Ok(Side::Keeper(Keeper {
                front,
                orders: read_orders,
                terminal,
                ignored_ttou,
            }))
        }
        keeper => Ok(Side::Front(Box::new(Front {
            keeper: Pid::from_raw(keeper).ok_or_else(|| anyhow!("fork returned {keeper}"))?,
            orders: write_orders,
            signals,
            terminal,
            inherited,
            typed: None,
        }))),
    }
}

/// A name that `killall shardlock` and `pkill shardlock` do not match.
#[cfg(target_os = "linux")]
fn name_this_process() {
    // It only helps against mistakes.
    std::fs::write("/proc/self/comm", "lock-keeper").ok();
}

#[cfg(not(target_os = "linux"))]
fn name_this_process() {}

impl Front {
    /// Serves the keeper until it has ended, and returns its exit code.
    pub(super) fn run(&mut self) -> Result<u8, Failure> {
        loop {
            let (signal, sender) = self
                .signals
                .next()
                .context("signals can't be waited for")
                .map_err(Failure::system)?;
            if signal == Signal::CHILD {
                if let Some(status) = self.reap() {
                    return Ok(self.end(status));
                }
                continue;
            }
            if sender == Sender::Kernel {
                self.typed = Some(signal);
            }
            // Without a keeper its end is the next to be seen.
            self.orders.write_all(&[orders::encode(signal, sender)]).ok();
        }
    }

    /// Reaps all children that have ended, stops with the keeper, and returns how the keeper has ended if it has.
    fn reap(&self) -> Option<WaitStatus> {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
            if pid != self.keeper {
                continue;
            }
            if !status.stopped() {
                return Some(status);
            }
            stop_this_process();
            kill_process(self.keeper, Signal::CONT).ok();
        }
        None
    }

    /// Clears up after the keeper and returns the tool's exit code.
    fn end(&self, status: WaitStatus) -> u8 {
        if let Some(signal) = status.terminating_signal() {
            self.end_the_command(signal);
            return exit::by_signal(signal);
        }
        let code = status.exit_status().unwrap_or(i32::from(exit::SYSTEM)) as u8;
        if self.typed == Some(Signal::INT) && code == exit::by_signal(Signal::INT.as_raw()) {
            // A shell script stops at ^C only if its command was ended by the signal, too.
            self.signals.unblock().ok();
            kill_process(getpid(), Signal::INT).ok();
        }
        code
    }

    /// Kills what the keeper has left.
    fn end_the_command(&self, signal: i32) {
        let started = Instant::now();
        let left = loop {
            let mut left = tree::descendants(getpid(), &self.inherited);
            left.retain(|process| process.signal(Signal::KILL) != Err(Errno::SRCH));
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            if left.is_empty() || started.elapsed() >= KILLED_FOR_MAX {
                break left;
            }
            sleep(PAUSE);
        };
        if let Some(terminal) = &self.terminal {
            disposition::ignore(Signal::TTOU);
            terminal.take_back(|_| false);
        }
        let what = if left.is_empty() {
            "its command was killed".to_owned()
        } else {
            format!("{} of its command can't be killed", tree::list(&left))
        };
        output::complain(format_args!(
            "the process that holds the lock was ended by signal {signal}; {what}; the lock is free when its TTL has \
             passed"
        ));
    }
}

const PAUSE: Duration = Duration::from_millis(10);
const KILLED_FOR_MAX: Duration = Duration::from_secs(2);
