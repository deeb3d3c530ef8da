//! The processes of the command: the command itself and all its descendants.
//!
//! On Linux the keeper adopts orphans. Every process of the command therefore stays a descendant of
//! the keeper, whatever process groups and sessions it creates, and the command is gone once the
//! keeper has no children. On other systems the command is its process group.

use std::cell::Cell;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process_group, test_kill_process, wait};

use super::process::{Process, State, descendants};

/// The processes of a command. The command must be the only child that this process started.
pub(super) struct ProcessTree {
    /// The command itself.
    leader: Pid,
    /// Whether the leader was reaped. From then on, its PID may belong to another process, and to
    /// the process group of that process.
    is_leader_reaped: Cell<bool>,
    group: Group,
}

/// The process group in which the command was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Group {
    /// The command leads its own group.
    Own,
    /// The command shares this group with other processes.
    Shared(Pid),
}

/// What happened to the children since the last call of [`ProcessTree::reap`].
#[derive(Default)]
pub(super) struct Reaped {
    /// How the command itself ended, if it did.
    pub(super) ended: Option<WaitStatus>,
    /// The signal that stopped the command itself, if it was stopped.
    pub(super) stopped: Option<i32>,
    /// Whether no process of the command is left.
    pub(super) is_gone: bool,
}

impl ProcessTree {
    pub(super) const fn new(leader: Pid, group: Group) -> Self {
        Self {
            leader,
            is_leader_reaped: Cell::new(false),
            group,
        }
    }

    /// Sends a signal to the command and to the processes of the command in its group.
    pub(super) fn signal_group(&self, signal: Signal) {
        let sent = match self.group {
            Group::Own => self.signal_own_group(signal),
            Group::Shared(group) => {
                let mut sent = Err(Errno::SRCH);
                for process in self.processes().iter().filter(|process| process.group == Some(group)) {
                    sent = process.signal(signal).or(sent);
                }
                sent
            }
        };
        if let Err(error) = sent {
            tracing::debug!(?signal, %error, "the command could not be signalled");
        }
    }

    /// Sends a signal to all processes of the command.
    ///
    /// Returns the processes that this process has no permission to signal.
    pub(super) fn signal_all(&self, signal: Signal) -> Vec<Process> {
        let mut processes = self.processes();
        // Signalling the whole group at once does not miss a process that is just being forked.
        let has_own = self.group == Group::Own && self.signal_own_group(signal) != Err(Errno::SRCH);
        processes.retain(|process| {
            let sent = if has_own && process.group == Some(self.leader) {
                test_kill_process(process.pid)
            } else {
                process.signal(signal)
            };
            sent == Err(Errno::PERM)
        });
        processes
    }

    /// Signals the command's own process group, if it still exists.
    fn signal_own_group(&self, signal: Signal) -> Result<(), Errno> {
        // A group keeps its ID while it has members. Without /proc they are not known.
        if self.is_leader_reaped.get() && cfg!(target_os = "linux") && !self.is_in(self.leader) {
            return Err(Errno::SRCH);
        }
        kill_process_group(self.leader, signal)
    }

    /// The processes that exist now, without those that only wait to be reaped.
    pub(super) fn processes(&self) -> Vec<Process> {
        let mut processes = descendants(getpid(), &[]);
        let is_missing = processes.iter().all(|process| process.pid != self.leader);
        // Processes of other users may be hidden in /proc. On systems other than Linux, no process
        // is listed at all.
        let is_hidden = || !self.is_leader_reaped.get() && test_kill_process(self.leader) == Err(Errno::PERM);
        if is_missing && (!cfg!(target_os = "linux") || is_hidden()) {
            processes.push(Process {
                pid: self.leader,
                parent: getpid(),
                group: match self.group {
                    Group::Own => Some(self.leader),
                    Group::Shared(group) => Some(group),
                },
                state: State::Running,
                started: None,
                name: String::new(),
            });
        }
        processes.retain(|process| process.state != State::Ended);
        processes
    }

    /// Reaps all children that have ended, including adopted orphans.
    pub(super) fn reap(&self) -> Reaped {
        let mut reaped = Reaped::default();
        loop {
            match wait(WaitOptions::NOHANG | WaitOptions::UNTRACED) {
                Ok(Some((pid, status))) if pid == self.leader => match status.stopping_signal() {
                    Some(signal) => reaped.stopped = Some(signal),
                    None => {
                        self.is_leader_reaped.set(true);
                        reaped.ended = Some(status);
                    }
                },
                Ok(Some(_)) | Err(Errno::INTR) => {}
                Ok(None) => return reaped,
                Err(_) => {
                    reaped.is_gone = self.is_gone_without_children();
                    return reaped;
                }
            }
        }
    }

    #[cfg(target_os = "linux")]
    #[expect(clippy::unused_self, reason = "other systems need `self`")]
    const fn is_gone_without_children(&self) -> bool {
        true
    }

    #[cfg(not(target_os = "linux"))]
    fn is_gone_without_children(&self) -> bool {
        self.group != Group::Own || rustix::process::test_kill_process_group(self.leader) == Err(Errno::SRCH)
    }

    /// Returns whether a process of the command is in this group. Zombies count.
    pub(super) fn is_in(&self, group: Pid) -> bool {
        let mut processes = descendants(getpid(), &[]).into_iter();
        processes.any(|process| process.group == Some(group))
    }

    /// Returns whether the command itself is currently stopped.
    pub(super) fn is_stopped(&self) -> bool {
        let mut processes = self.processes().into_iter();
        processes.any(|process| process.pid == self.leader && process.state == State::Stopped)
    }
}

/// From now on, orphaned descendants of this process become its children.
#[cfg(target_os = "linux")]
pub(super) fn adopt_orphans() {
    // Can't fail on Linux 3.4 or later.
    rustix::process::set_child_subreaper(Some(getpid())).ok();
}

#[cfg(not(target_os = "linux"))]
pub(super) fn adopt_orphans() {}
