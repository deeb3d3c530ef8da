//! The demo's load and an agent on the test's servers, scraped by a real Prometheus.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::process::Pid;
use support::directory::directory;
use support::other_clock::OtherClock;
use support::process::Process;
use support::prometheus::{Prometheus, Sample};
use support::{PATIENCE, Quorum, RedisServer, quorum, wait_until};
use tempfile::TempDir;

use super::agent::LoadedAgent;
use super::definition::{Choice, Target, filled};
use crate::tool::bare;

/// Longer than a fault takes to show on a busy machine.
const SHOWN_WITHIN: Duration = PATIENCE;

/// Two Redis servers and a quorum, two processes that contend for locks on them, an agent with
/// clients, and a Prometheus.
pub(crate) struct Environment {
    pub(crate) prometheus: Prometheus,
    /// A server whose clock can jump.
    pub(crate) first: RedisServer,
    pub(crate) second: RedisServer,
    pub(crate) quorum: Quorum,
    pub(crate) agent: LoadedAgent,
    load: Process,
    dir: TempDir,
    _lock: MutexGuard<'static, ()>,
}

/// One environment at a time: each loads the whole machine.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

impl Environment {
    #[track_caller]
    pub(crate) fn start() -> Self {
        let lock = ONE_AT_A_TIME.lock();
        // The library is loaded at the start and not needed afterwards.
        let clock = OtherClock::build();
        let (first, second) = (RedisServer::start_in(&clock.settable(), &[]), RedisServer::start());
        let quorum = Quorum::start(3);
        let dir = directory("load");
        let targets = dir.path().join("targets.json");
        let shards = [first.url(), second.url(), quorum.url()];
        let load = start_load(dir.path(), &targets, &shards);
        let agent = LoadedAgent::start(
            with_shards(bare(&["serve"]), &shards),
            dir.path(),
            &dir.path().join("targets-agent.json"),
        );
        let prometheus = Prometheus::start(&dir.path().join("targets*.json"));
        let environment = Self {
            prometheus,
            first,
            second,
            quorum,
            agent,
            load,
            dir,
            _lock: lock,
        };
        wait_until("both processes and the agent are scraped", SHOWN_WITHIN, || {
            let up = environment.prometheus.query("up == 1");
            assert!(environment.is_alive(), "{}", environment.log());
            up.len() == 3
        });
        environment
    }

    /// The values of all variables before the user selects anything.
    pub(crate) fn everything() -> Choice {
        let names = ["job", "instance", "class", "shard"];
        let mut choice: Choice = names.into_iter().map(|name| (name, ".*".to_owned())).collect();
        // Grafana uses at least four times the interval. Use more, since scrapes are late on a busy
        // machine.
        choice.insert("__rate_interval", "5s".to_owned());
        choice.insert("__range", "5m".to_owned());
        choice
    }

    /// The current result of this query.
    #[track_caller]
    pub(crate) fn query(&self, target: &Target, choice: &Choice) -> Vec<Sample> {
        self.prometheus.query(&filled(&target.expression, choice))
    }

    /// Waits until the result of this query is as wanted.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, target: &Target, choice: &Choice, wanted: impl Fn(&[Sample]) -> bool) {
        let expression = filled(&target.expression, choice);
        let deadline = Instant::now() + SHOWN_WITHIN;
        loop {
            let samples = self.prometheus.query(&expression);
            if wanted(&samples) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{what}: {expression} was {samples:?} after {SHOWN_WITHIN:?}\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// A worker process of the load.
    #[track_caller]
    pub(crate) fn worker(&self) -> Pid {
        let workers = self.load.descendants();
        workers.first().expect("the load has workers").0
    }

    fn is_alive(&self) -> bool {
        !self.load.descendants().is_empty()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join(LOG)).unwrap_or_default()
    }
}

const LOG: &str = "load.log";

#[track_caller]
fn start_load(dir: &Path, targets: &Path, shards: &[String]) -> Process {
    let log = File::create(dir.join(LOG)).expect("make a log file");
    let mut command = bare(&["demo", "--load", "--processes", "2", "--tasks", "16", "--targets"]);
    command.arg(targets);
    let mut command = with_shards(command, shards);
    command.stdout(log.try_clone().expect("share the log file")).stderr(log);
    Process::spawn(command).expect("start the load")
}

/// The command on these shards.
fn with_shards(mut command: Command, shards: &[String]) -> Command {
    let ttl = format!("{}ms", quorum::MAX_TTL.as_millis());
    command
        .args(shards.iter().flat_map(|url| ["--shard", url]))
        .env("SHARDLOCK_TTL", &ttl)
        .env("SHARDLOCK_REDLOCK_MAX_TTL", &ttl);
    command
}
