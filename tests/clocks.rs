//! Machines whose clocks differ: nothing is decided by the time of day.
#![cfg(target_os = "linux")]
// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use support::other_clock::OtherClock;
use support::worker;
use support_locks::{LOCKER, Locker, TestStore, obey, on_each_store, until_queued};

#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        LOCKER => obey(&me),
        "clock" => me.say(now().to_string()),
        name => panic!("no worker is called {name}"),
    }
}

/// Seconds since 1970, as this process sees them.
fn now() -> i64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("after 1970");
    now.as_secs().try_into().expect("in our time")
}

/// What the wall clocks of the processes differ by from the test's, in seconds.
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
fn the_clock_of_a_worker_can_be_another() {
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

    async fn clocks_that_differ_change_nothing(store: &TestStore) {
        let clock = OtherClock::build();
        let watcher = store.manager().await;
        let mut lockers = lockers(store, &clock);
        let mut largest = 0;
        // Each holds the lock for three TTLs while the others wait, and gets it in the order of asking.
        lockers[0].ask();
        let mut grow = |token| assert!(std::mem::replace(&mut largest, token) < token, "{token}");
        grow(lockers[0].locked());
        for holder in 0..lockers.len() {
            let (this, next) = (holder % AHEAD.len(), (holder + 1) % AHEAD.len());
            if holder == 0 {
                for (place, locker) in lockers.iter_mut().enumerate().skip(1) {
                    locker.ask();
                    until_queued(&watcher, "k", place as u64).await;
                }
            }
            assert_eq!(lockers[next].line_within(3 * store.short_ttl()), None, "it is held");
            lockers[this].release();
            grow(lockers[next].locked());
            lockers[this].ask();
            until_queued(&watcher, "k", AHEAD.len() as u64 - 1).await;
        }
        // And one whose clock is ahead dies with the lock: it is missed for its TTL and not for 30 seconds.
        let killed = Instant::now();
        lockers[0].kill();
        grow(lockers[1].locked());
        let bound = store.kind().dead_within(store.short_ttl()) + Duration::from_millis(400);
        assert!(killed.elapsed() < bound, "{:?}", killed.elapsed());
    }
}
