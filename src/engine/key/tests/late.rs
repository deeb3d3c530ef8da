//! Late events for a cycle that is over must not affect the current one.

use super::*;

/// No cycle of a bench has this number.
const OVER: u64 = 900;

/// Asserts that the event did nothing, except perhaps release the cycle that is over.
#[track_caller]
fn assert_ignored(seen: &Seen, what: &str) {
    assert_eq!((seen.request, seen.lost), (None, None), "{what}");
    assert!(seen.woken.is_empty(), "{what}: {seen:?}");
    assert!(
        seen.abandoned.iter().all(|cycle| *cycle == Cycle::of(OVER)),
        "{what}: {seen:?}"
    );
}

/// Every event that a request of the old cycle can cause.
fn deliver_late_events(bench: &mut Bench) {
    let over = Cycle::of(OVER);
    for reply in [granted(500, 563), extended(500, 563), queued(500)] {
        let seen = bench.reply(over, reply);
        assert_ignored(&seen, "a reply");
        assert_eq!(seen.abandoned, [over], "the store has it");
    }
    for reply in [AcquireReply::Taken, AcquireReply::Busy] {
        assert_eq!(bench.reply(over, reply), NOTHING);
    }
    assert_eq!(bench.reply_to_release(over, None), NOTHING);
    assert_eq!(bench.reply_to_release(over, Some(granted(500, 563))), NOTHING);
    assert_eq!(bench.failed(over), NOTHING);
    assert_eq!(bench.cancelled(over), NOTHING);
    assert_eq!(bench.renewed(over, bench.now, Some(RenewReply::NotOurs)), NOTHING);
    assert_eq!(
        bench.renewed(over, bench.now, Some(RenewReply::Extended { has_waiters: true })),
        NOTHING
    );
    let pushes: [fn(&mut Bench, Cycle) -> Seen; 3] = [
        |bench, over| bench.grant(grant(over, 500, 563)),
        |bench, over| bench.your_turn(over),
        |bench, over| bench.remote_waiter(over),
    ];
    for push in pushes {
        let seen = push(bench, over);
        assert_ignored(&seen, "a push");
        assert_eq!(seen.abandoned, [over]);
    }
}

/// A connection that was given up may still deliver a reply. If it were taken for the reply to the
/// current request, a task would hold a lock that the store never granted, or wait for a reply that
/// has already arrived.
#[test]
fn late_events_of_an_old_cycle_do_not_affect_an_acquire() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    deliver_late_events(&mut bench);
    assert!(!bench.queue.is_settled(id) && bench.queue.awaits_store());
    bench.reply(seen.acquires().0, granted(1, 1));
    assert_eq!(bench.guard(id).token.get(), 1);
}

#[test]
fn late_events_of_an_old_cycle_do_not_affect_an_extension() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.enqueue(1);
    let cycle = bench.release_held(&guard).acquires().0;
    let until = guard.lease.valid_until();
    bench.pass(ms(100));
    deliver_late_events(&mut bench);
    assert!(!bench.queue.is_settled(id) && bench.queue.awaits_store());
    assert_eq!(guard.lease.valid_until(), until);
    bench.reply(cycle, extended(2, 65));
    assert_eq!(bench.guard(id).token.get(), 2);
}

#[test]
fn late_events_of_an_old_cycle_do_not_affect_a_release() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    bench.release_held(&guard);
    deliver_late_events(&mut bench);
    assert!(bench.queue.awaits_store(), "its reply determines what happens next");
    bench.enqueue(1);
    assert!(bench.reply_to_release(guard.lease.cycle, None).acquires().0 > guard.lease.cycle);
}

#[test]
fn late_events_of_an_old_cycle_do_not_affect_a_release_that_requeues() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.join_store_queue(10);
    let (other, _) = bench.enqueue(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    deliver_late_events(&mut bench);
    assert!(bench.queue.is_current(cycle) && bench.queue.is_current(next));
    assert_eq!(bench.reply_to_release(cycle, Some(granted(12, 12))).woken, [1]);
    assert!(!bench.queue.is_current(cycle) && bench.queue.is_current(next));
    assert_eq!(bench.guard(other).token.get(), 12);
}

/// A late push for the cycle that the request in flight releases. A second release, sent at once,
/// could overtake that request, whose guard would report that its lease was lost. The push may also
/// stand for a lease that was taken since, so the release is repeated after its reply.
#[test]
fn late_push_for_a_cycle_that_is_requeued_repeats_its_release_after_the_reply() {
    let pushes: [fn(&mut Bench, Cycle) -> Seen; 2] = [
        |bench, cycle| bench.grant(grant(cycle, 500, 563)),
        |bench, cycle| bench.your_turn(cycle),
    ];
    for push in pushes {
        let mut bench = Bench::new();
        let (cycle, sent) = bench.requeue();
        assert_eq!(push(&mut bench, cycle), NOTHING);
        bench.assert_repeated(&sent, Some(queued(20)));
    }
}

#[test]
fn late_events_of_an_old_cycle_do_not_affect_a_queued_cycle() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    deliver_late_events(&mut bench);
    assert!(!bench.queue.is_settled(id));
    assert_eq!(bench.queue.queued_cycle(), Some(cycle));
    assert_eq!(bench.grant(grant(cycle, 11, 11)).woken, [0]);
}

#[test]
fn late_events_of_an_old_cycle_do_not_affect_a_cycle_that_is_retried() {
    let mut bench = Bench::new();
    let in_outage = InOutage::UntilOwnLimit;
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { in_outage, ..OPTIONS });
    let cycle = seen.acquires().0;
    bench.failed(cycle);
    deliver_late_events(&mut bench);
    assert!(bench.queue.is_current(cycle) && !bench.queue.is_settled(id));
    assert_eq!(bench.your_turn(cycle).acquires().0, cycle);
}

#[test]
fn late_events_of_an_old_cycle_do_not_affect_a_guard() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    deliver_late_events(&mut bench);
    let cycle = guard.lease.cycle;
    // The same goes for a failure of this cycle's own request, since there is none.
    assert_eq!(bench.failed(cycle), NOTHING);
    assert_eq!(bench.cancelled(cycle), NOTHING);
    assert_eq!(bench.grant(grant(cycle, 500, 563)), NOTHING);
    assert_eq!(guard.lease.loss_at(bench.now), None);
    assert_eq!(bench.release_held(&guard).abandoned, [], "nothing is in doubt");
}

#[test]
fn reply_that_no_waiter_needs_leaves_nothing() {
    let ends: [fn(&mut Bench, Cycle) -> Seen; 4] = [
        |bench, cycle| bench.reply(cycle, AcquireReply::Taken),
        |bench, cycle| bench.reply(cycle, AcquireReply::Busy),
        |bench, cycle| bench.failed(cycle),
        |bench, cycle| bench.cancelled(cycle),
    ];
    for end in ends {
        let mut bench = Bench::new();
        let (id, seen) = bench.enqueue(0);
        bench.give_up(id);
        assert_eq!(end(&mut bench, seen.acquires().0).request, None);
        assert!(bench.queue.is_unused());
    }
    let ends: [fn(&mut Bench, Cycle) -> Seen; 3] = [
        |bench, cycle| bench.reply_to_release(cycle, None),
        |bench, cycle| bench.failed(cycle),
        |bench, cycle| bench.cancelled(cycle),
    ];
    for end in ends {
        let mut bench = Bench::new();
        let guard = bench.hold(1, 1);
        bench.release_held(&guard);
        assert_eq!(end(&mut bench, guard.lease.cycle).request, None);
        assert!(bench.queue.is_unused());
    }
}

/// A server without its data counts tokens from the beginning. One waiter gets the error, and the
/// others retry with a new cycle, for which the store's script issues tokens above the floor.
#[test]
fn waiters_behind_a_token_regression_retry_with_a_new_cycle() {
    let mut bench = Bench::new();
    let (first, seen) = bench.enqueue_as(
        0,
        WaiterOptions {
            contended_hint: true,
            ..OPTIONS
        },
    );
    let cycle = seen.acquires().0;
    let (second, _) = bench.enqueue(1);
    let below = Answer {
        floor: 50,
        ..answer(bench.now, granted(20, 30))
    };
    let (_, seen) = bench.event(|queue, cx| ((), queue.on_acquire_reply(cycle, below, cx)));
    assert!(matches!(
        bench.collect(first),
        Some(Outcome::Regressed { token: 20, floor: 50 })
    ));
    assert_eq!(seen.abandoned, [cycle]);
    let next = seen.acquires().0;
    assert!(next > cycle);
    bench.reply(next, granted(51, 51));
    assert_eq!(bench.guard(second).token.get(), 51);
}

/// A manager that no grant reaches must ask by itself, and often: at its turn the lease is reserved
/// for one second. With short leases it asks even more often.
#[test]
fn waiter_that_no_grant_reaches_retries_often() {
    for (ttl, owner_ttl, retry_in) in [
        (ms(400), Some(ms(5_000)), 100),
        (ms(400), Some(ms(50)), 52),
        (ms(400), None, 100),
        (ms(60_000), Some(ms(5_000)), 250),
        (ms(60_000), None, 250),
    ] {
        let mut bench = Bench::new();
        let options = WaiterOptions {
            ttl,
            contended_hint: true,
            ..OPTIONS
        };
        let cycle = bench.enqueue_as(0, options).1.acquires().0;
        let position = QueuePosition {
            enqueue_token: 10,
            owner_ttl,
            owner_foreign: false,
            ahead: 0,
            is_subscribed: false,
        };
        bench.reply(cycle, AcquireReply::Queued(position));
        assert_eq!(
            bench.queue.next_deadline(),
            Some(bench.now + ms(retry_in)),
            "{ttl:?} {owner_ttl:?}"
        );
    }
}

/// This holds no matter how many cycles are ahead: the next owner may die with a shorter lease than
/// the one last seen.
#[test]
fn waiter_far_back_in_the_queue_retries_in_bounded_time() {
    for (ahead, retry_in) in [(4_999, 12_500), (u64::MAX, 12_500)] {
        let mut bench = Bench::new();
        let (_, seen) = bench.enqueue(0);
        let position = QueuePosition {
            enqueue_token: 10,
            owner_ttl: Some(ms(3_600_000)),
            owner_foreign: false,
            ahead,
            is_subscribed: true,
        };
        bench.reply(seen.acquires().0, AcquireReply::Queued(position));
        assert_eq!(bench.queue.next_deadline(), Some(bench.now + ms(retry_in)), "{ahead}");
    }
}
