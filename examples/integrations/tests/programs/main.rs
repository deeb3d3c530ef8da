//! Runs each program, as several processes if it matters, against servers that the tests start.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod apalis_worker;
mod axum_postgres;
mod cron_scheduler;
mod guide;
mod lapin_consumer;
mod opentelemetry;
mod sqlx_tokens;

use std::env;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use support::process::Process;

/// Time limit for a line of a program, for busy machines.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running program. Killed when dropped.
struct Program {
    process: Process,
    lines: Receiver<String>,
}

impl Program {
    /// Starts a program with variables and arguments. It inherits no settings of the tests.
    #[track_caller]
    fn start(path: &str, vars: &[(&str, &str)], args: &[&str]) -> Self {
        let mut command = Command::new(path);
        for (name, _) in env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("SHARDLOCK_")) {
            command.env_remove(name);
        }
        // A server on a busy machine may take longer than the default of a second to answer.
        command.env("SHARDLOCK_STORE_TIMEOUT", "5s");
        command.envs(vars.iter().copied()).args(args).stdout(Stdio::piped());
        let mut process = Process::spawn(command).expect("start the program");
        let output = BufReader::new(process.take_stdout().expect("it is piped"));
        let (send, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    break;
                }
            }
        });
        Self { process, lines }
    }

    /// The next line that starts with this.
    #[track_caller]
    fn line(&self, start: &str) -> String {
        loop {
            let line = self.lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|error| panic!("no line starts with {start:?}: {error}"));
            if line.starts_with(start) {
                return line;
            }
        }
    }

    /// Waits until the program has ended, and returns all lines that were not read before.
    #[track_caller]
    fn finish(mut self) -> Vec<String> {
        let status = self.process.wait(PATIENCE);
        assert!(status.success(), "{status}");
        self.lines.iter().collect()
    }
}
