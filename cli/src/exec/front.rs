//! The process that the caller started. It forwards signals to the keeper, and cleans up after it.

use std::io::{PipeWriter, Write};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process, wait};

use super::signals::{BlockedSignals, Sender, stop_this_process};
use super::terminal::Terminal;
use super::{events, process};
use crate::disposition;
use crate::exit::{self, Failure};
use crate::output;

/// State of the process that the caller started.
pub(super) struct Front {
    pub(super) keeper: Pid,
    pub(super) signal_pipe: PipeWriter,
    pub(super) signals: BlockedSignals,
    pub(super) terminal: Option<Terminal>,
    /// Children that this process had before it executed the tool. They are not part of the
    /// command.
    pub(super) inherited: Vec<Pid>,
    /// The last signal that came from the terminal.
    pub(super) last_from_terminal: Option<Signal>,
}

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
                self.last_from_terminal = Some(signal);
            }
            // If the write fails, the keeper has ended, and its CHILD signal follows.
            self.signal_pipe.write_all(&[events::encode(signal, sender)]).ok();
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
            self.kill_orphans(signal);
            return exit::by_signal(signal);
        }
        let code = status.exit_status().unwrap_or(i32::from(exit::SYSTEM)) as u8;
        if self.last_from_terminal == Some(Signal::INT) && code == exit::by_signal(Signal::INT.as_raw()) {
            // A shell script stops at ^C only if its command was itself terminated by the signal.
            self.signals.unblock().ok();
            kill_process(getpid(), Signal::INT).ok();
        }
        code
    }

    /// Kills the processes that the keeper left behind.
    fn kill_orphans(&self, signal: i32) {
        let started = Instant::now();
        let remaining = loop {
            let mut remaining = process::descendants(getpid(), &self.inherited);
            remaining.retain(|process| process.signal(Signal::KILL) != Err(Errno::SRCH));
            while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
            if remaining.is_empty() || started.elapsed() >= KILLED_FOR_MAX {
                break remaining;
            }
            sleep(KILL_RETRY_PAUSE);
        };
        if let Some(terminal) = &self.terminal {
            disposition::ignore(Signal::TTOU);
            terminal.restore_foreground(|_| false);
        }
        let what = if remaining.is_empty() {
            "its command was killed".to_owned()
        } else {
            format!("{} of its command can't be killed", process::list(&remaining))
        };
        output::eprint(format_args!(
            "the process that holds the lock was killed by signal {signal}; {what}; the lock becomes free when its \
             TTL expires"
        ));
    }
}

const KILL_RETRY_PAUSE: Duration = Duration::from_millis(10);
const KILLED_FOR_MAX: Duration = Duration::from_secs(2);
