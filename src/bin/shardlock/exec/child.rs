//! The command that runs under the lock: from its start to the moment when nothing of it is left.
//!
//! # Implementation details
//!
//! Once the command was asked to end, be it for a signal or because the lock is lost, a deadline runs: what of it is
//! alive then is killed, again and again until nothing is left, and only then does [`Child::outlive`] return. If the
//! front was killed there is no grace. A command that ends by itself is done at once; what it left in the background is
//! its own affair.
//!
//! Processes that run as another user can't be signalled unless the tool runs as root. That is reported, and the lock
//! is kept until they have ended; if it is lost, they are reported to run without it.

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

/// A command that runs.
pub(super) struct Child<'a> {
    tree: Tree,
    keeper: &'a Keeper,
    /// The exit code for the end of the command itself.
    ended: Option<u8>,
    /// Since it was asked to end.
    ending: Option<Ending>,
    is_lost: bool,
}

/// How far a command is that was asked to end.
struct Ending {
    /// When what is left is killed.
    deadline: Instant,
    /// When there is something to do about it.
    next: Instant,
    /// When it was killed for the first time.
    killed: Option<Instant>,
    /// Whether it was reported that it can't be ended.
    is_reported: bool,
}

/// How the command ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// With this code, which is the tool's.
    Ended(u8),
    /// It was asked to end since the lock was lost.
    Lost,
}

impl<'a> Child<'a> {
    /// Starts the command. To be called on the main thread: the death of the thread that starts a child is the child's.
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
        // Dropping it neither ends nor reaps the process.
        let leader = Pid::from_child(&command.spawn()?);
        Ok(Self {
            tree: Tree::new(leader, group),
            keeper,
            ended: None,
            ending: None,
            is_lost: false,
        })
    }

    /// Passes signals on, ends the command if the lock is lost, and returns when the command is gone.
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
                    output::complain(format_args!(
                        "lock {:?} (token {}) was lost: {reason}; ending the command", guard.key(), guard.token()
                    ));
                    // What could not be ended runs without the lock now.
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
            // Seen to by the look that follows.
            Order::Child => {}
            Order::End => {
                tracing::warn!("the tool was killed; killing the command");
                self.end(Signal::KILL, Duration::ZERO);
            }
            Order::Signal(signal @ (Signal::TERM | Signal::HUP), _)
            | Order::Signal(signal @ Signal::INT, Sender::Process) => self.end(signal, grace),
            Order::Signal(signal, Sender::Process) => self.tree.signal_group(signal),
            Order::Signal(signal, Sender::Kernel) => {
                tracing::trace!(?signal, "the terminal has sent it to the command, too");
            }
        }
    }

    /// Does what is due, and returns the exit code once the command is done with.
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
        // There is no lock to keep for what stays.
        self.ended.filter(|_| self.is_lost)
    }

    /// Asks all of the command to end, and starts the grace unless it runs.
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
        // What is stopped can't act on it.
        self.tree.signal_all(Signal::CONT);
        self.report(&refused, "runs as another user and can't be signalled");
    }

    /// Reports processes that do not end, once.
    fn report(&mut self, processes: &[Process], why: &str) {
        let Some(ending) = self.ending.as_mut().filter(|ending| !ending.is_reported) else {
            return;
        };
        if processes.is_empty() {
            return;
        }
        ending.is_reported = true;
        let what_now = if self.is_lost {
            "it runs on without the lock"
        } else {
            "the lock is kept until it has ended"
        };
        let list = tree::list(processes);
        output::complain(format_args!("{list} of the command {why}; {what_now}"));
    }

    /// If job control stopped the command, stops the front, too, so that the shell that has started it continues. The
    /// lock is kept meanwhile.
    fn stop_with_it(&mut self, signal: i32) {
        let job_control = [Signal::TSTP, Signal::TTIN, Signal::TTOU].map(Signal::as_raw);
        if !job_control.contains(&signal) {
            // A debugger, for example, stops the command alone.
            return;
        }
        let front = self.keeper.front;
        if leads_our_session(front) {
            // The front leads its session, so there is no shell to continue it.
            if signal == Signal::TSTP.as_raw() {
                self.tree.signal_group(Signal::CONT);
            }
            return;
        }
        kill_process(front, Signal::STOP).ok();
        // Both may have been continued in between, the front before it was stopped.
        if !self.tree.is_stopped() {
            kill_process(front, Signal::CONT).ok();
        }
    }
}

const LOOK_AT_THE_KILLED: Duration = Duration::from_millis(20);
const LOOK_AT_WHAT_STAYS: Duration = Duration::from_secs(1);

/// How long processes that were killed may take to be gone before it is reported. One that waits for a device may take
/// for ever.
const KILLED_FOR_MAX: Duration = Duration::from_secs(1);

async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The exit code of the tool for the end of the command.
fn code(status: WaitStatus) -> u8 {
    match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => exit::by_signal(signal),
        (None, None) => exit::SYSTEM,
    }
}

/// The tool's end if the command could not be started, with the codes of shells.
pub(super) fn spawn_failure(program: &OsStr, error: io::Error) -> Failure {
    let (code, what) = match error.kind() {
        io::ErrorKind::NotFound => (exit::NOT_FOUND, "was not found"),
        // No process could be made for it.
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => (exit::SYSTEM, "could not be started"),
        _ => (exit::NOT_EXECUTABLE, "can't be executed"),
    };
    Failure::new(code, anyhow!(error).context(format!("the command {program:?} {what}")))
}

/// Gives the command the dispositions of signals that the tool was started with, and ties it to this process.
fn prepare(command: &mut Command, keeper: &Keeper) {
    let ignored_pipe = disposition::is_ignored(Signal::PIPE);
    let ignored_ttou = keeper.ignored_ttou;
    let parent = getpid();
    let prepare = move || {
        // The standard library has just set it to the default.
        if ignored_pipe {
            disposition::ignore(Signal::PIPE);
        }
        if !ignored_ttou {
            disposition::set_default(Signal::TTOU);
        }
        die_with(parent)
    };
    #[expect(unsafe_code, reason = "only the child itself can ask for its parent's death signal")]
    // SAFETY: between fork and exec the closure makes a few system calls; it neither allocates nor locks.
    unsafe {
        command.pre_exec(prepare);
    }
}

#[cfg(target_os = "linux")]
fn die_with(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // The parent may have been killed just before; then no signal would ever come.
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
