//! The processes of a round: an agent, its clients, and workers with a manager of their own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, Worker, wait_until, worker};
use tempfile::TempDir;

use super::{CLIENT, WORKER};
use crate::tool::{Ended, Run, bare};

/// The number of workers with a manager of their own, and of the places of their keys.
pub const PLACES: usize = 3;
const WORKERS: usize = 2;
const CLIENTS: usize = 3;

/// Longer than any hold: an agent that drains ends no lock that is held.
const DRAIN: &str = "60s";

pub struct Crew {
    history: PathBuf,
    seed: u64,
    ttl: Duration,
    url: String,
    pub agent: Agent,
    clients: Vec<Member>,
    workers: Vec<Member>,
    /// Number of processes started so far.
    count: usize,
}

pub struct Member {
    pub name: String,
    pub worker: Worker,
}

/// The agent, and the socket at which there is always one again.
pub struct Agent {
    run: Run,
    socket: PathBuf,
    ttl: Duration,
    url: String,
    _dir: TempDir,
}

impl Agent {
    fn start(server: &RedisServer, ttl: Duration) -> Self {
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

    fn wait_until_it_listens(&mut self) {
        wait_until("the agent listens", PATIENCE, || {
            assert!(self.run.is_running(), "the agent has ended: {}", self.run.stderr());
            self.run.stderr().contains("listening on")
        });
    }

    /// Starts a new one, after this one has ended.
    pub fn restart(&mut self) {
        self.run = launch(&self.socket, self.ttl, &self.url);
        self.wait_until_it_listens();
    }

    pub fn kill(&mut self) {
        self.run.kill();
    }

    pub fn stop(&self) {
        self.run.signal(Signal::STOP);
    }

    pub fn cont(&self) {
        self.run.signal(Signal::CONT);
    }

    /// SIGTERM. Returns once the agent has ended.
    pub fn drain(&mut self) -> Ended {
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

impl Crew {
    pub fn start(history: PathBuf, seed: u64, server: &RedisServer, ttl: Duration) -> Self {
        let mut crew = Self {
            history,
            seed,
            ttl,
            url: server.url(),
            agent: Agent::start(server, ttl),
            clients: Vec::new(),
            workers: Vec::new(),
            count: 0,
        };
        crew.clients = (0..CLIENTS).map(|_| crew.spawn_client()).collect();
        crew.workers = (0..WORKERS).map(|place| crew.spawn_worker(place)).collect();
        for member in crew.clients.iter().chain(&crew.workers) {
            assert_eq!(member.worker.line(), "ready");
        }
        crew
    }

    fn next_seed(&mut self) -> String {
        self.count += 1;
        let seed = self.seed.wrapping_mul(100).wrapping_add(self.count as u64);
        seed.to_string()
    }

    fn spawn(&self, entry: &str, name: String, more: &[(&str, String)]) -> Member {
        let ttl = self.ttl.as_millis().to_string();
        let common = [
            ("SHARDLOCK_TEST_WHO", name.clone()),
            ("SHARDLOCK_TEST_TTL", ttl),
            ("SHARDLOCK_TEST_HISTORY", self.history.display().to_string()),
        ];
        let vars: Vec<_> = common
            .iter()
            .chain(more)
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let worker = worker::spawn(entry, &vars);
        Member { name, worker }
    }

    fn spawn_client(&mut self) -> Member {
        let seed = self.next_seed();
        let name = format!("agent-c{}", self.count);
        let socket = self.agent.socket.display().to_string();
        let more = [("SHARDLOCK_TEST_SEED", seed), ("SHARDLOCK_TEST_SOCKET", socket)];
        self.spawn(CLIENT, name, &more)
    }

    fn spawn_worker(&mut self, place: usize) -> Member {
        let seed = self.next_seed();
        let name = format!("w{}", self.count);
        let renew = if self.seed.is_multiple_of(4) { "0.1" } else { "0.4" };
        let more = [
            ("SHARDLOCK_TEST_SEED", seed),
            ("SHARDLOCK_TEST_PLACE", place.to_string()),
            ("SHARDLOCK_TEST_RENEW", renew.to_owned()),
            ("SHARDLOCK_TEST_URL", self.url.clone()),
            ("SHARDLOCK_TEST_LONGEST_TTL", self.ttl.as_millis().to_string()),
            ("SHARDLOCK_TEST_REPLICAS", "0".to_owned()),
        ];
        self.spawn(WORKER, name, &more)
    }

    pub fn client(&mut self, number: usize) -> &mut Member {
        let index = number % self.clients.len();
        &mut self.clients[index]
    }

    pub fn worker(&mut self, number: usize) -> &mut Member {
        let index = number % self.workers.len();
        &mut self.workers[index]
    }

    /// Kills a client with SIGKILL and starts a new one.
    pub fn replace_client(&mut self, number: usize) {
        self.client(number).worker.kill();
        let member = self.spawn_client();
        assert_eq!(member.worker.line(), "ready");
        *self.client(number) = member;
    }

    pub fn replace_worker(&mut self, number: usize) {
        let place = number % self.workers.len();
        self.worker(number).worker.kill();
        let member = self.spawn_worker(place);
        assert_eq!(member.worker.line(), "ready");
        *self.worker(number) = member;
    }

    /// Asks all to finish, and returns the names of those that do not finish in time.
    pub fn end(mut self, within: Duration) -> Vec<String> {
        let mut members: Vec<Member> = self.clients.drain(..).chain(self.workers.drain(..)).collect();
        for member in &mut members {
            member.worker.send("end");
        }
        let look = Duration::from_millis(50);
        // Count polls instead of measuring time, because time during which the machine is stalled
        // must not count.
        let looks = within.as_millis() / look.as_millis();
        let ended = |member: &Member| {
            let mut said = (0..looks).map(|_| member.worker.line_within(look));
            said.find_map(|line| line).as_deref() == Some("ended")
        };
        let late = members.iter().filter(|member| !ended(member));
        let mut late: Vec<String> = late.map(|member| member.name.clone()).collect();
        let ended = self.agent.drain();
        if ended.code != 0 {
            late.push(format!("the agent ended with {}: {}", ended.code, ended.stderr));
        }
        late
    }
}
