//! Properties of the scripts that the comparison with the reference implementation
//! (`store/conformance.rs`) does not cover: claims whose counters were lost, renewal in a slot that
//! is being moved, and what expires: queues, and leases of shared holders and permits.

mod claims;
mod leases;
mod modes;

use std::cell::Cell;
use std::time::Duration;

use redis::{FromRedisValue, Value};
use support::RedisServer;

use super::super::reply::is_foreign;
use super::{COUNTER_AHEAD, LuaScript, MARKER, Scripts};
use crate::fence::FencingToken;
use crate::identity::ManagerId;
use crate::protocol::Cycle;

/// Concatenates these files: the built-in ones, or those in the directory that the environment
/// variable names.
pub(super) fn text(files: &[(&str, &'static str)]) -> &'static str {
    let directory = std::env::var_os("SHARDLOCK_TEST_SCRIPTS");
    let text = |&(name, built_in): &(&str, &'static str)| match &directory {
        None => built_in.to_owned(),
        Some(directory) => {
            let path = std::path::Path::new(directory).join(name).with_extension("lua");
            std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        }
    };
    let script: String = files.iter().map(text).collect();
    let Some(lease) = UNNOTIFIED_LEASE.get() else {
        return script.leak();
    };
    let line = "local UNNOTIFIED_LEASE = 1000\n";
    script
        .replace(line, &format!("local UNNOTIFIED_LEASE = {}\n", lease.as_millis()))
        .leak()
}

thread_local! {
    /// Replaces the constant in the scripts that this thread builds.
    static UNNOTIFIED_LEASE: Cell<Option<Duration>> = const { Cell::new(None) };
}

/// Builds scripts in which a lease whose new owner can't be notified lasts this long.
pub(crate) fn with_unnotified_lease(lease: Duration) {
    UNNOTIFIED_LEASE.set(Some(lease));
}

/// The year 2035 on the server's clock, as a token.
const FLOOR: u64 = 10 * 365 * 24 * 3600 * 8_000_000;
/// How much of a remaining time may pass before the test checks it. All times used differ by more.
const SLACK: u64 = 40_000;

/// The keys of a claim. That of an exclusive lease does without the last.
const CLAIM_KEYS: [&str; 4] = ["lease", "counter", "queue", "holders"];

/// A server, with fixed names for one lock.
struct Bench {
    server: RedisServer,
    scripts: Scripts,
}

impl Bench {
    fn new() -> Self {
        Self {
            server: RedisServer::start(),
            scripts: Scripts::for_a_primary("lock:"),
        }
    }

    fn call<T: FromRedisValue>(&self, script: &str, keys: &[&str], args: &[&str]) -> T {
        let count = keys.len().to_string();
        self.server.query(&[&["EVAL", script, &count], keys, args].concat())
    }

    fn claim(&self, owner_tag: &str, ttl: u64, least: u64, floor: u64) -> Vec<u64> {
        let (ttl, least, floor) = (ttl.to_string(), least.to_string(), floor.to_string());
        let args = [owner_tag, &ttl, &least, &floor, "take"];
        self.call(self.scripts.claim.text(), &CLAIM_KEYS[..3], &args)
    }

    fn extend_claim(&self, owner_tag: &str, ttl: u64, least: u64) -> Vec<i64> {
        let (ttl, least) = (ttl.to_string(), least.to_string());
        let args = [owner_tag, &ttl, &least, "0", "extend"];
        self.call(self.scripts.claim.text(), &CLAIM_KEYS[..3], &args)
    }

    /// A claim of a shared lease, `take` or `extend`.
    fn claim_shared(&self, owner_tag: &str, ttl: u64, least: u64, kind: &str) -> Vec<i64> {
        let (ttl, least) = (ttl.to_string(), least.to_string());
        let args = [owner_tag, &ttl, &least, "0", kind];
        let script = self.scripts.modes.claim.text();
        self.call(script, &CLAIM_KEYS, &args)
    }

    fn renew_alone(&self, owner_tag: &str, ttl: u64) -> Vec<u64> {
        self.call(
            self.scripts.renew_alone.text(),
            &["lease"],
            &[owner_tag, &ttl.to_string()],
        )
    }

    /// An acquire by the script for exclusive cycles.
    fn acquire(&self, owner_tag: &str, ttl: u64, how: &str) -> Vec<i64> {
        let args = [owner_tag, &ttl.to_string(), "1", "0", how, "inbox:", "key"];
        numbers(self.call(self.scripts.acquire.text(), &["lease", "queue", "counter"], &args))
    }

    /// An acquire that enqueues if the key is taken.
    fn join(&self, owner_tag: &str) -> Vec<u64> {
        let reply = self.acquire(owner_tag, 100_000, "join");
        reply.into_iter().map(|number| number.max(0).unsigned_abs()).collect()
    }

    /// A release by the script for exclusive cycles, which enqueues `next` unless it is empty.
    fn release(&self, owner_tag: &str, next: &str) -> Vec<i64> {
        let args = [owner_tag, "1", "0", "inbox:", "key", next];
        numbers(self.call(self.scripts.release.text(), &["lease", "queue", "counter"], &args))
    }

    /// Calls a script for all modes.
    fn call_modes(&self, script: &LuaScript, args: &[&str]) -> Vec<i64> {
        numbers(self.call(script.text(), &["lease", "queue", "counter", "holders"], args))
    }

    /// An acquire by the script for all modes.
    fn acquire_in_mode(&self, owner_tag: &str, ttl: u64, how: &str) -> Vec<i64> {
        let args = [owner_tag, &ttl.to_string(), "1", "0", how, "inbox:", "key"];
        self.call_modes(&self.scripts.modes.acquire, &args)
    }

    fn release_in_mode(&self, owner_tag: &str) -> Vec<i64> {
        let args = [owner_tag, "1", "0", "inbox:", "key", ""];
        self.call_modes(&self.scripts.modes.release, &args)
    }

    fn renew_in_mode(&self, owner_tag: &str, ttl: u64) -> Vec<u64> {
        let keys = ["lease", "queue", "holders"];
        self.call(self.scripts.modes.renew.text(), &keys, &[owner_tag, &ttl.to_string()])
    }

    fn renew_holder_alone(&self, owner_tag: &str, ttl: u64) -> Vec<u64> {
        let script = self.scripts.modes.renew_alone.text();
        self.call(script, &["holders"], &[owner_tag, &ttl.to_string()])
    }

    fn holders(&self) -> Vec<String> {
        self.server.query(&["ZRANGE", "holders", "0", "-1"])
    }

    /// The server's clock in ms.
    fn now(&self) -> u64 {
        let time: Vec<u64> = self.server.query(&["TIME"]);
        time[0] * 1_000 + time[1] / 1_000
    }

    /// Makes this owner tag a holder whose lease ends at this time.
    fn hold(&self, owner_tag: &str, ends: u64) {
        self.server.command(&["ZADD", "holders", &ends.to_string(), owner_tag]);
        self.own(MARKER, Some(300_000));
    }

    /// What is in the store: the lease, the queue with its scores, and the counter.
    fn state(&self) -> (Option<String>, Vec<String>, u64) {
        let queue = self.server.query(&["ZRANGE", "queue", "0", "-1", "WITHSCORES"]);
        (self.owner(), queue, self.counter())
    }

    /// Makes this owner tag the owner, without expiry if the TTL is `None`.
    fn own(&self, owner_tag: &str, ttl: Option<u64>) {
        self.server.command(&["SET", "lease", owner_tag]);
        if let Some(ttl) = ttl {
            self.server.command(&["PEXPIRE", "lease", &ttl.to_string()]);
        }
    }

    fn owner(&self) -> Option<String> {
        self.server.query(&["GET", "lease"])
    }

    fn counter(&self) -> u64 {
        self.server
            .query::<Option<u64>>(&["GET", "counter"])
            .unwrap_or_default()
    }

    #[track_caller]
    fn assert_left(&self, key: &str, expected: u64) {
        let left: i64 = self.server.query(&["PTTL", key]);
        let left = u64::try_from(left).unwrap_or_else(|_| panic!("{key} has no end: {left}"));
        assert!(
            left <= expected && expected - left < SLACK,
            "{key}: {left} of {expected}"
        );
    }
}

/// The numbers of a reply. The owner is 1 if it is foreign, otherwise 0.
fn numbers(reply: Vec<Value>) -> Vec<i64> {
    let number = |value| match value {
        Value::Int(number) => number,
        owner => is_foreign(&owner).unwrap().into(),
    };
    reply.into_iter().map(number).collect()
}

fn owner_tag(manager: u64, cycle: u64) -> String {
    let cycle = Cycle::with_ttl(cycle, Duration::from_secs(100));
    ManagerId::of("h", 1, manager).owner_tag(cycle).to_string()
}

/// An owner tag with a mode: `-s`, or `-p<weight>-<limit>`.
fn in_mode(manager: u64, mode: &str) -> String {
    format!("{}{mode}", owner_tag(manager, 3))
}
