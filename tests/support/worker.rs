//! Workers: processes of the test's own binary, which speak with the test in lines.
//!
//! A test file that uses workers has one entry for all of them:
//!
//! ```ignore
//! #[test]
//! fn worker_entry() {
//!     let Some(me) = worker::current() else { return };
//!     match me.name() {
//!         "echo" => {
//!             while let Some(line) = me.hear() {
//!                 me.say(&line);
//!             }
//!         }
//!         name => panic!("no worker is called {name}"),
//!     }
//! }
//!
//! #[test]
//! fn a_worker_echoes() {
//!     let mut worker = worker::spawn("echo", &[("LOCKTEST_GREETING", "hello")]);
//!     worker.send("one");
//!     assert_eq!(worker.line(), "one");
//!     assert!(worker.wait().success());
//! }
//! ```
//!
//! In an ordinary run the entry returns at once. [`spawn`] runs the binary again with only that test and with
//! `LOCKTEST_WORKER` set to the worker's name. What a worker writes to standard error is seen with the test's.
//!
//! Variables for a worker are named `LOCKTEST_...`, since the product refuses unknown ones named `SHARDLOCK_...`.

use std::env;
use std::io::{self, BufRead, BufReader, Write};
use std::process::{ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use super::process::Process;
use super::wait::PATIENCE;

const NAME: &str = "LOCKTEST_WORKER";

/// Marks our lines among those that the test harness of the worker prints.
const PREFIX: &str = "@ ";

/// Starts this test binary again as the worker `name`, with these environment variables besides our own.
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
    let stdout = BufReader::new(process.take_stdout().expect("it is piped"));
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
    /// The next line that the worker says; waits for it for [`PATIENCE`].
    #[track_caller]
    pub fn line(&self) -> String {
        let said = self.line_within(PATIENCE);
        said.unwrap_or_else(|| panic!("worker `{}` said nothing for {PATIENCE:?}", self.name))
    }

    /// The next line, or nothing if the worker says none within this time. A worker that ended is a panic.
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

    /// Says a line to the worker.
    #[track_caller]
    pub fn send(&mut self, line: &str) {
        let stdin = self
            .stdin
            .as_mut()
            .expect("the worker's input is open until `wait`");
        if let Err(error) = writeln!(stdin, "{line}") {
            panic!("worker `{}` does not listen: {error}", self.name);
        }
    }

    /// SIGKILL, then reaps.
    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// SIGSTOP. Returns when the worker stands still.
    #[track_caller]
    pub fn stop(&self) {
        self.process.stop();
    }

    /// SIGCONT.
    #[track_caller]
    pub fn cont(&self) {
        self.process.cont();
    }

    /// Closes the worker's input and waits for its end, for [`PATIENCE`].
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

/// The worker that this process is, or nothing in an ordinary run of the tests.
pub fn current() -> Option<Current> {
    let name = env::var(NAME).ok()?;
    // The harness has begun a line: "test worker_entry ... ".
    println!();
    Some(Current { name })
}

/// The worker's own side.
#[derive(Clone, Debug)]
pub struct Current {
    name: String,
}

impl Current {
    /// Which worker this is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A variable that the test has set.
    #[track_caller]
    pub fn var(&self, name: &str) -> String {
        env::var(name).unwrap_or_else(|_| panic!("worker `{}` needs {name}", self.name))
    }

    /// Says a line to the test. A test that does not listen any more has ended, and so does the worker.
    pub fn say(&self, line: impl AsRef<str>) {
        let mut out = io::stdout().lock();
        if writeln!(out, "{PREFIX}{}", line.as_ref())
            .and_then(|()| out.flush())
            .is_err()
        {
            std::process::exit(1);
        }
    }

    /// Blocks for the next line from the test; nothing once the test waits for the worker's end.
    pub fn hear(&self) -> Option<String> {
        let mut line = String::new();
        let read = io::stdin()
            .lock()
            .read_line(&mut line)
            .expect("read from the test");
        (read > 0).then(|| line.trim_end_matches('\n').to_owned())
    }
}
