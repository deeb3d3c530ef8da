//! A primary watched by sentinels: how it is found and followed through failovers, and how its
//! replicas confirm leases.

mod load;

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockGuard, LockManager, LossReason};
use support::proxy::Proxy;
use support::sentinel::{DOWN_AFTER, NAME, Watched};
use support::{PATIENCE, RedisServer};
use support_locks::{STORE_TIMEOUT, hand_off, lock, lock_in_time, lock_keys, soon, until, until_queued, waiting};

/// Long enough that no test waits for its end by mistake.
const LONG_TTL: Duration = Duration::from_secs(60);

/// Servers whose primary is not replaced because a busy machine makes it late. Tests that want a
/// failover set the time to [`DOWN_AFTER`].
pub(crate) fn start(replicas: usize) -> Watched {
    let watched = Watched::start(replicas);
    watched.consider_down_after(PATIENCE);
    watched
}

async fn connect(watched: &Watched) -> LockManager {
    support_locks::connect(&watched.url()).await
}

/// The error of connecting to this URL.
async fn refused(url: &str) -> LockError {
    let builder = LockManager::builder().shard(url).store_timeout(STORE_TIMEOUT);
    builder.connect().await.expect_err(url)
}

/// A manager with long leases and this store timeout.
async fn connect_long_ttl(watched: &Watched, limit: Duration) -> LockManager {
    let builder = LockManager::builder().shard(watched.url()).ttl(LONG_TTL);
    builder.store_timeout(limit).connect().await.expect("connect")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_and_hand_offs_work_on_the_primary_that_sentinels_name() {
    let watched = start(1);
    let (one, other) = (connect(&watched).await, connect(&watched).await);
    for _ in 0..20 {
        hand_off(&one, &other, "k").await;
        hand_off(&other, &one, "k").await;
    }
    let guard = lock(&one, "k").await;
    assert!(other.try_lock("k").await.expect("try").is_none());
    guard.release().await.expect("release");
    assert_eq!(
        watched.primary().channels().len(),
        2 + 1,
        "two inboxes, and the sentinels' own channel"
    );
    assert_eq!(lock_keys(watched.primary()), [""; 0]);
}

/// The number of pooled connections of the manager to this server.
fn pooled(server: &RedisServer, locks: &LockManager) -> usize {
    let (list, name) = (
        server.query::<String>(&["CLIENT", "LIST"]),
        format!("name=shardlock:{}:pool ", locks.id()),
    );
    list.lines().filter(|client| client.contains(&name)).count()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn inspections_follow_the_primary_and_reuse_no_connection_to_the_old_one() {
    let watched = start(1);
    let locks = connect(&watched).await;
    for _ in 0..2 {
        locks.inspect("k").await.expect("inspect");
        let old = watched.primary();
        assert_eq!(pooled(old, &locks), 1);
        watched.has_replicas(1);
        // The old primary lives on as a replica.
        let new = watched.failover();
        until("the new primary is inspected", async || {
            locks.inspect("k").await.is_ok() && pooled(new, &locks) == 1
        })
        .await;
        until("the connection to the old primary is closed", async || {
            pooled(old, &locks) == 0
        })
        .await;
        // And no other one is opened there.
        for _ in 0..20 {
            locks.inspect("k").await.expect("inspect");
            assert_eq!(pooled(old, &locks), 0);
        }
    }
}

/// The sentinels leave the old primary unchanged for at least eight seconds, and it keeps accepting
/// writes that will be lost.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn orderly_failover_is_followed_at_once_and_keeps_holders_and_waiters() {
    let watched = start(1);
    let connect = || connect_long_ttl(&watched, STORE_TIMEOUT);
    let (one, other) = (connect().await, connect().await);
    let (held, kept) = (lock(&one, "held").await, lock(&other, "kept").await);
    let waiting = waiting(&other, "held");
    until_queued(&one, "held", 1).await;
    watched.has_replicas(1);
    let old = watched.primary();
    let new = watched.failover();
    until("the inboxes have moved", async || {
        new.channels().len() >= 3 && old.channels().iter().all(|channel| !channel.starts_with("lock:in:"))
    })
    .await;
    let role: Vec<redis::Value> = old.query(&["ROLE"]);
    assert_eq!(role[0], redis::Value::BulkString("master".into()), "still");

    assert!(held.is_valid() && kept.is_valid());
    let token = held.token();
    let released = Instant::now();
    held.release().await.expect("the lock is held on the new primary");
    let handed = soon("the hand-off", waiting).await.expect("a task");
    assert!(handed.token() > token);
    assert!(released.elapsed() < Duration::from_secs(5), "{:?}", released.elapsed());
    handed.release().await.expect("release");
    kept.release().await.expect("release");
    hand_off(&one, &other, "k").await;
    hand_off(&other, &one, "k").await;
    assert_eq!(lock_keys(new), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_the_primary_was_killed_locks_and_hand_offs_work_on_the_promoted_replica() {
    let watched = start(2);
    let one = connect_long_ttl(&watched, Duration::from_secs(3)).await;
    let other = connect(&watched).await;
    let mut largest = lock_in_time(&one, "k").await;
    let held = lock(&one, "held").await;
    watched.has_replicas(2);
    let old = watched.primary();
    old.kill();
    let failing = one.lock("k").fail_fast();
    let error = failing.await.expect_err("no replica is promoted yet");
    assert!(error.kind() == LockErrorKind::Unavailable, "{error}");
    assert!(error.to_string().contains(&old.address()), "{error}");
    watched.consider_down_after(DOWN_AFTER);
    for locks in [&one, &other] {
        let token = lock_in_time(locks, "k").await;
        assert!(token > largest, "{token} after {largest}");
        largest = token;
    }
    watched.switched(old.port());
    hand_off(&one, &other, "k").await;
    // The replica had the lease.
    assert!(held.is_valid());
    assert!(other.try_lock("held").await.expect("try").is_none());
    held.release().await.expect("the lock is held on the new primary");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hung_primary_is_abandoned_once_the_sentinels_switch() {
    let watched = start(1);
    let connect = || connect_long_ttl(&watched, STORE_TIMEOUT);
    let (one, other) = (connect().await, connect().await);
    let held = lock(&one, "held").await;
    let token = held.token();
    watched.has_replicas(1);
    let old = watched.primary();
    watched.consider_down_after(DOWN_AFTER);
    old.stop();
    let new = watched.switched(old.port());
    let switched = Instant::now();
    let guard = soon("a lock", one.lock("k").into_future()).await;
    // A request sent before the switch may still fail; the next one must succeed.
    let guard = match guard {
        Ok(guard) => guard,
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            one.lock("k").await.expect("on the new primary")
        }
    };
    assert!(guard.token() > token);
    guard.release().await.expect("release");
    until("the inboxes have moved", async || {
        let inboxes = |channel: &&String| channel.starts_with("lock:in:");
        new.channels().iter().filter(inboxes).count() == 2
    })
    .await;
    assert!(switched.elapsed() < Duration::from_secs(5), "{:?}", switched.elapsed());
    let waiting = waiting(&other, "held");
    until_queued(&one, "held", 1).await;
    held.release().await.expect("the lock is held on the new primary");
    let handed = soon("the hand-off", waiting).await.expect("a task");
    handed.release().await.expect("release");

    // Once resumed, the old primary is demoted, and no manager returns to it. Without the shorter
    // publish period the demotion would take eight seconds.
    watched.publish_every(Duration::from_millis(250));
    old.cont();
    watched.has_replicas(1);
    hand_off(&one, &other, "k").await;
    assert_eq!(lock_keys(new), [""; 0]);
}

/// The promoted replica has an old counter: a plain INCR would issue the same tokens again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tokens_grow_though_nothing_was_replicated_before_the_failover() {
    let watched = start(1);
    let (one, other) = (connect(&watched).await, connect(&watched).await);
    let mut largest = lock_in_time(&one, "k").await;
    watched.has_replicas(1);
    let old = watched.primary();
    let counter = old
        .keys()
        .into_iter()
        .find(|key| key.contains("%fence"))
        .expect("a counter");
    let replica = watched.replicas()[0];
    watched.cut_replication();
    let stale: u64 = replica.query(&["GET", &counter]);
    assert!(stale >= largest);
    for _ in 0..50 {
        largest = largest.max(lock_in_time(&one, "k").await);
    }
    let lost = lock(&one, "lost").await;
    watched.consider_down_after(DOWN_AFTER);
    old.kill();
    let new = watched.switched(old.port());
    assert_eq!(new.port(), replica.port());
    let after: u64 = new.query(&["GET", &counter]);
    assert!(after < largest, "{after} is no old counter");
    // This manager has never seen the lost tokens.
    let newcomer = connect(&watched).await;
    for locks in [&newcomer, &other, &one, &newcomer] {
        let token = lock_in_time(locks, "k").await;
        assert!(token > largest, "{token} after {largest}");
        largest = token;
    }
    // The lease was lost with the primary. Its holder is notified at the next renewal, long before
    // the TTL of ten seconds.
    assert_eq!(soon("the loss", lost.lost()).await, LossReason::Taken);
    let token = lost.token();
    assert!(lost.release().await.expect_err("the lock was lost").is_lost());
    let guard = lock(&other, "lost").await;
    assert!(guard.token() > token);
    guard.release().await.expect("release");
}

/// A manager with a lingering lease for `k` and minutes until its next renewal, and the token of
/// the last guard under this lease.
async fn keeper(watched: &Watched) -> (LockManager, u64) {
    const LONG: Duration = Duration::from_secs(3600);
    let builder = LockManager::builder().shard(watched.url()).ttl(LONG).linger(LONG);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    let token = lock_in_time(&locks, "k").await;
    assert_eq!(locks.shard_states()[0].lingering, 1);
    (locks, token)
}

/// [`lock`] that retries while a failover is in progress.
async fn lock_eventually(locks: &LockManager, key: &str) -> LockGuard {
    let mut guard = None;
    until("the lock can be acquired again", async || {
        guard = locks.lock(key).await.ok();
        guard.is_some()
    })
    .await;
    guard.expect("the lock was acquired")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lingering_lease_lost_in_a_failover_is_not_reused() {
    for hangs in [false, true] {
        let watched = start(1);
        let other = connect(&watched).await;
        watched.has_replicas(1);
        watched.cut_replication();
        let (keeper, token) = keeper(&watched).await;
        let old = watched.primary();
        watched.consider_down_after(DOWN_AFTER);
        if hangs {
            old.stop();
        } else {
            old.kill();
        }
        watched.switched(old.port());
        let guard = lock_eventually(&other, "k").await;
        assert!(guard.token().get() > token);
        match keeper.try_lock("k").await {
            Ok(both) => assert!(both.is_none(), "two holders: {guard:?}, {both:?}"),
            Err(error) => assert!(error.is_retryable(), "{error}"),
        }
        assert!(guard.is_valid());
        let last = guard.token().get();
        guard.release().await.expect("the lock was held");
        let token = lock_in_time(&keeper, "k").await;
        assert!(token > last, "{token} after {last}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lingering_lease_kept_in_a_failover_is_reused() {
    let watched = start(1);
    let (keeper, mut token) = keeper(&watched).await;
    let lease = keeper
        .inspect("k")
        .await
        .expect("inspect")
        .holder
        .expect("the lease lingers")
        .owner;
    watched.has_replicas(1);
    let old = watched.primary();
    watched.consider_down_after(DOWN_AFTER);
    old.kill();
    watched.switched(old.port());
    for _ in 0..3 {
        let guard = lock_eventually(&keeper, "k").await;
        assert!(guard.token().get() > token, "{} after {token}", guard.token());
        assert_eq!(guard.owner(), lease);
        token = guard.token().get();
        guard.release().await.expect("release");
    }
}

/// The next renewal is minutes away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holder_is_notified_of_a_lock_lost_in_a_failover() {
    let watched = start(1);
    watched.has_replicas(1);
    watched.cut_replication();
    let (keeper, _) = keeper(&watched).await;
    let held = lock(&keeper, "k").await;
    let old = watched.primary();
    watched.consider_down_after(DOWN_AFTER);
    old.kill();
    watched.switched(old.port());
    assert_eq!(soon("the loss", held.lost()).await, LossReason::Taken);
}

/// A manual failover that no sentinel reports. A request discovers it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demoted_primary_is_abandoned_by_commands_and_inbox() {
    let watched = start(1);
    let one = connect_long_ttl(&watched, Duration::from_secs(3)).await;
    let other = connect(&watched).await;
    hand_off(&one, &other, "k").await;
    let token = lock_in_time(&one, "k").await;
    watched.has_replicas(1);
    let (old, new) = (watched.primary(), watched.replicas()[0]);
    new.command(&["REPLICAOF", "NO", "ONE"]);
    old.command(&["REPLICAOF", "127.0.0.1", &new.port().to_string()]);
    let failing = one.lock("k").fail_fast();
    let error = failing.await.expect_err("the sentinels still name the old one");
    assert!(error.is_retryable(), "{error}");
    assert!(error.to_string().contains("is a replica of"), "{error}");
    let mut inboxes = Vec::new();
    let is_there = |inboxes: &[String], locks: &LockManager| inboxes.iter().any(|channel| channel.contains(locks.id()));
    until("the inbox has left it", async || {
        inboxes = old.channels();
        !is_there(&inboxes, &one)
    })
    .await;
    // No request of the other manager has discovered the failover, so its inbox shows that nothing
    // else has cut the inboxes.
    assert!(is_there(&inboxes, &other), "{inboxes:?}");
    watched.consider_down_after(DOWN_AFTER);
    assert!(lock_in_time(&one, "k").await > token);
    lock_in_time(&other, "k").await;
    hand_off(&one, &other, "k").await;
    hand_off(&other, &one, "k").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_and_sentinels_are_refused_as_primaries() {
    let watched = start(1);
    let (primary, replica) = (watched.primary(), watched.replicas()[0]);
    let error = refused(&replica.url()).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    for part in ["is a replica of", &primary.address(), "connect to the primary"] {
        assert!(error.to_string().contains(part), "{error}");
    }
    let sentinel = watched.sentinels()[0].address();
    let error = refused(&format!("redis://{sentinel}")).await;
    assert!(error.kind() == LockErrorKind::Refused, "{error}");
    assert!(
        error.to_string().contains(&format!("redis+sentinel://{sentinel}/NAME")),
        "{error}"
    );
    assert_eq!(lock_keys(primary), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn error_of_a_primary_says_that_the_sentinels_name_it() {
    let watched = start(0);
    let primary = watched.primary().address();
    watched.primary().kill();
    let words = format!("the sentinels name {primary} as the primary: ");
    let builder = LockManager::builder().shard(watched.url());
    let builder = builder.store_timeout(Duration::from_secs(3));
    // If an answer is late, the error only says so.
    until("the error names the origin", async || {
        let error = builder.clone().connect().await.expect_err("nothing listens there");
        error.to_string().contains(&words)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn name_unknown_to_the_sentinels_is_explained() {
    let watched = Watched::start(0);
    let url = watched.url().replace(NAME, "another");
    let error = refused(&url).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(
        error.to_string().contains("knows no primary called \"another\""),
        "{error}"
    );
}

/// The user and password before the hosts are for the primary; the sentinels have their own. These
/// sentinels report host names instead of addresses.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_and_the_primary_each_get_their_own_password() {
    let lines = [
        "requirepass hunter2-s",
        "sentinel sentinel-pass hunter2-s",
        "sentinel resolve-hostnames yes",
        "sentinel announce-hostnames yes",
        "sentinel auth-pass mymaster hunter2-p",
    ];
    let watched = Watched::start_with(0, &["--requirepass", "hunter2-p"], &lines);
    let plain = watched.url();
    let with_login = plain.replace("://", "://:hunter2-p@");
    let right = format!("{with_login}?sentinel_password=hunter2-s");
    let locks = support_locks::connect(&right).await;
    lock_in_time(&locks, "k").await;
    for (wrong, words) in [
        (with_login.clone(), "no sentinel names the primary"),
        (
            format!("{with_login}?sentinel_password=hunter2-x"),
            "no sentinel names the primary",
        ),
        (
            format!("{plain}?sentinel_password=hunter2-s"),
            "check the user and the password",
        ),
        (right.replace("2-p", "2-x"), "check the user and the password"),
    ] {
        let error = refused(&wrong).await;
        assert!(
            (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
            "{error}"
        );
        assert!(error.to_string().contains(words), "{error}");
        assert!(
            error.to_string().contains("password") && !error.to_string().contains("hunter2"),
            "{error}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sentinels_that_are_down_or_hang_are_passed_over() {
    let watched = start(1);
    watched.sentinels()[0].stop();
    let started = Instant::now();
    // A single sentinel may take half of the time.
    let builder = LockManager::builder()
        .shard(watched.url())
        .store_timeout(2 * STORE_TIMEOUT);
    let locks = builder.connect().await.expect("connect");
    assert!(started.elapsed() < STORE_TIMEOUT * 3 / 4, "{:?}", started.elapsed());
    let token = lock_in_time(&locks, "k").await;
    watched.sentinels()[0].cont();
    watched.consider_down_after(DOWN_AFTER);
    watched.sentinels()[0].kill();
    let other = connect(&watched).await;
    watched.has_replicas(1);
    let old = watched.primary();
    old.kill();
    watched.switched(old.port());
    assert!(lock_in_time(&other, "k").await > token);
    hand_off(&locks, &other, "k").await;
}

/// A device on the path has lost the subscription's state, and neither side is notified.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscription_to_a_sentinel_that_falls_silent_is_replaced() {
    let watched = start(1);
    let proxy = Proxy::start(watched.sentinels()[0].address());
    // So long that only a message from a sentinel makes requests leave a primary that hangs.
    let patience = Duration::from_secs(15);
    let locks = LockManager::builder()
        .shard(format!("redis+sentinel://{}/{NAME}", proxy.address()))
        .ttl(LONG_TTL)
        .store_timeout(patience);
    let locks = locks.connect().await.expect("connect");
    until("the manager is subscribed to the sentinel", async || {
        let clients: String = watched.sentinels()[0]
            .try_query(&["CLIENT", "LIST"])
            .expect("list clients");
        clients.contains(" sub=1 ")
    })
    .await;
    proxy.silence();
    let silenced = proxy.connections();
    // The first connection is the new subscription, the second asks whether a switch was missed.
    until("the manager is subscribed to the sentinel again", async || {
        proxy.connections() >= silenced + 2
    })
    .await;
    watched.has_replicas(1);
    let old = watched.primary();
    watched.consider_down_after(DOWN_AFTER);
    old.stop();
    let new = watched.switched(old.port());
    let switched = Instant::now();
    // Only a message from a sentinel makes an inbox leave a server that hangs.
    until("the inbox has moved", async || {
        new.channels().iter().any(|channel| channel.starts_with("lock:in:"))
    })
    .await;
    lock_in_time(&locks, "k").await;
    assert!(switched.elapsed() < patience / 2, "{:?}", switched.elapsed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_connections_survive_while_all_sentinels_are_down_and_new_ones_fail() {
    let watched = Watched::start(0);
    let (one, other) = (connect(&watched).await, connect(&watched).await);
    let url = watched.url();
    for sentinel in watched.sentinels() {
        sentinel.kill();
    }
    for _ in 0..20 {
        hand_off(&one, &other, "k").await;
        hand_off(&other, &one, "k").await;
    }
    let started = Instant::now();
    let error = refused(&url).await;
    // Before the store timeout.
    assert!(started.elapsed() < STORE_TIMEOUT * 3 / 4, "{:?}", started.elapsed());
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    for sentinel in watched.sentinels() {
        assert!(error.to_string().contains(&sentinel.address()), "{error}");
    }
}
