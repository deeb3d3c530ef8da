//! A Redis Cluster as a shard: real nodes, dying primaries, connections that fall silent.

mod migration;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::introspect::Slot;
use shardlock::{LockError, LockGuard, LockManager, LossReason};
use support::filter::{Filter, Verdict};
use support::proxy::Proxy;
use support::sentinel::in_step;
use support::{ClientType, Cluster, RedisServer};
use support_locks::{lock, lock_in_time, soon, until, until_queued};

/// Longer than a failover takes.
const PATIENT: Duration = Duration::from_secs(15);

/// Long enough that no test waits for its end by mistake.
const LONG_TTL: Duration = Duration::from_secs(60);

fn builder(cluster: &Cluster) -> Builder {
    LockManager::builder().shard(cluster.url()).store_timeout(PATIENT)
}

async fn connect(cluster: &Cluster) -> LockManager {
    connected(builder(cluster)).await
}

/// Connects. Whatever its store timeout is, a manager that connects waits for a node for a second
/// at most, and a busy machine may take longer.
async fn connected(builder: Builder) -> LockManager {
    let mut locks = None;
    until("the manager is connected", async || {
        locks = builder.clone().connect().await.ok();
        locks.is_some()
    })
    .await;
    locks.expect("just seen")
}

/// The error of a manager that is refused, see [`connected`].
async fn refusal(builder: Builder) -> LockError {
    let mut refusal = None;
    until("the manager is refused", async || {
        let error = builder.clone().connect().await.err();
        refusal = error.filter(|error| error.kind() != LockErrorKind::Unavailable);
        refusal.is_some()
    })
    .await;
    refusal.expect("just seen")
}

/// The slot of a plain key's lease.
fn slot(key: &str) -> u16 {
    Slot::of(format!("lock:{key}").as_bytes()).number()
}

/// A key whose slot the node with this index owns.
fn key_on(cluster: &Cluster, node: usize) -> String {
    names().find(|key| cluster.owner(slot(key)) == node).expect("some key")
}

fn names() -> impl Iterator<Item = String> {
    (0..).map(|number| format!("key-{number}"))
}

/// The keys that belong to individual locks.
fn lock_keys(cluster: &Cluster) -> Vec<String> {
    let mut keys = cluster.keys();
    keys.retain(|key| !key.starts_with("lock:%map") && !key.starts_with("lock:%fence:"));
    keys
}

async fn is_empty(cluster: &Cluster) {
    until("nothing is left", async || lock_keys(cluster).is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_of_all_shapes_are_locked_handed_off_and_released() {
    let cluster = Cluster::start(3, 0);
    // Each names a different node, and discovers the others.
    let at = |url: String| LockManager::builder().shard(url).store_timeout(PATIENT);
    let one = connected(at(cluster.url_of(0))).await;
    let other = connected(at(cluster.url_of(1))).await;
    let long = "x".repeat(512);
    let keys = [
        "plain",
        "a:b",
        "{tag}key",
        "{}",
        "a}b{",
        "100%",
        "with space\\",
        "clé",
        "A",
        "a",
        &long,
    ];
    for key in keys {
        let guard = lock(&one, key).await;
        assert!(other.try_lock(key).await.expect("try").is_none(), "{key}");
        let waiting = tokio::spawn({
            let (other, key) = (other.clone(), key.to_owned());
            async move { lock(&other, &key).await }
        });
        until_queued(&one, key, 1).await;
        let seen = one.inspect(key).await.expect("inspect");
        let holder = seen.holder.expect("held");
        assert!(holder.owner.starts_with(one.id()), "{seen:?}", seen = holder.owner);
        assert!(seen.queue[0].starts_with(other.id()), "{:?}", seen.queue);
        let started = Instant::now();
        let token = guard.token();
        guard.release().await.expect("release");
        let next = soon("the hand-off", waiting).await.expect("a task");
        assert!(next.token() > token, "{key}");
        // The TTL is ten seconds.
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
        next.release().await.expect("release");
    }
    is_empty(&cluster).await;
    one.shutdown().await.ok();
    other.shutdown().await.ok();
    drop((one, other));
    until("no channel is left", async || cluster.shard_channels().is_empty()).await;
}

/// Spawns a task that waits for a key.
fn waiting(locks: &LockManager, key: &str) -> tokio::task::JoinHandle<LockGuard> {
    let (locks, key) = (locks.clone(), key.to_owned());
    tokio::spawn(async move { lock(&locks, &key).await })
}

async fn hand_over(guard: LockGuard, waiting: tokio::task::JoinHandle<LockGuard>) -> LockGuard {
    let token = guard.token();
    guard.release().await.expect("release");
    let next = soon("the hand-off", waiting).await.expect("a task");
    assert!(next.token() > token, "{} after {token}", next.token());
    next
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_costs_at_most_two_script_calls_and_a_hand_off_two_and_a_publish() {
    let cluster = Cluster::start(3, 0);
    // No lease is renewed meanwhile.
    let builder = || builder(&cluster).ttl(LONG_TTL);
    let (one, other) = (connected(builder()).await, connected(builder()).await);
    // A request that has had no answer for a second is sent again.
    let repeated = |since: Instant| 2 * since.elapsed().as_secs();
    // Makes both managers load the script and subscribe to the slot's inbox.
    let guard = lock(&one, "k").await;
    let next = waiting(&other, "k");
    until_queued(&one, "k", 1).await;
    let guard = hand_over(guard, next).await;
    let next = waiting(&one, "k");
    until_queued(&one, "k", 1).await;
    hand_over(guard, next).await.release().await.expect("release");

    cluster.reset_stats();
    let started = Instant::now();
    for _ in 0..10 {
        lock(&one, "free").await.release().await.expect("release");
    }
    let (calls, publishes) = (cluster.script_calls(), cluster.publishes());
    let without_script: u64 = cluster.nodes().iter().map(|node| node.calls("incrby")).sum();
    println!(
        "10 locks of a free key: {calls} script calls, {without_script} acquired without one, {publishes} publishes"
    );
    // The node may need to load one of the two scripts first.
    assert!(
        (20 - without_script..=22 + repeated(started)).contains(&calls) && publishes == 0,
        "{calls} {publishes}"
    );

    let mut guard = lock(&one, "k").await;
    let mut next = waiting(&other, "k");
    until_queued(&one, "k", 1).await;
    guard = hand_over(guard, next).await;
    next = waiting(&one, "k");
    until_queued(&other, "k", 1).await;
    cluster.reset_stats();
    let started = Instant::now();
    const ROUNDS: u64 = 20;
    for round in 0..ROUNDS {
        let (holder, rival) = if round % 2 == 0 { (&one, &other) } else { (&other, &one) };
        guard = hand_over(guard, next).await;
        next = waiting(rival, "k");
        until_queued(holder, "k", 1).await;
    }
    let (calls, publishes) = (cluster.script_calls(), cluster.publishes());
    println!("{ROUNDS} hand-offs: {calls} script calls, {publishes} publishes");
    assert!(
        (2 * ROUNDS..=2 * ROUNDS + repeated(started)).contains(&calls),
        "{calls}"
    );
    assert!(publishes <= ROUNDS + 1, "{publishes}");
    hand_over(guard, next).await.release().await.expect("release");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiter_is_served_after_a_lost_subscription() {
    let cluster = Cluster::start(3, 0);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    let key = key_on(&cluster, 1);
    for round in 0..10 {
        let guard = lock(&one, &key).await;
        let next = waiting(&other, &key);
        until_queued(&one, &key, 1).await;
        // In half of the rounds the grant is published while there is no subscriber, in the others
        // afterwards.
        assert!(cluster.nodes()[1].client_kill(ClientType::PubSub) >= 1);
        if round % 2 == 0 {
            until("the inbox is back", async || !cluster.shard_channels().is_empty()).await;
        }
        let started = Instant::now();
        hand_over(guard, next).await.release().await.expect("release");
        // The TTL is ten seconds.
        assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    }
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lock_known_to_a_replica_survives_the_death_of_its_primary() {
    let cluster = Cluster::start(3, 3);
    // No renewal is confirmed during the failover, which may take long on a busy machine.
    let builder = || builder(&cluster).ttl(LONG_TTL).min_replicas_acked(1);
    let (one, other) = (connected(builder()).await, connected(builder()).await);
    let key = key_on(&cluster, 0);
    let elsewhere = key_on(&cluster, 1);
    let guard = lock(&one, &key).await;
    let kept = lock(&one, &elsewhere).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;
    let (dead, _) = cluster.fail_over(slot(&key));
    assert_eq!(dead, 0);
    // Restarts as a replica and only has what the new primary sends. Leases count again once this
    // replica has them.
    cluster.nodes()[dead].restart();
    // Both locks are still held by the same holders.
    until("its replica answers", async || other.inspect(&key).await.is_ok()).await;
    assert!(guard.is_valid() && kept.is_valid());
    assert!(other.try_lock(&key).await.expect("try").is_none());
    hand_over(guard, next).await.release().await.expect("release");
    kept.release().await.expect("release");
    is_empty(&cluster).await;
}

/// The renewal that would discover the loss is minutes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lingering_lease_lost_in_a_failover_is_not_reused() {
    const LONG: Duration = Duration::from_secs(3600);
    let cluster = Cluster::start(3, 3);
    let other = connect(&cluster).await;
    let keeper = connected(builder(&cluster).ttl(LONG).linger(LONG)).await;
    let key = key_on(&cluster, 0);
    let token = lock_in_time(&keeper, &key).await;
    assert_eq!(keeper.shard_states()[0].lingering, 1);
    let (_, new) = cluster.fail_over(slot(&key));
    // Simulates a lease that was not replicated. A node that believes others to be down refuses.
    let lease = format!("lock:{key}");
    until("the lease is deleted", async || {
        cluster.nodes()[new].try_query::<u64>(&["DEL", &lease]).is_ok()
    })
    .await;
    let mut guard = None;
    until("the lock can be acquired again", async || {
        guard = other.lock(&key).await.ok();
        guard.is_some()
    })
    .await;
    let guard = guard.expect("the lock was acquired");
    assert!(guard.token().get() > token);
    match keeper.try_lock(&key).await {
        Ok(both) => assert!(both.is_none(), "two holders: {guard:?}, {both:?}"),
        Err(error) => assert!(error.is_retryable(), "{error}"),
    }
    guard.release().await.expect("the lock was held");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hung_primary_is_abandoned_when_its_replica_takes_over() {
    let cluster = Cluster::start(3, 3);
    let builder = || builder(&cluster).ttl(LONG_TTL);
    let (one, other) = (connected(builder()).await, connected(builder()).await);
    let key = key_on(&cluster, 2);
    let guard = lock(&one, &key).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;
    let hanging = &cluster.nodes()[2];
    until("the replica has the lease", async || in_step(hanging) == 1).await;
    hanging.stop();
    // No connection breaks. Eventually the release reaches the replica that took over.
    hand_over(guard, next).await.release().await.expect("release");
    hanging.cont();
    cluster.wait_until_in_order();
    let guard = lock(&one, &key).await;
    let next = waiting(&other, &key);
    until_queued(&one, &key, 1).await;
    hand_over(guard, next).await.release().await.expect("release");
}

/// A proxy in front of the only node of a cluster, which announces the proxy's port, and a manager
/// behind the proxy.
async fn behind_a_proxy(cluster: &Cluster, ttl: Duration) -> (Proxy, LockManager) {
    let node = &cluster.nodes()[0];
    let proxy = Proxy::start(node.address());
    let port = proxy.port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let builder = LockManager::builder().shard(format!("redis+cluster://127.0.0.1:{port}"));
    let locks = connected(builder.ttl(ttl).store_timeout(PATIENT)).await;
    (proxy, locks)
}

/// A proxy that drops a connection's replies still acknowledges what is sent, so no connection
/// breaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_fall_silent_are_replaced_and_a_held_lock_stays_held() {
    let cluster = Cluster::start(1, 0);
    // Renewals of the shorter lease have less time than a request.
    for ttl in [3, 5].map(Duration::from_secs) {
        let (proxy, locks) = behind_a_proxy(&cluster, ttl).await;
        for _ in 0..2 {
            let guard = lock(&locks, "held").await;
            proxy.silence();
            until("another lock can be acquired", async || {
                locks.lock("other").await.is_ok()
            })
            .await;
            // Without a renewal on a new connection, the lease would end before that.
            let lost = tokio::time::timeout(ttl, guard.lost()).await;
            assert!(lost.is_err() && guard.is_valid(), "{ttl:?}: {lost:?}");
            guard.release().await.expect("on a new connection");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn silent_subscription_is_replaced() {
    let cluster = Cluster::start(1, 0);
    let node = &cluster.nodes()[0];
    let (proxy, waiter) = behind_a_proxy(&cluster, Duration::from_secs(30)).await;
    let holder = connect(&cluster).await;
    let guard = lock(&holder, "k").await;
    let next = waiting(&waiter, "k");
    until_queued(&holder, "k", 1).await;
    let before = node.subscribers();
    assert_eq!(before.len(), 1);
    proxy.silence();
    until("the inbox is subscribed again", async || {
        let now = node.subscribers();
        now.len() == 1 && now != before
    })
    .await;
    let started = Instant::now();
    hand_over(guard, next).await.release().await.expect("release");
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
}

/// Regression: the request that was sent again found the lock taken, by its own first attempt. The
/// manager went on with another cycle, and the lock stayed taken for its whole TTL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acquire_whose_reply_is_lost_has_the_lock() {
    let cluster = Cluster::start(1, 0);
    let node = &cluster.nodes()[0];
    let losing = Arc::new(AtomicBool::new(false));
    let lost = Arc::<Mutex<Vec<Vec<u8>>>>::default();
    let proxy = Filter::start(node.address(), {
        let (losing, lost) = (Arc::clone(&losing), Arc::clone(&lost));
        move |command| {
            let is_of_a_lease = command.iter().any(|word| word.starts_with(b"lock:key-"));
            if is_of_a_lease && losing.swap(false, Ordering::SeqCst) {
                *lost.lock() = command.to_vec();
                return Verdict::LoseReply;
            }
            Verdict::Pass
        }
    });
    let port = proxy.address().rsplit_once(':').expect("a port").1.to_owned();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let url = format!("redis+cluster://{}", proxy.address());
    let builder = LockManager::builder().shard(url).store_timeout(PATIENT);
    let locks = connected(builder.ttl(LONG_TTL)).await;
    // Loads the scripts.
    lock(&locks, "key-0").await.release().await.expect("release");
    // The first acquire in a slot is a script. The next one, if it comes soon enough, is not.
    let both = BTreeSet::from([b"EVALSHA".to_vec(), b"SET".to_vec()]);
    let (mut names, mut seen) = (names(), BTreeSet::new());
    until("the replies of both kinds are lost", async || {
        let [key, next] = [(); 2].map(|()| names.next().expect("a name"));
        lock(&locks, &key).await.release().await.expect("release");
        for key in [&key, &next] {
            losing.store(true, Ordering::SeqCst);
            let guard = lock(&locks, key).await;
            let lost = std::mem::take(&mut *lost.lock());
            // The lease is that of the lost attempt.
            assert!(lost.contains(&guard.owner().into_bytes()), "{} {lost:?}", guard.owner());
            seen.insert(lost[0].clone());
            guard.release().await.expect("release");
        }
        seen == both
    })
    .await;
    is_empty(&cluster).await;
}

/// Requests a free lock while the replica is stopped, calls `meanwhile` once the primary has the
/// lease, and expects that the lock is granted with that lease when the replica answers again.
async fn lease_is_kept_until_the_replica_answers(meanwhile: impl AsyncFn(&RedisServer)) {
    // The replica must not be taken for dead.
    let cluster = Cluster::start_with(1, 1, &["--cluster-node-timeout", "60000"]);
    let [primary, replica] = cluster.nodes() else {
        unreachable!("two were started")
    };
    let locks = connected(builder(&cluster).ttl(LONG_TTL).min_replicas_acked(1)).await;
    lock(&locks, "k").await.release().await.expect("release");
    replica.stop();
    let waiting = waiting(&locks, "k");
    let lease = async || primary.query::<Option<String>>(&["GET", "lock:k"]);
    until("the primary has the lease", async || lease().await.is_some()).await;
    let owner = lease().await;
    meanwhile(primary).await;
    replica.cont();
    let guard = soon("the lock", waiting).await.expect("a task");
    assert_eq!(Some(guard.owner()), owner);
    guard.release().await.expect("release");
    is_empty(&cluster).await;
}

/// Regression: the request that was sent again since no replica had acknowledged found the lock
/// taken, by its own first attempt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acquire_without_an_acknowledgement_is_repeated_by_the_same_cycle() {
    lease_is_kept_until_the_replica_answers(async |primary| {
        let waits = primary.calls("wait");
        until("it was repeated", async || primary.calls("wait") > waits + 1).await;
    })
    .await;
}

/// Regression: a wait for replicas that failed ended the request, although the command before it
/// was executed. A node that becomes a replica ends waits with the same error.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acquire_whose_wait_for_replicas_fails_is_repeated_by_the_same_cycle() {
    lease_is_kept_until_the_replica_answers(async |primary| {
        until("a wait has failed", async || {
            let list: String = primary.query(&["CLIENT", "LIST"]);
            let waiting = list.lines().find(|client| client.contains(" cmd=wait"));
            let id = waiting.and_then(|client| client.strip_prefix("id=")?.split(' ').next());
            // Returns 0 if the wait has ended meanwhile.
            id.is_some_and(|id| primary.query::<bool>(&["CLIENT", "UNBLOCK", id, "ERROR"]))
        })
        .await;
    })
    .await;
}

/// Regression: it gave up after a second, whatever its store timeout was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manager_that_connects_waits_for_a_busy_node() {
    let cluster = Cluster::start(1, 0);
    let node = &cluster.nodes()[0];
    let proxy = Proxy::start(node.address());
    let port = proxy.port();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port.to_string()]);
    proxy.hold_back();
    let builder = LockManager::builder().shard(format!("redis+cluster://127.0.0.1:{port}"));
    let mut connecting = tokio::spawn(builder.store_timeout(PATIENT).connect());
    // Longer than a request waits for one node.
    let ended = tokio::time::timeout(Duration::from_millis(1500), &mut connecting).await;
    assert!(ended.is_err(), "{ended:?}");
    proxy.let_through();
    let locks = soon("the manager", connecting).await.expect("a task").expect("connect");
    lock(&locks, "k").await.release().await.expect("release");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connect_needs_one_reachable_node_and_explains_failures() {
    let cluster = Cluster::start(3, 0);
    let (nobody, alone) = (RedisServer::start(), RedisServer::start());
    nobody.kill();
    // The first host is down, the others are up.
    let url = format!("redis+cluster://{},{}", nobody.address(), cluster.nodes()[1].address());
    let at = |url: &str| LockManager::builder().shard(url).store_timeout(PATIENT);
    let locks = connected(at(&url)).await;
    lock(&locks, "k").await.release().await.expect("release");

    let error = at(&format!("redis+cluster://{}", nobody.address())).connect();
    let error = error.await.expect_err("down");
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("refused"), "{error}");
    let error = refusal(at(&format!("redis+cluster://{}", alone.address()))).await;
    assert!(error.kind() == LockErrorKind::Refused, "{error}");
    assert!(error.to_string().contains("not a node of a Redis Cluster"), "{error}");
    let error = refusal(at(&cluster.nodes()[0].url())).await;
    assert!(error.kind() == LockErrorKind::Refused, "{error}");

    // A different shard map.
    let error = refusal(builder(&cluster).shard("memory://cluster-map")).await;
    assert!(error.kind() == LockErrorKind::ShardMapMismatch, "{error}");

    // A wrong password.
    let closed = Cluster::start_with(3, 0, &["--requirepass", "hunter2", "--masterauth", "hunter2"]);
    for (login, words) in [("", "password"), (":hunter3@", "password")] {
        let url = closed.url().replace("://", &format!("://{login}"));
        let error = refusal(at(&url)).await;
        assert!(error.kind() == LockErrorKind::Refused, "{error}");
        assert!(
            error.to_string().contains(words) && !error.to_string().contains("hunter"),
            "{error}"
        );
    }
    let locks = connected(at(&closed.url().replace("://", "://:hunter2@"))).await;
    lock(&locks, "k").await.release().await.expect("release");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_key_types_are_refused_and_flushed_scripts_are_reloaded() {
    let cluster = Cluster::start(3, 0);
    let (one, other) = (connect(&cluster).await, connect(&cluster).await);
    let key = key_on(&cluster, 2);
    cluster.nodes()[2].command(&["LPUSH", &format!("lock:{key}"), "x"]);
    let error = one.lock(&key).await.expect_err("a list");
    assert!(
        error.kind() == LockErrorKind::Refused && error.to_string().contains(&key),
        "{error}"
    );
    cluster.nodes()[2].command(&["DEL", &format!("lock:{key}")]);
    for _ in 0..5 {
        cluster
            .alive()
            .for_each(|node| drop(node.command(&["SCRIPT", "FLUSH"])));
        let guard = lock(&one, &key).await;
        let next = waiting(&other, &key);
        until_queued(&one, &key, 1).await;
        cluster
            .alive()
            .for_each(|node| drop(node.command(&["SCRIPT", "FLUSH"])));
        hand_over(guard, next).await.release().await.expect("release");
    }
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn too_few_replicas_are_an_error_that_leaves_nothing() {
    let cluster = Cluster::start(3, 0);
    let limited = builder(&cluster).store_timeout(Duration::from_secs(1));
    let locks = connected(limited.min_replicas_acked(1)).await;
    // If the answer is late, the error only says so.
    until("the error counts the replicas", async || {
        let error = locks.lock("k").await.expect_err("no replica");
        assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
        error.to_string().contains("only 0 of 1 replicas")
    })
    .await;
    is_empty(&cluster).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leases_on_other_nodes_survive_a_dead_or_hung_node() {
    // With two of five nodes gone, the others are still a majority.
    let cluster = Cluster::start_with(5, 0, &["--cluster-require-full-coverage", "no"]);
    let ttl = Duration::from_secs(3);
    let locks = connected(builder(&cluster).ttl(ttl)).await;
    let keys = [0, 1, 2].map(|node| key_on(&cluster, node));
    let mut guards = Vec::new();
    for key in &keys {
        guards.push(lock(&locks, key).await);
    }
    cluster.nodes()[0].stop();
    assert_eq!(soon("the loss", guards[0].lost()).await, LossReason::Expired);
    cluster.nodes()[1].kill();
    assert_eq!(soon("the loss", guards[1].lost()).await, LossReason::Expired);
    // Longer than any lease lasts without a renewal.
    assert!(tokio::time::timeout(2 * ttl, guards[2].lost()).await.is_err());
    let last = guards.pop().expect("three");
    last.release().await.expect("the lock was held throughout");
    lock(&locks, &keys[2]).await.release().await.expect("release");
    cluster.nodes()[0].cont();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_grow_after_the_failover_to_a_lagging_replica() {
    let cluster = Cluster::start(3, 3);
    let locks = connect(&cluster).await;
    let key = key_on(&cluster, 0);
    let before = lock(&locks, &key).await;
    let before = (before.token(), before.release().await.expect("release")).0;
    // From now on the primary rejects its replica, which logs in as a user that it does not have.
    let (primary, replica) = (&cluster.nodes()[0], &cluster.nodes()[3]);
    replica.command(&["CONFIG", "SET", "masteruser", "nobody"]);
    replica.command(&["CONFIG", "SET", "masterauth", "none"]);
    primary.command(&["CLIENT", "KILL", "TYPE", "replica"]);
    let mut last = before;
    for _ in 0..20 {
        let guard = lock(&locks, &key).await;
        assert!(guard.token() > last);
        last = guard.token();
        guard.release().await.expect("release");
    }
    cluster.fail_over(slot(&key));
    // A manager that has seen none of these tokens.
    let fresh = connect(&cluster).await;
    let guard = lock(&fresh, &key).await;
    assert!(guard.token() > last, "{} after {last}", guard.token());
    guard.release().await.expect("release");
}

/// As in containers, where nodes announce addresses that are only reachable inside.
#[tokio::test]
async fn error_of_an_announced_address_names_its_origin() {
    let cluster = Cluster::start(1, 0);
    let node = &cluster.nodes()[0];
    let port = support::free_port().to_string();
    node.command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let announced = format!("127.0.0.1:{port}");
    until("the node announces the port", async || {
        let nodes: String = node.query(&["CLUSTER", "NODES"]);
        nodes.contains(&format!(":{port}@"))
    })
    .await;
    let builder = LockManager::builder()
        .shard(cluster.url())
        .store_timeout(Duration::from_secs(3));
    let words =
        format!("{announced}, which is not in the URL but is announced by the cluster's nodes (cluster-announce-ip");
    // If an answer is late, the error only says so.
    until("the error names the origin", async || {
        let error = builder.clone().connect().await.expect_err("nothing listens there");
        error.to_string().contains(&words)
    })
    .await;
}
