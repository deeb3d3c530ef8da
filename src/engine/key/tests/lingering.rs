//! A lease that lingers without a guard.

use super::*;

const LINGER: Linger = Linger::of_millis(400);

const KEPT: WaiterOptions = WaiterOptions {
    linger: LINGER,
    ..OPTIONS
};

/// Acquires and releases a guard under a lease with these tokens. The lease now lingers. Returns
/// its cycle.
fn linger(bench: &mut Bench, first: u64, last: u64) -> Cycle {
    let (id, seen) = bench.enqueue_as(0, KEPT);
    let (cycle, ..) = seen.acquires();
    bench.reply(cycle, granted(first, last));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
    cycle
}

#[test]
fn lingering_lease_serves_tasks_without_messages_and_with_growing_tokens() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, KEPT);
    let (cycle, kind, tokens) = seen.acquires();
    assert_eq!(
        (kind, tokens),
        (AcquireKind::Fast, 64),
        "there are tokens for the tasks that come later"
    );
    bench.reply(cycle, granted(1, 64));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard), NOTHING);
    for token in 2..=20 {
        let (id, seen) = bench.enqueue_as(7, KEPT);
        assert_eq!((seen.request, &seen.woken[..]), (None, &[7][..]));
        let guard = bench.guard(id);
        assert_eq!((guard.token.get(), guard.path), (token, Path::Lingering));
        assert_eq!(guard.lease.cycle, cycle);
        assert_eq!(bench.release_held(&guard), NOTHING);
    }
}

#[test]
fn tokens_of_a_lingering_lease_are_requested_before_they_run_out() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    let mut last = 1;
    let mut asked = None;
    while asked.is_none() {
        let (id, seen) = bench.enqueue_as(0, KEPT);
        assert_eq!(seen.request, None);
        let guard = bench.guard(id);
        last = guard.token.get();
        asked = bench.release_held(&guard).request;
    }
    assert_eq!(last, 48);
    let Some(Request::Acquire {
        cycle: requested,
        kind: AcquireKind::Extend,
        tokens: 1024,
        ..
    }) = asked
    else {
        panic!("{asked:?}")
    };
    assert_eq!(requested, cycle);
    // A task that arrives meanwhile gets one of the remaining tokens.
    let (id, _) = bench.enqueue_as(0, KEPT);
    let guard = bench.guard(id);
    assert_eq!(guard.token.get(), 49);
    assert_eq!(bench.release_held(&guard), NOTHING);
    assert_eq!(bench.reply(cycle, extended(100, 1123)), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
    for token in (50..=64).chain(100..=110) {
        let (id, _) = bench.enqueue_as(0, KEPT);
        let guard = bench.guard(id);
        assert_eq!(guard.token.get(), token);
        assert_eq!(bench.release_held(&guard), NOTHING);
    }
}

#[test]
fn task_waits_for_an_extension_if_the_lingering_lease_has_no_tokens() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, KEPT);
    let (cycle, ..) = seen.acquires();
    bench.reply(cycle, granted(1, 1));
    let guard = bench.guard(id);
    assert_eq!(
        bench.release_held(&guard).acquires(),
        (cycle, AcquireKind::Extend, 1024)
    );
    let (id, seen) = bench.enqueue_as(1, KEPT);
    assert_eq!(seen, NOTHING);
    assert_eq!(bench.reply(cycle, extended(10, 1033)).woken, [1]);
    assert_eq!(bench.guard(id).token.get(), 10);
}

#[test]
fn lingering_lease_is_confirmed_before_use_after_a_change_of_servers() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    bench.epoch += 1;
    let (id, seen) = bench.enqueue_as(1, KEPT);
    assert_eq!(
        (seen.acquires(), &seen.woken[..]),
        ((cycle, AcquireKind::Extend, 64), &[][..])
    );
    assert_eq!(bench.reply(cycle, extended(100, 163)).woken, [1]);
    let guard = bench.guard(id);
    assert_eq!(guard.token.get(), 100, "earlier tokens are discarded");
    assert_eq!(bench.release_held(&guard), NOTHING);
    let (id, seen) = bench.enqueue_as(2, KEPT);
    assert_eq!(seen.request, None, "once is enough");
    assert_eq!(bench.guard(id).token.get(), 101);
}

#[test]
fn lease_the_store_forgot_is_requested_again() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    bench.epoch += 1;
    let (id, _) = bench.enqueue_as(1, KEPT);
    let seen = bench.reply(cycle, AcquireReply::Busy);
    let (next, kind, _) = seen.acquires();
    assert!(next > cycle && kind == AcquireKind::Enqueue);
    assert_eq!((seen.lost, &seen.woken[..]), (None, &[][..]), "no guard was out");
    assert_eq!(bench.reply(next, granted(100, 163)).woken, [1]);
    assert_eq!(bench.guard(id).token.get(), 100);
}

#[test]
fn lingering_lease_with_an_overdue_renewal_is_confirmed_before_use() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    bench.pass(ms(151));
    let (id, seen) = bench.enqueue_as(1, KEPT);
    assert_eq!(
        (seen.acquires(), &seen.woken[..]),
        ((cycle, AcquireKind::Extend, 64), &[][..])
    );
    assert_eq!(bench.reply(cycle, extended(100, 163)).woken, [1]);
    assert_eq!(bench.guard(id).token.get(), 2);
}

#[test]
fn remote_waiter_ends_lingering_at_once_and_for_the_next_lease() {
    for by_renewal in [false, true] {
        let mut bench = Bench::new();
        let cycle = linger(&mut bench, 1, 64);
        let seen = if by_renewal {
            bench.renewed(cycle, bench.now, Some(RenewReply::Extended { has_waiters: true }))
        } else {
            bench.remote_waiter(cycle)
        };
        assert_eq!(seen.releases(), (cycle, None));
        assert!(bench.queue.is_evictable(), "until the reply comes");
        // A task that arrives now waits for the reply and then enters the store's queue.
        let (id, seen) = bench.enqueue_as(0, KEPT);
        assert_eq!(seen, NOTHING);
        assert!(!bench.queue.is_evictable());
        let (cycle, kind, _) = bench.reply_to_release(cycle, None).acquires();
        assert!(kind == AcquireKind::Enqueue && cycle.expects_remote_waiters());
        bench.reply(cycle, granted(100, 163));
        let guard = bench.guard(id);
        // As an odd cycle it would not be notified of remote waiters.
        assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
    }
}

#[test]
fn lease_with_a_remote_waiter_does_not_linger_after_its_guard() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, KEPT);
    let (cycle, ..) = seen.acquires();
    bench.reply(cycle, granted(1, 64));
    let guard = bench.guard(id);
    assert_eq!(bench.remote_waiter(cycle), NOTHING);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
}

#[test]
fn lingering_lease_with_a_remote_waiter_is_released_after_its_extension() {
    let mut bench = Bench::new();
    let cycle = linger_without_tokens(&mut bench);
    assert_eq!(
        bench.remote_waiter(cycle),
        NOTHING,
        "the extension could execute after the release"
    );
    assert_eq!(bench.queue.lingers_until(), None);
    let try_it = WaiterOptions { try_only: true, ..KEPT };
    let (id, _) = bench.enqueue_as(0, try_it);
    assert!(matches!(bench.collect(id), Some(Outcome::Busy)), "others wait");
    let seen = bench.reply(cycle, extended(10, 1033));
    assert_eq!(seen.releases(), (cycle, None));
}

/// As above, but an extension is in flight.
fn linger_without_tokens(bench: &mut Bench) -> Cycle {
    let (id, seen) = bench.enqueue_as(0, KEPT);
    let (cycle, ..) = seen.acquires();
    bench.reply(cycle, granted(1, 1));
    let guard = bench.guard(id);
    bench.release_held(&guard).acquires();
    cycle
}

#[test]
fn try_that_waits_for_an_extension_does_not_wait_for_remote_waiters() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let cycle = linger_without_tokens(&mut bench);
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { try_only: true, ..KEPT });
    assert_eq!(seen, NOTHING);
    let reply = AcquireReply::Granted {
        tokens: tokens(10, 1033),
        queued: 1,
        extended: true,
    };
    let seen = bench.reply(cycle, reply);
    assert_eq!(seen.releases(), (cycle, None));
    assert!(matches!(bench.collect(id), Some(Outcome::Busy)));
}

#[test]
fn failed_extension_releases_the_lingering_lease() {
    for fails in [true, false] {
        let mut bench = Bench::new();
        let cycle = linger_without_tokens(&mut bench);
        let seen = if fails {
            bench.failed(cycle)
        } else {
            bench.cancelled(cycle)
        };
        // The extension may still execute, even after the release.
        assert_eq!(seen.releases(), (cycle, None));
        bench.assert_repeated(&seen, None);
    }
}

#[test]
fn lingering_lease_is_released_at_or_shortly_before_its_end() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    let until = bench.queue.lingers_until().unwrap();
    assert_eq!(until, bench.now + ms(400));
    bench.pass(ms(100));
    assert_eq!(bench.renewal(), Some(cycle), "it is renewed like any other");
    bench.renewed(cycle, bench.now, Some(RenewReply::Extended { has_waiters: false }));
    bench.pass(ms(249));
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(1));
    assert_eq!(bench.tick().releases(), (cycle, None));
    bench.reply_to_release(cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn end_of_a_linger_period_is_the_next_deadline() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(
        0,
        WaiterOptions {
            linger: Linger::of_millis(5),
            ..OPTIONS
        },
    );
    bench.reply(seen.acquires().0, granted(1, 64));
    let guard = bench.guard(id);
    bench.release_held(&guard);
    assert_eq!(bench.queue.next_deadline(), Some(bench.now + ms(5)));
}

#[test]
fn expired_lingering_lease_is_not_reused_and_no_loss_is_reported() {
    for noticed in [true, false] {
        let mut bench = Bench::new();
        let cycle = linger(&mut bench, 1, 64);
        bench.pass(TTL);
        let seen = if noticed { Some(bench.tick()) } else { None };
        let (id, wanted) = bench.enqueue_as(0, KEPT);
        let (next, kind, _) = wanted.acquires();
        assert!(next > cycle && kind == AcquireKind::Enqueue);
        // The reply to a renewal may have been lost, so the store may still have the lease.
        assert_eq!(seen.as_ref().unwrap_or(&wanted).abandoned, [cycle]);
        assert!(seen.is_none_or(|seen| seen.lost.is_none()) && wanted.lost.is_none());
        assert!(bench.collect(id).is_none());
    }
}

#[test]
fn taken_lingering_lease_is_not_reused_and_no_loss_is_reported() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    let seen = bench.renewed(cycle, bench.now, Some(RenewReply::NotOurs));
    assert_eq!((seen.lost, seen.request), (None, None));
    assert!(bench.queue.is_unused());
    assert!(bench.enqueue_as(0, KEPT).1.acquires().0 > cycle);
}

#[test]
fn shutdown_or_drop_of_the_last_handle_releases_a_lingering_lease_at_once() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    let seen = bench.close();
    assert_eq!((seen.releases(), seen.lost), ((cycle, None), None));

    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    let (_, seen) = bench.event(|queue, cx| ((), queue.stop_lingering(cx)));
    assert_eq!(seen.releases(), (cycle, None));

    // The same if a guard is still out at that time.
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue_as(0, KEPT);
    let (cycle, ..) = seen.acquires();
    bench.reply(cycle, granted(1, 64));
    let guard = bench.guard(id);
    let (_, seen) = bench.event(|queue, cx| ((), queue.stop_lingering(cx)));
    assert_eq!(seen, NOTHING);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
}

#[test]
fn last_guard_decides_whether_the_lease_lingers() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    let (id, _) = bench.enqueue_as(0, OPTIONS);
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
}

#[test]
fn lease_does_not_linger_if_there_is_no_room() {
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    bench.keys.0 = 11;
    let (id, _) = bench.enqueue_as(0, KEPT);
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
    // A lease that already lingers is released when evicted.
    let mut bench = Bench::new();
    let cycle = linger(&mut bench, 1, 64);
    assert_eq!(bench.evict().releases(), (cycle, None));
    assert!(bench.queue.is_evictable());
    bench.reply_to_release(cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn lingering_lease_serves_a_try_and_tasks_wait_behind_its_guard() {
    let mut bench = Bench::new();
    linger(&mut bench, 1, 64);
    let (id, _) = bench.enqueue_as(0, WaiterOptions { try_only: true, ..KEPT });
    let guard = bench.guard(id);
    assert_eq!(guard.path, Path::Lingering);
    let (next, seen) = bench.enqueue_as(1, KEPT);
    assert_eq!(seen, NOTHING);
    let (id, _) = bench.enqueue_as(2, WaiterOptions { try_only: true, ..KEPT });
    assert!(matches!(bench.collect(id), Some(Outcome::Busy)));
    assert_eq!(bench.release_held(&guard).woken, [1]);
    assert_eq!(bench.guard(next).path, Path::LocalHandOff);
}

#[test]
fn lease_still_lingers_after_a_waiter_gave_up() {
    let mut bench = Bench::new();
    linger(&mut bench, 1, 64);
    let (id, _) = bench.enqueue_as(0, KEPT);
    assert_eq!(bench.give_up(id), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
    let (id, _) = bench.enqueue_as(0, KEPT);
    assert_eq!(bench.guard(id).token.get(), 3);
}

#[test]
fn lingering_takes_no_more_memory_in_an_entry() {
    let without = size_of::<Option<crate::engine::key::phase::Holder>>();
    assert_eq!(size_of::<crate::engine::key::phase::Occupant>(), without);
}

/// Only a store that may have lost the lease is asked sooner.
#[test]
fn new_subscription_alone_does_not_hasten_a_renewal() {
    let mut bench = Bench::new();
    let _guard = bench.hold(1, 1);
    let due = bench.queue.next_deadline();
    assert_eq!(bench.resubscribed(), NOTHING);
    assert_eq!(bench.queue.next_deadline(), due);
    bench.epoch += 1;
    bench.resubscribed();
    assert!(bench.queue.next_deadline() <= Some(bench.now));
}

/// A renewal without a reply is repeated after half of the interval. It is repeated sooner, but not
/// at once, if the store may have lost the lease before, and at once if that happened since.
#[test]
fn renewal_without_a_reply_is_repeated() {
    const LONG: Duration = Duration::from_secs(100);
    for (moved_before, moved_since, after) in [
        (false, false, ms(5_000)),
        (true, false, ms(1_000)),
        (false, true, ms(0)),
    ] {
        let mut bench = Bench::new();
        let (id, seen) = bench.enqueue_as(0, WaiterOptions { ttl: LONG, ..OPTIONS });
        let cycle = seen.acquires().0;
        let answer = Answer {
            ttl: LONG,
            ..answer(bench.now, granted(1, 1))
        };
        bench.event(|queue, cx| ((), queue.on_acquire_reply(cycle, answer, cx)));
        bench.guard(id);
        bench.epoch += u32::from(moved_before);
        bench.pass(ms(10_000));
        assert!(
            bench
                .event(|queue, cx| (queue.renewal(cx), Effects::none()))
                .0
                .is_some()
        );
        bench.epoch += u32::from(moved_since);
        let sent_at = bench.now;
        let event = StoreEvent::RenewalReply {
            ttl: LONG,
            sent_at,
            reply: None,
        };
        bench.event(|queue, cx| ((), queue.on_event(cycle, event, cx)));
        assert_eq!(bench.queue.next_deadline(), Some(bench.now + after));
    }
}
