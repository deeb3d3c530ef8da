//! Snapshots of the processes on this machine, from `/proc`. On systems other than Linux, none are
//! listed.

use std::fmt;

use rustix::io::Errno;
use rustix::process::{Pid, Signal};

/// A snapshot of a process.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) pid: Pid,
    pub(super) parent: Pid,
    /// `None` if the group is from outside the PID namespace of this process.
    pub(super) group: Option<Pid>,
    pub(super) state: State,
    /// Start time in clock ticks since boot. Together with the PID it identifies a process
    /// uniquely.
    pub(super) started: Option<u64>,
    pub(super) name: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    Running,
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
                // Not supported by kernels before 5.3, and refused by some sandboxes. A process of
                // another user can't be signalled in either way.
                Err(Errno::NOSYS | Errno::PERM) => return kill_process(self.pid, signal),
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
    /// further on, the number of threads and the start time. The name may contain any characters.
    ///
    /// The state is that of the main thread. A process whose main thread has ended is shown as a
    /// zombie while its other threads run on.
    pub(super) fn parse(pid: Pid, text: &str) -> Option<Process> {
        let (before, after) = text.rsplit_once(')')?;
        let (_, name) = before.split_once('(')?;
        let mut fields = after.split_ascii_whitespace();
        let state_of_main_thread = fields.next()?;
        let mut pid_of_next = || fields.next().map(|field| field.parse().ok().and_then(Pid::from_raw));
        // A process whose parent is outside the namespace (PID 0) is not a descendant of the tool.
        let (parent, group) = (pid_of_next()??, pid_of_next()?);
        const BEFORE_THREADS: usize = 14;
        let threads: u64 = fields.nth(BEFORE_THREADS)?.parse().ok()?;
        let started = fields.nth(1)?.parse().ok();
        let state = match state_of_main_thread {
            "Z" | "X" | "x" if threads > 1 => State::Running,
            "Z" | "X" | "x" => State::Ended,
            "T" | "t" => State::Stopped,
            _ => State::Running,
        };
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
mod other_systems {
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
pub(super) use other_systems::{children, descendants};

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

    #[test]
    fn a_process_runs_as_long_as_any_of_its_threads() {
        let pid = Pid::from_raw(17).unwrap();
        let state = |threads: u8| {
            let rest = format!("5 34816 6 4194304 1 2 3 4 5 6 7 8 20 0 {threads} 0 8877 9");
            linux::parse(pid, &format!("17 (sh) Z 3 4 {rest}")).unwrap().state
        };
        assert_eq!(state(2), State::Running);
        assert_eq!(state(1), State::Ended);
        assert_eq!(state(0), State::Ended);
    }
}
