//! What a key reports to those who drive it is the same for a queue and for a group.

use super::group::{End, GroupBench, Step, permits};
use super::*;

const LINGER: Linger = Linger::of_millis(400);

#[derive(Debug, Clone, Copy, PartialEq, Default)]
struct Views {
    unused: bool,
    leases: usize,
    guards: usize,
    ttl: Option<Duration>,
    waiting: usize,
    waits: usize,
    since: Option<Moment>,
    queued: Option<Cycle>,
    awaits_store: bool,
    contended: bool,
    lingers_until: Option<Moment>,
    evictable: bool,
}

fn views(key: &Contender<u32>) -> Views {
    let mut waits = 0;
    key.each_wait(|_, _| waits += 1);
    Views {
        unused: key.is_unused(),
        leases: key.leases(),
        guards: key.guards().count(),
        ttl: key.ttl(),
        waiting: key.waiting(),
        waits,
        since: key.waiting_since(),
        queued: key.queued_cycle(),
        awaits_store: key.awaits_store(),
        contended: key.is_contended(),
        lingers_until: key.lingers_until(),
        evictable: key.is_evictable(),
    }
}

#[test]
fn key_reports_each_state_in_every_mode() {
    for mode in [LockMode::Exclusive, LockMode::Shared, permits(1, 1)] {
        let mut bench = GroupBench::new([mode; 2]);
        let is_exclusive = mode == LockMode::Exclusive;
        assert_eq!(bench.key.is_exclusive(), is_exclusive);
        let unused = Views {
            unused: true,
            ..Views::default()
        };
        assert_eq!(views(&bench.key), unused, "{mode:?}");

        let (options, since) = (
            WaiterOptions {
                mode,
                linger: LINGER,
                ..OPTIONS
            },
            bench.now,
        );
        let id = bench.event(|key, cx| key.enqueue(options, Some(0), cx));
        let cycle = bench.in_flight[0].cycle();
        // A lock that is asked for may be free, which a group does not count on.
        let waiting = Views {
            waiting: 1,
            waits: 1,
            since: Some(since),
            awaits_store: true,
            contended: !is_exclusive,
            ..Views::default()
        };
        assert_eq!(views(&bench.key), waiting, "{mode:?}");
        assert!(
            bench.key.is_current(cycle) && !bench.key.has_lease_of(cycle),
            "{mode:?}"
        );
        assert!(!bench.key.is_current(Cycle::of(cycle.number() + 2)), "{mode:?}");

        assert!(bench.step(Step::Queued(End::Oldest)));
        let queued = Views {
            queued: Some(cycle),
            awaits_store: false,
            contended: true,
            ..waiting
        };
        assert_eq!(views(&bench.key), queued, "{mode:?}");

        assert!(bench.step(Step::Pushed));
        let Some(Outcome::Granted(guard)) = bench.key.collect(id) else {
            panic!("{mode:?}: the guard was granted");
        };
        let held = Views {
            leases: 1,
            guards: 1,
            ttl: Some(TTL),
            contended: is_exclusive,
            ..Views::default()
        };
        assert_eq!(views(&bench.key), held, "{mode:?}");
        assert!(bench.key.has_lease_of(cycle) && bench.key.is_current(cycle), "{mode:?}");

        bench.event(|key, cx| key.released(cycle, guard.token, cx));
        bench.step(Step::Granted(End::Oldest));
        assert_eq!(views(&bench.key), unused, "{mode:?}");

        // A lease that was granted at once may linger.
        let mut bench = GroupBench::new([mode; 2]);
        let id = bench.event(|key, cx| key.enqueue(options, Some(0), cx));
        assert!(bench.step(Step::Granted(End::Oldest)));
        let Some(Outcome::Granted(guard)) = bench.key.collect(id) else {
            panic!("{mode:?}: the guard was granted");
        };
        bench.event(|key, cx| key.released(guard.lease.cycle, guard.token, cx));
        let lingering = Views {
            guards: 0,
            contended: false,
            lingers_until: views(&bench.key).lingers_until,
            evictable: true,
            ..held
        };
        assert_eq!(views(&bench.key), lingering, "{mode:?}");
        assert!(lingering.lingers_until > Some(bench.now), "{mode:?}");

        bench.event(|key, cx| ((), key.evict(cx)));
        let evicted = Views {
            awaits_store: true,
            evictable: true,
            ..Views::default()
        };
        assert_eq!(views(&bench.key), evicted, "{mode:?}");
        bench.step(Step::Granted(End::Oldest));
        assert_eq!(views(&bench.key), unused, "{mode:?}");
    }
}
