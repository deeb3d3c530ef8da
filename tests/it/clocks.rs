//! Machines with different clocks: no decision depends on the time of day, and jumps and drift of a
//! server's clock are reported.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use shardlock::LockManager;
use shardlock::config::Builder;
use support::other_clock::{self, OtherClock};
use support::sentinel::Watched;
use support::{Cluster, PATIENCE, Quorum, RedisServer, quorum, worker};
use support_locks::{Locker, Measured, STORE_TIMEOUT, TestStore, lock, on_each_store, until, until_queued};

use crate::connections::named;

/// Reports the seconds since 1970 on this process's clock.
pub(crate) fn report_time(me: &worker::Current) {
    me.send(now().to_string());
}

/// Seconds since 1970 on this process's clock.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_secs().try_into().expect("a time that fits in an i64")
}

/// The differences between the workers' wall clocks and the test's, in seconds.
const AHEAD: [i64; 3] = [30, 0, -30];

/// Long enough for workers and servers on a busy machine.
const TTL: Duration = Duration::from_secs(2);

fn lockers(store: &TestStore, clock: &OtherClock) -> Vec<Locker> {
    let ahead = |seconds| {
        let vars = clock.ahead_by(seconds);
        let vars = vars.each_ref().map(|(name, value)| (*name, value.as_str()));
        store.lockers_with(1, TTL, &vars).remove(0)
    };
    AHEAD.map(ahead).into()
}

#[test]
fn clock_of_a_worker_can_be_shifted() {
    let clock = OtherClock::build();
    for seconds in AHEAD {
        let vars = clock.ahead_by(seconds);
        let worker = worker::spawn("clock", &vars.each_ref().map(|(name, value)| (*name, value.as_str())));
        let theirs: i64 = worker.line().parse().expect("a number");
        let difference = theirs - now();
        assert!((seconds - 5..=seconds).contains(&difference), "{difference}");
    }
}

on_each_store! {
    on(servers);

    async fn differing_clocks_do_not_affect_locks(store: &TestStore) {
        let clock = OtherClock::build();
        let watcher = store.manager().await;
        let mut lockers = lockers(store, &clock);
        let mut largest = 0;
        // Each worker holds the lock for longer than a TTL while the others wait, and they are
        // served in request order.
        lockers[0].request();
        let mut grow = |token| assert!(std::mem::replace(&mut largest, token) < token, "{token}");
        grow(lockers[0].locked());
        for holder in 0..lockers.len() {
            let (this, next) = (holder % AHEAD.len(), (holder + 1) % AHEAD.len());
            if holder == 0 {
                for (place, locker) in lockers.iter_mut().enumerate().skip(1) {
                    locker.request();
                    until_queued(&watcher, "k", place as u64).await;
                }
            }
            assert_eq!(lockers[next].line_within(TTL * 5 / 4), None, "the lock is held");
            lockers[this].release();
            grow(lockers[next].locked());
            lockers[this].request();
            until_queued(&watcher, "k", AHEAD.len() as u64 - 1).await;
        }
        // When a worker with a fast clock is killed, its lock is free after the TTL rather than 30
        // seconds later.
        let killed = Instant::now();
        lockers[0].kill();
        grow(lockers[1].locked());
        let bound = store.kind().dead_within(TTL) + Duration::from_secs(5);
        assert!(killed.elapsed() < bound, "{:?}", killed.elapsed());
    }
}

/// Waits until `jumps` jumps have been counted and the largest drift, rounded to seconds, is
/// `drift`, but no longer than the connections are kept. Returns whether they were.
async fn until_reported(measured: &Measured, jumps: u32, drift: f64, are_kept: impl Fn() -> bool) -> bool {
    until(
        &format!("{jumps} jumps and a drift of {drift} s are reported"),
        async || {
            // Clocks are read every few seconds, and this asks the servers as well.
            tokio::time::sleep(Duration::from_millis(50)).await;
            let told = measured.value("shardlock_server_clock_drift_seconds").round();
            (jumps_of(measured), told) == (f64::from(jumps), drift) || !are_kept()
        },
    )
    .await;
    are_kept()
}

fn jumps_of(measured: &Measured) -> f64 {
    measured.value("shardlock_server_clock_jumps_total")
}

/// Waits until each server has received three more `TIME` commands, so that at least one health
/// check after the first has read its clock.
async fn until_clocks_are_read(servers: &[&RedisServer]) {
    let before: Vec<u64> = servers.iter().map(|server| server.calls("time")).collect();
    until("the clocks are known", async || {
        let now = servers.iter().map(|server| server.calls("time"));
        // One may have been in flight, and a new connection sends one as well.
        now.zip(&before).all(|(now, before)| now >= before + 3)
    })
    .await;
}

/// Shifts the clocks of two servers in turn, forward and back.
///
/// A jump between two connections is not counted, since they may lead to different servers. If a
/// busy server has lost a connection meanwhile, another manager begins anew.
async fn assert_jumps_are_reported(builder: Builder, servers: &[&RedisServer]) {
    for _ in 0..3 {
        let measured = Measured::connect(builder.clone()).await;
        let purpose = format!(":{}:renewals", measured.locks.id());
        let connections = || -> Vec<_> { servers.iter().map(|server| named(server, &purpose)).collect() };
        until_clocks_are_read(servers).await;
        assert_eq!(jumps_of(&measured), 0.0);
        let first = connections();
        let mut reported = true;
        // The smaller drift does not hide the larger one.
        for (server, seconds, jumps, drift) in [(0, 5, 1, 5.0), (1, -4, 2, 5.0), (0, 0, 3, -4.0)] {
            other_clock::set(servers[server].dir(), seconds);
            reported &= until_reported(&measured, jumps, drift, || connections() == first).await;
        }
        if reported {
            assert!(measured.locks.shard_states()[0].is_up);
            return;
        }
        other_clock::set(servers[1].dir(), 0);
    }
    panic!("no manager has kept its connections");
}

#[tokio::test]
async fn clock_jump_of_a_cluster_node_is_reported() {
    let clock = OtherClock::build();
    let cluster = Cluster::start_in(3, 0, &clock.settable(), &[]);
    let builder = LockManager::builder().shard(cluster.url()).store_timeout(STORE_TIMEOUT);
    let nodes: Vec<&RedisServer> = cluster.nodes().iter().collect();
    assert_jumps_are_reported(builder, &nodes).await;
}

#[tokio::test]
async fn clock_jump_of_a_quorum_node_is_reported() {
    let clock = OtherClock::build();
    let nodes = Quorum::start_in(3, &clock.settable());
    let builder = LockManager::builder().shard(nodes.url()).store_timeout(STORE_TIMEOUT);
    let builder = builder.ttl(quorum::MAX_TTL).redlock_max_ttl(quorum::MAX_TTL);
    let nodes: Vec<&RedisServer> = nodes.nodes().iter().collect();
    assert_jumps_are_reported(builder, &nodes).await;
}

/// The promoted replica lacks the latest counter, and its clock, to which a counter is raised that
/// was lost, is behind the tokens that were issued.
#[tokio::test]
async fn token_grows_after_a_failover_to_a_server_that_lags_and_whose_clock_is_behind() {
    let clock = OtherClock::build();
    let watched = Watched::start_in(1, &clock.settable(), &[], &[]);
    watched.consider_down_after(PATIENCE);
    let builder = LockManager::builder().shard(watched.url()).store_timeout(STORE_TIMEOUT);
    let locks = builder.connect().await.expect("connect");
    let next_token = async || {
        let guard = lock(&locks, "k").await;
        let token = guard.token().get();
        guard.release().await.expect("release");
        token
    };
    let before = next_token().await;
    other_clock::set(watched.replicas()[0].dir(), -3_600);
    watched.failover().command(&["FLUSHALL"]);
    let after = next_token().await;
    assert!(after > before, "{after} after {before}");
}

#[tokio::test]
async fn a_failover_to_a_server_with_another_clock_is_no_jump() {
    let clock = OtherClock::build();
    let watched = Watched::start_in(1, &clock.settable(), &[], &[]);
    // A busy machine must not cause a failover.
    watched.consider_down_after(PATIENCE);
    let builder = LockManager::builder().shard(watched.url()).store_timeout(STORE_TIMEOUT);
    let measured = Measured::connect(builder).await;
    let replica = watched.replicas()[0];
    other_clock::set(replica.dir(), 30);
    until_clocks_are_read(&[watched.primary()]).await;
    other_clock::set(watched.primary().dir(), 5);
    until_reported(&measured, 1, 5.0, || true).await;

    let primary = watched.failover();
    assert_eq!(primary.port(), replica.port());
    until_reported(&measured, 1, 0.0, || true).await;
    // The new primary's clock is the reference from now on.
    other_clock::set(primary.dir(), 37);
    until_reported(&measured, 2, 7.0, || true).await;
}
