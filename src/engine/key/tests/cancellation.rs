//! Waiters that give up, in every phase.

use super::*;

#[test]
fn grant_or_position_for_a_waiter_that_gave_up_is_released() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    assert_eq!(bench.give_up(id), NOTHING);
    assert_eq!(bench.reply(cycle, granted(1, 1)).releases(), (cycle, None));
    bench.reply_to_release(cycle, None);
    assert!(bench.queue.is_unused());

    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    bench.give_up(id);
    assert_eq!(bench.reply(cycle, queued(1)).releases(), (cycle, None));
    bench.reply_to_release(cycle, None);

    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    bench.give_up(id);
    assert_eq!(bench.reply(cycle, AcquireReply::Taken), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn last_waiter_that_gives_up_leaves_the_stores_queue() {
    let mut bench = Bench::new();
    let (first, cycle) = bench.join_store_queue(10);
    let (second, _) = bench.enqueue(1);
    assert_eq!(bench.give_up(first), NOTHING, "the second waiter still waits");
    assert_eq!(bench.give_up(second).releases(), (cycle, None));
    // A grant that crosses the release needs no further action: the release covers it.
    assert_eq!(bench.grant(grant(cycle, 11, 11)), NOTHING);
    bench.reply_to_release(cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn waiter_that_gives_up_does_not_change_the_order_of_the_others() {
    let mut bench = Bench::new();
    let mut guard = bench.hold(1, 64);
    let ids: Vec<_> = (1..=3).map(|waker| bench.enqueue(waker).0).collect();
    assert_eq!(bench.give_up(ids[1]), NOTHING);
    for waker in [1, 3] {
        assert_eq!(bench.release_held(&guard).woken, [waker]);
        guard = bench.guard(ids[waker as usize - 1]);
    }
}

#[test]
fn woken_waiter_that_gives_up_passes_the_lock_on() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let ids: Vec<_> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    assert_eq!(bench.release_held(&guard).woken, [1]);
    assert_eq!(bench.give_up(ids[0]).woken, [2]);
    let seen = bench.give_up(ids[1]);
    assert_eq!(seen.releases(), (guard.lease.cycle, None));
    bench.reply_to_release(guard.lease.cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn waiter_that_gives_up_after_a_failed_request_leaves_nothing() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    bench.failed(seen.acquires().0);
    assert_eq!(bench.give_up(id), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn lease_is_released_after_an_extension_whose_waiter_gave_up() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.enqueue(1);
    let cycle = bench.release_held(&guard).acquires().0;
    assert_eq!(bench.give_up(id), NOTHING);
    assert_eq!(bench.reply(cycle, extended(2, 65)).releases(), (cycle, None));
}

#[test]
fn waiter_that_gives_up_during_a_release_causes_no_request() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    bench.release_held(&guard);
    let (id, _) = bench.enqueue(1);
    assert_eq!(bench.give_up(id), NOTHING);
    assert_eq!(bench.reply_to_release(guard.lease.cycle, None), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn cancelled_request_is_sent_again_for_the_remaining_waiters() {
    let mut bench = Bench::new();
    let (first, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    let (second, _) = bench.enqueue(1);
    bench.give_up(first);
    // The first attempt may execute as well. It belongs to the same cycle.
    assert_eq!(bench.cancelled(cycle).acquires(), (cycle, AcquireKind::Enqueue, 1));
    bench.reply(cycle, extended(1, 1));
    assert_eq!(bench.guard(second).token.get(), 1);
}

#[test]
fn cycle_of_a_cancelled_request_is_abandoned_if_no_waiter_is_left() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    bench.give_up(id);
    assert_eq!(bench.cancelled(cycle).abandoned, [cycle]);
    assert!(bench.queue.is_unused());
}

#[test]
fn cancelled_release_is_repeated() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let cycle = guard.lease.cycle;
    bench.release_held(&guard);
    bench.enqueue(1);
    let seen = bench.cancelled(cycle);
    assert_eq!(seen.abandoned, [cycle]);
    assert!(seen.acquires().0 > cycle, "the next waiter is not delayed by it");
}

#[test]
fn cancelled_requeue_is_repeated_as_a_release_and_an_acquire() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.join_store_queue(10);
    let (other, _) = bench.enqueue(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    let seen = bench.cancelled(cycle);
    assert_eq!((seen.acquires().0, &seen.abandoned[..]), (next, &[cycle][..]));

    // If no waiter is left, both cycles are released.
    bench.give_up(other);
    assert_eq!(bench.cancelled(next).abandoned, [next]);
    assert!(bench.queue.is_unused());
}

#[test]
fn cancelled_extension_is_sent_again_if_a_waiter_needs_it() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.enqueue(1);
    let cycle = bench.release_held(&guard).acquires().0;
    assert_eq!(bench.cancelled(cycle).acquires().0, cycle);
    bench.reply(cycle, extended(2, 65));
    let guard = bench.guard(id);
    // The first extension may execute after the release, so the release is repeated.
    let seen = bench.release_held(&guard);
    assert_eq!(seen.releases().0, cycle);
    bench.assert_repeated(&seen, None);
}
