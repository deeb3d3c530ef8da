//! What an event reports for metrics and for tasks that wait for the loss of a lease.

use super::*;

const NONE: Reported = Reported {
    served: None,
    yielded: None,
    ended: None,
    stale_grant: false,
};

/// Operators see how many guards a lease serves before it is released, and which bound ended it.
#[test]
fn hold_reports_guards_served_and_the_bound_that_ended_it() {
    for bound in [None, Some(Bound::Gate), Some(Bound::Burst), Some(Bound::Slice)] {
        let mut bench = Bench::new();
        bench.rules.max_burst = if bound == Some(Bound::Burst) { 2 } else { 100 };
        bench.rules.max_slice = ms(10);
        let (id, cycle) = bench.join_store_queue(10);
        let (second, _) = bench.enqueue(1);
        if bound.is_some_and(|bound| bound != Bound::Gate) {
            bench.enqueue(2);
        }
        bench.pass(ms(1));
        bench.grant(grant(cycle, 11, 74));
        assert_eq!(bench.reported, NONE);
        if bound == Some(Bound::Gate) {
            bench.pass(ms(1));
            bench.enqueue(2);
        }
        let guard = bench.guard(id);
        bench.release_held(&guard);
        assert_eq!(bench.reported, NONE, "the lease continues");
        let guard = bench.guard(second);
        if bound == Some(Bound::Slice) {
            bench.pass(ms(10));
        }
        bench.release_held(&guard);
        let reported = Reported {
            served: Some(2),
            yielded: bound,
            ..NONE
        };
        assert_eq!(bench.reported, reported);
    }
}

/// Guards served before remote waiters were known are counted too, although not for the bound.
#[test]
fn hold_counts_guards_from_before_remote_waiters_were_known() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let (id, _) = bench.enqueue(1);
    bench.release_held(&guard);
    let guard = bench.guard(id);
    bench.remote_waiter(guard.lease.cycle);
    bench.release_held(&guard);
    assert_eq!(bench.reported.served, Some(2));
}

/// Tasks that wait for the loss sleep until the ended lease notifies them, which happens outside
/// the queue.
#[test]
fn lost_lease_is_reported_with_its_cycle() {
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
        assert_eq!(
            (bench.reported.ended, bench.reported.served),
            (Some(cycle), Some(1)),
            "{name}"
        );
        assert_eq!(guard.lease.loss(), Some(reason), "{name}");
    }
}

#[test]
fn stale_grant_is_counted() {
    let mut bench = Bench::new();
    bench.grant(grant(Cycle::of(99), 1, 1));
    assert!(bench.reported.stale_grant, "its cycle is over");
    let (_, cycle) = bench.join_store_queue(10);
    bench.grant(grant(cycle, 10, 10));
    assert!(bench.reported.stale_grant, "it expired before the last acquire");
    bench.grant(grant(cycle, 11, 11));
    assert!(!bench.reported.stale_grant);
}

/// The longest wait of each class must be found behind waiters of other classes.
#[test]
fn waits_are_listed_by_class_only_if_there_are_several() {
    fn waits(bench: &Bench) -> Vec<(u16, Moment)> {
        let mut waits = Vec::new();
        bench
            .queue
            .each_wait(|options, since| waits.push((options.class, since)));
        waits
    }
    let of_class = |class| WaiterOptions { class, ..OPTIONS };
    let mut bench = Bench::new();
    let (_, seen) = bench.enqueue_as(0, of_class(3));
    let start = at(1_000);
    bench.pass(ms(5));
    let (second, _) = bench.enqueue_as(1, of_class(3));
    assert_eq!(waits(&bench), [(3, start)]);
    bench.pass(ms(5));
    let (third, _) = bench.enqueue_as(2, of_class(7));
    assert_eq!(waits(&bench), [(3, start), (3, at(1_005)), (7, at(1_010))]);
    bench.reply(seen.acquires().0, queued(10));
    for id in [second, third] {
        bench.give_up(id);
    }
    assert_eq!(waits(&bench).len(), 1);
}

/// What the shard and the introspection page see of a key, from the first waiter to the release.
#[test]
fn queue_reports_the_state_of_a_key() {
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
            ("remote", queue.remote_waiters_seen()),
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
    let (first, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    assert_is(&bench, "awaits", 1);
    bench.pass(ms(5));
    let (second, _) = bench.enqueue(1);
    assert_is(&bench, "awaits contended", 2);
    assert_eq!(bench.queue.waiting_since(), Some(at(1_000)));
    assert_eq!(
        [first, second].map(|id| bench.queue.waker(id).copied()),
        [Some(0), Some(1)]
    );
    bench.reply(cycle, queued(10));
    assert_is(&bench, "queued contended remote", 2);
    assert_eq!(bench.queue.queued_cycle(), Some(cycle));
    bench.grant(grant(cycle, 11, 11));
    // Tokens for the second waiter have been requested.
    assert_is(&bench, "held leased guarded awaits contended remote", 1);
    assert_eq!(bench.queue.waker(first), None);
    assert_eq!(bench.queue.waiting_since(), Some(at(1_005)));
    let guard = bench.guard(first);
    bench.release_held(&guard);
    assert_is(&bench, "held leased awaits contended remote", 1);
    bench.reply(cycle, extended(12, 75));
    let guard = bench.guard(second);
    assert_is(&bench, "held leased guarded contended remote", 0);
    bench.release_held(&guard);
    assert_is(&bench, "awaits remote", 0);
    bench.reply_to_release(cycle, None);
    assert_is(&bench, "unused remote", 0);
    let (third, seen) = bench.enqueue(2);
    bench.failed(seen.acquires().0);
    assert_is(&bench, "remote", 0);
    bench.collect(third);
    assert_is(&bench, "unused remote", 0);
}
