//! A key that stays locked although its guard is gone.

use super::*;

const MIN_HOLD: Duration = ms(3_000);

const WANTS_LONG: WaiterOptions = WaiterOptions {
    min_hold: MinHold::of_millis(3_000),
    ..OPTIONS
};

/// The TTL of the acquire among the effects.
#[track_caller]
fn requested_ttl(seen: &Seen) -> Duration {
    match seen.request {
        Some(Request::Acquire { ttl, .. }) => ttl,
        _ => panic!("no acquire in {seen:?}"),
    }
}

impl Bench {
    /// Replies with a grant of that TTL.
    fn grant_for(&mut self, ttl: Duration, cycle: Cycle, first: u64, last: u64) -> Seen {
        let answer = Answer {
            ttl,
            ..answer(self.now, granted(first, last))
        };
        self.event(|queue, cx| ((), queue.on_acquire_reply(cycle, answer, cx)))
            .1
    }

    /// Acquires the lock with `MIN_HOLD`.
    fn hold_long(&mut self) -> Granted {
        let (id, seen) = self.enqueue_as(0, WANTS_LONG);
        let cycle = seen.acquires().0;
        self.grant_for(MIN_HOLD, cycle, 1, 1);
        self.guard(id)
    }
}

#[test]
fn first_ttl_covers_the_minimum_hold_and_renewals_have_the_usual_one() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WANTS_LONG);
    assert_eq!(requested_ttl(&seen), MIN_HOLD);
    let cycle = seen.acquires().0;
    assert_eq!(cycle.ttl(), MIN_HOLD, "also if the lease is passed on to it");
    bench.grant_for(MIN_HOLD, cycle, 1, 1);
    let guard = bench.guard(id);
    assert!(guard.lease.remaining(bench.now) > ms(2_900));
    bench.pass(ms(300));
    let renewal = bench.event(|queue, cx| (queue.renewal(cx), Effects::none())).0;
    assert_eq!(renewal.map(|(_, ttl, _)| ttl), Some(TTL));

    let short = WaiterOptions {
        min_hold: MinHold::of_millis(10),
        ..OPTIONS
    };
    assert_eq!(requested_ttl(&Bench::new().enqueue_as(0, short).1), TTL);
}

/// Regression: the first renewal came after a part of the minimum hold, which may be a day, and a
/// loss was noticed no sooner.
#[test]
fn first_renewal_is_due_after_a_part_of_the_usual_ttl() {
    let mut bench = Bench::new();
    let sent_at = bench.now;
    bench.hold_long();
    assert_eq!(bench.queue.next_deadline(), Some(sent_at + ms(100)));
}

#[test]
fn early_release_goes_to_the_store_and_the_cycle_is_recorded() {
    let mut bench = Bench::new();
    let guard = bench.hold_long();
    let until = bench.now + MIN_HOLD;
    bench.pass(ms(50));
    let seen = bench.release_held(&guard);
    assert_eq!(seen.releases(), (guard.lease.cycle, None));
    assert_eq!(bench.min_holds.until(guard.lease.cycle, bench.now), Some(until));
    assert_eq!(bench.reply_to_release(guard.lease.cycle, None), NOTHING);
    assert!(bench.queue.is_unused());
    assert_eq!(bench.min_holds.until(guard.lease.cycle, until), None);
}

#[test]
fn local_waiters_do_not_get_the_key_before_the_time_has_passed() {
    let mut bench = Bench::new();
    let guard = bench.hold_long();
    let (waiter, _) = bench.enqueue(1);
    bench.pass(ms(50));
    let seen = bench.release_held(&guard);
    assert_eq!((seen.releases(), &seen.woken[..]), ((guard.lease.cycle, None), &[][..]));
    // The waiter joins the queue of the store.
    let seen = bench.reply_to_release(guard.lease.cycle, None);
    let (cycle, kind, _) = seen.acquires();
    assert!(cycle != guard.lease.cycle && kind == AcquireKind::Fast);
    let (cycle, kind, _) = bench.reply(cycle, AcquireReply::Taken).acquires();
    assert_eq!(kind, AcquireKind::Enqueue);
    assert_eq!(bench.reply(cycle, queued(10)), NOTHING);
    assert!(!bench.queue.is_settled(waiter));
}

#[test]
fn try_of_the_same_process_is_sent_to_the_store() {
    let mut bench = Bench::new();
    let guard = bench.hold_long();
    bench.release_held(&guard);
    let try_it = WaiterOptions {
        try_only: true,
        ..OPTIONS
    };
    let (id, seen) = bench.enqueue_as(1, try_it);
    assert_eq!(seen, NOTHING);
    let (cycle, kind, _) = bench.reply_to_release(guard.lease.cycle, None).acquires();
    assert_eq!(kind, AcquireKind::Try);
    assert_eq!(bench.reply(cycle, AcquireReply::Busy).woken, [1]);
    assert!(matches!(bench.collect(id), Some(Outcome::Busy)));
    assert!(bench.queue.is_unused());
}

#[test]
fn lease_is_used_as_usual_once_the_time_has_passed() {
    let linger = Linger::of_millis(400);
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { linger, ..WANTS_LONG });
    bench.grant_for(MIN_HOLD, seen.acquires().0, 1, 64);
    let guard = bench.guard(id);
    bench.pass(ms(2_900));
    bench.renewed(
        guard.lease.cycle,
        bench.now,
        Some(RenewReply::Extended { has_waiters: false }),
    );
    bench.pass(ms(100));
    let (waiter, _) = bench.enqueue(1);
    assert_eq!(bench.release_held(&guard).woken, [1]);
    let guard = bench.guard(waiter);
    assert_eq!(guard.path, Path::LocalHandOff);
    assert_eq!(bench.release_held(&guard).releases(), (guard.lease.cycle, None));

    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { linger, ..WANTS_LONG });
    bench.grant_for(MIN_HOLD, seen.acquires().0, 1, 64);
    let guard = bench.guard(id);
    bench.pass(ms(2_900));
    bench.renewed(
        guard.lease.cycle,
        bench.now,
        Some(RenewReply::Extended { has_waiters: false }),
    );
    bench.pass(ms(100));
    assert_eq!(bench.release_held(&guard), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
}

#[test]
fn lease_does_not_linger_before_the_time_has_passed() {
    let linger = Linger::of_millis(400);
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { linger, ..WANTS_LONG });
    bench.grant_for(MIN_HOLD, seen.acquires().0, 1, 64);
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).releases(), (guard.lease.cycle, None));
}

/// The earlier lease may end before the minimum hold does if this process dies.
#[test]
fn waiter_with_a_minimum_hold_gets_a_new_lease() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 64);
    bench.enqueue_as(1, WANTS_LONG);
    assert_eq!(bench.release_held(&guard).releases(), (guard.lease.cycle, None));
    let seen = bench.reply_to_release(guard.lease.cycle, None);
    assert_eq!(requested_ttl(&seen), MIN_HOLD);

    let linger = Linger::of_millis(400);
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { linger, ..OPTIONS });
    bench.reply(seen.acquires().0, granted(1, 64));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard), NOTHING);
    let try_long = WaiterOptions {
        try_only: true,
        ..WANTS_LONG
    };
    let (_, seen) = bench.enqueue_as(1, try_long);
    assert_eq!(seen.releases(), (guard.lease.cycle, None));
    let seen = bench.reply_to_release(guard.lease.cycle, None);
    assert_eq!((seen.acquires().1, requested_ttl(&seen)), (AcquireKind::Try, MIN_HOLD));
}

#[test]
fn lease_requested_for_a_waiter_that_has_left_is_extended_first() {
    let mut bench = Bench::new();
    let (first, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    let (second, _) = bench.enqueue_as(1, WANTS_LONG);
    bench.give_up(first);
    let seen = bench.reply(cycle, granted(1, 64));
    assert_eq!((seen.acquires().0, requested_ttl(&seen)), (cycle, MIN_HOLD));
    assert_eq!(bench.grant_for(MIN_HOLD, cycle, 65, 128).woken, [1]);
    assert_eq!(bench.guard(second).lease.cycle, cycle);
}

#[test]
fn extension_in_flight_is_awaited_before_the_release() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WANTS_LONG);
    let cycle = seen.acquires().0;
    bench.enqueue(1);
    let seen = bench.grant_for(MIN_HOLD, cycle, 1, 2);
    assert_eq!(seen.acquires().1, AcquireKind::Extend);
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard), NOTHING);
    let seen = bench.reply(cycle, extended(3, 66));
    assert_eq!((seen.releases(), &seen.woken[..]), ((cycle, None), &[][..]));
}

#[test]
fn task_that_does_not_take_its_guard_leaves_the_key_unlocked() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, WANTS_LONG);
    let cycle = seen.acquires().0;
    let (waiter, _) = bench.enqueue(1);
    bench.grant_for(MIN_HOLD, cycle, 1, 64);
    assert_eq!(bench.give_up(id).woken, [1]);
    assert_eq!(bench.min_holds.until(cycle, bench.now), None);
    assert_eq!(bench.guard(waiter).lease.cycle, cycle);

    for event in [Bench::close, Bench::disown] {
        let mut bench = Bench::new();
        let (_, seen) = bench.enqueue_as(0, WANTS_LONG);
        let cycle = seen.acquires().0;
        bench.grant_for(MIN_HOLD, cycle, 1, 64);
        event(&mut bench);
        assert_eq!(bench.min_holds.until(cycle, bench.now), None);
    }
}

#[test]
fn lost_or_closed_lease_stays_for_the_rest_of_the_time() {
    for event in [Bench::close, Bench::disown] {
        let mut bench = Bench::new();
        let guard = bench.hold_long();
        event(&mut bench);
        bench.release(&guard);
        assert!(bench.min_holds.until(guard.lease.cycle, bench.now).is_some());
    }
}
