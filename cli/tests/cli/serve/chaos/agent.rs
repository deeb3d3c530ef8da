//! The agent of a round, and the socket at which there is always one again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, wait_until};
use tempfile::TempDir;

use crate::tool::{Ended, Run, bare};

/// Longer than any hold: an agent that drains ends no lock that is held.
const DRAIN: &str = "60s";

pub(super) struct Agent {
    run: Run,
    socket: PathBuf,
    ttl: Duration,
    url: String,
    _dir: TempDir,
}

impl Agent {
    pub(super) fn start(server: &RedisServer, ttl: Duration) -> Self {
        let dir = tempfile::tempdir().expect("make a directory");
        let socket = dir.path().join("agent.sock");
        let mut agent = Self {
            run: launch(&socket, ttl, &server.url()),
            socket,
            ttl,
            url: server.url(),
            _dir: dir,
        };
        agent.wait_until_it_listens();
        agent
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    fn wait_until_it_listens(&mut self) {
        wait_until("the agent listens", PATIENCE, || {
            assert!(self.run.is_running(), "the agent has ended: {}", self.run.stderr());
            self.run.stderr().contains("listening on")
        });
    }

    /// Starts a new one, after this one has ended.
    pub(super) fn restart(&mut self) {
        self.run = launch(&self.socket, self.ttl, &self.url);
        self.wait_until_it_listens();
    }

    pub(super) fn kill(&mut self) {
        self.run.kill();
    }

    pub(super) fn stop(&self) {
        self.run.signal(Signal::STOP);
    }

    pub(super) fn cont(&self) {
        self.run.signal(Signal::CONT);
    }

    /// SIGTERM. Returns once the agent has ended.
    pub(super) fn drain(&mut self) -> Ended {
        self.run.signal(Signal::TERM);
        self.run.end_within(Duration::from_secs(60))
    }
}

fn launch(socket: &Path, ttl: Duration, url: &str) -> Run {
    let ttl = format!("ttl={}ms", ttl.as_millis());
    let mut command = bare(&["serve", "--drain", DRAIN, "--set", &ttl, "--shard", url]);
    command.arg("--socket").arg(socket);
    Run::start(command)
}
