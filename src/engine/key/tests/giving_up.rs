//! Waiters that give up, in every phase.

use super::*;

#[test]
fn while_the_request_is_under_way_the_reply_finds_nobody_and_is_undone() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want(0);
    let cycle = seen.asks().0;
    assert_eq!(bench.give_up(id), NOTHING);
    assert_eq!(bench.reply(cycle, granted(1, 1)).releases(), (cycle, None));
    bench.released_remotely(cycle, None);
    assert!(bench.queue.is_unused());

    let (id, seen) = bench.want(0);
    let cycle = seen.asks().0;
    bench.give_up(id);
    assert_eq!(bench.reply(cycle, queued(1)).releases(), (cycle, None));
    bench.released_remotely(cycle, None);

    let (id, seen) = bench.want(0);
    let cycle = seen.asks().0;
    bench.give_up(id);
    assert_eq!(bench.reply(cycle, AcquireReply::Taken), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn the_last_one_in_the_stores_queue_leaves_it() {
    let mut bench = Bench::new();
    let (first, cycle) = bench.stand_in_queue(10);
    let (second, _) = bench.want(1);
    assert_eq!(bench.give_up(first), NOTHING, "the second waiter still waits");
    assert_eq!(bench.give_up(second).releases(), (cycle, None));
    // A grant that crosses the release needs no further action: the release covers it.
    assert_eq!(bench.grant(grant(cycle, 11, 11)), NOTHING);
    bench.released_remotely(cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn one_in_the_middle_leaves_the_order_of_the_others() {
    let mut bench = Bench::new();
    let mut guard = bench.hold(1, 64);
    let ids: Vec<_> = (1..=3).map(|waker| bench.want(waker).0).collect();
    assert_eq!(bench.give_up(ids[1]), NOTHING);
    for waker in [1, 3] {
        assert_eq!(bench.release_held(&guard).woken, [waker]);
        guard = bench.guard(ids[waker as usize - 1]);
    }
}

#[test]
fn one_that_was_just_woken_passes_the_lock_on() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    let ids: Vec<_> = (1..=2).map(|waker| bench.want(waker).0).collect();
    assert_eq!(bench.release_held(&guard).woken, [1]);
    assert_eq!(bench.give_up(ids[0]).woken, [2]);
    let seen = bench.give_up(ids[1]);
    assert_eq!(seen.releases(), (guard.lease.cycle, None));
    bench.released_remotely(guard.lease.cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn one_that_was_just_told_no_leaves_nothing_behind() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want(0);
    bench.failed(seen.asks().0);
    assert_eq!(bench.give_up(id), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn while_the_lease_is_extended_for_it_the_lease_is_given_back_afterwards() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.want(1);
    let cycle = bench.release_held(&guard).asks().0;
    assert_eq!(bench.give_up(id), NOTHING);
    assert_eq!(bench.reply(cycle, extended(2, 65)).releases(), (cycle, None));
}

#[test]
fn while_a_release_is_under_way_nothing_follows() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    bench.release_held(&guard);
    let (id, _) = bench.want(1);
    assert_eq!(bench.give_up(id), NOTHING);
    assert_eq!(bench.released_remotely(guard.lease.cycle, None), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn the_task_that_carried_a_request_out_leaves_it_to_the_others() {
    let mut bench = Bench::new();
    let (first, seen) = bench.want(0);
    let cycle = seen.asks().0;
    let (second, _) = bench.want(1);
    bench.give_up(first);
    // The first attempt may execute as well. It belongs to the same cycle.
    assert_eq!(bench.dropped(cycle).asks(), (cycle, AcquireKind::Enqueue, 1));
    bench.reply(cycle, extended(1, 1));
    assert_eq!(bench.guard(second).token.get(), 1);
}

#[test]
fn where_nobody_is_left_a_dropped_request_is_cleaned_up() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want(0);
    let cycle = seen.asks().0;
    bench.give_up(id);
    assert_eq!(bench.dropped(cycle).abandoned, [cycle]);
    assert!(bench.queue.is_unused());
}

#[test]
fn a_dropped_release_is_repeated() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let cycle = guard.lease.cycle;
    bench.release_held(&guard);
    bench.want(1);
    let seen = bench.dropped(cycle);
    assert_eq!(seen.abandoned, [cycle]);
    assert!(seen.asks().0 > cycle, "the next waiter is not delayed by it");
}

#[test]
fn a_dropped_release_that_requeues_is_repeated_and_asked_for_again() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.stand_in_queue(10);
    let (other, _) = bench.want(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    let seen = bench.dropped(cycle);
    assert_eq!((seen.asks().0, &seen.abandoned[..]), (next, &[cycle][..]));

    // If no waiter is left, both cycles are released.
    bench.give_up(other);
    assert_eq!(bench.dropped(next).abandoned, [next]);
    assert!(bench.queue.is_unused());
}

#[test]
fn a_dropped_extension_is_sent_again_where_somebody_waits_for_it() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    let (id, _) = bench.want(1);
    let cycle = bench.release_held(&guard).asks().0;
    assert_eq!(bench.dropped(cycle).asks().0, cycle);
    bench.reply(cycle, extended(2, 65));
    let guard = bench.guard(id);
    // The first extension may execute after the release, so the release is repeated.
    let seen = bench.release_held(&guard);
    assert_eq!((seen.releases().0, &seen.abandoned[..]), (cycle, &[cycle][..]));
}
