//! The processes of the command: the command itself and all its descendants.
//!
//! On Linux the keeper adopts orphans. Every process of the command therefore stays a descendant of
//! the keeper, whatever process groups and sessions it creates, and the command is gone once the
//! keeper has no children. On other systems the command is its process group.

use std::fmt;

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, getpid, kill_process_group, test_kill_process, wait};

/// The processes of a command. The command must be the only child that this process started.
pub(super) struct Tree {
    /// The command itself.
    leader: Pid,
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

/// What happened to the children since the last call of [`Tree::reap`].
#[derive(Default)]
pub(super) struct Reaped {
    /// How the command itself ended, if it did.
    pub(super) ended: Option<WaitStatus>,
    /// The signal that stopped the command itself, if it was stopped.
    pub(super) stopped: Option<i32>,
    /// Whether no process of the command is left.
    pub(super) is_gone: bool,
}

impl Tree {
    pub(super) const fn new(leader: Pid, group: Group) -> Self {
        Self { leader, group }
    }

    /// Sends a signal to the command and to the processes of the command in its group.
    pub(super) fn signal_group(&self, signal: Signal) {
        let sent = match self.group {
            Group::Own => kill_process_group(self.leader, signal),
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
        let has_own = self.group == Group::Own && kill_process_group(self.leader, signal) != Err(Errno::SRCH);
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

    /// The processes that exist now, without those that only wait to be reaped.
    pub(super) fn processes(&self) -> Vec<Process> {
        let mut processes = descendants(getpid(), &[]);
        let is_missing = processes.iter().all(|process| process.pid != self.leader);
        // Processes of other users may be hidden in /proc. On systems other than Linux, no process
        // is listed at all.
        if is_missing && (!cfg!(target_os = "linux") || test_kill_process(self.leader) == Err(Errno::PERM)) {
            processes.push(Process {
                pid: self.leader,
                parent: getpid(),
                group: match self.group {
                    Group::Own => Some(self.leader),
                    Group::Shared(group) => Some(group),
                },
                state: State::Runs,
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
                    None => reaped.ended = Some(status),
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

/// A snapshot of a process.
#[derive(Debug)]
pub(super) struct Process {
    pid: Pid,
    parent: Pid,
    /// `None` if the group is from outside the PID namespace of this process.
    group: Option<Pid>,
    state: State,
    /// Start time in clock ticks since boot. Together with the PID it identifies a process
    /// uniquely.
    started: Option<u64>,
    name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Runs,
    Stopped,
    /// A zombie: the process has ended and only needs to be reaped.
    Ended,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pid, name, .. } = self;
        if name.is_empty() {
            write!(f, "process {pid}")
        } else {
            write!(f, "process {pid} ({name})")
        }
    }
}

/// Lists processes on one line.
pub(super) fn list(processes: &[Process]) -> String {
    const SHOWN_MAX: usize = 5;
    let mut list: Vec<String> = processes.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    if processes.len() > SHOWN_MAX {
        list.push(format!("{} more", processes.len() - SHOWN_MAX));
    }
    list.join(", ")
}

/// From now on, orphaned descendants of this process become its children.
#[cfg(target_os = "linux")]
pub(super) fn adopt_orphans() {
    // Can't fail on Linux 3.4 or later.
    rustix::process::set_child_subreaper(Some(getpid())).ok();
}

#[cfg(not(target_os = "linux"))]
pub(super) fn adopt_orphans() {}

#[cfg(target_os = "linux")]
mod linux {
    use std::collections::HashMap;
    use std::fs;

    use rustix::process::{PidfdFlags, kill_process, pidfd_open, pidfd_send_signal};

    use super::{Errno, Pid, Process, Signal, State};

    impl Process {
        /// Sends a signal to the process, but never to another process that has since reused its
        /// PID.
        pub(in super::super) fn signal(&self, signal: Signal) -> Result<(), Errno> {
            let handle = match pidfd_open(self.pid, PidfdFlags::empty()) {
                Ok(handle) => handle,
                // Not supported by kernels before 5.3 and by some sandboxes.
                Err(Errno::NOSYS) => return kill_process(self.pid, signal),
                Err(error) => return Err(error),
            };
            // The PID may have been reused before the handle was opened.
            match read(self.pid) {
                Some(now) if now.state == State::Ended || now.started != self.started => Err(Errno::SRCH),
                _ => pidfd_send_signal(handle, signal),
            }
        }
    }

    /// The children of a process.
    pub(in super::super) fn children(of: Pid) -> Vec<Pid> {
        let children = all().into_iter().filter(|process| process.parent == of);
        children.map(|process| process.pid).collect()
    }

    /// All descendants of a process, except the children in `without` and their descendants.
    ///
    /// Parents come before their children.
    pub(in super::super) fn descendants(of: Pid, without: &[Pid]) -> Vec<Process> {
        let mut by_parent = HashMap::<Pid, Vec<Process>>::new();
        for process in all() {
            by_parent.entry(process.parent).or_default().push(process);
        }
        let mut found = by_parent.remove(&of).unwrap_or_default();
        found.retain(|process| !without.contains(&process.pid));
        let mut next = 0;
        while let Some(process) = found.get(next) {
            let children = by_parent.remove(&process.pid).unwrap_or_default();
            found.extend(children);
            next += 1;
        }
        found
    }

    fn all() -> Vec<Process> {
        let entries = fs::read_dir("/proc").into_iter().flatten();
        let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter_map(Pid::from_raw).filter_map(read).collect()
    }

    /// Reads the state of a process. Returns `None` if there is no such process or it is not
    /// visible.
    fn read(pid: Pid) -> Option<Process> {
        let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
        parse(pid, &String::from_utf8_lossy(&text))
    }

    /// Parses `/proc/PID/stat`, such as `17 (a name) S 1 17 ...`: state, parent, process group and,
    /// further on, the start time. The name may contain any characters.
    pub(super) fn parse(pid: Pid, text: &str) -> Option<Process> {
        let (before, after) = text.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let mut fields = after.split_ascii_whitespace();
        let state = match fields.next()? {
            "Z" | "X" | "x" => State::Ended,
            "T" | "t" => State::Stopped,
            _ => State::Runs,
        };
        let mut pid_of_next = || fields.next().map(|field| field.parse().ok().and_then(Pid::from_raw));
        // A process whose parent is outside the namespace (PID 0) is not a descendant of the tool.
        let (parent, group) = (pid_of_next()??, pid_of_next()?);
        const BETWEEN: usize = 16;
        let started = fields.nth(BETWEEN)?.parse().ok();
        Some(Process {
            pid,
            parent,
            group,
            state,
            started,
            // The command chooses the name, and the name is shown on a terminal.
            name: name.escape_debug().to_string(),
        })
    }
}

#[cfg(target_os = "linux")]
pub(super) use linux::{children, descendants};

#[cfg(not(target_os = "linux"))]
mod elsewhere {
    use super::{Errno, Pid, Process, Signal};

    impl Process {
        pub(in super::super) fn signal(&self, signal: Signal) -> Result<(), Errno> {
            rustix::process::kill_process(self.pid, signal)
        }
    }

    pub(in super::super) fn children(_of: Pid) -> Vec<Pid> {
        vec![]
    }

    pub(in super::super) fn descendants(_of: Pid, _without: &[Pid]) -> Vec<Process> {
        vec![]
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) use elsewhere::{children, descendants};

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn a_process_may_have_any_name() {
        let pid = Pid::from_raw(17).unwrap();
        let rest = "5 34816 6 4194304 1 2 3 4 5 6 7 8 20 0 1 0 8877 9";
        let process = linux::parse(pid, &format!("17 (a) S (b\n\x1b) T 3 4 {rest}")).unwrap();
        assert_eq!(
            (Some(process.parent), process.group),
            (Pid::from_raw(3), Pid::from_raw(4))
        );
        assert_eq!((process.state, process.started), (State::Stopped, Some(8877)));
        assert_eq!(process.to_string(), "process 17 (a) S (b\\n\\u{1b})");
        assert!(linux::parse(pid, &format!("17 (kthreadd) S 0 0 {rest}")).is_none());
        let of_other_namespace = linux::parse(pid, &format!("17 (sh) S 1 0 {rest}")).unwrap();
        assert_eq!(of_other_namespace.group, None);
    }
}
