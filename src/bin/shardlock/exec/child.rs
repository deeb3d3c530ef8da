//! The command that runs under the lock: from its start to the moment when nothing of it is left.
//!
//! # Implementation details
//!
//! The child leads a process group, so that what it starts is signalled with it. Once the tool has asked the group to
//! end, be it for a signal or because the lock is lost, a deadline runs: whatever of the group is alive then is killed,
//! and only then does [`Child::outlive`] return. A child that ends by itself is done at once; what it left in the
//! background is its own affair.
//!
//! On Linux the kernel kills the child should the tool be killed by a signal that can't be caught. Elsewhere such a
//! child lives on, and its lock with it until the TTL has passed.

use std::ffi::OsStr;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::process::ExitStatus;
use std::time::Duration;

use anyhow::{Context, anyhow};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, WaitOptions, getpid, getsid, kill_current_process_group, kill_process_group,
    test_kill_process_group, waitid, waitpgid,
};
use shardlock::LockGuard;
use tokio::process::Command;
use tokio::time::{Instant, sleep, sleep_until};

use super::signals::{Signals, stop_this_process};
use super::terminal::Terminal;
use crate::exit::{self, Failure};
use crate::output;

/// A command that runs.
pub(super) struct Child {
    process: tokio::process::Child,
    /// Its process id and, since it leads it, its group's.
    group: Pid,
    terminal: Terminal,
    /// When what is left of the group is killed, once it was asked to end.
    deadline: Option<Instant>,
    /// Whether that has been done.
    killed: bool,
}

/// How the command ended.
#[derive(Debug)]
pub(super) enum Outcome {
    /// With this code, which is the tool's.
    Ended(u8),
    /// It was ended since the lock was lost.
    Lost,
}

impl Child {
    /// Starts the command. To be called on the main thread: the death of the thread that starts a child is the child's.
    pub(super) fn spawn(mut command: Command) -> io::Result<Self> {
        command.process_group(0);
        die_with_this_process(&mut command);
        let terminal = Terminal::lend_to(&mut command);
        let process = command.spawn()?;
        let group = process
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()))
            .ok_or_else(|| io::Error::other("the command has no process id"))?;
        Ok(Self {
            process,
            group,
            terminal,
            deadline: None,
            killed: false,
        })
    }

    /// Passes signals on, ends the command if the lock is lost, and returns when the command is gone.
    pub(super) async fn outlive(
        mut self,
        guard: &LockGuard,
        signals: &mut Signals,
        grace: Duration,
    ) -> anyhow::Result<Outcome> {
        let mut lost = pin!(guard.lost());
        let mut is_lost = false;
        let status = loop {
            let deadline = self.deadline;
            tokio::select! {
                biased;
                status = self.process.wait() => break status.context("the command can't be waited for")?,
                reason = &mut lost, if !is_lost => {
                    is_lost = true;
                    output::complain(format_args!(
                        "lock {:?} (token {}) was lost: {reason}; the command is ended", guard.key(), guard.token()
                    ));
                    self.end(Signal::TERM, grace);
                }
                signal = signals.next() => self.pass_on(signal, grace),
                () = until(deadline), if !self.killed => self.kill(),
            }
        };
        self.terminal.take_back();
        self.end_the_rest().await;
        Ok(if is_lost {
            Outcome::Lost
        } else {
            Outcome::Ended(code(status))
        })
    }

    fn pass_on(&mut self, signal: Signal, grace: Duration) {
        match signal {
            Signal::TERM | Signal::INT | Signal::HUP => self.end(signal, grace),
            Signal::CHILD => self.stop_with_it(),
            Signal::CONT => {
                self.terminal.lend_again(self.group);
                self.signal(Signal::CONT);
            }
            other => self.signal(other),
        }
    }

    /// Asks the group to end, and starts the grace unless it runs.
    fn end(&mut self, signal: Signal, grace: Duration) {
        adopt_orphans();
        self.signal(signal);
        // What is stopped can't act on it.
        self.signal(Signal::CONT);
        self.deadline.get_or_insert_with(|| Instant::now() + grace);
    }

    /// Where job control stopped the command, stops the tool, too, so that the shell that has started it goes on.
    /// Nothing renews the lease meanwhile: it may be lost when both are continued.
    ///
    /// A command that was stopped by other means, by a debugger for example, keeps the lock.
    fn stop_with_it(&mut self) {
        let options = WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
        let Ok(Some(status)) = waitid(WaitId::Pid(self.group), options) else {
            return;
        };
        let job_control = [Signal::TSTP, Signal::TTIN, Signal::TTOU].map(Signal::as_raw);
        let Some(signal) = status.stopping_signal().filter(|signal| job_control.contains(signal)) else {
            return;
        };
        if getsid(None) == Ok(getpid()) {
            // The tool leads its session, so there is no shell to continue it.
            if signal == Signal::TSTP.as_raw() {
                self.signal(Signal::CONT);
            }
        } else if self.terminal.is_lent() {
            self.terminal.take_back();
            // The terminal told the command's group only, not the script that may have started the tool.
            kill_current_process_group(Signal::STOP).ok();
        } else {
            stop_this_process();
        }
    }

    /// Waits until what was asked to end is gone, and kills it at the deadline. Nothing tells of the end of processes
    /// that are not the tool's children, so it has to look.
    async fn end_the_rest(&mut self) {
        let Some(deadline) = self.deadline else {
            return;
        };
        let give_up = deadline.max(Instant::now()) + KILLED_FOR_MAX;
        loop {
            // Adopted orphans count until they are reaped.
            while let Ok(Some(_)) = waitpgid(self.group, WaitOptions::NOHANG) {}
            if test_kill_process_group(self.group).is_err() {
                return;
            }
            let now = Instant::now();
            if now >= deadline && !self.killed {
                self.kill();
            }
            if now >= give_up {
                tracing::warn!(group = %self.group, "processes of the command can't be killed; the lock is given back");
                return;
            }
            sleep(LOOK_AT_THE_REST).await;
        }
    }

    fn kill(&mut self) {
        self.killed = true;
        self.signal(Signal::KILL);
    }

    fn signal(&self, signal: Signal) {
        if let Err(error) = kill_process_group(self.group, signal) {
            tracing::debug!(?signal, %error, "the command's process group could not be signalled");
        }
    }
}

const LOOK_AT_THE_REST: Duration = Duration::from_millis(10);

/// How long processes that were killed may take to be gone. One that waits for a device may take for ever.
const KILLED_FOR_MAX: Duration = Duration::from_secs(1);

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

/// The exit code of the tool for the end of the command.
fn code(status: ExitStatus) -> u8 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code as u8,
        (None, Some(signal)) => exit::by_signal(signal),
        (None, None) => exit::SYSTEM,
    }
}

/// The tool's end where the command could not be started, with the codes of shells.
pub(super) fn spawn_failure(program: &OsStr, error: io::Error) -> Failure {
    let (code, what) = match error.kind() {
        io::ErrorKind::NotFound => (exit::NOT_FOUND, "was not found"),
        // No process could be made for it.
        io::ErrorKind::WouldBlock | io::ErrorKind::OutOfMemory => (exit::SYSTEM, "could not be started"),
        _ => (exit::NOT_EXECUTABLE, "can't be executed"),
    };
    Failure::new(code, anyhow!(error).context(format!("the command {program:?} {what}")))
}

/// Makes orphans of the command children of the tool from now on. They count as members of their group until their
/// parent reaps them, and in many containers the first process, which would be that parent, never does.
#[cfg(target_os = "linux")]
fn adopt_orphans() {
    // Without it, the worst is that the end of the command takes the whole grace.
    rustix::process::set_child_subreaper(Some(getpid())).ok();
}

#[cfg(not(target_os = "linux"))]
fn adopt_orphans() {}

#[cfg(target_os = "linux")]
fn die_with_this_process(command: &mut Command) {
    use rustix::process::{getppid, set_parent_process_death_signal};

    let parent = getpid();
    let tie = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // The tool may have been killed just before; then no signal would ever come.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::ErrorKind::BrokenPipe.into())
        }
    };
    #[expect(unsafe_code, reason = "only the child itself can ask for its parent's death signal")]
    // SAFETY: between fork and exec the closure makes two system calls; it neither allocates nor locks.
    unsafe {
        command.pre_exec(tie);
    }
}

#[cfg(not(target_os = "linux"))]
fn die_with_this_process(_command: &mut Command) {}
