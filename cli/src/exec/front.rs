//! The process started as `shardlock exec`, and the second process that it forks to do the work.
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

/// Which of the two processes is running.
pub(super) enum Side {
    Front(Box<Front>),
    Keeper(Keeper),
}

/// State of the process that the caller started.
pub(super) struct Front {
    keeper: Pid,
    orders: PipeWriter,
    signals: Blocked,
    terminal: Option<Terminal>,
    /// Children that this process had before it executed the tool. They are not part of the
    /// command.
    inherited: Vec<Pid>,
    /// The last signal that came from the terminal.
    typed: Option<Signal>,
}

/// State of the process that holds the lock.
pub(super) struct Keeper {
    pub(super) front: Pid,
    pub(super) orders: PipeReader,
    /// The controlling terminal of the front, if there is one.
    pub(super) terminal: Option<Terminal>,
    /// Whether TTOU was ignored when the tool was started. The keeper itself ignores TTOU, because
    /// it runs in the background of the terminal and must not be stopped when it prints a message.
    pub(super) ignored_ttou: bool,
}

/// Forks into the front and the keeper. Call this while the process has a single thread.
pub(super) fn split() -> anyhow::Result<Side> {
    let (read_orders, write_orders) = io::pipe().context("a pipe can't be created")?;
    let (front, terminal) = (getpid(), Terminal::of_this_process());
    let inherited = tree::children(front);
    tree::adopt_orphans();
    // If CHILD were ignored, the kernel would reap the keeper and its exit code would be lost.
    disposition::set_default(Signal::CHILD);
    // Block before the fork, so that no later signal is missed.
    let signals = Blocked::block(FORWARDED.into_iter().filter(|&signal| !disposition::is_ignored(signal)))
        .context("signals can't be blocked")?;
    #[expect(unsafe_code, reason = "no safe interface forks")]
    // SAFETY: the process has a single thread, so its memory is consistent in the child.
    let child = unsafe { libc::fork() };
    match child {
        -1 => Err(io::Error::last_os_error()).context("the process that holds the lock can't be forked"),
        0 => {
            signals.unblock().context("signals can't be unblocked")?;
            setpgid(None, None).context("a process group can't be created")?;
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

/// Renames the process so that `killall shardlock` and `pkill shardlock` do not match it.
#[cfg(target_os = "linux")]
fn name_this_process() {
    // Best effort: the name only guards against mistakes.
    std::fs::write("/proc/self/comm", "lock-keeper").ok();
}

#[cfg(not(target_os = "linux"))]
fn name_this_process() {}

impl Front {
    /// Forwards signals to the keeper until the keeper has ended, and returns its exit code.
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
            // If the write fails, the keeper has ended, and its CHILD signal follows.
            self.orders.write_all(&[orders::encode(signal, sender)]).ok();
        }
    }

    /// Reaps all children that have ended. If the keeper was stopped, stops this process too, and
    /// continues the keeper afterwards.
    ///
    /// Returns the status of the keeper if the keeper has ended.
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

    /// Cleans up after the keeper and returns the exit code of the tool.
    fn end(&self, status: WaitStatus) -> u8 {
        if let Some(signal) = status.terminating_signal() {
            self.end_the_command(signal);
            return exit::by_signal(signal);
        }
        let code = status.exit_status().unwrap_or(i32::from(exit::SYSTEM)) as u8;
        if self.typed == Some(Signal::INT) && code == exit::by_signal(Signal::INT.as_raw()) {
            // A shell script stops at ^C only if its command was itself terminated by the signal.
            self.signals.unblock().ok();
            kill_process(getpid(), Signal::INT).ok();
        }
        code
    }

    /// Kills the processes that the keeper left behind.
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
        output::eprint(format_args!(
            "the process that holds the lock was killed by signal {signal}; {what}; the lock becomes free when its \
             TTL expires"
        ));
    }
}

const PAUSE: Duration = Duration::from_millis(10);
const KILLED_FOR_MAX: Duration = Duration::from_secs(2);
