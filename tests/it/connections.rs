//! Connections that break, stall, or can't be made.

use std::future::IntoFuture;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager, LossReason, namespace};
use support::filter::{Filter, Verdict};
use support::proxy::Proxy;
use support::quorum::MAX_TTL;
#[cfg(feature = "tls")]
use support::tls::{Authority, TlsServer};
use support::{ClientType, Cluster, PATIENCE, Quorum, RedisServer, worker};
use support_locks::{
    Kind, Measured, TestStore, builder_of, hand_off, lock, lock_keys, on_each_store, poll_once, soon, until,
    until_queued, waiting,
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

/// Requests new keys while the servers hang, until many requests have failed and one was refused
/// because too many keys were waiting. Reports the growth of this process's memory. Afterwards
/// reports the milliseconds until a lock was acquired.
#[cfg(target_os = "linux")]
#[tokio::main]
pub(crate) async fn ask_for_ever_new_keys(me: &worker::Current) {
    let locks = builder_of(me)
        .store_timeout(Duration::from_millis(500))
        .connect()
        .await
        .expect("connect");
    lock(&locks, "first").await.release().await.expect("release");
    me.say("connected");
    assert_eq!(me.hear().as_deref(), Some("begin"));
    let before = resident_kib("VmRSS:");
    ask_until_many_failed(&locks).await;
    ask_until_one_is_refused(&locks).await;
    me.say(resident_kib("VmHWM:").saturating_sub(before).to_string());
    assert_eq!(me.hear().as_deref(), Some("they go on"));
    let begun = Instant::now();
    let _last = lock(&locks, "last").await;
    me.say(begun.elapsed().as_millis().to_string());
}

#[cfg(target_os = "linux")]
async fn ask_until_many_failed(locks: &LockManager) {
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
async fn ask_until_one_is_refused(locks: &LockManager) {
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
fn resident_kib(line: &str) -> u64 {
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
    async fn a_server_that_hangs_costs_bounded_memory_and_its_locks_are_had_soon_after(store: &TestStore) {
        let mut asker = store.worker("asker", &[]);
        assert_eq!(asker.line(), "connected");
        let servers = store.keep_servers();
        servers.stand_still();
        asker.send("begin");
        let grown_kib = asker.line_within(2 * ASKING_MAX).expect("the growth");
        let grown_kib: u64 = grown_kib.parse().expect("a number");
        println!("memory grew by {grown_kib} KiB");
        assert!(grown_kib < 700 * 1024, "{grown_kib} KiB");
        servers.go_on();
        asker.send("they go on");
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

    async fn a_killed_server_is_an_error_in_time_and_a_loss_in_time_and_its_restart_mends_it(store: &TestStore) {
        let servers = store.servers();
        let locks = store.short_lived_manager().await;
        let guard = lock(&locks, "k").await;
        let waiting = tokio::spawn({
            let locks = locks.clone();
            async move { locks.lock("k").await }
        });
        let killed = Instant::now();
        servers.kill();
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
        // The store timeout is one second; a refused connection is noticed sooner.
        assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());

        assert_eq!(soon("the loss", guard.lost()).await, LossReason::Expired);
        assert!(
            killed.elapsed() < store.short_ttl() + Duration::from_secs(2),
            "{:?}",
            killed.elapsed()
        );
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

    async fn a_request_survives_an_outage_for_as_long_as_it_may_wait(store: &TestStore) {
        let (servers, limit) = (store.servers(), Duration::from_secs(1));
        let builder = || store.builder().store_timeout(limit);
        let (locks, other) = (builder().connect().await.expect("connect"), builder().connect().await.expect("connect"));
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

    async fn a_stall_shorter_than_the_store_timeout_strands_nobody(store: &TestStore) {
        let servers = store.servers();
        let locks = store.manager().await;
        for _ in 0..5 {
            servers.stand_still();
            let acquiring = tokio::spawn({
                let locks = locks.clone();
                async move { lock(&locks, "k").await }
            });
            // Both replies are delayed, whichever request the stall hits.
            tokio::time::sleep(Duration::from_millis(60)).await;
            servers.go_on();
            let guard = soon("the lock", acquiring).await.expect("a task");
            servers.stand_still();
            let releasing = tokio::spawn(guard.release());
            tokio::time::sleep(Duration::from_millis(60)).await;
            servers.go_on();
            soon("the release", releasing).await.expect("a task").expect("release");
        }
        store.is_tidy().await;
    }
}

// A quorum detects silent nodes sooner; it has its own tests.
on_each_store! { on(redis etcd, own);
    async fn a_server_that_does_not_answer_is_an_error_after_the_store_timeout(store: &TestStore) {
        let servers = store.servers();
        let limit = Duration::from_secs(1);
        let builder = store.builder().store_timeout(limit);
        let locks = builder.connect().await.expect("connect");
        lock(&locks, "k").await.release().await.expect("release");
        servers.stand_still();
        let started = Instant::now();
        let error = soon("an error", locks.lock("k").into_future())
            .await
            .expect_err("no answer");
        assert!(started.elapsed() >= limit, "{:?}", started.elapsed());
        assert!(
            started.elapsed() < limit + Duration::from_secs(1),
            "{:?}",
            started.elapsed()
        );
        assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
        assert!(error.to_string().contains("store_timeout"), "{error}");
        // A shorter wait limit ends the wait first.
        let error = locks.lock("j").timeout(limit / 3).await.expect_err("no answer");
        assert!(error.is_timeout(), "{error}");

        servers.go_on();
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
                until("the inboxes are back", async || servers.inboxes(store.namespace()) == inboxes).await;
            }
            let started = Instant::now();
            guard.release().await.expect("release");
            let guard = soon("the hand-off", waiting).await.expect("a task");
            // The TTL is ten seconds, and the delay before the first reconnect a few milliseconds.
            assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
            guard.release().await.expect("release");
            until("the inboxes are back", async || servers.inboxes(store.namespace()) == inboxes).await;
        }
        store.is_tidy().await;
    }

    async fn a_subscription_that_is_cut_off_and_made_again_is_counted(store: &TestStore) {
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

    async fn a_broken_command_connection_is_replaced_unseen(store: &TestStore) {
        let servers = store.servers();
        let (one, other) = (store.manager().await, store.manager().await);
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

    async fn forgotten_scripts_are_never_seen(store: &TestStore) {
        let builder = || store.builder().ttl(store.short_ttl()).max_burst(2);
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
        // Renewals work, too.
        let lost = tokio::time::timeout(2 * store.short_ttl(), held.lost()).await;
        assert!(lost.is_err() && held.is_valid());
        held.release().await.expect("release");
        over.store(true, Ordering::Relaxed);
        flushing.join().expect("a thread");
        store.is_clean().await;
    }
}

/// Closes the connections whose names end with `purpose`, and returns their number.
fn cut_named(server: &RedisServer, purpose: &str) -> usize {
    let ids = named(server, purpose);
    for id in &ids {
        server.command(&["CLIENT", "KILL", "ID", id]);
    }
    ids.len()
}

/// The ids of those connections.
fn named(server: &RedisServer, purpose: &str) -> Vec<String> {
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

    async fn a_server_that_takes_no_more_connections_costs_no_lock_and_says_so(store: &TestStore) {
        let nodes = store.servers().nodes();
        let ttl = Duration::from_secs(1);
        let locks = store.builder().ttl(ttl).connections(1).connect().await.expect("connect");
        let guard = lock(&locks, "k").await;
        for node in &nodes {
            // More clients than that are connected already, and they stay connected.
            node.command(&["CONFIG", "SET", "maxclients", "1"]);
        }
        let held = async |what: &str| {
            let lost = tokio::time::timeout(2 * ttl, guard.lost()).await;
            assert!(lost.is_err() && guard.is_valid(), "{what}: {lost:?}");
        };
        held("the connection for renewals is open").await;

        let error = store.builder().connect().await.expect_err("no more connections");
        assert!(error.to_string().contains("max number of clients"), "{error}");
        assert!(error.is_retryable(), "{error}");

        let cut: usize = nodes.iter().map(|node| cut_named(node, ":renewals")).sum();
        assert_eq!(cut, nodes.len());
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

/// The largest number of pooled connections that a manager opens to a server.
const POOL_MAX: usize = 4;

/// The pooled connections of a manager to these servers.
fn pooled(nodes: &[&RedisServer], locks: &LockManager) -> usize {
    let purpose = format!(":{}:pool", locks.id());
    nodes.iter().map(|node| named(node, &purpose).len()).sum()
}

on_each_store! {
    on(redis_nodes, own);

    async fn locks_open_no_pooled_connection(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let watcher = store.manager().await;
        for (from, to) in [(&one, &other), (&other, &one)] {
            let guard = lock(from, "k").await;
            let waiting = waiting(to, "k");
            until_queued(&watcher, "k", 1).await;
            guard.release().await.expect("release");
            soon("the hand-off", waiting).await.expect("a task").release().await.expect("release");
        }
        // The holder renews its lease while the other one waits, which is checked every few
        // seconds, as both managers probe the servers.
        let guard = lock(&one, "k").await;
        let waiting = waiting(&other, "k");
        until_queued(&watcher, "k", 1).await;
        let nodes = store.servers().nodes();
        let calls = |name: &str| -> u64 {
            let calls = nodes.iter().map(|node| node.commands().get(name).copied().unwrap_or(0));
            calls.sum()
        };
        let before = calls("zcard");
        until("the waiting key is checked", async || calls("zcard") > before).await;
        guard.release().await.expect("the lock was held throughout");
        soon("the hand-off", waiting).await.expect("a task").release().await.expect("release");
        assert_eq!((pooled(&nodes, &one), pooled(&nodes, &other)), (0, 0));
        // Only the inspecting manager has one.
        assert!(pooled(&nodes, &watcher) >= 1);
    }

    async fn concurrent_inspections_share_few_connections_which_are_closed_when_idle(store: &TestStore) {
        let locks = store.manager().await;
        let guard = lock(&locks, "k").await;
        let nodes = store.servers().nodes();
        let mut inspections = JoinSet::new();
        for _ in 0..200 {
            let locks = locks.clone();
            inspections.spawn(async move { locks.inspect("k").await.expect("inspect").holder });
        }
        let (mut done, mut seen) = (0, 0);
        while let Some(inspected) = soon("the inspections", inspections.join_next()).await {
            let holder = inspected.expect("a task").expect("a holder");
            assert_eq!(holder.owner, guard.owner());
            if done % 20 == 0 {
                seen = seen.max(pooled(&nodes, &locks));
            }
            done += 1;
        }
        assert!((1..=POOL_MAX * nodes.len()).contains(&seen), "{seen} connections");
        until("idle connections are closed", async || pooled(&nodes, &locks) == 0).await;
        locks.inspect("k").await.expect("on a new connection");
        guard.release().await.expect("release");
    }

    async fn inspections_and_erasing_survive_the_loss_of_all_connections(store: &TestStore) {
        let locks = store.manager().await;
        for round in 0..10 {
            lock(&locks, "k").await.release().await.expect("release");
            if round % 2 == 0 {
                // Connections that are idle in the pool are lost, too.
                locks.inspect("k").await.expect("inspect");
            }
            store.servers().cut(ClientType::Normal);
            locks.inspect("k").await.expect("on a new connection");
            store.servers().cut(ClientType::Normal);
            if store.kind() == Kind::Redlock {
                // Its nodes are down until their next probe, and no node is left out.
                until("the namespace is erased", async || namespace::erase(&locks).await.is_ok()).await;
            } else {
                namespace::erase(&locks).await.expect("on a new connection");
            }
            assert_eq!(store.lock_keys(), [""; 0]);
        }
    }
}

/// A device on the path has lost the connections' state, and neither side is notified.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspections_and_erasing_work_while_all_earlier_connections_are_silent() {
    let (server, cluster) = (RedisServer::start(), Cluster::start(1, 0));
    let node = &cluster.nodes()[0];
    let proxies = [server.address(), node.address()].map(Proxy::start);
    // The slot map leads through the proxy as well.
    let port = proxies[1].port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let urls = [proxies[0].url(), format!("redis+cluster://{}", proxies[1].address())];
    for (url, proxy) in urls.iter().zip(&proxies) {
        let limit = Duration::from_secs(4);
        let builder = LockManager::builder().shard(url).store_timeout(limit);
        let locks = builder.connect().await.expect("connect");
        let guard = lock(&locks, "k").await;
        for _ in 0..2 {
            // Leaves several connections in the pool.
            let inspections: JoinSet<_> = (0..20)
                .map(|_| {
                    let locks = locks.clone();
                    async move { locks.inspect("k").await.expect("inspect") }
                })
                .collect();
            soon("the inspections", inspections.join_all()).await;
            proxy.silence();
            let started = Instant::now();
            let seen = locks.inspect("k").await.expect("on a new connection");
            assert_eq!(seen.holder.expect("a holder").owner, guard.owner());
            assert!(started.elapsed() < limit / 2, "{:?}", started.elapsed());
        }
        drop(guard);
        proxy.silence();
        let started = Instant::now();
        assert!(namespace::erase(&locks).await.expect("on a new connection") >= 1);
        assert!(started.elapsed() < limit / 2, "{:?}", started.elapsed());
    }
}

/// A dead connection is not a dead server.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_connection_of_an_idle_manager_is_replaced_and_its_shard_stays_up() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    let measured = Measured::connect(LockManager::builder().shard(proxy.url())).await;
    let purpose = format!(":{}:renewals", measured.locks.id());
    let before = named(&server, &purpose);
    assert_eq!(before.len(), 1);
    proxy.silence();
    until("the connection is replaced", async || {
        assert_eq!(measured.value("shardlock_shard_up"), 1.0);
        let now = named(&server, &purpose);
        now.len() == 1 && now != before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspections_work_on_a_server_that_takes_no_more_connections() {
    let server = RedisServer::start();
    let locks = LockManager::connect(&server.url()).await.expect("connect");
    let guard = lock(&locks, "k").await;
    server.command(&["CONFIG", "SET", "maxclients", "1"]);
    let seen = locks.inspect("k").await.expect("on a kept connection");
    assert_eq!(seen.holder.expect("a holder").owner, guard.owner());
    guard.release().await.expect("release");
}

/// An inspection from a runtime that then ends must not leave its connection without a driver.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_connections_outlive_the_runtime_of_their_first_user() {
    let server = RedisServer::start_with(&["--requirepass", "s3cret"]);
    let url = format!("redis://:s3cret@{}/3", server.address());
    let locks = LockManager::connect(&url).await.expect("connect");
    let once = {
        let locks = locks.clone();
        move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime
                .expect("a runtime")
                .block_on(locks.inspect("k"))
                .expect("inspect");
        }
    };
    tokio::task::spawn_blocking(once).await.expect("a thread");
    let first = named(&server, ":pool");
    assert_eq!(first.len(), 1);
    locks.inspect("k").await.expect("inspect");
    assert_eq!(named(&server, ":pool"), first, "the connection is reused");
    let list: String = server.query(&["CLIENT", "LIST"]);
    let client = list
        .lines()
        .find(|client| client.contains(":pool "))
        .expect("a connection");
    assert!(client.contains(" db=3 "), "{client}");
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pooled_connections_are_encrypted_like_all_others() {
    let authority = Authority::create();
    let identity = authority.issue("server", &["localhost"]);
    let tls = TlsServer::start(&authority, &identity, false, &[]);
    let builder = LockManager::builder()
        .shard(tls.url("localhost"))
        .tls_ca(authority.ca());
    let locks = builder.connect().await.expect("connect");
    locks.inspect("k").await.expect("inspect");
    assert_eq!(named(&tls.server, ":pool").len(), 1);
}

/// The error of connecting to this URL. It must be returned quickly and must not contain the
/// password.
async fn refused(url: &str) -> LockError {
    let started = Instant::now();
    let builder = LockManager::builder().shard(url).store_timeout(Duration::from_secs(5));
    let error = soon("an error", builder.connect()).await.expect_err(url);
    assert!(
        started.elapsed() < Duration::from_secs(4),
        "{:?}: {error}",
        started.elapsed()
    );
    assert!(!error.to_string().contains("hunter2"), "{error}");
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    error
}

#[tokio::test]
async fn a_wrong_or_missing_password_is_said_in_words() {
    let server = RedisServer::start_with(&["--requirepass", "right"]);
    let wrong = [
        server.url(),
        format!("redis://:hunter2@{}", server.address()),
        format!("redis://nobody:hunter2@{}", server.address()),
    ];
    for url in wrong {
        let error = refused(&url).await;
        assert!(
            (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
            "{error}"
        );
        assert!(
            !error.is_retryable() && error.to_string().contains("password"),
            "{error}"
        );
        assert!(error.to_string().contains(&server.address()), "{error}");
    }
    let right = format!("redis://:right@{}", server.address());
    let locks = LockManager::connect(&right).await.expect("connect");
    lock(&locks, "k").await.release().await.expect("release");
}

#[tokio::test]
async fn a_port_that_refuses_and_a_host_that_does_not_exist_are_said_in_words() {
    let server = RedisServer::start();
    let url = server.url();
    server.kill();
    let error = refused(&url).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(error.to_string().contains(&url), "{error}");
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
    let kind = source.map(std::io::Error::kind);
    assert_eq!(kind, Some(std::io::ErrorKind::ConnectionRefused), "{error:?}");

    // A name in a top-level domain that is reserved and never resolves.
    let error = refused("redis://:hunter2@lock.invalid:6379").await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("lock.invalid"), "{error}");
}

#[cfg(not(feature = "tls"))]
#[tokio::test]
async fn tls_is_refused_in_words_where_it_was_not_built() {
    let server = RedisServer::start();
    let error = refused(&format!("rediss://:hunter2@{}", server.address())).await;
    assert!(error.kind() == LockErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("feature `tls`"), "{error}");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn tls_to_a_plain_port_is_said_in_words() {
    let server = RedisServer::start();
    let error = refused(&format!("rediss://:hunter2@{}", server.address())).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("does not speak TLS"), "{error}");
}

#[tokio::test]
async fn a_port_that_speaks_something_else_is_said_in_words() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.expect("a connection");
                // The client may have disconnected by then.
                drop(stream.read(&mut [0; 64]));
                drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
            });
        }
    });
    let error = refused(&format!("redis://{address}")).await;
    assert!(error.kind() == LockErrorKind::Refused, "{error}");
    for part in [&address.to_string(), "not a Redis", "HTTP/1.1 400 Bad Request"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// Like an HTTP server, which waits for the end of the headers, and like a server that speaks
/// first.
#[tokio::test]
async fn a_port_that_waits_for_another_protocol_or_speaks_first_is_reported_before_the_time_limit() {
    for (greeting, end, reply) in [
        ("", "\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "", ""),
    ] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let url = format!("redis://{}", listener.local_addr().expect("an address"));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.expect("a connection");
                    drop(stream.write_all(greeting.as_bytes()));
                    let (mut all, mut some) = (Vec::new(), [0; 64]);
                    while let Ok(count @ 1..) = stream.read(&mut some) {
                        all.extend_from_slice(&some[..count]);
                        if !end.is_empty() && all.ends_with(end.as_bytes()) {
                            drop(stream.write_all(reply.as_bytes()));
                            return;
                        }
                    }
                });
            }
        });
        let error = refused(&url).await;
        let said = [greeting, reply].concat();
        assert!(error.kind() == LockErrorKind::Refused, "{error}");
        assert!(error.to_string().contains(said.trim()), "{error}");
    }
}

#[tokio::test]
async fn a_proxy_that_hangs_up_on_commands_is_reported_with_all_of_them() {
    let server = RedisServer::start();
    let proxy = Filter::start(server.address(), |command| {
        let lacks: [&[u8]; 4] = [b"CLIENT", b"ROLE", b"TIME", b"SUBSCRIBE"];
        match lacks.contains(&&*command[0].to_ascii_uppercase()) {
            true => Verdict::HangUp,
            false => Verdict::Pass,
        }
    });
    let error = refused(&proxy.url()).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .contains("closes the connection on CLIENT, ROLE, TIME, SUBSCRIBE:"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_too_old_for_waiting_is_refused_at_connect() {
    let server = RedisServer::start_with(&["--rename-command", "ZPOPMIN", ""]);
    let error = refused(&server.url()).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(
        error.to_string().contains("lacks ZPOPMIN") && error.to_string().contains("Redis 5.0"),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_without_role_is_refused_unless_it_is_not_to_be_asked() {
    let server = RedisServer::start_with(&["--rename-command", "ROLE", ""]);
    let error = refused(&server.url()).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("set check_role = false"), "{error}");
    let builder = LockManager::builder()
        .shard(server.url())
        .ttl(Duration::from_millis(500));
    let locks = builder.check_role(false).connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    let other = lock(&locks, "other").await;
    // A renewal that finds its lease gone does not send ROLE either.
    server.command(&["DEL", "lock:k"]);
    assert_eq!(soon("the loss", guard.lost()).await, LossReason::Taken);
    other.release().await.expect("release");
}

#[tokio::test]
async fn a_cluster_too_old_for_waiting_is_refused_at_connect() {
    let cluster = Cluster::start(1, 0);
    let node = cluster.nodes()[0].address();
    let proxy = Filter::start(node, |command| match &command[0][..] {
        // Like Redis 6.2.
        b"PUBSUB" => {
            Verdict::Refuse("ERR Unknown subcommand or wrong number of arguments for 'SHARDNUMSUB'. Try PUBSUB HELP.")
        }
        _ => Verdict::Pass,
    });
    // The node announces the proxy's port.
    let port = proxy.address().rsplit_once(':').expect("a port").1.to_owned();
    cluster.nodes()[0].command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let error = refused(&format!("redis+cluster://{}", proxy.address())).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(
        error.to_string().contains("sharded pub/sub") && error.to_string().contains("Redis 7.0"),
        "{error}"
    );
}

#[tokio::test]
async fn connections_have_names_that_say_what_they_are_for() {
    let server = RedisServer::start();
    let locks = LockManager::builder()
        .shard(server.url())
        .connections(2)
        .connect()
        .await
        .expect("connect");
    assert_eq!(named(&server, &format!(":{}:requests", locks.id())).len(), 2);
    assert_eq!(named(&server, &format!(":{}:renewals", locks.id())).len(), 1);
}

#[tokio::test]
async fn a_port_that_says_nothing_is_an_error_after_the_store_timeout() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    let limit = Duration::from_millis(200);
    let started = Instant::now();
    let builder = LockManager::builder()
        .shard(format!("redis://{address}"))
        .store_timeout(limit);
    let error = soon("an error", builder.connect())
        .await
        .expect_err("the server does not answer");
    assert!(started.elapsed() >= limit && started.elapsed() < limit + Duration::from_secs(1));
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}

/// Regression: a task may have started a request and then be busy with something else, for example
/// in a `select!` whose other branch is running.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_nobody_polls_keeps_nobody_from_connecting() {
    let server = RedisServer::start();
    let locks = LockManager::connect(&server.url()).await.expect("connect");
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
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    // Renewals of the shorter lease have less time than a request.
    for ttl in [1, 2].map(Duration::from_secs) {
        let locks = LockManager::builder().shard(proxy.url()).ttl(ttl);
        let locks = locks.connect().await.expect("connect");
        for _ in 0..2 {
            let guard = lock(&locks, "k").await;
            proxy.silence();
            let lost = tokio::time::timeout(2 * ttl, guard.lost()).await;
            assert!(lost.is_err() && guard.is_valid(), "{ttl:?}: {lost:?}");
            guard.release().await.expect("on a new connection");
        }
    }
}

/// Commands are answered but published messages never arrive. The waiter would only notice the free
/// lock when it asks every ten seconds, forever.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inbox_that_falls_silent_is_subscribed_anew() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    let holder = LockManager::connect(&server.url()).await.expect("connect");
    let waiter = LockManager::connect(&proxy.url()).await.expect("connect");
    let before = server.subscribers();
    assert_eq!(before.len(), 2);
    proxy.silence();
    until("the inbox is subscribed again", async || {
        let now = server.subscribers();
        now.len() == 2 && now != before
    })
    .await;
    // On the connection that the hand-off uses; inspecting uses another one.
    until("locks can be acquired again", async || {
        match waiter.try_lock("k").await {
            Ok(Some(guard)) => guard.release().await.is_ok(),
            _ => false,
        }
    })
    .await;
    let started = Instant::now();
    hand_off(&holder, &waiter, "k").await;
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

/// The server executes requests, but its replies arrive late or never.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_stalls_during_an_acquire_on_a_free_key_strands_nobody() {
    let server = RedisServer::start();
    let proxy = Proxy::start(server.address());
    let limit = Duration::from_millis(400);
    let builder = LockManager::builder().shard(proxy.url()).store_timeout(limit);
    let locks = builder.connect().await.expect("connect");
    let others = LockManager::connect(&server.url()).await.expect("connect");
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
    // released.
    proxy.hold_back();
    let error = soon("an error", locks.lock("k").into_future())
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
    lock(&locks, "k").await.release().await.expect("release");
    until("nothing is left", async || lock_keys(&server).is_empty()).await;
}

/// Delays acquire requests on their way, replaces their connections, lets the releases of their
/// cycles complete on the new connections, and then delivers the delayed requests.
async fn assert_late_requests_take_nothing(nodes: &[&RedisServer], proxies: &[Proxy], builder: Builder, ttl: Duration) {
    let locks = builder
        .ttl(ttl)
        .store_timeout(Duration::from_millis(500))
        .connect()
        .await
        .expect("connect");
    // Loads the scripts into the servers and opens all connections.
    let keys: Vec<String> = (0..20).map(|number| format!("k{number}")).collect();
    for key in &keys {
        lock(&locks, key).await.release().await.expect("release");
    }
    proxies.iter().for_each(Proxy::withhold);
    let asking: JoinSet<_> = keys
        .iter()
        .map(|key| {
            let request = locks
                .lock(key.as_str())
                .timeout(Duration::from_millis(500))
                .into_future();
            async move { drop(request.await) }
        })
        .collect();
    soon("all requests end", asking.join_all()).await;
    // Covers both kinds of cycles: those whose owner is notified of waiters, and those of contended
    // keys.
    for key in &keys {
        let mut guard = None;
        until("a new connection", async || {
            guard = locks.lock(key.as_str()).await.ok();
            guard.is_some()
        })
        .await;
        guard.expect("a guard").release().await.expect("release");
    }
    let left = || nodes.iter().flat_map(|node| lock_keys(node)).collect::<Vec<_>>();
    until("everything is released", async || left().is_empty()).await;
    // Bytes on a connection that the client has reset are gone. Any other client would keep them
    // until the network is back.
    let reset_by = Instant::now() + PATIENCE;
    while proxies.iter().any(|proxy| proxy.withheld() > 0) && Instant::now() < reset_by {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let late: Vec<String> = proxies
        .iter()
        .flat_map(Proxy::deliver_late)
        .map(|late| late.to_string())
        .collect();
    until("the late requests are executed", async || {
        let known = nodes.iter().map(|node| node.query::<String>(&["CLIENT", "LIST"]));
        known
            .into_iter()
            .all(|known| !late.iter().any(|late| known.contains(late.as_str())))
    })
    .await;
    assert_eq!(left(), [""; 0], "leases and queue entries of finished cycles");
    for key in &keys {
        lock(&locks, key).await.release().await.expect("release");
    }
}

const LONG: Duration = Duration::from_secs(60);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_a_replaced_connection_take_no_lock() {
    let server = RedisServer::start();
    let proxies = [Proxy::start(server.address())];
    let builder = LockManager::builder().shard(proxies[0].url());
    assert_late_requests_take_nothing(&[&server], &proxies, builder, LONG).await;
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_a_replaced_encrypted_connection_take_no_lock() {
    let authority = Authority::create();
    let identity = authority.issue("server", &["localhost"]);
    let tls = TlsServer::start(&authority, &identity, false, &[]);
    let proxies = [Proxy::start(format!("127.0.0.1:{}", tls.tls_port))];
    let url = format!("rediss://localhost:{}", proxies[0].port());
    let builder = LockManager::builder().shard(url).tls_ca(authority.ca());
    assert_late_requests_take_nothing(&[&tls.server], &proxies, builder, LONG).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_replaced_connections_of_a_quorum_take_no_lock() {
    let quorum = Quorum::start(3);
    let nodes: Vec<&RedisServer> = quorum.nodes().iter().collect();
    let proxies: Vec<Proxy> = nodes.iter().map(|node| Proxy::start(node.address())).collect();
    let places: Vec<String> = proxies.iter().map(Proxy::address).collect();
    let builder = LockManager::builder()
        .shard(format!("redlock://{}", places.join(",")))
        .redlock_max_ttl(MAX_TTL);
    assert_late_requests_take_nothing(&nodes, &proxies, builder, MAX_TTL).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn late_requests_on_replaced_connections_of_a_cluster_take_no_lock() {
    let cluster = Cluster::start(1, 0);
    let node = &cluster.nodes()[0];
    let proxies = [Proxy::start(node.address())];
    // The slot map leads through the proxy as well.
    let port = proxies[0].port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let builder = LockManager::builder().shard(format!("redis+cluster://{}", proxies[0].address()));
    assert_late_requests_take_nothing(&[node], &proxies, builder, LONG).await;
}

/// Simulates a late acquire of a finished cycle.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lease_that_nobody_holds_is_given_back_when_it_is_wanted() {
    let server = RedisServer::start();
    let (locks, others) = (
        LockManager::connect(&server.url()).await.expect("connect"),
        LockManager::connect(&server.url()).await.expect("connect"),
    );
    for key in ["unused", "in-use"] {
        let guard = lock(&locks, key).await;
        let lease = format!("lock:{key}");
        let owner: String = server.query(&["GET", &lease]);
        guard.release().await.expect("release");
        let (_, cycle) = owner.rsplit_once(':').expect("a cycle");
        let (number, _) = cycle.split_once('-').expect("a number");
        assert_eq!(
            number.parse::<u64>().expect("a number") % 2,
            0,
            "its owner is notified of waiters"
        );
        until("the key is free", async || {
            server.query::<u64>(&["EXISTS", &lease]) == 0
        })
        .await;
        server.command(&["SET", &lease, &owner, "PX", "60000"]);
        // The same manager may want the key at the same time.
        let once = |locks: &LockManager| {
            let locks = locks.clone();
            async move { lock(&locks, key).await.release().await.expect("release") }
        };
        let own = (key == "in-use").then(|| tokio::spawn(once(&locks)));
        soon("the lock", once(&others)).await;
        if let Some(own) = own {
            soon("the lock", own).await.expect("a task");
        }
    }
}
