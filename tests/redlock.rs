//! Quorums of independent primaries, with real servers.

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod tool;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::{LockError, LockManager};
use support::quorum::{Quorum, all_know_its_vote, has_vote};
use support::{PATIENCE, RedisServer, eventually};

const MAX_TTL: Duration = Duration::from_secs(1);
const TTL: Duration = Duration::from_millis(800);
const TIMEOUT: Duration = Duration::from_secs(2);

fn builder(quorum: &Quorum) -> shardlock::Builder {
    LockManager::builder()
        .shard(quorum.url())
        .ttl(TTL)
        .redlock_max_ttl(MAX_TTL)
        .store_timeout(TIMEOUT)
}

async fn manager(quorum: &Quorum) -> LockManager {
    builder(quorum).connect().await.expect("connect")
}

/// Locks and releases so often, and returns the last token; each has to be above the one before.
async fn take_turns(locks: &LockManager, count: usize, mut last: u64, when: &str) -> u64 {
    for round in 0..count {
        let guard = locks.lock("key").timeout(PATIENCE).await;
        let guard = guard.unwrap_or_else(|error| panic!("{when}, round {round}: {error}"));
        assert!(guard.token().get() > last, "{when}, round {round}");
        last = guard.token().get();
        guard.release().await.expect("release");
    }
    last
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_two_of_five_may_be_dead_or_hang() {
    let quorum = Quorum::start(5).await;
    let mut last = 0;
    let locks = manager(&quorum).await;
    for one in 0..5 {
        for other in one + 1..5 {
            quorum.nodes[one].stop();
            quorum.nodes[other].stop();
            take_turns(&locks, 3, last, &format!("{one} and {other} hang")).await;
            quorum.nodes[one].cont();
            quorum.nodes[other].cont();
            // Also on those that hung: they are owed it.
            quorum.is_empty_on(0..5).await;
            // Whoever marked them down has to find them alive before the next two hang.
            last = take_turns_on_all(&locks, &quorum).await;
        }
    }
    drop(locks);
    for (one, other) in [(0, 1), (1, 4), (2, 3)] {
        let locks = manager(&quorum).await;
        quorum.nodes[one].kill();
        quorum.nodes[other].kill();
        last = take_turns(&locks, 3, last, &format!("{one} and {other} are dead")).await;
        quorum.nodes[one].restart();
        quorum.nodes[other].restart();
        has_vote(&quorum.nodes[one]).await;
        has_vote(&quorum.nodes[other]).await;
    }
}

/// Takes turns until the lease is on all nodes, so that none of them is taken for dead.
async fn take_turns_on_all(locks: &LockManager, quorum: &Quorum) -> u64 {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let guard = locks.lock("key").timeout(PATIENCE).await.expect("lock");
        let token = guard.token().get();
        let claimed = |node: &RedisServer| node.keys().iter().any(|key| key == "lock:key");
        let on_all = quorum.nodes.iter().all(claimed);
        guard.release().await.expect("release");
        if on_all {
            return token;
        }
        assert!(Instant::now() < deadline, "a node is not asked any more");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_dead_of_five_are_an_error_in_time_and_leave_nothing() {
    let quorum = Quorum::start(5).await;
    let locks = manager(&quorum).await;
    take_turns(&locks, 3, 0, "all are alive").await;
    quorum.nodes[..2].iter().for_each(RedisServer::kill);
    quorum.nodes[2].stop();
    let started = Instant::now();
    let error = locks.lock("key").await.expect_err("three of five are gone");
    assert!(matches!(error, LockError::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("no majority"), "{error}");
    assert!(started.elapsed() < TIMEOUT, "{:?}", started.elapsed());
    quorum.is_empty_on(3..5).await;
    quorum.nodes[2].cont();
    quorum.is_empty_on(2..5).await;
    eventually_locks(&locks).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_four_nodes_three_are_needed() {
    let quorum = Quorum::start(4).await;
    let locks = manager(&quorum).await;
    quorum.nodes[0].kill();
    take_turns(&locks, 3, 0, "one of four is dead").await;
    quorum.nodes[1].kill();
    let error = locks.lock("key").await.expect_err("two of four are dead");
    assert!(error.to_string().contains("3 of 4 nodes are needed"), "{error}");
    quorum.is_empty_on(2..4).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_managers_take_turns_in_their_order() {
    let quorum = Quorum::start(3).await;
    let first = manager(&quorum).await;
    let held = first.lock("key").await.expect("lock");
    let served = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = Vec::new();
    for number in 0..8_u64 {
        let (locks, served) = (manager(&quorum).await, Arc::clone(&served));
        tasks.push(tokio::spawn(async move {
            let guard = locks.lock("key").timeout(PATIENCE).await.expect("lock");
            served.lock().push((number, guard.token().get()));
            guard.release().await.expect("release");
            locks.shutdown().await;
        }));
        let deadline = Instant::now() + PATIENCE;
        while first.inspect("key").await.expect("inspect").queue_length <= number {
            assert!(Instant::now() < deadline, "manager {number} does not queue up");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
    held.release().await.expect("release");
    for task in tasks {
        task.await.expect("a task");
    }
    let served = served.lock().clone();
    let order: Vec<u64> = served.iter().map(|&(number, _)| number).collect();
    assert_eq!(order, (0..8).collect::<Vec<_>>());
    assert!(served.is_sorted_by(|(_, one), (_, next)| one < next), "{served:?}");
    first.shutdown().await;
    assert_eq!(quorum.left_on(0..3), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_restarted_has_no_vote_for_the_longest_ttl() {
    let quorum = Quorum::start(3).await;
    let locks = manager(&quorum).await;
    take_turns(&locks, 1, 0, "all are alive").await;
    quorum.nodes[0].kill();
    quorum.nodes[1].restart();
    let error = locks.lock("key").await.expect_err("one vote of three");
    assert!(matches!(error, LockError::Unavailable { .. }), "{error}");
    has_vote(&quorum.nodes[1]).await;
    eventually_locks(&locks).await;
}

async fn eventually_locks(locks: &LockManager) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match locks.lock("key").await {
            Ok(guard) => return guard.release().await.map(drop).expect("release"),
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_grow_though_each_node_in_turn_forgets_everything() {
    let quorum = Quorum::start(3).await;
    let (one, other) = (manager(&quorum).await, manager(&quorum).await);
    let mut last = 0;
    for node in &quorum.nodes {
        node.kill();
        last = take_turns(&one, 3, last, "one is dead").await;
        last = take_turns(&other, 3, last, "one is dead").await;
        node.restart();
        all_know_its_vote(node).await;
        node.command(&["FLUSHALL"]);
        last = take_turns(&other, 3, last, "one has forgotten everything").await;
        last = take_turns(&one, 3, last, "one has forgotten everything").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_held_lock_survives_restarts_of_all_nodes() {
    let quorum = Quorum::start(3).await;
    let (locks, other) = (manager(&quorum).await, manager(&quorum).await);
    let guard = locks.lock("key").await.expect("lock");
    for node in &quorum.nodes {
        node.restart();
        eventually("the lease is on the node again", PATIENCE, || {
            node.keys().iter().any(|key| key == "lock:key")
        })
        .await;
        all_know_its_vote(node).await;
        assert!(guard.is_valid());
        assert!(other.try_lock("key").await.expect("try").is_none());
    }
    assert!(guard.is_valid());
    guard.release().await.expect("it was held all the time");
    locks.shutdown().await;
    quorum.is_empty_on(0..3).await;
    eventually_locks(&other).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_order_of_nodes_or_another_longest_ttl_is_refused() {
    let mut quorum = Quorum::start(3).await;
    let _locks = manager(&quorum).await;
    let error = builder(&quorum).redlock_max_ttl(MAX_TTL * 2).connect().await;
    let error = error.expect_err("another redlock_max_ttl");
    assert!(matches!(error, LockError::ShardMapMismatch { .. }), "{error}");
    assert!(error.to_string().contains("redlock_max_ttl"), "{error}");
    quorum.nodes.swap(0, 1);
    let error = builder(&quorum).connect().await.expect_err("other places");
    assert!(matches!(error, LockError::ShardMapMismatch { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ttl_above_the_longest_is_refused_with_both() {
    let quorum = Quorum::start(3).await;
    let locks = manager(&quorum).await;
    let error = locks.lock("key").ttl(MAX_TTL * 3).await.expect_err("too long");
    let words = error.to_string();
    assert!(words.contains("ttl 3s is above redlock_max_ttl 1s"), "{words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_took_longer_than_its_ttl_is_no_lock_and_leaves_nothing() {
    let quorum = Quorum::start(3).await;
    let locks = manager(&quorum).await;
    take_turns_on_all(&locks, &quorum).await;
    quorum.nodes[0].stop();
    // Those whose door hangs wait for it first.
    let all = (0..30).map(|number| {
        let locks = locks.clone();
        async move {
            let key = format!("key-{number}");
            locks.lock(key).ttl(Duration::from_millis(100)).await
        }
    });
    let all = futures_util::future::join_all(all).await;
    let late = all.iter().filter_map(|locked| locked.as_ref().err());
    let late: Vec<String> = late.map(ToString::to_string).collect();
    assert!(!late.is_empty());
    let named = late
        .iter()
        .all(|words| words.contains("leaves nothing of the ttl 100ms"));
    assert!(named, "{late:?}");
    drop(all);
    quorum.is_empty_on(1..3).await;
    quorum.nodes[0].cont();
    take_turns_on_all(&locks, &quorum).await;
    quorum.is_empty_on(0..3).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_stops_waiting_midway_leaves_nothing() {
    let quorum = Quorum::start(3).await;
    let locks = manager(&quorum).await;
    take_turns_on_all(&locks, &quorum).await;
    for node in &quorum.nodes {
        node.stop();
        let all = (0..60_u64).map(|number| {
            let (locks, limit) = (locks.clone(), Duration::from_micros(number * 5_000));
            async move {
                let locking = async {
                    if let Ok(guard) = locks.lock(format!("key-{number}")).await {
                        guard.release().await.ok();
                    }
                };
                tokio::time::timeout(limit, locking).await.ok();
            }
        });
        futures_util::future::join_all(all).await;
        node.cont();
        take_turns_on_all(&locks, &quorum).await;
        quorum.is_empty_on(0..3).await;
    }
}

/// Who is inside, and the last token, per key.
#[derive(Default)]
struct Ledger {
    keys: HashMap<String, (bool, u64)>,
    overlaps: u64,
    regressions: u64,
    served: u64,
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_overlaps_while_nodes_fail_one_at_a_time() {
    let quorum = Quorum::start(5).await;
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let until = Instant::now() + Duration::from_secs(6);
    let mut tasks = Vec::new();
    let mut managers = Vec::new();
    for _ in 0..3 {
        let locks = manager(&quorum).await;
        for task in 0..4 {
            let (locks, ledger) = (locks.clone(), Arc::clone(&ledger));
            tasks.push(tokio::spawn(async move {
                let key = format!("key-{}", task % 2);
                let (mut count, mut errors) = (0_u64, 0_u64);
                while Instant::now() < until {
                    let Ok(guard) = locks.lock(&key).timeout(PATIENCE).await else {
                        errors += 1;
                        continue;
                    };
                    let token = guard.token().get();
                    {
                        let mut ledger = ledger.lock();
                        let (inside, last) = *ledger.keys.entry(key.clone()).or_default();
                        ledger.overlaps += u64::from(inside);
                        ledger.regressions += u64::from(token <= last);
                        ledger.served += 1;
                        ledger.keys.insert(key.clone(), (true, token.max(last)));
                    }
                    tokio::task::yield_now().await;
                    ledger.lock().keys.entry(key.clone()).or_default().0 = false;
                    guard.release().await.ok();
                    count += 1;
                }
                (count, errors)
            }));
        }
        managers.push(locks);
    }
    let mut faults = 0;
    while Instant::now() < until {
        let node = &quorum.nodes[faults % 5];
        if faults % 2 == 0 {
            node.stop();
            tokio::time::sleep(Duration::from_millis(300)).await;
            node.cont();
            tokio::time::sleep(Duration::from_millis(200)).await;
        } else {
            node.kill();
            tokio::time::sleep(Duration::from_millis(200)).await;
            node.restart();
            all_know_its_vote(node).await;
        }
        faults += 1;
    }
    let mut errors = 0;
    for task in tasks {
        let (count, failed) = tokio::time::timeout(PATIENCE, task)
            .await
            .expect("served")
            .expect("a task");
        assert!(count > 0, "a task was never served");
        errors += failed;
    }
    {
        let ledger = ledger.lock();
        println!("{faults} faults: {} served, {errors} errors", ledger.served);
        assert_eq!((ledger.overlaps, ledger.regressions), (0, 0));
    }
    for locks in managers {
        locks.shutdown().await;
    }
    quorum.is_empty_on(0..5).await;
}

fn quantile(times: &mut [Duration], share: f64) -> Duration {
    times.sort_unstable();
    times[((times.len() - 1) as f64 * share) as usize]
}

async fn measure(locks: &LockManager, what: &str) -> Duration {
    // The first finds out who is gone.
    for number in 0..50 {
        let guard = locks.lock(format!("warm-{number}")).await.expect("lock");
        guard.release().await.expect("release");
    }
    let mut batches = Vec::new();
    for _ in 0..3 {
        let mut times = Vec::new();
        for number in 0..500 {
            let started = Instant::now();
            let guard = locks.lock(format!("key-{number}")).await.expect("lock");
            times.push(started.elapsed());
            guard.release().await.expect("release");
        }
        batches.push((quantile(&mut times, 0.99), quantile(&mut times, 0.5)));
    }
    // The median of three, since other programs use this machine, too.
    batches.sort_unstable();
    let (most, half) = batches[1];
    println!("{what}: acquire p50 {half:?}, p99 {most:?}");
    most
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_that_are_gone_do_not_slow_the_rest() {
    let quorum = Quorum::start(5).await;
    let locks = manager(&quorum).await;
    let alive = measure(&locks, "5 alive").await;
    quorum.nodes[..2].iter().for_each(RedisServer::stop);
    let hanging = measure(&locks, "2 of 5 hang").await;
    quorum.nodes[..2].iter().for_each(RedisServer::kill);
    let dead = measure(&locks, "2 of 5 are dead").await;
    assert!(hanging <= alive * 2, "{hanging:?} against {alive:?}");
    assert!(dead <= alive * 2, "{dead:?} against {alive:?}");
}

/// How many scripts were run and how many messages published on all nodes.
fn counts(quorum: &Quorum) -> (u64, u64) {
    let sum = |count: fn(&RedisServer) -> u64| quorum.nodes.iter().map(count).sum();
    (sum(RedisServer::script_calls), sum(RedisServer::publishes))
}

/// One holds, the other waits, and gets it. Returns how long that took from the release on, and how many scripts and publishes.
async fn hand_off(quorum: &Quorum, one: &LockManager, other: &LockManager) -> (Duration, u64, u64) {
    let guard = one.lock("key").await.expect("lock");
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { other.lock("key").timeout(PATIENCE).await.expect("lock") }
    });
    let deadline = Instant::now() + PATIENCE;
    while other.inspect("key").await.expect("inspect").queue_length == 0 {
        assert!(Instant::now() < deadline, "nobody waits");
    }
    let before = counts(quorum);
    let started = Instant::now();
    guard.release().await.expect("release");
    let guard = waiting.await.expect("a task");
    let took = started.elapsed();
    eventually("the lease is on all nodes", PATIENCE, || {
        quorum.left_on(0..3).len() == 3
    })
    .await;
    let after = counts(quorum);
    guard.release().await.expect("release");
    quorum.is_empty_on(0..3).await;
    (took, after.0 - before.0, after.1 - before.1)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_it_costs() {
    let quorum = Quorum::start(3).await;
    let (one, other) = (manager(&quorum).await, manager(&quorum).await);
    take_turns(&one, 2, 0, "warm-up").await;
    take_turns(&other, 2, 0, "warm-up").await;
    hand_off(&quorum, &one, &other).await;
    // The least of several: a release may still be under way on the slowest node when the next round begins.
    let mut least = [u64::MAX; 4];
    let mut took = Duration::MAX;
    for _ in 0..5 {
        let start = counts(&quorum).0;
        let guard = one.lock("key").await.expect("lock");
        eventually("all have the lease", PATIENCE, || quorum.left_on(0..3).len() == 3).await;
        let locked = counts(&quorum).0;
        guard.release().await.expect("release");
        quorum.is_empty_on(0..3).await;
        let released = counts(&quorum).0;
        let (time, scripts, publishes) = hand_off(&quorum, &one, &other).await;
        let now = [locked - start, released - locked, scripts, publishes];
        least = std::array::from_fn(|index| least[index].min(now[index]));
        took = took.min(time);
    }
    println!(
        "3 nodes: a lock is {} scripts, a release {}, a hand-off {} and {} publishes within {took:?}",
        least[0], least[1], least[2], least[3]
    );
    assert_eq!(least[..2], [3, 3], "each node once");
    assert!(
        least[2] <= 7,
        "three releases, one of them in vain; the turn's request; two claims"
    );
    assert_eq!(least[3], 1, "one push");
}

#[test]
fn the_tool_runs_a_command_and_looks_at_a_key() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let quorum = runtime.block_on(Quorum::start(3));
    let run = |args: &[&str]| {
        let mut command = tool::bare(args);
        command.env("SHARDLOCK_SHARDS", quorum.url());
        command
            .env("SHARDLOCK_REDLOCK_MAX_TTL", "1s")
            .env("SHARDLOCK_TTL", "800ms");
        tool::run(command)
    };
    let ended = run(&["exec", "key", "--", "echo", "inside"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.contains("inside"), "{ended:?}");
    assert_eq!(quorum.left_on(0..3), [""; 0]);
    let ended = run(&["inspect", "key"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.contains("nobody"), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_permissions_of_the_acl_file_are_enough() {
    let quorum = Quorum::start(3).await;
    let file = include_str!("../config/acl.conf");
    let mut lines = file.lines();
    let user = lines.find(|line| line.starts_with("user shardlock ")).expect("a user");
    lines
        .find(|line| line.starts_with("# redlock:// "))
        .expect("more for quorums");
    let more = lines.next().expect("permissions").trim_start_matches('#');
    let words = user.split_whitespace().skip(2).chain(more.split_whitespace());
    let words: Vec<&str> = ["ACL", "SETUSER", "shardlock"].into_iter().chain(words).collect();
    for node in &quorum.nodes {
        node.command(&words);
    }
    let url = quorum.url().replace("redlock://", "redlock://shardlock:change-me@");
    let builder = LockManager::builder().shard(url).ttl(TTL).redlock_max_ttl(MAX_TTL);
    let (one, other) = (builder.clone().connect().await, builder.connect().await);
    let (one, other) = (one.expect("connect"), other.expect("connect"));
    take_turns(&one, 2, 0, "with these permissions").await;
    hand_off(&quorum, &one, &other).await;
    let guard = one.lock("key").await.expect("lock");
    quorum.nodes[0].restart();
    quorum.nodes[0].command(&words);
    eventually("the lease is on the node again", PATIENCE, || {
        !quorum.left_on(0..1).is_empty()
    })
    .await;
    guard.release().await.expect("release");
}
