//! Worker processes: the test binary started again, exchanging lines with the test.
//!
//! A test file that uses workers has one entry for all of them:
//!
//! ```ignore
//! #[test]
//! fn worker_entry() {
//!     let Some(me) = worker::current() else { return };
//!     match me.name() {
//!         "echo" => {
//!             while let Some(line) = me.recv() {
//!                 me.send(&line);
//!             }
//!         }
//!         name => panic!("no worker is called {name}"),
//!     }
//! }
//!
//! #[test]
//! fn a_worker_echoes() {
//!     let mut worker = worker::spawn("echo", &[("SHARDLOCK_TEST_GREETING", "hello")]);
//!     worker.send("one");
//!     assert_eq!(worker.line(), "one");
//!     assert!(worker.wait().success());
//! }
//! ```
//!
//! In an ordinary run the entry returns at once. [`spawn`] runs the binary again with only that
//! test and with `SHARDLOCK_TEST_WORKER` set to the worker's name. The worker's standard error is
//! inherited from the test.
//!
//! Variables for a worker are named `SHARDLOCK_TEST_...`. The tool rejects them like any unknown
//! variable named `SHARDLOCK_...`, so the tests remove them from its environment.

use std::env;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crate::process::Process;
use crate::wait::PATIENCE;

const NAME: &str = "SHARDLOCK_TEST_WORKER";

/// Distinguishes the worker's lines from those that its test harness prints.
const PREFIX: &str = "@ ";

/// Starts this test binary again as the worker `name`, with these additional environment variables.
#[track_caller]
pub fn spawn(name: &str, vars: &[(&str, &str)]) -> Worker {
    let mut command = Command::new(env::current_exe().expect("find the test binary"));
    command
        .args(["worker_entry", "--exact", "--nocapture", "--test-threads=1"])
        .envs(vars.iter().copied())
        .env(NAME, name)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut process = Process::spawn(command).expect("start a worker");
    let stdin = process.take_stdin();
    let stdout = BufReader::new(process.take_stdout().expect("the output is piped"));
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        let said = stdout.lines().map_while(Result::ok);
        for line in said.filter_map(|line| line.strip_prefix(PREFIX).map(str::to_owned)) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    Worker {
        name: name.to_owned(),
        process,
        stdin,
        lines,
    }
}

/// The test's side of a worker. Dropping it kills the worker.
#[derive(Debug)]
pub struct Worker {
    name: String,
    process: Process,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Worker {
    /// Returns the worker's next line. Panics if it prints none within [`PATIENCE`].
    #[track_caller]
    pub fn line(&self) -> String {
        let said = self.line_within(PATIENCE);
        said.unwrap_or_else(|| panic!("worker `{}` printed no line for {PATIENCE:?}", self.name))
    }

    /// Returns the next line, or `None` if the worker prints none in time. Panics if the worker has
    /// ended.
    #[track_caller]
    pub fn line_within(&self, within: Duration) -> Option<String> {
        match self.lines.recv_timeout(within) {
            Ok(line) => Some(line),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => {
                panic!("worker `{}` ended without another line", self.name)
            }
        }
    }

    /// Sends a line to the worker.
    #[track_caller]
    pub fn send(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("the worker's input is open until `wait`");
        if let Err(error) = writeln!(stdin, "{line}") {
            panic!("worker `{}` no longer reads its input: {error}", self.name);
        }
    }

    /// SIGKILL, then reaps.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGSTOP. Returns once the worker is stopped.
    #[track_caller]
    pub fn stop(&self) {
        self.process.stop();
    }

    /// SIGCONT.
    #[track_caller]
    pub fn cont(&self) {
        self.process.cont();
    }

    /// Closes the worker's input and waits up to [`PATIENCE`] for its end.
    #[track_caller]
    pub fn wait(&mut self) -> ExitStatus {
        self.stdin = None;
        self.process.wait(PATIENCE)
    }

    /// The process id.
    pub fn pid(&self) -> u32 {
        self.process.pid()
    }
}

/// The worker that this process is, or `None` in an ordinary test run.
pub fn current() -> Option<Current> {
    let name = env::var(NAME).ok()?;
    // End the line that the harness has begun: "test worker_entry ... ".
    println!();
    Some(Current { name })
}

/// The worker's own side.
#[derive(Clone, Debug)]
pub struct Current {
    name: String,
}

impl Current {
    /// The worker's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A variable set by the test.
    #[track_caller]
    pub fn var(&self, name: &str) -> String {
        env::var(name).unwrap_or_else(|_| panic!("worker `{}` needs {name}", self.name))
    }

    /// Sends a line to the test. If the test no longer reads, it has ended, and the worker exits.
    pub fn send(&self, line: impl AsRef<str>) {
        let mut out = io::stdout().lock();
        if writeln!(out, "{PREFIX}{}", line.as_ref())
            .and_then(|()| out.flush())
            .is_err()
        {
            std::process::exit(1);
        }
    }

    /// Blocks until the next line from the test. Returns `None` once the test waits for the
    /// worker's end.
    pub fn recv(&self) -> Option<String> {
        let mut line = String::new();
        let read = io::stdin().lock().read_line(&mut line).expect("read from the test");
        (read > 0).then(|| line.trim_end_matches('\n').to_owned())
    }
}
