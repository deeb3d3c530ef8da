//! `make dashboard` without the build: everything it starts is running, and nothing is left
//! afterwards.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use rustix::process::{Signal, test_kill_process};
use tempfile::TempDir;

use support::process::Process;
use support::{PATIENCE, prometheus, repository, server, wait_until};

/// The running command. It can't clean up after SIGKILL, so even a failing test ends it with
/// SIGTERM.
struct Running {
    process: Process,
    temp: TempDir,
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.process.ended().is_none() {
            self.process.signal(Signal::TERM);
            self.process.wait(PATIENCE);
        }
    }
}

/// Starts the command, and waits until it prints the address of Prometheus. Returns the port.
#[track_caller]
fn start() -> (Running, u16) {
    let temp = tempfile::tempdir().unwrap();
    let script = repository().join("scripts/dashboard");
    let mut command = Command::new(script);
    command
        .arg(env!("CARGO_BIN_EXE_shardlock"))
        .args(["--processes", "2", "--tasks", "16"])
        .env("SHARDLOCK_REDIS_SERVER", &server::binary().path)
        .env("SHARDLOCK_PROMETHEUS", prometheus::binary())
        .env("SCRAPE_INTERVAL", prometheus::Prometheus::SCRAPE_INTERVAL)
        // On a busy machine, the default of a second may pass before a server gets to run.
        .env("SHARDLOCK_STORE_TIMEOUT", "4s")
        .env("TMPDIR", temp.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let mut process = Process::spawn(command).expect("start scripts/dashboard");
    let mut output = BufReader::new(process.take_stdout().expect("the output is piped"));
    let running = Running { process, temp };
    let port = loop {
        let mut line = String::new();
        assert_ne!(output.read_line(&mut line).unwrap(), 0, "the command has ended");
        if let Some(port) = line.trim_end().strip_prefix("Prometheus: http://127.0.0.1:") {
            break port.parse().unwrap();
        }
    };
    std::thread::spawn(move || {
        // Keep reading, so that the command never blocks on its output. The output is for people.
        drop(output.read_to_string(&mut String::new()));
    });
    (running, port)
}

#[test]
fn dashboard_command_measures_a_load_until_it_is_stopped_and_leaves_nothing() {
    let (mut running, port) = start();
    wait_until("Prometheus has scraped locks", PATIENCE, || {
        let locks = prometheus::query(port, "sum(shardlock_acquisitions_total{job=\"shardlock\"})");
        locks.iter().any(|sample| sample.value > 0.0)
    });
    let descendants = running.process.descendants();
    let count = |word: &str| descendants.iter().filter(|(_, words)| words.contains(word)).count();
    assert_eq!(
        (count("prometheus.yml"), count("demo --load")),
        (1, 1),
        "{descendants:?}"
    );
    running.process.signal(Signal::INT);
    assert_eq!(running.process.wait(PATIENCE).code(), Some(130));
    for (pid, words) in &descendants {
        assert!(test_kill_process(*pid).is_err(), "{words} still runs");
    }
    assert_eq!(std::fs::read_dir(running.temp.path()).unwrap().count(), 0);
}
