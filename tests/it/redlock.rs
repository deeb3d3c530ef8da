//! A quorum of independent nodes: what it survives, what it refuses, and what it leaves behind.

mod load;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockGuard, LockManager};
use support::quorum::MAX_TTL;
use support::{PATIENCE, Quorum, RedisServer};
use support_locks::{lock, soon, until, waiting};

/// A node on a busy machine may take longer than the default of a second to answer.
const STORE_TIMEOUT: Duration = Duration::from_secs(3);

fn builder(quorum: &Quorum) -> Builder {
    LockManager::builder()
        .shard(quorum.url())
        .store_timeout(STORE_TIMEOUT)
        .ttl(MAX_TTL)
        .redlock_max_ttl(MAX_TTL)
}

/// A request waits for a majority for less than half of the store timeout. On a busy machine, nodes
/// are often taken for silent, and some tests leave no more than a majority.
async fn connect(quorum: &Quorum) -> LockManager {
    let builder = builder(quorum).store_timeout(PATIENCE);
    builder.connect().await.expect("connect")
}

/// Keys of individual locks on a node.
fn left_on(node: &RedisServer) -> Vec<String> {
    support_locks::lock_keys(node)
}

async fn nothing_is_left(quorum: &Quorum, alive: impl Fn(usize) -> bool) {
    until("nothing is left on any node that answers", async || {
        let nodes = quorum.nodes().iter().enumerate();
        nodes
            .filter(|(number, _)| alive(*number))
            .all(|(_, node)| left_on(node).is_empty())
    })
    .await;
}

/// All pairs of five nodes.
fn pairs() -> impl Iterator<Item = (usize, usize)> {
    (0..5).flat_map(|one| (one + 1..5).map(move |other| (one, other)))
}

async fn lock_can_be_acquired(locks: &LockManager, other: &LockManager, key: &str) -> u64 {
    let guard = soon("the lock", lock(locks, key)).await;
    assert!(other.try_lock(key).await.expect("try").is_none());
    let token = guard.token().get();
    guard.release().await.expect("release");
    token
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_and_hand_offs_work_with_any_two_nodes_silent() {
    let quorum = Quorum::start(5);
    let (locks, other) = (connect(&quorum).await, connect(&quorum).await);
    let mut last = 0;
    for (one, two) in pairs() {
        quorum.nodes()[one].stop();
        quorum.nodes()[two].stop();
        for key in ["a", "b", "c"] {
            lock_can_be_acquired(&locks, &other, key).await;
        }
        let token = lock_can_be_acquired(&locks, &other, "k").await;
        assert!(token > last, "{token} after {last}");
        let guard = lock(&locks, "k").await;
        let waiting = tokio::spawn({
            let other = other.clone();
            async move { lock(&other, "k").await }
        });
        until("the other manager waits", async || {
            locks.inspect("k").await.expect("inspect").queue_length == 1
        })
        .await;
        guard.release().await.expect("release");
        let guard = soon("the hand-off", waiting).await.expect("a task");
        last = guard.token().get();
        assert!(last > token, "{last} after {token}");
        guard.release().await.expect("release");
        quorum.nodes()[one].cont();
        quorum.nodes()[two].cont();
        // Including the nodes that were silent during the release.
        nothing_is_left(&quorum, |_| true).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_nodes_may_be_dead_and_a_third_is_an_error_that_leaves_nothing() {
    let quorum = Quorum::start(5);
    let (locks, other) = (connect(&quorum).await, connect(&quorum).await);
    let limited = &builder(&quorum).connect().await.expect("connect");
    let mut last = 0;
    for dead in [0, 3] {
        quorum.nodes()[dead].kill();
        for key in ["a", "b", "k"] {
            let token = lock_can_be_acquired(&locks, &other, key).await;
            if key == "k" {
                assert!(token > last, "{token} after {last}");
                last = token;
            }
        }
    }
    quorum.nodes()[4].kill();
    let failing = ["a", "b", "k"].map(|key| async move {
        let started = Instant::now();
        let error = limited.lock(key).await.expect_err("no majority");
        (error, started.elapsed())
    });
    for (error, waited) in join_all(failing).await {
        assert!(
            error.kind() == LockErrorKind::Unavailable && error.is_retryable(),
            "{error}"
        );
        assert!(error.to_string().contains("3 of 5 nodes are needed"), "{error}");
        assert!(error.to_string().contains(&quorum.nodes()[4].address()), "{error}");
        assert!(waited < 2 * STORE_TIMEOUT, "{waited:?}");
    }
    nothing_is_left(&quorum, |node| ![0, 3, 4].contains(&node)).await;
    // A new manager receives the error as well.
    let error = builder(&quorum).connect().await.expect_err("no majority");
    assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_four_nodes_three_are_a_majority_and_two_are_not() {
    let quorum = Quorum::start(4);
    let (locks, other) = (connect(&quorum).await, connect(&quorum).await);
    let limited = builder(&quorum).connect().await.expect("connect");
    quorum.nodes()[1].kill();
    lock_can_be_acquired(&locks, &other, "k").await;
    quorum.nodes()[2].kill();
    let error = limited.lock("k").await.expect_err("half is no majority");
    assert!(error.to_string().contains("3 of 4 nodes are needed"), "{error}");
    nothing_is_left(&quorum, |node| ![1, 2].contains(&node)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarted_has_no_vote_until_the_longest_ttl_has_passed() {
    let quorum = Quorum::start(3);
    let locks = connect(&quorum).await;
    let guard = lock(&locks, "held").await;
    // One node is down and one has restarted empty, so only one of three votes is left.
    quorum.nodes()[0].restart();
    quorum.nodes()[1].kill();
    let other = connect_when_possible(&quorum).await;
    // A busy machine may find the third node slow as well, and then reports only that. The error
    // must not wait until the node votes again, after four seconds.
    until("the missing vote is reported", async || {
        let error = other.lock("k").fail_fast().await.expect_err("no majority");
        error.to_string().contains("no vote yet")
    })
    .await;
    assert!(guard.is_valid() || guard.loss_is_reported_within(MAX_TTL).await);
    quorum.wait_for_vote(0);
    until("two nodes vote again", async || match other.lock("k").await {
        Ok(guard) => guard.release().await.is_ok(),
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            false
        }
    })
    .await;
}

trait LossIsReported {
    async fn loss_is_reported_within(&self, time: Duration) -> bool;
}

impl LossIsReported for shardlock::LockGuard {
    async fn loss_is_reported_within(&self, time: Duration) -> bool {
        tokio::time::timeout(time, self.lost()).await.is_ok()
    }
}

async fn connect_when_possible(quorum: &Quorum) -> LockManager {
    let mut connected = None;
    until("a manager can connect", async || {
        connected = builder(quorum).connect().await.ok();
        connected.is_some()
    })
    .await;
    connected.expect("just seen")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_that_is_held_for_long_survives_the_restart_of_each_node_in_turn() {
    let quorum = Quorum::start(3);
    let (locks, other) = (connect(&quorum).await, connect(&quorum).await);
    let guard = lock(&locks, "k").await;
    until_all_nodes_have_the_lease(&quorum).await;
    for node in 0..3 {
        quorum.nodes()[node].restart();
        quorum.wait_for_vote(node);
        until("the node has the lease again", async || {
            !left_on(&quorum.nodes()[node]).is_empty()
        })
        .await;
        assert!(guard.is_valid());
        assert!(other.try_lock("k").await.expect("try").is_none());
    }
    let token = guard.token();
    guard.release().await.expect("the lock was held throughout");
    nothing_is_left(&quorum, |_| true).await;
    // Each node has lost its counters in the meantime.
    let guard = lock(&other, "k").await;
    assert!(guard.token() > token, "{} after {token}", guard.token());
}

/// Readers of two managers, one of which joins while nodes have restarted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shared_locks_survive_the_restart_of_each_node_in_turn() {
    let quorum = Quorum::start(3);
    let (locks, other) = (connect(&quorum).await, connect(&quorum).await);
    let all_have = async |readers: u64| {
        let has_them = |node: &RedisServer| node.query::<u64>(&["ZCARD", "{lock:k}:h"]) == readers;
        until("all nodes have the leases", async || {
            quorum.nodes().iter().all(has_them)
        })
        .await;
    };
    let guard = locks.lock("k").shared().await.expect("a shared lock");
    all_have(1).await;
    let mut late = None;
    for node in 0..3 {
        quorum.nodes()[node].restart();
        quorum.wait_for_vote(node);
        if late.is_none() {
            all_have(1).await;
            late = Some(other.lock("k").shared().await.expect("a shared lock"));
        }
        all_have(2).await;
        assert!(guard.is_valid() && late.as_ref().is_some_and(LockGuard::is_valid));
        for locks in [&locks, &other] {
            assert!(locks.try_lock("k").await.expect("try").is_none());
        }
    }
    let late = late.expect("the second reader");
    let largest = guard.token().max(late.token());
    guard.release().await.expect("the lock was held throughout");
    assert!(
        locks.try_lock("k").await.expect("try").is_none(),
        "the other still reads"
    );
    late.release().await.expect("the lock was held throughout");
    nothing_is_left(&quorum, |_| true).await;
    let guard = lock(&other, "k").await;
    assert!(guard.token() > largest, "{} after {largest}", guard.token());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permits_are_refused_with_the_reason_and_nothing_is_sent() {
    let quorum = Quorum::start(3);
    let locks = connect(&quorum).await;
    let before = counts(&quorum).0;
    let error = locks.permits("k", 2).await.expect_err("no permits");
    assert!(
        error.kind() == LockErrorKind::Unsupported && !error.is_retryable(),
        "{error}"
    );
    for word in ["permits 1/2", "majority", "another kind of shard", "\"k\""] {
        assert!(error.to_string().contains(word), "{word}: {error}");
    }
    let error = locks.try_permits("k", 2).await.expect_err("no permits");
    assert!(error.kind() == LockErrorKind::Unsupported, "{error}");
    assert_eq!(counts(&quorum).0, before);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_grow_although_minorities_are_flushed_and_sequencers_change() {
    let quorum = Quorum::start(5);
    let (locks, other) = (connect(&quorum).await, connect(&quorum).await);
    let mut last = 0;
    for round in 0..30 {
        let node = &quorum.nodes()[round % 5];
        match round % 3 {
            0 => drop(node.command(&["FLUSHALL"])),
            1 => node.stop(),
            _ => {}
        }
        let (one, next) = if round % 2 == 0 {
            (&locks, &other)
        } else {
            (&other, &locks)
        };
        for manager in [one, next] {
            let guard = soon("the lock", lock(manager, "k")).await;
            let token = guard.token().get();
            assert!(token > last, "round {round}: {token} after {last}");
            last = token;
            guard.release().await.expect("release");
        }
        node.cont();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn swapped_nodes_a_different_max_ttl_and_too_long_ttls_are_refused() {
    let quorum = Quorum::start(3);
    let locks = connect(&quorum).await;
    // The first lock stores the map.
    locks.lock("k").await.expect("lock").release().await.expect("release");
    let error = locks.lock("k").ttl(MAX_TTL * 2).await.expect_err("too long");
    let words = error.to_string();
    assert!(
        words.contains("redlock_max_ttl") && words.contains("ttl 6s") && words.contains("3s"),
        "{error}"
    );
    // Even if the task would get the lock from another one of its process, without a request.
    let guard = lock(&locks, "k").await;
    let next = waiting(&locks, "k");
    let too_long = locks.lock("k").ttl(MAX_TTL * 2).into_future();
    let error = soon("the refusal", too_long).await.expect_err("too long");
    assert!(error.to_string().contains("redlock_max_ttl"), "{error}");
    guard.release().await.expect("release");
    let next = soon("the next", next).await.expect("a task");
    next.release().await.expect("release");
    let places: Vec<_> = quorum.nodes().iter().map(RedisServer::address).collect();
    let swapped = format!("redlock://{},{},{}", places[1], places[0], places[2]);
    let refused = [
        builder(&quorum).shards([]).shard(swapped),
        builder(&quorum).redlock_max_ttl(MAX_TTL * 3),
    ];
    for builder in refused {
        let error = builder.connect().await.expect_err("another map");
        assert!(error.kind() == LockErrorKind::ShardMapMismatch, "{error}");
        assert!(
            error.to_string().contains("node ") && error.to_string().contains("redlock_max_ttl 3s"),
            "{error}"
        );
    }
}

/// As while the password of the nodes is changed, one after the other.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_refuses_the_login_keeps_no_manager_from_connecting() {
    let quorum = Quorum::start(3);
    quorum.nodes()[1].command(&["CONFIG", "SET", "requirepass", "another"]);
    let (one, other) = (connect(&quorum).await, connect(&quorum).await);
    support_locks::hand_off(&one, &other, "k").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn quorum_reached_too_late_is_an_error_rather_than_a_lock() {
    let quorum = Quorum::start(3);
    let locks = connect(&quorum).await;
    let proxied = Duration::from_millis(60);
    for node in quorum.nodes() {
        // Longer than the lease, and shorter than the time after which a node counts as silent.
        node.command(&["CLIENT", "PAUSE", &proxied.as_millis().to_string(), "ALL"]);
    }
    match locks.try_lock("k").ttl(Duration::from_millis(50)).await {
        Err(error) => assert!(error.kind() == LockErrorKind::Unavailable, "{error}"),
        // The pause ended in time.
        Ok(Some(guard)) => assert!(guard.remaining() <= Duration::from_millis(50)),
        Ok(None) => panic!("the key has no other contender"),
    }
    nothing_is_left(&quorum, |_| true).await;
}

fn percentile(times: &mut [Duration], part: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * part) as usize]
}

/// Alternates between the quorums, so that a moment in which the machine is slow affects all of
/// them.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_silent_or_dead_nodes_do_not_slow_the_others() {
    // Enough rounds that a few moments in which the machine is slow do not determine the 99th
    // percentile.
    const ROUNDS: usize = 1600;
    let quorums = [Quorum::start(5), Quorum::start(5), Quorum::start(5)];
    let mut managers = Vec::new();
    for quorum in &quorums {
        managers.push(connect(quorum).await);
    }
    for node in [0, 1] {
        quorums[1].nodes()[node].stop();
        quorums[2].nodes()[node].kill();
    }
    let keys: Vec<_> = (0..20).map(|number| format!("key-{number}")).collect();
    // The first request to a node discovers that it is silent or dead.
    for locks in &managers {
        for key in &keys {
            lock(locks, key).await.release().await.expect("release");
        }
    }
    let mut times = [const { Vec::new() }; 3];
    for round in 0..ROUNDS {
        for (locks, times) in managers.iter().zip(&mut times) {
            let started = Instant::now();
            let guard = lock(locks, &keys[round % keys.len()]).await;
            times.push(started.elapsed());
            guard.release().await.expect("release");
        }
    }
    let [alive, silent, dead] = times
        .each_mut()
        .map(|times| (percentile(times, 0.5), percentile(times, 0.99)));
    println!("p50 and p99 of acquiring: all alive {alive:?}, two silent {silent:?}, two dead {dead:?}");
    let bound = alive.0 * 2 + Duration::from_millis(2);
    assert!(silent.0 <= bound && dead.0 <= bound, "{alive:?} {silent:?} {dead:?}");
    // Allow for the scheduling delays of a busy machine. A request that waits for a node takes a
    // quarter of a second longer.
    let bound = alive.1 * 2 + Duration::from_millis(100);
    assert!(silent.1 <= bound && dead.1 <= bound, "{alive:?} {silent:?} {dead:?}");
}

/// Number of script calls and publishes on all nodes.
fn counts(quorum: &Quorum) -> (u64, u64) {
    let sum = |count: fn(&RedisServer) -> u64| quorum.nodes().iter().map(count).sum();
    (sum(RedisServer::script_calls), sum(RedisServer::publishes))
}

async fn until_all_nodes_have_the_lease(quorum: &Quorum) {
    let has_it = |node: &RedisServer| left_on(node).len() == 1;
    until("the lease is on all nodes", async || quorum.nodes().iter().all(has_it)).await;
}

/// Hands the lock off from one manager to the other. Returns the number of script calls and
/// publishes from the release on.
async fn hand_off(quorum: &Quorum, one: &LockManager, other: &LockManager) -> (u64, u64) {
    let guard = lock(one, "key").await;
    until_all_nodes_have_the_lease(quorum).await;
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { lock(&other, "key").await }
    });
    support_locks::until_queued(one, "key", 1).await;
    let before = counts(quorum);
    guard.release().await.expect("release");
    let guard = soon("the hand-off", waiting).await.expect("a task");
    until_all_nodes_have_the_lease(quorum).await;
    let after = counts(quorum);
    guard.release().await.expect("release");
    nothing_is_left(quorum, |_| true).await;
    (after.0 - before.0, after.1 - before.1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_and_a_release_cost_a_script_on_each_node_and_a_hand_off_one_message() {
    let quorum = Quorum::start(3);
    let (one, other) = (connect(&quorum).await, connect(&quorum).await);
    for _ in 0..2 {
        hand_off(&quorum, &one, &other).await;
        hand_off(&quorum, &other, &one).await;
    }
    // The minimum of several rounds: a release may still be in flight to the slowest node when the
    // next round begins.
    let mut least = [u64::MAX; 4];
    for _ in 0..5 {
        let start = counts(&quorum).0;
        let guard = lock(&one, "key").await;
        until_all_nodes_have_the_lease(&quorum).await;
        let locked = counts(&quorum).0;
        guard.release().await.expect("release");
        nothing_is_left(&quorum, |_| true).await;
        let released = counts(&quorum).0;
        let (scripts, publishes) = hand_off(&quorum, &one, &other).await;
        let now = [locked - start, released - locked, scripts, publishes];
        least = std::array::from_fn(|index| least[index].min(now[index]));
    }
    println!("3 nodes: scripts of a lock, a release, a hand-off, and its publishes: {least:?}");
    assert_eq!(least[..2], [3, 3], "each node once");
    assert!(
        least[2] <= 7,
        "three releases, one of them without effect; the turn's request; two claims"
    );
    assert_eq!(least[3], 1, "one push");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn permissions_of_the_acl_file_are_sufficient() {
    let quorum = Quorum::start(3);
    let mut lines = include_str!("../../config/acl.conf").lines();
    let user = lines.find(|line| line.starts_with("user shardlock ")).expect("a user");
    lines
        .find(|line| line.starts_with("# redlock:// "))
        .expect("permissions for quorums");
    let more = lines.next().expect("permissions").trim_start_matches('#');
    let words = user.split_whitespace().skip(2).chain(more.split_whitespace());
    let words: Vec<&str> = ["ACL", "SETUSER", "shardlock"].into_iter().chain(words).collect();
    for node in quorum.nodes() {
        node.command(&words);
    }
    let url = quorum.url().replace("redlock://", "redlock://shardlock:change-me@");
    let builder = builder(&quorum).shards([]).shard(url);
    let (one, other) = (builder.clone().connect().await, builder.connect().await);
    let (one, other) = (one.expect("connect"), other.expect("connect"));
    hand_off(&quorum, &one, &other).await;
    let readers = [one.lock("key").shared().await, other.lock("key").shared().await];
    for guard in readers {
        guard.expect("a shared lock").release().await.expect("release");
    }
    nothing_is_left(&quorum, |_| true).await;
    let guard = lock(&one, "key").await;
    // Two of three nodes are enough for the lock. Wait for the third, or the loss of one node would
    // lose the lock.
    until_all_nodes_have_the_lease(&quorum).await;
    quorum.nodes()[0].restart();
    quorum.nodes()[0].command(&words);
    until("the lease is on the node again", async || {
        !left_on(&quorum.nodes()[0]).is_empty()
    })
    .await;
    guard.release().await.expect("release");
}
