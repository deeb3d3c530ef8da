//! Child processes that never outlive the test process, however it ends.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus};
use std::sync::{OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use crate::wait::wait_until;

/// A child process. Dropping it kills it with SIGKILL and reaps it.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pid: Pid,
}

impl Process {
    /// Starts the command, tied to this process: on Linux the kernel kills the child when this
    /// process dies.
    ///
    /// # Errors
    ///
    /// See [`Command::spawn`].
    pub fn spawn(command: Command) -> io::Result<Self> {
        let child = spawn_from_lasting_thread(command)?;
        let pid = Pid::from_child(&child);
        Ok(Self { child, pid })
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The child's standard input, if it was piped and not taken before.
    pub fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.child.stdin.take()
    }

    /// The child's standard output, if it was piped and not taken before.
    pub fn take_stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Sends a signal.
    #[track_caller]
    pub fn signal(&self, signal: Signal) {
        kill_process(self.pid, signal).expect("signal a child");
    }

    /// SIGKILL, then reaps. Does nothing if the process was already reaped.
    pub fn kill(&mut self) {
        self.child.kill().expect("kill a child");
        self.child.wait().expect("reap a child");
    }

    /// SIGSTOP. Returns once the kernel reports that the whole process is stopped.
    #[track_caller]
    pub fn stop(&self) {
        self.signal(Signal::STOP);
        let what = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let status = waitid(WaitId::Pid(self.pid), what).expect("wait for a child to stop");
        assert!(
            status.is_some_and(|status| status.stopped()),
            "the process ended before it could be stopped"
        );
    }

    /// SIGCONT.
    #[track_caller]
    pub fn cont(&self) {
        self.signal(Signal::CONT);
    }

    /// The exit status, or `None` while the process runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("poll a child")
    }

    /// The process ids of all descendants, each with its command line (on Linux).
    #[track_caller]
    pub fn descendants(&self) -> Vec<(Pid, String)> {
        let mut found = vec![];
        let mut parents = vec![self.pid()];
        while let Some(parent) = parents.pop() {
            for child in children(parent) {
                let words = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
                let words = String::from_utf8_lossy(&words).replace('\0', " ");
                found.push((Pid::from_raw(child as i32).expect("not 0"), words));
                parents.push(child);
            }
        }
        found
    }

    /// Waits for the process to end. Panics if it does not end in time.
    #[track_caller]
    pub fn wait(&mut self, within: Duration) -> ExitStatus {
        let mut status = None;
        let what = format!("process {} ends", self.pid());
        wait_until(&what, within, || {
            status = self.ended();
            status.is_some()
        });
        status.expect("just seen")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // The process may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn children(of: u32) -> Vec<u32> {
    let numbers = fs::read_dir("/proc").expect("there is /proc");
    let pids = numbers.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|&pid: &u32| parent(pid) == Some(of)).collect()
}

fn parent(of: u32) -> Option<u32> {
    // The process may have ended in the meantime.
    let status = fs::read_to_string(format!("/proc/{of}/status")).ok()?;
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    parent.trim().parse().ok()
}

type Job = (Command, mpsc::Sender<io::Result<Child>>);

/// Linux sends the death signal when the *thread* that started the child ends, and a test thread
/// may end before a server that the test shares with others. One thread that lives as long as the
/// process therefore starts all children.
fn spawn_from_lasting_thread(command: Command) -> io::Result<Child> {
    static SPAWNER: OnceLock<mpsc::Sender<Job>> = OnceLock::new();
    let spawner = SPAWNER.get_or_init(|| {
        let (jobs, queue) = mpsc::channel::<Job>();
        thread::Builder::new()
            .name("spawner".into())
            .spawn(move || {
                for (mut command, reply) in queue {
                    tie_to_this_process(&mut command);
                    drop(reply.send(command.spawn()));
                }
            })
            .expect("start a thread");
        jobs
    });
    let (reply, child) = mpsc::channel();
    spawner.send((command, reply)).expect("the spawner is running");
    child.recv().expect("the spawner replies")
}

/// Makes a child independent of how the tests were started. The child leads a session, so it has no
/// terminal. No signal is ignored or blocked, as it would be under nohup(1) or in a script's
/// background job.
#[cfg(target_os = "linux")]
fn tie_to_this_process(command: &mut Command) {
    use rustix::process::{getpid, getppid, set_parent_process_death_signal, setsid};

    let parent = getpid();
    let tie = move || {
        // Fails if the child already leads a session, as one started on a terminal does.
        setsid().ok();
        for signal in 1..=31 {
            // SAFETY: the default action runs no handler. KILL and STOP can't be changed, so the
            // call fails.
            #[allow(unsafe_code)]
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
        // SAFETY: the set is written before it is read.
        #[allow(unsafe_code)]
        unsafe {
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        }
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // If the parent died just before, the signal would never arrive.
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::ErrorKind::NotFound.into())
        }
    };
    // SAFETY: between fork and exec the closure makes system calls; it neither allocates nor locks.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(tie);
    }
}

#[cfg(not(target_os = "linux"))]
fn tie_to_this_process(_command: &mut Command) {}
