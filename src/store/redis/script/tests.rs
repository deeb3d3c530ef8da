//! Properties of the scripts that the comparison with the reference implementation
//! (`store/conformance.rs`) does not cover: claims whose counters were lost, renewal in a slot that
//! is being moved, and what expires: queues, and leases of shared holders and permits.

use std::cell::Cell;
use std::time::Duration;

use redis::{FromRedisValue, Value};
use support::RedisServer;

use super::{LuaScript, MARKER, Scripts};
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
        self.call(self.scripts.claim.text(), &["lease", "counter"], &args)
    }

    fn extend_claim(&self, owner_tag: &str, ttl: u64, least: u64) -> Vec<i64> {
        let (ttl, least) = (ttl.to_string(), least.to_string());
        let args = [owner_tag, &ttl, &least, "0", "extend"];
        self.call(self.scripts.claim.text(), &["lease", "counter"], &args)
    }

    /// A claim of a shared lease, `take` or `extend`.
    fn claim_shared(&self, owner_tag: &str, ttl: u64, least: u64, kind: &str) -> Vec<i64> {
        let (ttl, least) = (ttl.to_string(), least.to_string());
        let args = [owner_tag, &ttl, &least, "0", kind];
        let script = self.scripts.modes.claim.text();
        self.call(script, &["lease", "counter", "holders"], &args)
    }

    fn renew_alone(&self, owner_tag: &str, ttl: u64) -> Vec<u64> {
        self.call(
            self.scripts.renew_alone.text(),
            &["lease"],
            &[owner_tag, &ttl.to_string()],
        )
    }

    /// An acquire that enqueues if the key is taken.
    fn join(&self, owner_tag: &str) -> Vec<u64> {
        let args = [owner_tag, "100000", "1", "0", "join", "inbox:", "key"];
        let reply: Vec<i64> = self.call(self.scripts.acquire.text(), &["lease", "queue", "counter"], &args);
        reply.into_iter().map(|number| number.max(0).unsigned_abs()).collect()
    }

    /// Calls a script for all modes, which replies with numbers.
    fn call_modes(&self, script: &LuaScript, args: &[&str]) -> Vec<i64> {
        self.call(script.text(), &["lease", "queue", "counter", "holders"], args)
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

fn owner_tag(manager: u64, cycle: u64) -> String {
    let cycle = Cycle::with_ttl(cycle, Duration::from_secs(100));
    ManagerId::of("h", 1, manager).owner_tag(cycle).to_string()
}

/// Each node of a quorum votes for one owner and rejects all others. A node that voted for two
/// would let two managers reach a majority.
#[test]
fn claim_takes_a_free_lease_and_no_other_owners() {
    let bench = Bench::new();
    let (one, other) = (owner_tag(1, 2), owner_tag(2, 2));
    assert_eq!(bench.claim(&one, 300_000, 7, 0), [1, 0]);
    assert_eq!(bench.owner().as_ref(), Some(&one));
    bench.assert_left("lease", 300_000);
    assert_eq!(bench.counter(), 7);

    // Another cycle of the same manager is a different owner.
    for other in [other, owner_tag(1, 4)] {
        let reply = bench.claim(&other, 600_000, 9, FLOOR);
        let [0, left] = reply[..] else { panic!("{reply:?}") };
        assert!(left <= 300_000 && left > 300_000 - SLACK, "{left}");
        assert_eq!(bench.owner().as_ref(), Some(&one));
        bench.assert_left("lease", 300_000);
        assert_eq!(bench.counter(), 7, "a refusal raises nothing");
    }
    // A lease of another library may never expire.
    bench.own("another-library", None);
    let reply: Vec<i64> = bench.call(
        bench.scripts.claim.text(),
        &["lease", "counter"],
        &[&one, "1000", "9", "0", "take"],
    );
    assert_eq!(reply, [0, -1]);
    assert_eq!(bench.owner().as_deref(), Some("another-library"));
}

/// The owner relies on the expiry it was last granted, whatever TTL that request had. A claim that
/// shortened the lease would let the next manager in while the owner still considers its lock
/// valid.
#[test]
fn claim_of_the_owner_moves_the_end_of_its_lease_on_and_never_back() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    for (left, ttl, expected) in [
        (Some(100_000), 300_000, 300_000),
        (Some(300_000), 100_000, 300_000),
        (None, 100_000, 100_000),
    ] {
        bench.own(&me, left);
        let reply = bench.claim(&me, ttl, 0, 0);
        assert_eq!(reply[0], 1, "{reply:?}");
        assert_eq!(bench.owner().as_ref(), Some(&me));
        bench.assert_left("lease", expected);
    }
}

/// A node that lost a lease and took it again as an extension would count as one that held it
/// throughout.
#[test]
fn claim_that_extends_takes_no_lease_that_it_has_not() {
    let bench = Bench::new();
    let (me, other) = (owner_tag(1, 2), owner_tag(2, 2));
    assert_eq!(bench.extend_claim(&me, 300_000, 7), [0, -2]);
    assert_eq!((bench.owner(), bench.counter()), (None, 0));
    bench.own(&me, Some(100_000));
    assert_eq!(bench.extend_claim(&me, 300_000, 7), [1, 0]);
    bench.assert_left("lease", 300_000);
    assert_eq!(bench.counter(), 7);
    assert_eq!(bench.extend_claim(&other, 600_000, 9)[0], 0);
    assert_eq!(bench.owner().as_ref(), Some(&me));
}

/// The sequencer issues tokens above all counters of a majority. A node whose counter was lost
/// reports the larger of the floor that managers have seen and its own time, so no later token is
/// below an earlier one.
#[test]
fn claim_reports_a_counter_that_is_never_below_the_floor() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    let claim = |least, floor| {
        let reply = bench.claim(&me, 100_000, least, floor);
        (reply[1], bench.counter())
    };
    // Without a floor the counter is reported unchanged, and raised to the sequencer's token.
    assert_eq!(claim(500, 0), (0, 500));
    assert_eq!(claim(400, 500), (500, 500), "the counter never decreases");
    assert_eq!(claim(600, 500), (500, 600));
    // A counter below the floor was lost: the server's time is above every issued token.
    let time: Vec<u64> = bench.server.query(&["TIME"]);
    let before = FencingToken::from_server_time(time[0], time[1]);
    let (counter, stored) = claim(700, 601);
    let time: Vec<u64> = bench.server.query(&["TIME"]);
    let after = FencingToken::from_server_time(time[0], time[1]);
    assert!((before..=after).contains(&counter), "{before} {counter} {after}");
    assert_eq!(stored, counter);
    // If the server's clock is behind, the floor is above its time.
    assert_eq!(claim(0, FLOOR), (FLOOR, FLOOR));
    assert_eq!(claim(FLOOR + 64, FLOOR), (FLOOR, FLOOR + 64));
}

/// A node admits every reader, and no writer beside them: one majority of each has a node in
/// common.
#[test]
fn shared_claims_exclude_an_exclusive_one_and_the_other_way_round() {
    let bench = Bench::new();
    let (writer, one, other) = (owner_tag(1, 2), in_mode(2, "-s"), in_mode(3, "-s"));
    assert_eq!(bench.claim_shared(&one, 100_000, 7, "take"), [1, 0]);
    assert_eq!(bench.claim_shared(&other, 200_000, 5, "take"), [1, 7]);
    assert_eq!((bench.owner().as_deref(), bench.counter()), (Some(MARKER), 7));
    assert_eq!(bench.holders(), [one.as_str(), &other]);
    let reply = bench.claim(&writer, 300_000, 9, 0);
    assert!(reply[0] == 0 && reply[1] <= 200_000, "{reply:?}");
    assert_eq!(bench.counter(), 7, "a refusal raises nothing");
    // The last one that leaves takes the marker along.
    assert_eq!(bench.release_in_mode(&one), [1]);
    assert_eq!(bench.claim(&writer, 300_000, 9, 0)[0], 0);
    assert_eq!(bench.release_in_mode(&other), [1]);
    assert_eq!(bench.claim(&writer, 300_000, 9, 0), [1, 7]);
    assert_eq!((bench.owner().as_ref(), bench.holders()), (Some(&writer), vec![]));
    for kind in ["take", "extend"] {
        assert_eq!(bench.claim_shared(&one, 600_000, 11, kind), [0]);
    }
    assert_eq!((bench.owner(), bench.counter()), (Some(writer), 9));
    assert_eq!(bench.holders(), [""; 0]);
}

/// The marker lasts as long as the last holder, and no claim moves an end back: see the same tests
/// of other requests below.
#[test]
fn shared_claim_moves_ends_on_and_never_back() {
    let bench = Bench::new();
    let (one, other) = (in_mode(2, "-s"), in_mode(3, "-s"));
    let ends = |holder: &str| bench.server.query::<u64>(&["ZSCORE", "holders", holder]) - bench.now();
    let assert_ends = |holder: &str, expected: u64| {
        assert!(ends(holder) <= expected && expected - ends(holder) < SLACK, "{holder}");
    };
    for (holder, ttl, own, all) in [
        (&one, 300_000, 300_000, 300_000),
        (&other, 100_000, 100_000, 300_000),
        (&other, 200_000, 200_000, 300_000),
        (&one, 100_000, 300_000, 300_000),
        (&other, 500_000, 500_000, 500_000),
    ] {
        for kind in ["take", "extend"] {
            assert_eq!(bench.claim_shared(holder, ttl, 0, kind)[0], 1);
            assert_ends(holder, own);
            bench.assert_left("lease", all);
            bench.assert_left("holders", all);
        }
    }
    assert_eq!(bench.claim_shared(&one, 700_000, 0, "extend")[0], 1);
    assert_ends(&one, 700_000);
    assert_ends(&other, 500_000);
    bench.assert_left("lease", 700_000);
    bench.assert_left("holders", 700_000);
}

/// As for an exclusive lease: only a node that has had the lease the whole time may count. Its
/// members are no holders any more if an administrator has deleted the marker, or once they have
/// ended.
#[test]
fn shared_claim_that_extends_takes_no_lease_that_it_has_not() {
    let bench = Bench::new();
    let (me, other) = (in_mode(2, "-s"), in_mode(3, "-s"));
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "extend"), [0]);
    assert_eq!((bench.owner(), bench.counter()), (None, 0));
    bench.hold(&me, bench.now() + 300_000);
    bench.server.command(&["DEL", "lease"]);
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "extend")[0], 0);
    assert_eq!(bench.holders(), [""; 0]);
    // The members of the set must not become holders again with the next marker.
    bench.hold(&other, bench.now() + 300_000);
    bench.server.command(&["DEL", "lease"]);
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "take")[0], 1);
    assert_eq!(bench.holders(), [me.as_str()]);
    // Its lease has ended, while the marker is still there for another holder.
    bench.hold(&in_mode(4, "-s"), bench.now());
    bench.hold(&me, bench.now());
    bench.hold(&other, bench.now() + 300_000);
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "extend")[0], 0);
    assert_eq!(bench.holders(), [other.as_str()], "none that died is left");
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "take")[0], 1);
    // The lease of another library.
    bench.own("another-library", None);
    assert_eq!(bench.claim_shared(&me, 300_000, 9, "take"), [0]);
    assert_eq!(bench.owner().as_deref(), Some("another-library"));
}

/// While a cluster slot is being moved, a lease is renewed by a script with only its own key, under
/// the same rules.
#[test]
fn renewal_of_one_key_extends_the_owners_lease_alone_and_never_shortens_it() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    for (left, ttl, expected) in [
        (Some(100_000), 300_000, 300_000),
        (Some(300_000), 100_000, 300_000),
        (None, 100_000, 100_000),
    ] {
        bench.own(&me, left);
        assert_eq!(bench.renew_alone(&me, ttl), [1]);
        assert_eq!(bench.owner().as_ref(), Some(&me));
        bench.assert_left("lease", expected);
    }
    // Another cycle of the same manager is a different owner.
    for other in [owner_tag(1, 4), owner_tag(2, 2)] {
        bench.own(&other, Some(100_000));
        assert_eq!(bench.renew_alone(&me, 300_000), [0]);
        assert_eq!(bench.owner().as_ref(), Some(&other));
        bench.assert_left("lease", 100_000);
    }
    bench.server.command(&["DEL", "lease"]);
    assert_eq!(bench.renew_alone(&me, 300_000), [0]);
    assert_eq!(bench.owner(), None, "a renewal takes nothing");
    // A key of a wrong type is not ours.
    bench.server.command(&["LPUSH", "lease", "value"]);
    assert_eq!(bench.renew_alone(&me, 300_000), [0]);
}

/// If an operator removes a permission, held locks must not be reported as lost at once; they are
/// lost when they expire.
#[test]
fn renewal_that_may_not_see_the_owner_is_an_error_and_no_loss() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    bench.own(&me, Some(100_000));
    bench.server.command(&[
        "ACL", "SETUSER", "default", "-get", "+eval", "+pttl", "+pexpire", "+exists",
    ]);
    let renew = |script: &str, keys: &[&str]| {
        let count = keys.len().to_string();
        let words = [&["EVAL", script, &count], keys, &[&me, "300000"]].concat();
        bench.server.try_query::<Value>(&words)
    };
    assert!(renew(bench.scripts.renew_alone.text(), &["lease"]).is_err());
    assert!(renew(bench.scripts.renew.text(), &["lease", "queue"]).is_err());
}

/// If all waiters die, no client ever removes their queue entries. The server does, a minute after
/// the owner's lease has expired. While a cycle waits, each of its requests postpones that.
#[test]
fn queue_of_waiters_ends_a_minute_after_the_lease() {
    let bench = Bench::new();
    for ttl in [Some(100_000), Some(300_000), None] {
        bench.server.command(&["DEL", "queue"]);
        bench.own(&owner_tag(1, 2), ttl);
        assert_eq!(bench.join(&owner_tag(2, 2))[0], 2);
        bench.assert_left("queue", ttl.unwrap_or_default() + 60_000);
        // The next request renews a queue that is about to expire.
        bench.server.command(&["PEXPIRE", "queue", "1000"]);
        assert_eq!(bench.join(&owner_tag(2, 2))[0], 2);
        bench.assert_left("queue", ttl.unwrap_or_default() + 60_000);
    }
}

/// The lease is passed on to the head, and the previous owner waits behind: the queue is kept for
/// the new lease.
#[test]
fn queue_that_an_owner_joins_again_ends_a_minute_after_the_next_lease() {
    let bench = Bench::new();
    bench.own(&owner_tag(1, 2), Some(300_000));
    bench.join(&owner_tag(2, 3));
    bench.join(&owner_tag(3, 3));
    let args = [&owner_tag(1, 2), "1", "0", "inbox:", "key", &owner_tag(1, 5)];
    let reply: Vec<u64> = bench.call(bench.scripts.release.text(), &["lease", "queue", "counter"], &args);
    assert_eq!(reply[..2], [1, 2], "the previous owner waits");
    assert_eq!(bench.owner(), Some(owner_tag(2, 3)));
    // The next owner's inbox has no subscriber, so its lease stays short until it asks.
    bench.assert_left("lease", 1_000);
    bench.assert_left("queue", 61_000);
}

/// An owner tag with a mode: `-s`, or `-p<weight>-<limit>`.
fn in_mode(manager: u64, mode: &str) -> String {
    format!("{}{mode}", owner_tag(manager, 3))
}

/// If it ended before, an exclusive request could take the lease beside a holder. If it ended
/// later, nobody could take a key that nobody holds.
#[test]
fn marker_ends_with_the_lease_of_the_last_holder() {
    let bench = Bench::new();
    let all = [(1, 100_000), (2, 500_000), (3, 300_000)].map(|(manager, ttl)| (in_mode(manager, "-s"), ttl));
    let assert_ends = |expected| {
        assert_eq!(bench.owner().as_deref(), Some(MARKER));
        bench.assert_left("lease", expected);
        bench.assert_left("holders", expected);
    };
    for ((holder, ttl), ends) in all.iter().zip([100_000, 500_000, 500_000]) {
        assert_eq!(bench.acquire_in_mode(holder, *ttl, "try")[0], 1);
        assert_ends(ends);
    }
    // A renewal moves it on, if that is needed, and never back.
    for (ttl, ends) in [(200_000, 500_000), (600_000, 600_000), (100_000, 600_000)] {
        assert_eq!(bench.renew_in_mode(&all[0].0, ttl), [1]);
        assert_ends(ends);
    }
    // So does an extension.
    for (ttl, ends) in [(100_000, 600_000), (700_000, 700_000)] {
        assert_eq!(bench.acquire_in_mode(&all[0].0, ttl, "extend")[3], 1);
        assert_ends(ends);
    }
    assert_eq!(bench.release_in_mode(&all[0].0), [1]);
    assert_ends(500_000);
    assert_eq!(bench.release_in_mode(&all[2].0), [1]);
    assert_ends(500_000);
    assert_eq!(bench.release_in_mode(&all[1].0), [1]);
    assert_eq!((bench.owner(), bench.holders()), (None, vec![]));
}

/// A holder that died leaves its member. By the server's clock it ends, and nobody has to wait for
/// it any longer, while the marker lasts for another holder.
#[test]
fn holder_whose_lease_has_ended_counts_no_more() {
    let bench = Bench::new();
    let (dead, other, me) = (in_mode(1, "-p2-2"), in_mode(2, "-s"), in_mode(3, "-p1-2"));
    bench.hold(&dead, bench.now() + 100_000);
    bench.hold(&other, bench.now() + 200_000);
    assert_eq!(bench.acquire_in_mode(&me, 100_000, "try"), [0]);
    bench.hold(&dead, bench.now());
    assert_eq!(bench.renew_in_mode(&dead, 100_000), [0]);
    assert_eq!(bench.renew_holder_alone(&dead, 100_000), [0]);
    assert_eq!(bench.acquire_in_mode(&dead, 100_000, "extend"), [0]);
    assert_eq!(bench.holders(), [other.as_str()]);
    assert_eq!(bench.acquire_in_mode(&me, 100_000, "try")[0], 1);
    assert_eq!(bench.holders(), [me.as_str(), other.as_str()]);
    // The lease of the last one ends while the marker is still there.
    for holder in [&me, &other] {
        bench.hold(holder, bench.now());
    }
    let exclusive = owner_tag(4, 2);
    assert_eq!(bench.acquire_in_mode(&exclusive, 100_000, "try")[0], 1);
    assert_eq!((bench.owner(), bench.holders()), (Some(exclusive), vec![]));
}

/// An administrator deletes the lease, or another library overwrites it. The members of the set
/// must not become holders again with the next marker.
#[test]
fn holders_whose_marker_is_gone_have_lost_the_key() {
    let bench = Bench::new();
    let (before, next) = (in_mode(1, "-s"), in_mode(2, "-s"));
    for overwritten in [false, true] {
        bench.hold(&before, bench.now() + 300_000);
        bench.server.command(&["DEL", "lease"]);
        if overwritten {
            bench.own("another-library", Some(100_000));
        }
        assert_eq!(bench.renew_in_mode(&before, 100_000), [0]);
        assert_eq!(bench.acquire_in_mode(&before, 100_000, "extend"), [0]);
        assert_eq!(bench.holders(), [""; 0]);
        let reply = bench.acquire_in_mode(&next, 100_000, "try");
        let expected: &[&str] = if overwritten { &[] } else { &[&next] };
        assert_eq!(reply[0], i64::from(!overwritten));
        assert_eq!(bench.holders(), expected);
    }
}

/// Renewal while a slot is being moved, by two scripts with one key each.
#[test]
fn renewal_of_a_holder_alone_extends_it_and_never_shortens_it() {
    let bench = Bench::new();
    let (me, other) = (in_mode(1, "-p1-3"), in_mode(2, "-p1-3"));
    let ends = |holder: &str| bench.server.query::<u64>(&["ZSCORE", "holders", holder]) - bench.now();
    bench.hold(&me, bench.now() + 100_000);
    for (ttl, expected) in [(300_000, 300_000), (100_000, 300_000), (400_000, 400_000)] {
        assert_eq!(bench.renew_alone(MARKER, ttl), [1]);
        assert_eq!(bench.renew_holder_alone(&me, ttl), [1]);
        assert!(ends(&me) <= expected && expected - ends(&me) < SLACK);
        bench.assert_left("lease", expected);
        bench.assert_left("holders", expected);
    }
    assert_eq!(bench.renew_holder_alone(&other, 300_000), [0]);
    assert_eq!(bench.holders(), [me.as_str()]);
    bench.server.command(&["DEL", "holders"]);
    assert_eq!(bench.renew_holder_alone(&me, 300_000), [0]);
    assert_eq!(bench.holders(), [""; 0], "a renewal takes nothing");
    bench.server.command(&["LPUSH", "holders", "value"]);
    assert_eq!(bench.renew_holder_alone(&me, 300_000), [0]);
}

/// The scripts of exclusive cycles leave what they can't do to the others. A token or a place in
/// the queue that they left behind would be one too many.
#[test]
fn scripts_of_exclusive_cycles_leave_other_modes_as_they_were() {
    let bench = Bench::new();
    let (me, next, reader) = (owner_tag(1, 2), owner_tag(1, 4), in_mode(2, "-s"));
    let keys = ["lease", "queue", "counter"];
    let acquire = |how: &str| -> Vec<i64> {
        let args = [&next, "100000", "1", "0", how, "inbox:", "key"];
        bench.call(bench.scripts.acquire.text(), &keys, &args)
    };
    let release = |next: &str| -> Vec<i64> {
        let args = [&me, "1", "0", "inbox:", "key", next];
        bench.call(bench.scripts.release.text(), &keys, &args)
    };
    // A reader is next.
    bench.own(&me, Some(100_000));
    assert_eq!(bench.acquire_in_mode(&reader, 100_000, "join")[0], 2);
    let before = bench.state();
    for requeued in ["", &next] {
        assert_eq!(release(requeued), [3]);
        assert_eq!(bench.state(), before);
    }
    // The same after the owner has died.
    bench.server.command(&["DEL", "lease"]);
    let before = bench.state();
    for how in ["join", "try"] {
        assert_eq!(acquire(how), [3]);
        assert_eq!(bench.state(), before);
    }
    assert_eq!(release(""), [3]);
    assert_eq!(release(&next), [3]);
    assert_eq!(bench.state(), before);
    // A reader holds the key.
    assert_eq!(bench.acquire_in_mode(&reader, 100_000, "join")[0], 1);
    let before = bench.state();
    assert_eq!(before.0.as_deref(), Some(MARKER));
    for how in ["join", "try"] {
        assert_eq!(acquire(how), [3]);
    }
    assert_eq!(acquire("extend"), [0]);
    for requeued in ["", &next] {
        assert_eq!(release(requeued), [3]);
    }
    assert_eq!(bench.state(), before);
}

/// If a waiter's wait lasts until the first of several leases ends, the queue must still be there.
#[test]
fn queue_behind_holders_ends_a_minute_after_the_first_lease() {
    let bench = Bench::new();
    for (manager, ttl) in [(1, 500_000), (2, 200_000), (3, 300_000)] {
        bench.acquire_in_mode(&in_mode(manager, "-s"), ttl, "try");
    }
    let reply = bench.acquire_in_mode(&owner_tag(4, 2), 100_000, "join");
    assert!(reply[2] <= 200_000 && 200_000 - reply[2] < SLACK as i64, "{reply:?}");
    bench.assert_left("queue", 260_000);
}

/// A lease without an end, which only an administrator can have made so, gets one as well.
#[test]
fn retired_lease_ends_with_the_rest_of_its_time_or_earlier() {
    let bench = Bench::new();
    let (me, retired) = (owner_tag(1, 2), owner_tag(1, 1));
    let retire = |rest: &str| -> u64 {
        let args = [&me, &retired, rest, "inbox:", "key"];
        bench.call(bench.scripts.retire.text(), &["lease", "queue", "counter"], &args)
    };
    for (left, rest, expected) in [
        (Some(300_000), "100000", 100_000),
        (Some(100_000), "300000", 100_000),
        (None, "100000", 100_000),
    ] {
        bench.own(&me, left);
        assert_eq!(retire(rest), 1);
        assert_eq!(bench.owner().as_ref(), Some(&retired));
        bench.assert_left("lease", expected);
    }
    // It is no longer the cycle's.
    assert_eq!(retire("1"), 0);
    let args = [&me, "1", "0", "inbox:", "key", ""];
    let reply: Vec<u64> = bench.call(bench.scripts.release.text(), &["lease", "queue", "counter"], &args);
    assert_eq!(reply, [0]);
    bench.assert_left("lease", 100_000);
}
