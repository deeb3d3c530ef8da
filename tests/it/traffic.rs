//! The cost of locking on the server, as counted by the server.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use shardlock::{LockManager, LockRequest};
use support::RedisServer;
use support_locks::{Locker, TestStore, lock, on_each_store, soon, until_queued};
use tokio::task::JoinSet;

/// Long enough that no renewals and no expiries are counted.
const LONG_TTL: Duration = Duration::from_secs(600);

async fn connect(store: &TestStore, ttl: Duration) -> LockManager {
    store.builder().ttl(ttl).connect().await.expect("connect")
}

/// `processes` processes with one task each pass the lock around while all others wait.
async fn hand_offs_cost_two_calls_and_one_message(store: &TestStore, processes: usize) {
    let server = store.server();
    let watcher = connect(store, LONG_TTL).await;
    let mut lockers = store.lockers(processes, LONG_TTL);
    for (place, locker) in lockers.iter_mut().enumerate() {
        locker.request();
        if place == 0 {
            locker.locked();
        } else {
            until_queued(&watcher, "k", place as u64).await;
        }
    }
    let hand_off = async |lockers: &mut Vec<Locker>, holder: usize| {
        // The holder releases the lock and requests it again immediately.
        lockers[holder].release();
        lockers[holder].request();
        let next = (holder + 1) % processes;
        lockers[next].locked();
        // The last holder waits again.
        until_queued(&watcher, "k", processes as u64 - 1).await;
        next
    };
    let (mut holder, started) = (0, Instant::now());
    // Skip the first round: scripts may have to be loaded, and the first holder expected no
    // contender.
    for _ in 0..processes {
        holder = hand_off(&mut lockers, holder).await;
    }
    server.reset_stats();
    let hand_offs: u64 = 64;
    for _ in 0..hand_offs {
        holder = hand_off(&mut lockers, holder).await;
    }
    // A process that has waited for ten seconds, as on a very busy machine, asks again and notifies
    // the holder.
    let again = started.elapsed().as_secs() / 10 * processes as u64;
    let (calls, messages) = (server.script_calls(), server.publishes());
    assert!(
        (2 * hand_offs..=2 * hand_offs + again).contains(&calls) && (hand_offs..=hand_offs + again).contains(&messages),
        "{calls} calls, {messages} messages: {:?}",
        server.commands()
    );
}

/// The commands since the last reset, except those that the counting itself needs.
fn commands(server: &RedisServer) -> BTreeMap<String, u64> {
    let mut commands = server.commands();
    commands.retain(|name, _| name != "info" && !name.starts_with("config"));
    commands
}

/// Sixteen tasks in each of eight managers that wait for the key.
async fn wait(store: &TestStore, watcher: &LockManager, ttl: Duration) -> JoinSet<()> {
    let mut waiting = JoinSet::new();
    for place in 1..=8 {
        let locks = connect(store, ttl).await;
        for _ in 0..16 {
            let locks = locks.clone();
            waiting.spawn(async move { lock(&locks, "k").await.release().await.expect("release") });
        }
        until_queued(watcher, "k", place).await;
    }
    waiting
}

/// Tasks of one process hold the key again and again, several at a time.
async fn rarely_need_the_server(store: &TestStore, request: fn(&LockManager) -> LockRequest) {
    const LOCKS: u32 = 20_000;

    let locks = connect(store, LONG_TTL).await;
    let (server, count) = (store.server(), Arc::new(AtomicU32::new(0)));
    server.reset_stats();
    let mut tasks = JoinSet::new();
    for _ in 0..64 {
        let (locks, count) = (locks.clone(), Arc::clone(&count));
        tasks.spawn(async move {
            // They end together: the last ones would find a free key each time.
            while count.fetch_add(1, Ordering::Relaxed) < LOCKS {
                drop(request(&locks).await.expect("the lock"));
            }
        });
    }
    while let Some(ended) = soon("the tasks", tasks.join_next()).await {
        ended.expect("a task");
    }
    // More tokens are reserved at a time, the more of them are used during a round trip.
    let calls = server.script_calls();
    assert!(calls <= u64::from(LOCKS) / 200, "{calls} {:?}", server.commands());
}

on_each_store! {
    on(counted, own);

    async fn a_hand_off_costs_two_script_calls_and_one_message_among_2_processes(store: &TestStore) {
        hand_offs_cost_two_calls_and_one_message(store, 2).await;
    }

    async fn a_hand_off_costs_two_script_calls_and_one_message_among_8_processes(store: &TestStore) {
        hand_offs_cost_two_calls_and_one_message(store, 8).await;
    }

    async fn a_hand_off_costs_two_script_calls_and_one_message_among_32_processes(store: &TestStore) {
        hand_offs_cost_two_calls_and_one_message(store, 32).await;
    }

    async fn waiter_sends_nothing(store: &TestStore) {
        let server = store.server();
        let holder = connect(store, LONG_TTL).await;
        let guard = lock(&holder, "k").await;
        let mut waiting = wait(store, &holder, LONG_TTL).await;
        server.reset_stats();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let mut sent = commands(server);
        // Each manager checks its shard every three seconds and its inbox every two, regardless of
        // the number of its waiters. Each check may fall into this period once or, on a busy
        // machine, twice. On a busy machine an inbox may also reply so late that it is
        // resubscribed, or be looked for only now.
        let looks = 2 * 9;
        for (command, in_one_look) in [
            ("time", 1),
            ("set", 1),
            ("get", 3),
            ("pttl", 1),
            ("zcard", 1),
            ("zrange", 1),
            ("ping", 2),
            ("subscribe", 1),
            ("pubsub|numsub", 1),
        ] {
            if let Some(count) = sent.remove(command) {
                assert!(count <= looks * in_one_look, "{count} times {command}");
            }
        }
        assert_eq!(sent, BTreeMap::new());
        guard.release().await.expect("release");
        while let Some(ended) = soon("the waiters", waiting.join_next()).await {
            ended.expect("a task");
        }
    }

    async fn waiter_checks_once_per_ttl_of_the_holder(store: &TestStore) {
        let server = store.server();
        // Long enough for a busy machine to renew the lease.
        let ttl = Duration::from_secs(3);
        let holder = connect(store, ttl).await;
        let guard = lock(&holder, "k").await;
        let mut waiting = wait(store, &holder, ttl).await;
        server.reset_stats();
        let reset = Instant::now();
        tokio::time::sleep(2 * ttl).await;
        let (calls, publishes) = (server.script_calls(), server.publishes());
        // A busy machine sleeps for longer.
        let ttls = reset.elapsed().div_duration_f64(ttl);
        // The holder renews ten times per TTL. A waiting manager retries when the TTL that its last
        // request saw has passed, a tenth of which may already have been used by then. That makes
        // three retries per manager in two TTLs, plus one for the edges, regardless of the number
        // of its waiting tasks.
        let retries = 8.0 * (ttls + 2.0);
        assert!(calls as f64 <= ttls * 10.0 + 2.0 + retries, "{:?}", server.commands());
        // The first waiter notifies the holder that it is waiting, and so does each retry, in case
        // the message was lost.
        assert!(publishes as f64 <= 1.0 + retries, "{:?}", server.commands());
        guard.release().await.expect("the lock was held throughout");
        while let Some(ended) = soon("the waiters", waiting.join_next()).await {
            ended.expect("a task");
        }
    }

    async fn tasks_of_one_process_pass_the_lock_on_without_the_server(store: &TestStore) {
        let server = store.server();
        let locks = connect(store, LONG_TTL).await;
        // Loads the release script into the server.
        lock(&locks, "k").await.release().await.expect("release");
        let mut tasks = JoinSet::new();
        let guard = lock(&locks, "k").await;
        for _ in 0..200 {
            let mut waiting = Box::pin({
                let locks = locks.clone();
                async move { lock(&locks, "k").await.release().await.expect("release") }
            });
            assert!(support_locks::poll_once(&mut waiting).is_none());
            tasks.spawn(waiting);
        }
        server.reset_stats();
        guard.release().await.expect("release");
        while let Some(ended) = soon("the tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
        // A few calls to reserve more tokens, and the last release.
        assert!(server.script_calls() <= 20, "{:?}", server.commands());
        assert_eq!(server.publishes(), 0);
    }

    async fn readers_of_one_process_rarely_need_the_server(store: &TestStore) {
        rarely_need_the_server(store, |locks| locks.lock("k").shared()).await;
    }

    async fn permits_of_one_process_rarely_need_the_server(store: &TestStore) {
        rarely_need_the_server(store, |locks| locks.permits("k", 2)).await;
    }

    async fn a_free_key_costs_two_plain_commands_and_one_script_call(store: &TestStore) {
        let server = store.server();
        let locks = connect(store, LONG_TTL).await;
        // The first lock in a slot raises its counter and loads the scripts.
        for _ in 0..2 {
            lock(&locks, "k").await.release().await.expect("release");
        }
        server.reset_stats();
        let locked = 50;
        for _ in 0..locked {
            lock(&locks, "k").await.release().await.expect("release");
        }
        // Per lock, rounded: on a busy machine, a few checks of the shard and the inbox fall into
        // this period.
        let per_lock = |(name, calls): (String, u64)| (name, (calls + locked / 2) / locked);
        let mut sent: BTreeMap<_, _> = commands(server).into_iter().map(per_lock).collect();
        sent.retain(|_, &mut calls| calls > 0);
        let expected = ["del", "evalsha", "exists", "get", "incrby", "set"];
        let expected: BTreeMap<_, _> = expected.map(|name| (name.to_owned(), 1)).into();
        assert_eq!(sent, expected);
    }
}
