//! `shardlock serve`: real agents, and raw clients on their sockets.

mod access;
pub(crate) mod chaos;
pub(crate) mod client;
mod clients;
mod commands;
pub(crate) mod compatibility;
mod deploy;
mod disconnects;
mod drain;
mod exec;
mod limits;
mod malformed;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, RespClient, wait_until};
use tempfile::TempDir;

use crate::tool::{Ended, Run, tool};

/// A running agent on a socket of its own. Dropping it kills it.
pub(crate) struct Agent {
    pub(crate) run: Run,
    pub(crate) socket: PathBuf,
    dir: TempDir,
}

impl Agent {
    #[track_caller]
    pub(crate) fn start(server: &RedisServer) -> Self {
        Self::with(server, &[])
    }

    /// With these options.
    #[track_caller]
    pub(crate) fn with(server: &RedisServer, options: &[&str]) -> Self {
        Self::started_in(tempfile::tempdir().expect("make a directory"), server, options)
    }

    #[track_caller]
    fn started_in(dir: TempDir, server: &RedisServer, options: &[&str]) -> Self {
        let socket = dir.path().join("agent.sock");
        let mut command = tool(server, &[&["serve"], options].concat());
        command.arg("--socket").arg(&socket);
        let run = Run::start(command);
        let mut agent = Self { run, socket, dir };
        agent.wait_until_it_prints("listening on");
        agent
    }

    #[track_caller]
    fn wait_until_it_prints(&mut self, text: &str) {
        wait_until(&format!("the agent prints {text:?}"), PATIENCE, || {
            assert!(self.run.is_running(), "the agent has ended: {}", self.run.stderr());
            self.run.stderr().contains(text)
        });
    }

    /// The TCP address, for an agent with `--listen 127.0.0.1:0`.
    #[track_caller]
    fn address(&self) -> String {
        let printed = self.run.stderr();
        let line = printed.lines().find(|line| line.contains("listening on"));
        let address = line.and_then(|line| line.rsplit_once(" and "));
        address.expect("an agent with --listen").1.to_owned()
    }

    #[track_caller]
    pub(crate) fn connect(&self) -> RespClient {
        RespClient::unix(&self.socket).expect("connect to the agent")
    }

    /// A connection that speaks RESP3.
    #[track_caller]
    fn connect_resp3(&self) -> RespClient {
        let mut client = self.connect();
        client.call(&["HELLO", "3"]);
        client
    }

    /// A line of INFO.
    #[track_caller]
    pub(crate) fn info(&self, name: &str) -> String {
        let info = self.connect().text(&["INFO"]);
        let prefix = format!("{name}:");
        let line = info.lines().find_map(|line| line.strip_prefix(&prefix));
        line.unwrap_or_else(|| panic!("no {name} in {info}")).to_owned()
    }

    #[track_caller]
    fn wait_until_info(&self, name: &str, value: &str) {
        wait_until(&format!("INFO has {name}:{value}"), PATIENCE, || {
            self.info(name) == value
        });
    }

    /// Waits until this number of clients wait for locks.
    #[track_caller]
    pub(crate) fn wait_until_waiting(&self, count: usize) {
        self.wait_until_info("blocked_clients", &count.to_string());
    }

    /// Waits until no lock is held.
    #[track_caller]
    pub(crate) fn wait_until_free(&self) {
        self.wait_until_info("held", "0");
    }

    #[track_caller]
    fn signal(&self, signal: Signal) {
        self.run.signal(signal);
    }

    #[track_caller]
    fn end(&mut self) -> Ended {
        self.run.end()
    }

    fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// The TTL of locks unless a test states another one. Anything faster than half of it did not wait
/// for a lease to expire.
const TTL: Duration = Duration::from_secs(10);
