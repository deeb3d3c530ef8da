//! The command that runs under the lock, from its start until its last process is gone.
//!
//! # Implementation details
//!
//! When the command is asked to end, by a signal or because the lock is lost, a grace period
//! starts. After the grace period the remaining processes are killed, repeatedly, until none are
//! left. Only then does [`RunningCommand::wait`] return. If the front was killed, there is no grace
//! period. If the command ends by itself, `wait` returns at once and background processes of the
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
use tokio::time::{Instant, sleep_until};

use super::events::{Event, Events};
use super::holding::Holding;
use super::keeper::Keeper;
use super::process::{self, Process};
use super::process_tree::{Group, ProcessTree};
use super::signals::Sender;
use super::terminal::leads_own_session;
use crate::disposition;
use crate::exit::{self, Failure};
use crate::output;

/// A running command.
pub(super) struct RunningCommand<'a> {
    tree: ProcessTree,
    keeper: &'a Keeper,
    /// The exit code, once the command's own process has ended.
    exit_code: Option<u8>,
    /// Set once the command was asked to end.
    termination: Option<Termination>,
    is_lost: bool,
}

/// Progress of ending the command.
struct Termination {
    /// When the remaining processes are killed.
    deadline: Instant,
    /// When to act next.
    next: Instant,
    /// When the processes were first killed.
    killed_at: Option<Instant>,
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

impl<'a> RunningCommand<'a> {
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
            tree: ProcessTree::new(leader, group),
            keeper,
            exit_code: None,
            termination: None,
            is_lost: false,
        })
    }

    /// Forwards signals, ends the command if the lock is lost, and returns when the command is
    /// gone.
    pub(super) async fn wait(mut self, held: &Holding, events: &mut Events, grace: Duration) -> Outcome {
        let mut lost = pin!(held.lost());
        let exit_code = loop {
            if let Some(exit_code) = self.advance() {
                break exit_code;
            }
            let next = self.termination.as_ref().map(|termination| termination.next);
            tokio::select! {
                biased;
                lost = &mut lost, if !self.is_lost => {
                    self.is_lost = true;
                    // Processes that could not be ended now run without the lock. Report that too.
                    if let Some(termination) = &mut self.termination {
                        termination.is_reported = false;
                    }
                    self.terminate(Signal::TERM, grace);
                    // Afterwards: nobody may read it, and a full pipe would keep the tool waiting.
                    output::eprint(format_args!("{lost}; ending the command"));
                }
                event = events.next() => self.handle(event, grace),
                () = sleep_until_if_set(next) => {}
            }
        };
        if let Some(terminal) = &self.keeper.terminal {
            terminal.restore_foreground(|foreground| self.tree.is_in(foreground));
        }
        if self.is_lost {
            Outcome::Lost
        } else {
            Outcome::Ended(exit_code)
        }
    }

    fn handle(&mut self, event: Event, grace: Duration) {
        match event {
            // Handled by the `advance` that follows.
            Event::ChildChanged => {}
            Event::FrontDied => {
                tracing::warn!("the tool was killed; killing the command");
                self.terminate(Signal::KILL, Duration::ZERO);
            }
            Event::Signal(signal @ (Signal::TERM | Signal::HUP), _)
            | Event::Signal(signal @ Signal::INT, Sender::Process) => self.terminate(signal, grace),
            Event::Signal(signal, Sender::Process) => self.tree.signal_group(signal),
            Event::Signal(signal, Sender::Kernel) => {
                tracing::trace!(
                    ?signal,
                    "not forwarded: the terminal sent the signal to the command too"
                );
            }
        }
    }

    /// Reaps processes, acts on deadlines, and returns the exit code once the command is finished.
    fn advance(&mut self) -> Option<u8> {
        let reaped = self.tree.reap();
        self.exit_code = self.exit_code.or(reaped.ended.map(exit_code_of));
        if reaped.is_gone && self.exit_code.is_none() {
            tracing::error!("the exit code of the command was lost");
            self.exit_code = Some(exit::SYSTEM);
        }
        if let Some(signal) = reaped.stopped {
            self.stop_front(signal);
        }
        let Some(termination) = &mut self.termination else {
            return self.exit_code;
        };
        if reaped.is_gone {
            return self.exit_code;
        }
        let now = Instant::now();
        if now < termination.next {
            return None;
        }
        if now < termination.deadline {
            termination.next = termination.deadline;
            return None;
        }
        let killed_for = now - *termination.killed_at.get_or_insert(now);
        let is_overdue = killed_for >= KILLED_FOR_MAX;
        termination.next = now
            + if is_overdue {
                POLL_SURVIVORS_EVERY
            } else {
                POLL_KILLED_EVERY
            };
        let refused = self.tree.signal_all(Signal::KILL);
        self.report(&refused, "runs as another user and can't be signalled");
        if !is_overdue {
            return None;
        }
        self.report(&self.tree.processes(), "was killed, but has not ended");
        // Without a lock there is no reason to wait for the remaining processes.
        self.exit_code.filter(|_| self.is_lost)
    }

    /// Sends the signal to all processes of the command, and starts the grace period unless it has
    /// already started. With KILL, the grace period ends immediately.
    fn terminate(&mut self, signal: Signal, grace: Duration) {
        let now = Instant::now();
        let termination = self.termination.get_or_insert(Termination {
            deadline: now + grace,
            next: now + grace,
            killed_at: None,
            is_reported: false,
        });
        if signal == Signal::KILL {
            (termination.deadline, termination.next) = (now, now);
            return;
        }
        let refused = self.tree.signal_all(signal);
        // A stopped process can't act on the signal.
        self.tree.signal_all(Signal::CONT);
        self.report(&refused, "runs as another user and can't be signalled");
    }

    /// Reports processes that do not end. Does so only once.
    fn report(&mut self, processes: &[Process], why: &str) {
        let Some(termination) = self.termination.as_mut().filter(|termination| !termination.is_reported) else {
            return;
        };
        if processes.is_empty() {
            return;
        }
        termination.is_reported = true;
        let consequence = if self.is_lost {
            "it continues without the lock"
        } else {
            "the lock is kept until it has ended"
        };
        let list = process::list(processes);
        output::eprint(format_args!("{list} of the command {why}; {consequence}"));
    }

    /// If job control stopped the command, stops the front as well, so that the shell that started
    /// the front regains control. The lock is kept meanwhile.
    fn stop_front(&mut self, signal: i32) {
        let job_control = [Signal::TSTP, Signal::TTIN, Signal::TTOU].map(Signal::as_raw);
        if !job_control.contains(&signal) {
            // Stopped by something else, such as a debugger. The front keeps running.
            return;
        }
        let front = self.keeper.front;
        if leads_own_session(front) {
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

const POLL_KILLED_EVERY: Duration = Duration::from_millis(20);
const POLL_SURVIVORS_EVERY: Duration = Duration::from_secs(1);

/// How long killed processes may take to disappear before they are reported. A process that waits
/// for a device may never end.
const KILLED_FOR_MAX: Duration = Duration::from_secs(1);

async fn sleep_until_if_set(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// The exit code of the tool for a given end of the command.
fn exit_code_of(status: WaitStatus) -> u8 {
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
        die_with_parent(parent)
    };
    #[expect(unsafe_code, reason = "a parent death signal can only be set by the child itself")]
    // SAFETY: between fork and exec, the closure only makes system calls. It neither allocates nor
    // locks.
    unsafe {
        command.pre_exec(prepare);
    }
}

#[cfg(target_os = "linux")]
fn die_with_parent(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // If the parent died before the call above, the signal would never arrive.
    if rustix::process::getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::ErrorKind::BrokenPipe.into())
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_parent(_parent: Pid) -> io::Result<()> {
    Ok(())
}
