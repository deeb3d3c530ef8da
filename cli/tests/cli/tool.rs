//! The command-line tool, run by its tests as a process against a server of their own.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use support::process::Process;
use support::{PATIENCE, RedisServer, wait_until};

/// How long the tool waits for an answer of a server, unless a test sets it. On a busy machine, the
/// default of a second may pass before a healthy server gets to run.
const STORE_TIMEOUT: &str = "4s";

/// The tool with these arguments and no `SHARDLOCK_*` variables but the one for busy machines.
pub(crate) fn bare(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shardlock"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("SHARDLOCK_") {
            command.env_remove(name);
        }
    }
    command
        .args(args)
        .env("SHARDLOCK_STORE_TIMEOUT", STORE_TIMEOUT)
        .stdin(Stdio::null());
    command
}

/// The tool with these arguments, for this server.
pub(crate) fn tool(server: &RedisServer, args: &[&str]) -> Command {
    let mut command = bare(args);
    command.env("SHARDLOCK_SHARDS", server.url());
    command
}

/// The same, with time enough for each request on a busy machine.
pub(crate) fn patient(server: &RedisServer, args: &[&str]) -> Command {
    let mut command = tool(server, args);
    command.env("SHARDLOCK_STORE_TIMEOUT", "20s");
    command
}

/// The same as options, for a [`Holder`].
pub(crate) const PATIENT: [&str; 2] = ["--set", "store_timeout=20s"];

/// A running tool. Dropping it kills it.
pub(crate) struct Run {
    process: Process,
    outputs: TempDir,
}

/// The library's warning of a stall.
const STALLED: &str = "the background thread stalled";

/// How the tool ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    #[track_caller]
    pub(crate) fn start(mut command: Command) -> Self {
        let outputs = tempfile::tempdir().expect("make a directory");
        let file = |name| File::create(outputs.path().join(name)).expect("make a file");
        command.stdout(file("stdout")).stderr(file("stderr"));
        let process = Process::spawn(command).expect("start the tool");
        Self { process, outputs }
    }

    pub(crate) fn stdout(&self) -> String {
        fs::read_to_string(self.outputs.path().join("stdout")).expect("read standard output")
    }

    /// What the tool has reported. That the machine was too busy to run it for a while is left out:
    /// it says nothing about the tool.
    pub(crate) fn stderr(&self) -> String {
        let text = fs::read_to_string(self.outputs.path().join("stderr")).expect("read standard error");
        let lines = text.split_inclusive('\n');
        lines.filter(|line| !line.contains(STALLED)).collect()
    }

    pub(crate) fn take_stdin(&mut self) -> Option<ChildStdin> {
        self.process.take_stdin()
    }

    pub(crate) fn pid(&self) -> Pid {
        Pid::from_raw(self.process.pid().cast_signed()).expect("not 0")
    }

    #[track_caller]
    pub(crate) fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }

    /// SIGKILL, then reaps.
    pub(crate) fn kill(&mut self) {
        self.process.kill();
    }

    /// Kills the process of an `exec` that has the lock. If the one in front of it is killed
    /// ([`kill`](Self::kill)), the lock is released.
    #[track_caller]
    pub(crate) fn kill_keeper(&self) {
        let keeper = self.children()[0];
        rustix::process::kill_process(keeper, Signal::KILL).expect("it runs");
    }

    /// The running child processes of the tool.
    pub(crate) fn children(&self) -> Vec<Pid> {
        let pid = self.process.pid();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).expect("read its children");
        let pids = children.split_whitespace().map(|pid| pid.parse().expect("a number"));
        pids.filter_map(Pid::from_raw).collect()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.process.ended().is_none()
    }

    #[track_caller]
    pub(crate) fn wait_until_it_prints(&mut self, text: &str) {
        wait_until(&format!("the program prints {text:?}"), PATIENCE, || {
            assert!(
                self.is_running() || self.stdout().contains(text),
                "it has ended: {}",
                self.stderr()
            );
            self.stdout().contains(text)
        });
    }

    /// Waits until the tool exits. Panics if a signal ends it.
    #[track_caller]
    pub(crate) fn end(&mut self) -> Ended {
        self.end_within(PATIENCE)
    }

    #[track_caller]
    pub(crate) fn end_within(&mut self, limit: Duration) -> Ended {
        let status = self.process.wait(limit);
        let (stdout, stderr) = (self.stdout(), self.stderr());
        let code = status.code();
        let code = code.unwrap_or_else(|| panic!("the tool did not exit by itself: {status}: {stderr}"));
        Ended { code, stdout, stderr }
    }
}

/// Runs the tool until it exits.
#[track_caller]
pub(crate) fn run(command: Command) -> Ended {
    Run::start(command).end()
}

/// Files with which a test and its commands notify each other of their progress.
pub(crate) struct Notes {
    dir: TempDir,
}

impl Notes {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().expect("make a directory");
        Self { dir }
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn leave(&self, name: &str) {
        File::create(self.path(name)).expect("leave a note");
    }

    pub(crate) fn exists(&self, name: &str) -> bool {
        self.path(name).exists()
    }

    /// Waits until the note contains a whole line, and returns it.
    #[track_caller]
    pub(crate) fn line(&self, name: &str) -> String {
        let mut text = String::new();
        wait_until(&format!("there is a note {name:?}"), PATIENCE, || {
            text = fs::read_to_string(self.path(name)).unwrap_or_default();
            text.ends_with('\n')
        });
        text.trim_end().to_owned()
    }
}

/// Whether the process with this id runs. A zombie does not count.
pub(crate) fn is_alive(pid: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
    state.is_some_and(|state| !matches!(state, 'Z' | 'X'))
}

#[track_caller]
pub(crate) fn wait_until_dead(pid: &str) {
    wait_until(&format!("process {pid} is gone"), PATIENCE, || !is_alive(pid));
}

/// Whether the key is held.
#[track_caller]
pub(crate) fn is_held(server: &RedisServer, key: &str) -> bool {
    server.query(&["EXISTS", &format!("lock:{key}")])
}

/// The number of managers that wait for the key.
#[track_caller]
pub(crate) fn waiting(server: &RedisServer, key: &str) -> u64 {
    server.query(&["ZCARD", &format!("{{lock:{key}}}:q")])
}

/// A process that holds a key until the test lets it exit.
pub(crate) struct Holder {
    run: Run,
    go: Option<ChildStdin>,
}

impl Holder {
    #[track_caller]
    pub(crate) fn of(server: &RedisServer, key: &str) -> Self {
        Self::with(server, &[], key)
    }

    /// With these options of `exec`.
    #[track_caller]
    pub(crate) fn with(server: &RedisServer, options: &[&str], key: &str) -> Self {
        let notes = Notes::new();
        let args = [&["exec"], options, &[key, "sh", "-c", "echo here > here; cat"]].concat();
        let mut command = tool(server, &args);
        command.current_dir(notes.dir()).stdin(Stdio::piped());
        let mut run = Run::start(command);
        let go = run.take_stdin();
        notes.line("here");
        Self { run, go }
    }

    #[track_caller]
    pub(crate) fn go(mut self) {
        self.go = None;
        let ended = self.run.end();
        assert_eq!(ended.code, 0, "{ended:?}");
    }
}

/// Waits until `count` managers wait for the key.
#[track_caller]
pub(crate) fn wait_until_waiting(server: &RedisServer, key: &str, count: u64) {
    wait_until(&format!("{count} managers wait for {key}"), PATIENCE, || {
        waiting(server, key) == count
    });
}

/// Shorter than any time limit here, and longer than a loaded machine takes for one step.
pub(crate) const SHORT_GRACE: Duration = Duration::from_millis(300);
