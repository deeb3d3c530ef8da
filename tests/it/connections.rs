//! Connections that break, stall, or can't be made.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager, LossReason};
use support::proxy::Proxy;
use support::quorum::MAX_TTL;
use support::{ClientType, PATIENCE, RedisServer, worker};
use support_locks::{
    Kind, MARGIN, Measured, STORE_TIMEOUT, TestStore, builder_of, hand_off, lock, lock_in_time, lock_keys,
    on_each_store, poll_once, soon, until, until_queued,
};
use tokio::task::JoinSet;

/// The number of keys of a manager that may wait for a shard that is down.
#[cfg(target_os = "linux")]
const WAIT_IN_OUTAGE_MAX: usize = 10_000;
#[cfg(target_os = "linux")]
const ASKERS: usize = WAIT_IN_OUTAGE_MAX + 2_000;
#[cfg(target_os = "linux")]
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(100);
/// A busy machine takes its time for so many requests.
#[cfg(target_os = "linux")]
const ASKING_MAX: Duration = Duration::from_secs(120);

/// Connects a manager whose store timeout is short, so that its requests fail soon. A busy machine
/// may take longer to connect it.
async fn connect_in_time(builder: Builder) -> LockManager {
    let mut connected = None;
    until("the manager is connected", async || {
        connected = builder.clone().connect().await.ok();
        connected.is_some()
    })
    .await;
    connected.expect("just seen")
}

/// Requests new keys while the servers hang, until many requests have failed and one was refused
/// because too many keys were waiting. Reports the growth of this process's memory. Afterwards
/// reports the milliseconds until a lock was acquired.
#[cfg(target_os = "linux")]
#[tokio::main]
pub(crate) async fn request_new_keys_forever(me: &worker::Current) {
    let locks = connect_in_time(builder_of(me).store_timeout(Duration::from_millis(500))).await;
    lock_in_time(&locks, "first").await;
    me.send("connected");
    assert_eq!(me.recv().as_deref(), Some("begin"));
    let before = resident_kib("VmRSS:");
    request_until_many_failed(&locks).await;
    request_until_one_is_refused(&locks).await;
    me.send(resident_kib("VmHWM:").saturating_sub(before).to_string());
    assert_eq!(me.recv().as_deref(), Some("resumed"));
    let begun = Instant::now();
    let _last = lock(&locks, "last").await;
    me.send(begun.elapsed().as_millis().to_string());
}

#[cfg(target_os = "linux")]
async fn request_until_many_failed(locks: &LockManager) {
    let failed = Arc::new(AtomicU64::new(0));
    let mut askers = JoinSet::new();
    for asker in 0..ASKERS {
        let (locks, failed) = (locks.clone(), Arc::clone(&failed));
        askers.spawn(async move {
            for number in 0_u64.. {
                match locks.lock(format!("{asker}-{number}")).await {
                    Ok(guard) => panic!("{guard:?} while all servers hang"),
                    Err(error) if matches!(error.kind(), LockErrorKind::ShardDown | LockErrorKind::Unavailable) => {}
                    Err(error) => panic!("{error}"),
                }
                failed.fetch_add(1, Ordering::Relaxed);
                tokio::time::sleep(PAUSE_AFTER_ERROR).await;
            }
        });
    }
    support::eventually("enough requests failed", ASKING_MAX, || {
        while let Some(ended) = askers.try_join_next() {
            ended.expect("an asker keeps running");
        }
        failed.load(Ordering::Relaxed) >= 2 * ASKERS as u64
    })
    .await;
    askers.shutdown().await;
}

/// Each request waits until the servers return, so the limit is reached on a slow machine too.
#[cfg(target_os = "linux")]
async fn request_until_one_is_refused(locks: &LockManager) {
    let mut askers = JoinSet::new();
    for asker in 0..ASKERS {
        let locks = locks.clone();
        askers.spawn(async move { locks.lock(format!("patient-{asker}")).timeout(2 * ASKING_MAX).await });
    }
    let first = tokio::time::timeout(ASKING_MAX, askers.join_next()).await;
    let first = first.expect("an answer").expect("some ask");
    let error = first.expect("a task").expect_err("all servers hang");
    assert_eq!(error.kind(), LockErrorKind::ShardDown, "{error}");
    assert_eq!(error.limit(), Some(WAIT_IN_OUTAGE_MAX), "{error}");
    assert!(error.in_use() >= error.limit(), "{error}");
    askers.shutdown().await;
}

/// This process's memory, from a line of `/proc/self/status`.
#[cfg(target_os = "linux")]
pub(crate) fn resident_kib(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("Linux tells");
    let value = status
        .lines()
        .find_map(|told| told.strip_prefix(line))
        .expect("the line exists");
    value.trim().trim_end_matches("kB").trim().parse().expect("a number")
}

on_each_store! {
    on(pausable cluster, own);

    /// Regression: each request left behind a task with a half-open connection, 66 KB each.
    #[cfg(target_os = "linux")]
    async fn hung_server_costs_bounded_memory_and_locks_soon_after_recovery(store: &TestStore) {
        let mut asker = store.worker("asker", &[]);
        assert_eq!(asker.line(), "connected");
        let servers = store.keep_servers();
        servers.stop_all();
        asker.send("begin");
        let grown_kib = asker.line_within(2 * ASKING_MAX).expect("the growth");
        let grown_kib: u64 = grown_kib.parse().expect("a number");
        println!("memory grew by {grown_kib} KiB");
        assert!(grown_kib < 700 * 1024, "{grown_kib} KiB");
        servers.resume_all();
        asker.send("resumed");
        // A manager that has left nothing behind needs some time as well, on a busy machine more.
        let begun = Instant::now();
        until("a new manager has a lock", async || {
            let Ok(locks) = store.builder().connect().await else {
                return false;
            };
            locks.lock("new").await.is_ok()
        })
        .await;
        let new = begun.elapsed();
        let millis: u64 = asker.line().parse().expect("a number");
        println!("next lock acquired after {millis} ms, by a new manager after {new:?}");
        assert!(u128::from(millis) < 10_000.max(3 * new.as_millis()), "{millis} ms, a new manager {new:?}");
    }
}

on_each_store! {
    on(pausable, own);

    async fn killed_server_is_an_error_and_a_loss_in_time_until_it_restarts(store: &TestStore) {
        let servers = store.servers();
        let (ttl, limit) = (Duration::from_secs(2), Duration::from_secs(2));
        let builder = store.builder().ttl(ttl).store_timeout(limit);
        let locks = builder.connect().await.expect("connect");
        let guard = lock(&locks, "k").await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { locks.lock("k").await }
        });
        let killed = Instant::now();
        servers.kill();
        let failing = async {
            for key in ["other", "more"] {
                let error = soon("an error", locks.lock(key).fail_fast().into_future())
                    .await
                    .expect_err("no server");
                assert!(
                    (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("acquire")),
                    "{error}"
                );
                assert!(error.is_retryable() && error.to_string().contains(key), "{error}");
            }
            killed.elapsed()
        };
        let losing = async { (soon("the loss", guard.lost()).await, killed.elapsed()) };
        let (failed, (reason, lost)) = tokio::join!(failing, losing);
        // There are two requests, and a refused connection is noticed before the store timeout.
        assert!(failed < 2 * limit, "{failed:?}");
        assert_eq!(reason, LossReason::Expired);
        assert!(lost < ttl + 3 * MARGIN, "{lost:?}");
        assert!(guard.release().await.expect_err("the lock was lost").is_lost());
        // Waiters receive an error instead of waiting on.
        let error = soon("the waiter", waiting)
            .await
            .expect("a task")
            .expect_err("no server");
        assert!(error.kind() == LockErrorKind::Unavailable, "{error}");

        servers.restart();
        until("the manager has found the server again", async || {
            match locks.lock("k").await {
                Ok(guard) => guard.release().await.is_ok(),
                Err(error) => {
                    assert!(error.is_retryable(), "{error}");
                    false
                }
            }
        })
        .await;
        // The inbox has recovered, too: hand-offs between managers do not wait for the TTL.
        let other = store.manager().await;
        let guard = lock(&other, "k").await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { lock(&locks, "k").await }
        });
        until_queued(&other, "k", 1).await;
        let started = Instant::now();
        guard.release().await.expect("release");
        let guard = soon("the hand-off", waiting).await.expect("a task");
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        guard.release().await.expect("release");
        store.is_tidy().await;
    }

    async fn request_survives_an_outage_up_to_its_timeout(store: &TestStore) {
        let (servers, limit) = (store.servers(), Duration::from_secs(1));
        let locks = connect_in_time(store.builder().store_timeout(limit)).await;
        let other = store.manager().await;
        let patient = |key: &'static str| {
            let request = locks.lock(key).timeout(Duration::from_secs(60));
            tokio::spawn(async move { request.await.map(drop) })
        };
        let guard = lock(&other, "k").await;
        let queued = patient("k");
        until_queued(&other, "k", 1).await;
        servers.kill_all();
        let killed = Instant::now();
        let new = patient("new");

        let unavailable = |error: LockError| {
            assert_eq!(error.kind(), LockErrorKind::Unavailable, "{error}");
            error.waited().expect("an outage has a duration")
        };
        let error = soon("an error", locks.lock("a").into_future()).await.expect_err("no server");
        assert!(unavailable(error) >= limit);
        let error = soon("an error", locks.lock("b").timeout(2 * limit).into_future());
        assert!(unavailable(error.await.expect_err("no server")) >= 2 * limit);
        let asked = Instant::now();
        let error = soon("an error", locks.lock("c").fail_fast().into_future()).await.expect_err("no server");
        assert!(unavailable(error) <= asked.elapsed());
        assert!(locks.try_lock("d").await.is_err());
        assert!(killed.elapsed() >= 3 * limit);
        assert!(!new.is_finished() && !queued.is_finished());

        servers.restart_all();
        soon("a new request", new).await.expect("a task").expect("after the outage");
        drop(guard);
        soon("the waiting request", queued).await.expect("a task").expect("after the outage");
        store.is_clean().await;
    }

    async fn stall_shorter_than_the_store_timeout_is_no_error(store: &TestStore) {
        let servers = store.servers();
        // On a busy machine, the stalls may be longer by seconds.
        let locks = store.builder().store_timeout(PATIENCE).connect().await.expect("connect");
        for _ in 0..5 {
            servers.stop_all();
            let acquiring = tokio::spawn({
                let locks = locks.clone();
                async move { lock(&locks, "k").await }
            });
            // Both replies are delayed, whichever request the stall hits.
            tokio::time::sleep(Duration::from_millis(60)).await;
            servers.resume_all();
            let guard = soon("the lock", acquiring).await.expect("a task");
            servers.stop_all();
            let releasing = tokio::spawn(guard.release());
            tokio::time::sleep(Duration::from_millis(60)).await;
            servers.resume_all();
            soon("the release", releasing).await.expect("a task").expect("release");
        }
        store.is_tidy().await;
    }
}

// A quorum detects silent nodes sooner; it has its own tests.
on_each_store! { on(redis etcd, own);
    async fn a_server_that_does_not_answer_is_an_error_after_the_store_timeout(store: &TestStore) {
        let servers = store.servers();
        let limit = Duration::from_secs(2);
        let locks = connect_in_time(store.builder().store_timeout(limit)).await;
        lock_in_time(&locks, "k").await;
        servers.stop_all();
        let started = Instant::now();
        let error = soon("an error", locks.lock("k").into_future())
            .await
            .expect_err("no answer");
        assert!(started.elapsed() >= limit, "{:?}", started.elapsed());
        assert!(started.elapsed() < 2 * limit, "{:?}", started.elapsed());
        assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("store_timeout"), "{error}");
        // A shorter wait limit ends the wait first.
        let error = locks.lock("j").timeout(limit / 10).await.expect_err("no answer");
        assert!(error.is_timeout(), "{error}");

        servers.resume_all();
        // Whatever those requests did after all is undone: no waiter waits for the TTL of ten
        // seconds.
        let started = Instant::now();
        let other = store.manager().await;
        for key in ["k", "j"] {
            lock(&other, key).await.release().await.expect("release");
        }
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        store.is_clean().await;
    }
}

on_each_store! {
    on(redis_nodes, own);

    async fn a_hand_off_survives_the_loss_of_the_subscription_alone(store: &TestStore) {
        let servers = store.servers();
        let (holder, waiter) = (store.manager().await, store.manager().await);
        // A missed grant costs most of the TTL, which is ten seconds or that of a quorum. The delay
        // before the first reconnect is a few milliseconds.
        let bound = match store.kind() {
            Kind::Redlock => MAX_TTL * 4 / 5,
            _ => Duration::from_secs(5),
        };
        for round in 0..20 {
            let guard = lock(&holder, "k").await;
            let waiting = tokio::spawn({
                let waiter = waiter.clone();
                async move { lock(&waiter, "k").await }
            });
            until_queued(&holder, "k", 1).await;
            // In half of the rounds the grant is published while there is no subscriber, in the
            // others afterwards.
            let inboxes = servers.inboxes(store.namespace());
            assert!(inboxes > 0);
            servers.cut(ClientType::PubSub);
            if round % 2 == 0 {
                until("the inboxes are back", async || servers.inboxes(store.namespace()) >= inboxes).await;
            }
            let started = Instant::now();
            guard.release().await.expect("release");
            let guard = soon("the hand-off", waiting).await.expect("a task");
            assert!(started.elapsed() < bound, "{:?}", started.elapsed());
            guard.release().await.expect("release");
            until("the inboxes are back", async || servers.inboxes(store.namespace()) >= inboxes).await;
        }
        store.is_tidy().await;
    }

    async fn subscription_reconnects_are_counted(store: &TestStore) {
        let measured = Measured::connect(store.builder()).await;
        let reconnects = || measured.value("shardlock_subscription_reconnects_total");
        // In a cluster, a manager has an inbox only once it has waited.
        hand_off(&store.manager().await, &measured.locks, "k").await;
        assert_eq!(reconnects(), 0.0);
        store.servers().cut(ClientType::PubSub);
        // In a quorum, each node has one.
        let cut = if store.kind() == Kind::Redlock { 5.0 } else { 1.0 };
        until("the reconnects are counted", async || reconnects() == cut).await;
        hand_off(&store.manager().await, &measured.locks, "k").await;
        assert_eq!(reconnects(), cut);
    }

    async fn broken_command_connection_is_replaced_without_an_error(store: &TestStore) {
        let servers = store.servers();
        // A quorum waits for a majority for less than half of the store timeout, and its nodes are
        // down after a cut until their next probe.
        let builder = || store.builder().store_timeout(PATIENCE);
        let (one, other) = (builder().connect().await.expect("connect"), builder().connect().await.expect("connect"));
        let guard = lock(&one, "held").await;
        for _ in 0..20 {
            servers.cut(ClientType::Normal);
            let guard = one.lock("k").await.expect("on a new connection");
            servers.cut(ClientType::Normal);
            guard.release().await.expect("on a new connection");
            servers.cut(ClientType::Normal);
            assert!(other.try_lock("held").await.expect("on a new connection").is_none());
        }
        guard.release().await.expect("the lock was held throughout");
        store.is_empty(&one, "held").await;
    }

    async fn flushed_scripts_are_reloaded_without_an_error(store: &TestStore) {
        // Long enough for a machine that is busy beside the flushes.
        let ttl = MAX_TTL;
        let builder = || store.builder().ttl(ttl).max_burst(2).store_timeout(PATIENCE);
        let over = Arc::new(AtomicBool::new(false));
        let flushing = std::thread::spawn({
            let (servers, over) = (store.keep_servers(), Arc::clone(&over));
            move || {
                while !over.load(Ordering::Relaxed) {
                    servers.command(&["SCRIPT", "FLUSH"]);
                }
            }
        });
        let holder = builder().connect().await.expect("connect");
        let held = lock(&holder, "held").await;
        let mut tasks = JoinSet::new();
        for _ in 0..3 {
            let locks = builder().connect().await.expect("connect");
            for _ in 0..4 {
                let locks = locks.clone();
                tasks.spawn(async move {
                    for _ in 0..20 {
                        assert!(locks.try_lock("held").await.expect("try").is_none());
                        lock(&locks, "k").await.release().await.expect("release");
                    }
                });
            }
        }
        while let Some(ended) = soon("the tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
        // Renewals work, too: without them, the lease would end before that.
        let lost = tokio::time::timeout(ttl, held.lost()).await;
        assert!(lost.is_err() && held.is_valid());
        held.release().await.expect("release");
        over.store(true, Ordering::Relaxed);
        flushing.join().expect("a thread");
        store.is_clean().await;
    }
}

/// Closes the connections whose names end with `purpose`.
fn cut_named(server: &RedisServer, purpose: &str) {
    for id in named(server, purpose) {
        server.command(&["CLIENT", "KILL", "ID", &id]);
    }
}

/// The ids of those connections.
pub(crate) fn named(server: &RedisServer, purpose: &str) -> Vec<String> {
    let list: String = server.query(&["CLIENT", "LIST"]);
    let field = |client: &str, name| {
        client
            .split(' ')
            .find_map(|field| field.strip_prefix(name).map(str::to_owned))
    };
    let is_it = |client: &&str| {
        let name = field(client, "name=").unwrap_or_default();
        name.starts_with("shardlock:") && name.ends_with(purpose)
    };
    list.lines()
        .filter(is_it)
        .filter_map(|client| field(client, "id="))
        .collect()
}

on_each_store! {
    on(redis_nodes, own);

    async fn connection_limit_of_a_server_loses_no_lock_and_is_reported(store: &TestStore) {
        let nodes = store.servers().nodes();
        // Long enough for servers that are busy beside the test.
        let ttl = MAX_TTL;
        let locks = store.builder().ttl(ttl).connections(1).connect().await.expect("connect");
        let guard = lock(&locks, "k").await;
        for node in &nodes {
            // More clients than that are connected already, and they stay connected.
            node.command(&["CONFIG", "SET", "maxclients", "1"]);
        }
        // Without renewals, the lease would end before that.
        let held = async |what: &str| {
            let lost = tokio::time::timeout(ttl, guard.lost()).await;
            assert!(lost.is_err() && guard.is_valid(), "{what}: {lost:?}");
        };
        held("the connection for renewals is open").await;

        // A manager listens for the reason for a fifth of a second; a busy server may take longer.
        until("the error names the limit", async || {
            let error = store.builder().connect().await.expect_err("no more connections");
            assert!(error.is_retryable(), "{error}");
            error.to_string().contains("max number of clients")
        })
        .await;

        for node in &nodes {
            // On a busy machine, a manager may have given up its connection to a node before.
            cut_named(node, ":renewals");
            assert_eq!(named(node, ":renewals"), [""; 0]);
        }
        held("another connection takes its place").await;

        for node in &nodes {
            node.command(&["CONFIG", "SET", "maxclients", "10000"]);
        }
        until("there is a connection for renewals again", async || {
            nodes.iter().any(|node| !named(node, ":renewals").is_empty())
        })
        .await;
        guard.release().await.expect("the lock was held throughout");
    }
}

#[tokio::test]
async fn connection_names_state_their_purpose() {
    let server = RedisServer::start();
    let builder = LockManager::builder().shard(server.url()).connections(2);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    assert_eq!(named(&server, &format!(":{}:requests", locks.id())).len(), 2);
    assert_eq!(named(&server, &format!(":{}:renewals", locks.id())).len(), 1);
}

/// Regression: a task may have started a request and then be busy with something else, for example
/// in a `select!` whose other branch is running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn unpolled_request_does_not_block_reconnection() {
    let server = RedisServer::start();
    let locks = support_locks::connect(&server.url()).await;
    server.kill();
    locks.lock("{one}x").await.expect_err("the server does not answer");
    // In the same slot, and thus on the same connection.
    let mut begun = Box::pin(locks.lock("{one}a").into_future());
    assert!(poll_once(&mut begun).is_none());
    server.restart();
    lock(&locks, "{one}b").await.release().await.expect("release");
    drop(begun);
    until("nothing is left", async || lock_keys(&server).is_empty()).await;
}

/// A device on the path has lost the connections' state, and neither side is notified.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlives_connections_that_fall_silent() {
    let server = &RedisServer::start();
    // A renewal of the shorter lease waits for less time on a silent connection than a request.
    let leases = [4_500, 6_000].map(Duration::from_millis).map(|ttl| async move {
        let proxy = Proxy::start(server.address());
        let locks = LockManager::builder().shard(proxy.url()).ttl(ttl);
        let locks = locks
            .store_timeout(Duration::from_secs(3))
            .connect()
            .await
            .expect("connect");
        for _ in 0..2 {
            let guard = lock(&locks, &format!("{ttl:?}")).await;
            proxy.silence();
            // Without a renewal on a new connection, the lease would end before that.
            let lost = tokio::time::timeout(ttl, guard.lost()).await;
            assert!(lost.is_err() && guard.is_valid(), "{ttl:?}: {lost:?}");
            guard.release().await.expect("on a new connection");
        }
    });
    join_all(leases).await;
}

/// Regression: the request was sent again and again on the same connection, until its own timeout.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiting_request_leaves_a_silent_connection() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    let locks = LockManager::builder().shard(proxy.url()).store_timeout(STORE_TIMEOUT);
    let locks = locks.connect().await.expect("connect");
    lock(&locks, "k").await.release().await.expect("release");
    proxy.silence();
    let guard = locks.lock("k").timeout(PATIENCE).await.expect("lock");
    guard.release().await.expect("release");
}

/// The server executes requests, but its replies arrive late or never.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stalled_acquire_of_a_free_key_leaves_the_key_usable() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    // Much longer than a reply is held back, also on a busy machine.
    let limit = Duration::from_secs(3);
    let builder = |limit| LockManager::builder().shard(proxy.url()).store_timeout(limit);
    let locks = builder(limit).connect().await.expect("connect");
    let hasty = connect_in_time(builder(Duration::from_millis(400))).await;
    let others = support_locks::connect(&server.url()).await;
    // The manager's first lock stores the shard map.
    lock(&locks, "other").await.release().await.expect("release");
    for round in 0..8 {
        // In the first rounds the server does not know the scripts yet; in half of the rounds
        // another manager waits meanwhile.
        proxy.hold_back();
        let acquiring = tokio::spawn(locks.lock("k").into_future());
        until("the lease is taken", async || !lock_keys(&server).is_empty()).await;
        let waiting = (round % 2 == 0).then(|| tokio::spawn(others.lock("k").into_future()));
        if waiting.is_some() {
            until_queued(&others, "k", 1).await;
        }
        tokio::time::sleep(Duration::from_millis(60)).await;
        assert!(!acquiring.is_finished(), "the reply is held back");
        proxy.let_through();
        let guard = soon("the lock", acquiring).await.expect("a task").expect("lock");
        assert!(guard.is_valid());
        guard.release().await.expect("release");
        if let Some(waiting) = waiting {
            let guard = soon("the waiter", waiting).await.expect("a task").expect("lock");
            guard.release().await.expect("release");
        }
    }

    // Longer than the store timeout: the request fails, and the lease whose reply was lost is
    // released. Otherwise it would last for the rest of the TTL, almost ten seconds.
    proxy.hold_back();
    let error = soon("an error", hasty.lock("k").into_future())
        .await
        .expect_err("no answer");
    assert!(
        error.kind() == LockErrorKind::Unavailable && error.is_retryable(),
        "{error}"
    );
    let started = Instant::now();
    lock(&others, "k").await.release().await.expect("release");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    proxy.let_through();
    lock_in_time(&hasty, "k").await;
    until("nothing is left", async || lock_keys(&server).is_empty()).await;
}
