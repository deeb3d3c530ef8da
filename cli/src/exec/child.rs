//! The command that runs under the lock, from its start until its last process is gone.
//!
//! # Implementation details
//!
//! When the command is asked to end, by a signal or because the lock is lost, a grace period
//! starts. After the grace period the remaining processes are killed, repeatedly, until none are
//! left. Only then does [`Child::outlive`] return. If the front was killed, there is no grace
//! period. If the command ends by itself, `outlive` returns at once and background processes of the
//! command keep running.
//!
//! Processes that run as another user can't be signalled unless the tool runs as root. The tool
//! reports them and keeps the lock until they have ended. If the lock is lost, the tool reports
//! that they run without the lock.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::CommandExt;
use std::pin::pin;
use std::process::Command;
use std::time::Duration;

use anyhow::anyhow;
use rustix::process::{Pid, Signal, WaitStatus, getpid, kill_process};
use shardlock::LockGuard;
use tokio::time::{Instant, sleep_until};

use super::front::Keeper;
use super::orders::{Order, Orders};
use super::signals::Sender;
use super::terminal::leads_our_session;
use super::tree::{self, Group, Process, Tree};
use crate::disposition;
use crate::exit::{self, Failure};
use crate::output;

/// A running command.
pub(super) struct Child<'a> {
    tree: Tree,
    keeper: &'a Keeper,
    /// The exit code, once the command's own process has ended.
    ended: Option<u8>,
    /// Set once the command was asked to end.
    ending: Option<Ending>,
    is_lost: bool,
}

/// Progress of ending the command.
struct Ending {
    /// When the remaining processes are killed.
    deadline: Instant,
    /// When to act next.
    next: Instant,
    /// When the processes were first killed.
    killed: Option<Instant>,
    /// Whether processes that can't be ended were reported.
    is_reported: bool,
}

/// How the command ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// It ended, and the tool exits with this code.
    Ended(u8),
    /// The lock was lost, and the command was asked to end.
    Lost,
}

impl<'a> Child<'a> {
    /// Starts the command. Call this on the main thread: the kernel kills the child when the thread
    /// that started the child ends.
    pub(super) fn spawn(mut command: Command, keeper: &'a Keeper) -> io::Result<Self> {
        let group = match &keeper.terminal {
            Some(terminal) => Group::Shared(terminal.job),
            None => Group::Own,
        };
        command.process_group(match group {
            Group::Shared(job) => job.as_raw_nonzero().get(),
            Group::Own => 0,
        });
        prepare(&mut command, keeper);
        // Dropping the `std` handle neither ends nor reaps the process.
        let leader = Pid::from_child(&command.spawn()?);
        Ok(Self {
            tree: Tree::new(leader, group),
            keeper,
            ended: None,
            ending: None,
            is_lost: false,
        })
    }

    /// Forwards signals, ends the command if the lock is lost, and returns when the command is
    /// gone.
    pub(super) async fn outlive(mut self, guard: &LockGuard, orders: &mut Orders, grace: Duration) -> Outcome {
        let mut lost = pin!(guard.lost());
        let code = loop {
            if let Some(code) = self.look() {
                break code;
            }
            let next = self.ending.as_ref().map(|ending| ending.next);
            tokio::select! {
                biased;
                reason = &mut lost, if !self.is_lost => {
                    self.is_lost = true;
                    output::eprint(format_args!(
                        "lock {:?} (token {}) was lost: {reason}; ending the command", guard.key(), guard.token()
                    ));
                    // Processes that could not be ended now run without the lock. Report that too.
                    if let Some(ending) = &mut self.ending {
                        ending.is_reported = false;
                    }
                    self.end(Signal::TERM, grace);
                }
                order = orders.next() => self.obey(order, grace),
                () = until(next) => {}
            }
        };
        if let Some(terminal) = &self.keeper.terminal {
            terminal.take_back(|foreground| self.tree.is_in(foreground));
        }
        if self.is_lost {
            Outcome::Lost
        } else {
            Outcome::Ended(code)
        }
    }

    fn obey(&mut self, order: Order, grace: Duration) {
        match order {
            // Handled by the `look` that follows.
            Order::Child => {}
            Order::End => {
                tracing::warn!("the tool was killed; killing the command");
                self.end(Signal::KILL, Duration::ZERO);
            }
            Order::Signal(signal @ (Signal::TERM | Signal::HUP), _)
            | Order::Signal(signal @ Signal::INT, Sender::Process) => self.end(signal, grace),
            Order::Signal(signal, Sender::Process) => self.tree.signal_group(signal),
            Order::Signal(signal, Sender::Kernel) => {
                tracing::trace!(
                    ?signal,
                    "not forwarded: the terminal sent the signal to the command too"
                );
            }
        }
    }

    /// Reaps processes, acts on deadlines, and returns the exit code once the command is finished.
    fn look(&mut self) -> Option<u8> {
        let reaped = self.tree.reap();
        self.ended = self.ended.or(reaped.ended.map(code));
        if reaped.is_gone && self.ended.is_none() {
            tracing::error!("the exit code of the command was lost");
            self.ended = Some(exit::SYSTEM);
        }
        if let Some(signal) = reaped.stopped {
            self.stop_with_it(signal);
        }
        let Some(ending) = &mut self.ending else {
            return self.ended;
        };
        if reaped.is_gone {
            return self.ended;
        }
        let now = Instant::now();
        if now < ending.next {
            return None;
        }
        if now < ending.deadline {
            ending.next = ending.deadline;
            return None;
        }
        let killed_for = now - *ending.killed.get_or_insert(now);
        let has_failed = killed_for >= KILLED_FOR_MAX;
        ending.next = now
            + if has_failed {
                LOOK_AT_WHAT_STAYS
            } else {
                LOOK_AT_THE_KILLED
            };
        let refused = self.tree.signal_all(Signal::KILL);
        self.report(&refused, "runs as another user and can't be signalled");
        if !has_failed {
            return None;
        }
        self.report(&self.tree.processes(), "was killed, but has not ended");
        // Without a lock there is no reason to wait for the remaining processes.
        self.ended.filter(|_| self.is_lost)
    }

    /// Sends the signal to all processes of the command, and starts the grace period unless it has
    /// already started. With KILL, the grace period ends immediately.
    fn end(&mut self, signal: Signal, grace: Duration) {
        let now = Instant::now();
        let ending = self.ending.get_or_insert(Ending {
            deadline: now + grace,
            next: now + grace,
            killed: None,
            is_reported: false,
        });
        if signal == Signal::KILL {
            (ending.deadline, ending.next) = (now, now);
            return;
        }
        let refused = self.tree.signal_all(signal);
        // A stopped process can't act on the signal.
        self.tree.signal_all(Signal::CONT);
        self.report(&refused, "runs as another user and can't be signalled");
    }

    /// Reports processes that do not end. Does so only once.
    fn report(&mut self, processes: &[Process], why: &str) {
        let Some(ending) = self.ending.as_mut().filter(|ending| !ending.is_reported) else {
            return;
        };
        if processes.is_empty() {
            return;
        }
        ending.is_reported = true;
        let what_now = if self.is_lost {
            "it continues without the lock"
        } else {
            "the lock is kept until it has ended"
        };
        let list = tree::list(processes);
        output::eprint(format_args!("{list} of the command {why}; {what_now}"));
    }

    /// If job control stopped the command, stops the front as well, so that the shell that started
    /// the front regains control. The lock is kept meanwhile.
    fn stop_with_it(&mut self, signal: i32) {
        let job_control = [Signal::TSTP, Signal::TTIN, Signal::TTOU].map(Signal::as_raw);
        if !job_control.contains(&signal) {
            // Stopped by something else, such as a debugger. The front keeps running.
            return;
        }
        let front = self.keeper.front;
        if leads_our_session(front) {
            // The front leads its session, so no shell could continue the front.
            if signal == Signal::TSTP.as_raw() {
                self.tree.signal_group(Signal::CONT);
            }
            return;
        }
        kill_process(front, Signal::STOP).ok();
        // The job may have been continued in the meantime, before the front was stopped. Then
        // nothing else would continue the front.
        if !self.tree.is_stopped() {
            kill_process(front, Signal::CONT).ok();
        }
    }
}

const LOOK_AT_THE_KILLED: Duration = Duration::from_millis(20);
const LOOK_AT_WHAT_STAYS: Duration = Duration::from_secs(1);

/// How long killed processes may take to disappear before they are reported. A process that waits
/// for a device may never end.
const KILLED_FOR_MAX: Duration = Duration::from_secs(1);

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The exit code of the tool for a given end of the command.
fn code(status: WaitStatus) -> u8 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => exit::by_signal(signal),
        (None, None) => exit::SYSTEM,
    }
}

/// The failure to report if the command could not be started. The exit codes are those of shells.
pub(super) fn spawn_failure(program: &OsStr, error: io::Error) -> Failure {
    let (code, what) = match error.kind() {
        io::ErrorKind::NotFound => (exit::NOT_FOUND, "was not found"),
        // The system could not create a process.
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => (exit::SYSTEM, "could not be started"),
        _ => (exit::NOT_EXECUTABLE, "can't be executed"),
    };
    Failure::new(code, anyhow!(error).context(format!("the command {program:?} {what}")))
}

/// Restores the signal dispositions that the tool was started with, and makes the kernel kill the
/// command when this process dies.
fn prepare(command: &mut Command, keeper: &Keeper) {
    let ignored_pipe = disposition::is_ignored(Signal::PIPE);
    let ignored_ttou = keeper.ignored_ttou;
    let parent = getpid();
    let prepare = move || {
        // The standard library has just reset PIPE to the default.
        if ignored_pipe {
            disposition::ignore(Signal::PIPE);
        }
        if !ignored_ttou {
            disposition::set_default(Signal::TTOU);
        }
        die_with(parent)
    };
    #[expect(unsafe_code, reason = "a parent death signal can only be set by the child itself")]
    // SAFETY: between fork and exec, the closure only makes system calls. It neither allocates nor
    // locks.
    unsafe {
        command.pre_exec(prepare);
    }
}

#[cfg(target_os = "linux")]
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // If the parent died before the call above, the signal would never arrive.
    if rustix::process::getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with(_parent: Pid) -> io::Result<()> {
    Ok(())
}
