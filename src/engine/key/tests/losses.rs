//! Losses, failures, late replies, `max_hold`, shutdown.

use super::*;
use crate::error::LockErrorKind;

#[test]
fn lease_not_renewed_in_time_is_lost_and_its_waiters_retry() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    bench.enqueue(1);
    bench.pass(TTL - DRIFT);
    assert!(guard.lease.loss_at(bench.now).is_some(), "even before any timer fired");
    let seen = bench.tick();
    assert_eq!(seen.lost, Some(LossReason::Expired));
    assert_eq!(seen.abandoned, [], "the guard releases it when dropped");
    let (cycle, kind, _) = seen.acquires();
    assert!(cycle > guard.lease.cycle && kind == AcquireKind::Enqueue);
    assert_eq!(guard.lease.loss(), Some(LossReason::Expired));

    // A late release does not affect a later cycle.
    let (held, seen) = bench.release(&guard);
    assert!(!held);
    assert_eq!((seen.abandoned, seen.request), (vec![guard.lease.cycle], None));
}

#[test]
fn release_after_an_unnoticed_expiry_reports_the_loss() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    bench.enqueue(1);
    bench.pass(TTL - DRIFT);
    let (held, seen) = bench.release(&guard);
    assert!(!held);
    assert_eq!(seen.abandoned, [guard.lease.cycle]);
    assert!(seen.acquires().0 > guard.lease.cycle);
}

#[test]
fn waiter_woken_with_a_lost_lease_is_first_in_the_queue_again() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let ids: Vec<_> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    bench.release_held(&guard);
    bench.pass(TTL);
    let seen = bench.tick();
    assert_eq!(seen.lost, None, "no guard was out");
    assert!(!bench.queue.is_settled(ids[0]));
    assert_eq!(bench.queue.set_waker(ids[0], 1), None);
    assert_eq!(bench.reply(seen.acquires().0, granted(100, 164)).woken, [1]);
    assert_eq!(bench.guard(ids[0]).token.get(), 100);
}

#[test]
fn renewals_are_due_every_tenth_of_the_ttl_and_extend_the_validity() {
    let mut bench = Bench::new();
    let sent_at = bench.now;
    let guard = bench.hold(1, 1);
    let cycle = guard.lease.cycle;
    assert_eq!(bench.queue.next_deadline(), Some(sent_at + ms(100)));
    assert_eq!(bench.renewal(), None);
    bench.pass(ms(50));
    assert_eq!(
        bench.renewal(),
        Some(cycle),
        "a little early, so that many go out together"
    );
    assert_eq!(bench.renewal(), None, "one at a time");
    let sent_at = bench.now;
    bench.pass(ms(20));
    bench.renewed(cycle, sent_at, Some(RenewReply::Extended { has_waiters: false }));
    assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);
    assert_eq!(bench.queue.next_deadline(), Some(sent_at + ms(100)));
}

/// Regression: the next renewal followed the TTL of the one that was in flight.
#[test]
fn renewal_in_flight_across_a_hand_off_does_not_delay_the_next_one() {
    for extended in [true, false] {
        let mut bench = Bench::new();
        let long = WaiterOptions {
            ttl: 10 * TTL,
            ..OPTIONS
        };
        let (first, seen) = bench.enqueue_as(0, long);
        let cycle = seen.acquires().0;
        let reply = Answer {
            ttl: 10 * TTL,
            ..answer(bench.now, granted(1, 64))
        };
        bench.event(|queue, cx| ((), queue.on_acquire_reply(cycle, reply, cx)));
        let guard = bench.guard(first);
        let (short, _) = bench.enqueue(1);
        bench.pass(ms(500));
        assert_eq!(bench.renewal(), Some(cycle));
        let sent_at = bench.now;
        bench.release_held(&guard);
        bench.guard(short);
        let reply = extended.then_some(RenewReply::Extended { has_waiters: false });
        bench.event(|queue, cx| ((), queue.on_renewal_reply(cycle, 10 * TTL, sent_at, reply, cx)));
        let due = if extended { ms(100) } else { ms(50) };
        assert_eq!(bench.queue.next_deadline(), Some(sent_at + due));
    }
}

#[test]
fn a_failed_renewal_is_tried_again_and_loses_nothing() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let until = guard.lease.valid_until();
    bench.pass(ms(100));
    let cycle = bench.renewal().unwrap();
    bench.pass(ms(300));
    assert_eq!(bench.renewed(cycle, bench.now, None), NOTHING);
    assert_eq!(guard.lease.valid_until(), until);
    assert_eq!(bench.queue.next_deadline(), Some(bench.now + ms(50)));
    assert!(guard.lease.loss_at(bench.now).is_none());
}

#[test]
fn a_renewal_that_is_refused_or_too_late_loses_the_lease() {
    for (late, reply, reason) in [
        (ms(50), RenewReply::NotOurs, LossReason::Taken),
        (TTL, RenewReply::Extended { has_waiters: false }, LossReason::Expired),
    ] {
        let mut bench = Bench::new();
        let guard = bench.hold(1, 1);
        let sent_at = bench.now;
        bench.pass(late);
        let seen = bench.renewed(guard.lease.cycle, sent_at, Some(reply));
        assert_eq!(seen.lost, Some(reason));
        assert_eq!(guard.lease.loss(), Some(reason));
    }
}

#[test]
fn lease_the_store_lost_is_released_although_a_guard_is_out() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    bench.reply(cycle, granted(1, 1));
    let guard = bench.guard(id);
    let seen = bench.renewed(cycle, bench.now, Some(RenewReply::NotOurs));
    assert_eq!(seen.abandoned, [cycle], "though a guard is out");
    let (held, seen) = bench.release(&guard);
    assert_eq!((held, seen.request), (false, None));
}

#[test]
fn renewal_of_an_earlier_cycle_does_not_affect_the_current_one() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    assert_eq!(
        bench.renewed(Cycle::of(900), bench.now, Some(RenewReply::NotOurs)),
        NOTHING
    );
    assert!(guard.lease.loss().is_none());
}

#[test]
fn max_hold_ends_a_guard_that_is_kept_alive() {
    let mut bench = Bench::new();
    let options = WaiterOptions {
        max_hold: Some(ms(70)),
        ..OPTIONS
    };
    let (id, seen) = bench.enqueue_as(0, options);
    bench.reply(seen.acquires().0, granted(1, 1));
    let guard = bench.guard(id);
    assert_eq!(bench.queue.next_deadline(), Some(bench.now + ms(70)));
    bench.pass(ms(69));
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(1));
    assert_eq!(bench.tick().lost, Some(LossReason::MaxHold));
    assert_eq!(bench.release(&guard).1.abandoned, [guard.lease.cycle]);
}

/// The waiter's task was not polled for that long, for example because its runtime is blocked.
/// Without a release, the next waiter would have to wait for a lease without a holder to expire.
#[test]
fn lease_of_an_uncollected_guard_is_released() {
    for reply in [None, Some(RenewReply::Extended { has_waiters: false })] {
        let mut bench = Bench::new();
        let options = WaiterOptions {
            max_hold: reply.is_none().then_some(ms(70)),
            ..OPTIONS
        };
        let (id, seen) = bench.enqueue_as(0, options);
        let cycle = seen.acquires().0;
        bench.reply(cycle, granted(1, 1));
        let sent_at = bench.now;
        let seen = match reply {
            None => {
                bench.pass(ms(70));
                bench.tick()
            }
            // The server had extended the lease, but its reply came too late.
            reply => {
                bench.pass(TTL);
                bench.renewed(cycle, sent_at, reply)
            }
        };
        assert_eq!((&seen.abandoned[..], seen.lost), (&[cycle][..], None));
        bench.reply(seen.acquires().0, granted(2, 2));
        assert_eq!(bench.guard(id).token.get(), 2);
    }
}

#[test]
fn max_hold_counts_for_each_guard() {
    let mut bench = Bench::new();
    let options = WaiterOptions {
        max_hold: Some(ms(70)),
        ..OPTIONS
    };
    let guard = bench.hold(1, 9);
    let (id, _) = bench.enqueue_as(1, options);
    bench.pass(ms(90));
    bench.release_held(&guard);
    bench.guard(id);
    bench.pass(ms(60));
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(10));
    assert_eq!(bench.tick().lost, Some(LossReason::MaxHold));
}

#[test]
fn an_extension_that_did_not_find_the_lease_loses_it() {
    for reply in [granted(200, 263), queued(200)] {
        let mut bench = Bench::new();
        let guard = bench.hold(1, 1);
        let (id, _) = bench.enqueue(1);
        let cycle = bench.release_held(&guard).acquires().0;
        let seen = bench.reply(cycle, reply);
        // Another manager may have had it in between, so this cycle is over.
        assert_eq!(seen.abandoned, [cycle]);
        assert!(seen.acquires().0 > cycle);
        assert_eq!(guard.lease.loss(), Some(LossReason::Taken));
        assert!(!bench.queue.is_settled(id));
    }
}

#[test]
fn a_lease_that_runs_out_while_it_is_extended_is_released_in_the_background() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    bench.enqueue(1);
    let cycle = bench.release_held(&guard).acquires().0;
    bench.pass(TTL);
    let seen = bench.tick();
    assert_eq!(seen.abandoned, [cycle], "the extension may still execute");
    let next = seen.acquires().0;
    assert_eq!(bench.reply(cycle, extended(2, 65)).abandoned, [cycle]);
    assert_eq!(bench.reply(next, queued(70)), NOTHING, "the next cycle is not touched");
}

/// An extension without a reply could execute after the lease was lost. Its dead cycle then
/// acquired the key again, or a place in the queue, and blocked everyone until its lease expired.
#[test]
fn a_lease_that_runs_out_after_a_failed_extension_is_released_in_the_background() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 2);
    let ids: Vec<_> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    let cycle = bench.release_held(&guard).acquires().0;
    bench.guard(ids[0]);
    bench.failed(cycle);
    bench.pass(TTL);
    assert_eq!(bench.tick().abandoned, [cycle]);
}

#[test]
fn request_without_a_reply_fails_its_waiters() {
    let mut bench = Bench::new();
    let (first, seen) = bench.enqueue(0);
    let (second, _) = bench.enqueue(1);
    let cycle = seen.acquires().0;
    let seen = bench.failed(cycle);
    assert_eq!((seen.abandoned, seen.woken), (vec![cycle], vec![0, 1]));
    for id in [first, second] {
        assert!(matches!(bench.collect(id), Some(Outcome::Failed(_))));
    }
    assert!(bench.queue.is_unused());
}

#[test]
fn old_cycle_with_a_remote_waiter_is_released_and_a_current_one_is_not() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let over = guard.lease.cycle;
    assert_eq!(bench.release_held(&guard).releases(), (over, None));
    assert_eq!(bench.remote_waiter(over), NOTHING, "its release is on its way");
    bench.reply_to_release(over, None);
    assert_eq!(bench.remote_waiter(over).abandoned, [over], "no task here wants it");

    // A late acquire of the old cycle was executed: the store considers it the owner, whatever this
    // manager does now.
    let (_, seen) = bench.enqueue(0);
    let current = seen.acquires().0;
    assert_eq!(bench.remote_waiter(over).abandoned, [over]);
    assert_eq!(bench.remote_waiter(current), NOTHING);
    bench.reply(current, queued(100));
    assert_eq!(bench.remote_waiter(over).abandoned, [over]);
    assert_eq!(bench.remote_waiter(current), NOTHING, "its grant is on its way");
    bench.grant(grant(current, 101, 164));
    assert_eq!(bench.remote_waiter(over).abandoned, [over]);
    assert_eq!(bench.remote_waiter(current), NOTHING);
}

#[test]
fn a_failed_release_is_repeated_in_the_background() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let cycle = guard.lease.cycle;
    bench.release_held(&guard);
    bench.enqueue(1);
    let seen = bench.failed(cycle);
    assert_eq!(seen.abandoned, [cycle]);
    assert!(seen.acquires().0 > cycle);
}

#[test]
fn a_failed_release_that_requeues_abandons_both_cycles() {
    let mut bench = Bench::new();
    let (cycle, sent) = bench.requeue();
    let next = sent.releases().1.unwrap();
    let seen = bench.failed(cycle);
    assert_eq!((seen.abandoned, seen.woken), (vec![cycle, next], vec![1]));
}

#[test]
fn failed_extension_fails_only_the_waiter_that_needs_it() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 2);
    let ids: Vec<_> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    let cycle = bench.release_held(&guard).acquires().0;
    let second = bench.guard(ids[0]);
    assert_eq!(bench.failed(cycle), NOTHING, "the lease is still ours");
    // There is no token for the next waiter, so the extension is sent again.
    assert_eq!(bench.release_held(&second).acquires().0, cycle);
    let seen = bench.failed(cycle);
    assert_eq!(seen.woken, [2]);
    assert!(matches!(bench.collect(ids[1]), Some(Outcome::Failed(_))));
    assert_eq!(seen.releases().0, cycle);
    bench.assert_repeated(&seen, None);
}

#[test]
fn a_failure_of_an_earlier_request_changes_nothing() {
    let mut bench = Bench::new();
    assert_eq!(bench.failed(Cycle::of(50)), NOTHING);
    let (_, cycle) = bench.join_store_queue(1);
    assert_eq!(bench.failed(cycle), NOTHING, "it got its reply");
    assert_eq!(bench.cancelled(cycle), NOTHING);
}

/// The guard's runtime was blocked until the lease expired and another local task got the key. The
/// store may still know the earlier cycle, which nothing else would release. The current guard must
/// keep its lock, even if a server without its data has issued the same token to both.
#[test]
fn guard_of_an_earlier_cycle_is_released_without_ending_a_later_one() {
    for token in [1, 2] {
        let mut bench = Bench::new();
        let earlier = bench.hold(1, 1);
        let (id, _) = bench.enqueue(1);
        bench.pass(TTL);
        let next = bench.tick().acquires().0;
        bench.reply(next, granted(token, token));
        let present = bench.guard(id);
        let (held, seen) = bench.release(&earlier);
        assert!(!held);
        assert_eq!((seen.abandoned, seen.request), (vec![earlier.lease.cycle], None));
        assert_eq!(present.lease.loss_at(bench.now), None);
        assert_eq!(bench.release_held(&present).releases(), (next, None));
    }
}

#[test]
fn guard_released_twice_is_not_held_the_second_time() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 9);
    let (id, _) = bench.enqueue(1);
    bench.release_held(&guard);
    bench.guard(id);
    let (held, seen) = bench.release(&guard);
    assert!(!held);
    assert_eq!(seen, NOTHING, "the current holder is not affected");
}

#[test]
fn shutdown_refuses_waiters_and_releases_everything() {
    // If a request is in flight, its reply finds no waiter.
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    assert_eq!(bench.close().woken, [0]);
    assert!(matches!(bench.collect(id), Some(Outcome::Failed(error)) if error.kind() == LockErrorKind::Closed));
    assert_eq!(bench.reply(cycle, granted(1, 1)).releases().0, cycle);

    // In the store's queue.
    let mut bench = Bench::new();
    let (_, cycle) = bench.join_store_queue(1);
    assert_eq!(bench.close().releases(), (cycle, None));

    // With a guard out.
    let mut bench = Bench::new();
    let guard = bench.hold(1, 9);
    let (waiting, _) = bench.enqueue(1);
    let seen = bench.close();
    assert_eq!(seen.lost, Some(LossReason::Closed));
    assert_eq!((seen.releases().0, &seen.woken[..]), (guard.lease.cycle, &[1][..]));
    assert!(matches!(
        bench.collect(waiting),
        Some(Outcome::Failed(error)) if error.kind() == LockErrorKind::Closed
    ));
    assert!(!bench.release(&guard).0);

    // A task that arrives later is refused.
    let (id, seen) = bench.enqueue(2);
    assert_eq!((seen.request, &seen.woken[..]), (None, &[2][..]));
    assert!(matches!(bench.collect(id), Some(Outcome::Failed(error)) if error.kind() == LockErrorKind::Closed));
}

/// A task that had looked the key up just before a shutdown closed it was refused without being
/// woken. It was already asleep and waited forever.
#[test]
fn task_that_arrives_just_after_a_shutdown_is_woken_and_refused() {
    let mut bench = Bench::new();
    bench.hold(1, 1);
    bench.close();
    let (id, seen) = bench.enqueue(3);
    assert_eq!(seen.woken, [3]);
    assert!(matches!(bench.collect(id), Some(Outcome::Failed(error)) if error.kind() == LockErrorKind::Closed));
}

/// Regression: the key was forgotten when its lease was lost, although its guard was still out.
#[test]
fn a_shutdown_releases_the_lease_of_a_lost_guard_that_is_still_out() {
    for is_dropped in [false, true] {
        let mut bench = Bench::new();
        let max_hold = Some(ms(50));
        let (id, seen) = bench.enqueue_as(0, WaiterOptions { max_hold, ..OPTIONS });
        let cycle = seen.acquires().0;
        bench.reply(cycle, granted(1, 1));
        let guard = bench.guard(id);
        bench.pass(ms(50));
        let seen = bench.tick();
        assert_eq!((seen.lost, seen.abandoned), (Some(LossReason::MaxHold), vec![]));
        assert!(!bench.queue.is_unused(), "the guard has to release the lease");
        let released = if is_dropped {
            bench.release(&guard).1.abandoned
        } else {
            bench.close().abandoned
        };
        assert_eq!(released, [cycle]);
        assert!(bench.queue.is_unused());
        assert_eq!(bench.close().abandoned, [], "it was released before");
    }
}

/// Its task may have stopped polling it, and drop it only after the shutdown.
#[test]
fn outcome_that_nobody_collected_keeps_no_closed_key() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.enqueue(1);
    let sent = bench.close();
    assert!(!bench.queue.is_over());
    bench.reply_to_release(sent.releases().0, None);
    assert!(bench.queue.is_over() && !bench.queue.is_unused());
    assert!(matches!(bench.collect(id), Some(Outcome::Failed(_))));
    assert!(bench.queue.is_unused());
    assert_eq!(guard.lease.loss(), Some(LossReason::Closed));
}

#[test]
fn a_shutdown_while_the_lease_is_extended_releases_it_in_the_background() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.enqueue(1);
    let cycle = bench.release_held(&guard).acquires().0;
    let seen = bench.close();
    assert_eq!((seen.abandoned, seen.request), (vec![cycle], None));
    bench.collect(id);
    assert!(bench.queue.is_unused());
}

/// The shard now has another shard map. A manager with that map may give the key to another task at
/// another shard, so a lock here excludes nobody. Waiters ask again and get the error about the
/// map.
#[test]
fn shard_with_another_map_ends_the_lease_and_makes_queued_cycles_retry() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let (id, _) = bench.enqueue(1);
    let seen = bench.disown();
    assert_eq!(seen.lost, Some(LossReason::ShardMap));
    assert_eq!(guard.lease.loss(), Some(LossReason::ShardMap));
    assert!(seen.acquires().0 > guard.lease.cycle);
    assert!(!bench.queue.is_settled(id));
    assert_eq!(bench.disown(), NOTHING, "a reply is awaited anyway");

    let mut bench = Bench::new();
    let (_, cycle) = bench.join_store_queue(10);
    assert_eq!(bench.disown().acquires(), (cycle, AcquireKind::Enqueue, 1));
}

/// A process that dies blocks a key until its lease expires. Each lease has the TTL of the task
/// that gets it first: in the request, in the cycle from which other managers read it, and in the
/// renewals.
#[test]
fn lease_has_the_ttl_that_its_task_requested() {
    let ttl = TTL * 3;
    let options = WaiterOptions { ttl, ..OPTIONS };
    let asked = |seen: &Seen| match seen.request {
        Some(Request::Acquire { cycle, ttl, .. }) => (cycle.ttl(), ttl),
        _ => panic!("{seen:?}"),
    };
    // The first request.
    let mut bench = Bench::new();
    let (first, seen) = bench.enqueue_as(0, options);
    assert_eq!(asked(&seen), (ttl, ttl));
    // A request sent again for another task.
    bench.enqueue(1);
    let cycle = seen.acquires().0;
    bench.reply(cycle, queued(10));
    bench.give_up(first);
    bench.pass(ms(502));
    assert_eq!(asked(&bench.tick()), (ttl, TTL));

    // A guard that follows another one, and the request that requeues the remaining waiters.
    let mut bench = Bench::new();
    bench.rules.max_burst = 2;
    let (id, cycle) = bench.join_store_queue(10);
    let (second, _) = bench.enqueue_as(1, options);
    bench.enqueue_as(
        2,
        WaiterOptions {
            ttl: TTL * 2,
            ..OPTIONS
        },
    );
    bench.grant(grant(cycle, 11, 74));
    assert_eq!(bench.queue.ttl(), TTL);
    let guard = bench.guard(id);
    bench.release_held(&guard);
    assert_eq!(bench.queue.ttl(), ttl, "for renewals");
    let guard = bench.guard(second);
    let next = bench.release_held(&guard).releases().1.unwrap();
    assert_eq!((next.ttl(), bench.queue.ttl()), (TTL * 2, TTL * 2));
}

/// After a change of servers a lease must be confirmed before it is passed on. A lease requested
/// after the change is already confirmed.
#[test]
fn lease_requested_after_a_change_of_servers_needs_no_confirmation() {
    for requeued in [false, true] {
        let mut bench = Bench::new();
        bench.rules.max_burst = 1;
        let mut cycle = Cycle::of(0);
        let (mut id, mut next) = (None, None);
        if requeued {
            let (first, before) = bench.join_store_queue(10);
            id = Some(bench.enqueue(1).0);
            bench.grant(grant(before, 11, 11));
            let guard = bench.guard(first);
            bench.epoch += 1;
            cycle = bench.release_held(&guard).releases().1.unwrap();
            bench.rules.max_burst = 4;
            next = Some(bench.enqueue(2).0);
            bench.reply_to_release(before, Some(granted(20, 84)));
            assert!(cycle > before);
        } else {
            bench.epoch += 1;
            let (first, seen) = bench.enqueue(1);
            cycle = cycle.max(seen.acquires().0);
            bench.reply(cycle, granted(20, 84));
            id = id.or(Some(first));
        }
        let guard = bench.guard(id.unwrap());
        let next = next.unwrap_or_else(|| bench.enqueue(2).0);
        let seen = bench.release_held(&guard);
        assert_eq!(
            (seen.request, &seen.woken[..]),
            (None, &[2][..]),
            "requeued: {requeued}"
        );
        assert_eq!(bench.guard(next).lease.cycle, cycle);
    }
}
