//! What an event reports for metrics and for tasks that wait for the loss of a lease.

use super::*;

const NONE: Told = Told {
    served: None,
    yielded: None,
    ended: None,
    stale_grant: false,
};

/// Operators see how many guards a lease serves before it is released, and which bound ended it.
#[test]
fn tenure_tells_how_many_guards_it_served_and_which_bound_ended_it() {
    for bound in [None, Some(Bound::Gate), Some(Bound::Burst), Some(Bound::Slice)] {
        let mut bench = Bench::new();
        bench.rules.max_burst = if bound == Some(Bound::Burst) { 2 } else { 100 };
        bench.rules.max_slice = ms(10);
        let (id, cycle) = bench.stand_in_queue(10);
        let (second, _) = bench.want(1);
        if bound.is_some_and(|bound| bound != Bound::Gate) {
            bench.want(2);
        }
        bench.pass(ms(1));
        bench.grant(grant(cycle, 11, 74));
        assert_eq!(bench.told, NONE);
        if bound == Some(Bound::Gate) {
            bench.pass(ms(1));
            bench.want(2);
        }
        let guard = bench.guard(id);
        bench.release_held(&guard);
        assert_eq!(bench.told, NONE, "the lease continues");
        let guard = bench.guard(second);
        if bound == Some(Bound::Slice) {
            bench.pass(ms(10));
        }
        bench.release_held(&guard);
        let told = Told {
            served: Some(2),
            yielded: bound,
            ..NONE
        };
        assert_eq!(bench.told, told);
    }
}

/// Guards served before remote waiters were known are counted too, although not for the bound.
#[test]
fn tenure_counts_guards_of_before_rivals_were_known() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let (id, _) = bench.want(1);
    bench.release_held(&guard);
    let guard = bench.guard(id);
    bench.wanted(guard.lease.cycle);
    bench.release_held(&guard);
    assert_eq!(bench.told.served, Some(2));
}

/// Tasks that wait for the loss sleep until the ended lease notifies them, which happens outside
/// the queue.
#[test]
fn lease_that_ends_is_told_with_its_cycle() {
    /// What ends the lease, and the resulting reason.
    type Case = (&'static str, fn(&mut Bench, Cycle) -> Seen, LossReason);
    let losses: [Case; 4] = [
        (
            "time",
            |bench, _| {
                bench.pass(TTL);
                bench.tick()
            },
            LossReason::Expired,
        ),
        (
            "renewal",
            |bench, cycle| bench.renewed(cycle, bench.now, Some(RenewReply::NotOurs)),
            LossReason::Taken,
        ),
        ("map", |bench, _| bench.disown(), LossReason::ShardMap),
        ("shutdown", |bench, _| bench.close(), LossReason::Closed),
    ];
    for (name, lose, reason) in losses {
        let mut bench = Bench::new();
        let guard = bench.hold(1, 1);
        let cycle = guard.lease.cycle;
        let seen = lose(&mut bench, cycle);
        assert_eq!(seen.lost, Some(reason), "{name}");
        assert_eq!((bench.told.ended, bench.told.served), (Some(cycle), Some(1)), "{name}");
        assert_eq!(guard.lease.loss(), Some(reason), "{name}");
    }
}

#[test]
fn grant_that_is_of_no_use_is_counted() {
    let mut bench = Bench::new();
    bench.grant(grant(Cycle::of(99), 1, 1));
    assert!(bench.told.stale_grant, "its cycle is over");
    let (_, cycle) = bench.stand_in_queue(10);
    bench.grant(grant(cycle, 10, 10));
    assert!(bench.told.stale_grant, "it expired before the last acquire");
    bench.grant(grant(cycle, 11, 11));
    assert!(!bench.told.stale_grant);
}

/// The longest wait of each class must be found behind waiters of other classes.
#[test]
fn waits_are_listed_by_class_only_if_there_are_several() {
    fn waits(bench: &Bench) -> Vec<(u16, Moment)> {
        let mut waits = Vec::new();
        bench.queue.each_wait(|want, since| waits.push((want.class, since)));
        waits
    }
    let of_class = |class| WaiterOptions { class, ..WANT };
    let mut bench = Bench::new();
    let (_, seen) = bench.want_as(0, of_class(3));
    let start = at(1_000);
    bench.pass(ms(5));
    let (second, _) = bench.want_as(1, of_class(3));
    assert_eq!(waits(&bench), [(3, start)]);
    bench.pass(ms(5));
    let (third, _) = bench.want_as(2, of_class(7));
    assert_eq!(waits(&bench), [(3, start), (3, at(1_005)), (7, at(1_010))]);
    bench.reply(seen.asks().0, queued(10));
    for id in [second, third] {
        bench.give_up(id);
    }
    assert_eq!(waits(&bench).len(), 1);
}

/// What the shard and the introspection page see of a key, from the first waiter to the release.
#[test]
fn queue_tells_how_far_a_key_is() {
    #[track_caller]
    fn assert_is(bench: &Bench, expected: &str, waiting: usize) {
        let queue = &bench.queue;
        let mut is = Vec::new();
        for (name, holds) in [
            ("unused", queue.is_unused()),
            ("held", queue.holds()),
            ("leased", queue.lease().is_some()),
            ("guarded", queue.lease().is_some_and(|(_, token)| token.is_some())),
            ("awaits", queue.awaits_store()),
            ("queued", queue.queued_cycle().is_some()),
            ("contended", queue.is_contended()),
            ("rivals", queue.remote_waiters_seen()),
        ] {
            if holds {
                is.push(name);
            }
        }
        assert_eq!((is.join(" ").as_str(), queue.waiting()), (expected, waiting));
    }

    let mut bench = Bench::new();
    assert_is(&bench, "unused", 0);
    assert_eq!(bench.queue.waiting_since(), None);
    let (first, seen) = bench.want(0);
    let cycle = seen.asks().0;
    assert_is(&bench, "awaits", 1);
    bench.pass(ms(5));
    let (second, _) = bench.want(1);
    assert_is(&bench, "awaits contended", 2);
    assert_eq!(bench.queue.waiting_since(), Some(at(1_000)));
    assert_eq!(
        [first, second].map(|id| bench.queue.waker(id).copied()),
        [Some(0), Some(1)]
    );
    bench.reply(cycle, queued(10));
    assert_is(&bench, "queued contended rivals", 2);
    assert_eq!(bench.queue.queued_cycle(), Some(cycle));
    bench.grant(grant(cycle, 11, 11));
    // Tokens for the second waiter have been requested.
    assert_is(&bench, "held leased guarded awaits contended rivals", 1);
    assert_eq!(bench.queue.waker(first), None);
    assert_eq!(bench.queue.waiting_since(), Some(at(1_005)));
    let guard = bench.guard(first);
    bench.release_held(&guard);
    assert_is(&bench, "held leased awaits contended rivals", 1);
    bench.reply(cycle, extended(12, 75));
    let guard = bench.guard(second);
    assert_is(&bench, "held leased guarded contended rivals", 0);
    bench.release_held(&guard);
    assert_is(&bench, "awaits rivals", 0);
    bench.released_remotely(cycle, None);
    assert_is(&bench, "unused rivals", 0);
    let (third, seen) = bench.want(2);
    bench.failed(seen.asks().0);
    assert_is(&bench, "rivals", 0);
    bench.collect(third);
    assert_is(&bench, "unused rivals", 0);
}
