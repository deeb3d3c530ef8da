//! Machines with different clocks: no decision depends on the time of day, and jumps and drift of a
//! server's clock are reported.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use shardlock::LockManager;
use support::other_clock::{self, OtherClock};
use support::sentinel::Watched;
use support::{Cluster, Quorum, RedisServer, quorum, worker};
use support_locks::{Locker, Measured, TestStore, on_each_store, until, until_queued};

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

fn lockers(store: &TestStore, clock: &OtherClock) -> Vec<Locker> {
    let ahead = |seconds| {
        let vars = clock.ahead_by(seconds);
        let vars = vars.each_ref().map(|(name, value)| (*name, value.as_str()));
        store.lockers_with(1, store.short_ttl(), &vars).remove(0)
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
        // Each worker holds the lock for three TTLs while the others wait, and they are served in
        // request order.
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
            assert_eq!(lockers[next].line_within(3 * store.short_ttl()), None, "the lock is held");
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
        let bound = store.kind().dead_within(store.short_ttl()) + Duration::from_secs(5);
        assert!(killed.elapsed() < bound, "{:?}", killed.elapsed());
    }
}

/// Waits until `jumps` jumps have been counted and the largest drift, rounded to seconds, is
/// `drift`.
async fn until_reported(measured: &Measured, jumps: u32, drift: f64) {
    until(
        &format!("{jumps} jumps and a drift of {drift} s are reported"),
        async || {
            let told = measured.value("shardlock_server_clock_drift_seconds").round();
            (jumps_of(measured), told) == (f64::from(jumps), drift)
        },
    )
    .await;
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
async fn assert_jumps_are_reported(measured: &Measured, servers: &[&RedisServer]) {
    until_clocks_are_read(servers).await;
    assert_eq!(jumps_of(measured), 0.0);
    other_clock::set(servers[0].dir(), 5);
    until_reported(measured, 1, 5.0).await;
    // The smaller drift does not hide the larger one.
    other_clock::set(servers[1].dir(), -4);
    until_reported(measured, 2, 5.0).await;
    other_clock::set(servers[0].dir(), 0);
    until_reported(measured, 3, -4.0).await;
    assert!(measured.locks.shard_states()[0].is_up);
}

#[tokio::test]
async fn clock_jump_of_a_cluster_node_is_reported() {
    let clock = OtherClock::build();
    let cluster = Cluster::start_in(3, 0, &clock.settable(), &[]);
    let measured = Measured::connect(LockManager::builder().shard(cluster.url())).await;
    let nodes: Vec<&RedisServer> = cluster.nodes().iter().collect();
    assert_jumps_are_reported(&measured, &nodes).await;
}

#[tokio::test]
async fn clock_jump_of_a_quorum_node_is_reported() {
    let clock = OtherClock::build();
    let nodes = Quorum::start_in(3, &clock.settable());
    let builder = LockManager::builder().shard(nodes.url());
    let builder = builder.ttl(quorum::MAX_TTL).redlock_max_ttl(quorum::MAX_TTL);
    let measured = Measured::connect(builder).await;
    let nodes: Vec<&RedisServer> = nodes.nodes().iter().collect();
    assert_jumps_are_reported(&measured, &nodes).await;
}

#[tokio::test]
async fn a_failover_to_a_server_with_another_clock_is_no_jump() {
    let clock = OtherClock::build();
    let watched = Watched::start_in(1, &clock.settable(), &[], &[]);
    let measured = Measured::connect(LockManager::builder().shard(watched.url())).await;
    let replica = watched.replicas()[0];
    other_clock::set(replica.dir(), 30);
    until_clocks_are_read(&[watched.primary()]).await;
    other_clock::set(watched.primary().dir(), 5);
    until_reported(&measured, 1, 5.0).await;

    let primary = watched.failover();
    assert_eq!(primary.port(), replica.port());
    until_reported(&measured, 1, 0.0).await;
    // The new primary's clock is the reference from now on.
    other_clock::set(primary.dir(), 37);
    until_reported(&measured, 2, 7.0).await;
}
