//! A lease that lingers without a guard.

use super::*;

const LINGER: Linger = Linger::of_millis(400);

const KEPT: WaiterOptions = WaiterOptions { linger: LINGER, ..WANT };

/// Acquires and releases a guard under a lease with these tokens. The lease now lingers. Returns
/// its cycle.
fn keep(bench: &mut Bench, first: u64, last: u64) -> Cycle {
    let (id, seen) = bench.want_as(0, KEPT);
    let (cycle, ..) = seen.asks();
    bench.reply(cycle, granted(first, last));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
    cycle
}

#[test]
fn the_next_task_needs_no_message_and_has_a_larger_token() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want_as(0, KEPT);
    let (cycle, kind, tokens) = seen.asks();
    assert_eq!(
        (kind, tokens),
        (AcquireKind::Fast, 64),
        "there are tokens for the tasks that come later"
    );
    bench.reply(cycle, granted(1, 64));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard), NOTHING);
    for token in 2..=20 {
        let (id, seen) = bench.want_as(7, KEPT);
        assert_eq!((seen.request, &seen.woken[..]), (None, &[7][..]));
        let guard = bench.guard(id);
        assert_eq!((guard.token.get(), guard.path), (token, Path::Lingering));
        assert_eq!(guard.lease.cycle, cycle);
        assert_eq!(bench.release_held(&guard), NOTHING);
    }
}

#[test]
fn tokens_are_asked_for_before_they_run_out() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    let mut last = 1;
    let mut asked = None;
    while asked.is_none() {
        let (id, seen) = bench.want_as(0, KEPT);
        assert_eq!(seen.request, None);
        let guard = bench.guard(id);
        last = guard.token.get();
        asked = bench.release_held(&guard).request;
    }
    assert_eq!(last, 48);
    let Some(Request::Acquire {
        cycle: asks,
        kind: AcquireKind::Extend,
        tokens: 1024,
        ..
    }) = asked
    else {
        panic!("{asked:?}")
    };
    assert_eq!(asks, cycle);
    // A task that arrives meanwhile gets one of the remaining tokens.
    let (id, _) = bench.want_as(0, KEPT);
    let guard = bench.guard(id);
    assert_eq!(guard.token.get(), 49);
    assert_eq!(bench.release_held(&guard), NOTHING);
    assert_eq!(bench.reply(cycle, extended(100, 1123)), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
    for token in (50..=64).chain(100..=110) {
        let (id, _) = bench.want_as(0, KEPT);
        let guard = bench.guard(id);
        assert_eq!(guard.token.get(), token);
        assert_eq!(bench.release_held(&guard), NOTHING);
    }
}

#[test]
fn without_tokens_the_next_task_waits_for_an_extension() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want_as(0, KEPT);
    let (cycle, ..) = seen.asks();
    bench.reply(cycle, granted(1, 1));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).asks(), (cycle, AcquireKind::Extend, 1024));
    let (id, seen) = bench.want_as(1, KEPT);
    assert_eq!(seen, NOTHING);
    assert_eq!(bench.reply(cycle, extended(10, 1033)).woken, [1]);
    assert_eq!(bench.guard(id).token.get(), 10);
}

#[test]
fn after_a_change_of_servers_the_next_task_waits_until_the_store_has_confirmed_it() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    bench.epoch += 1;
    let (id, seen) = bench.want_as(1, KEPT);
    assert_eq!(
        (seen.asks(), &seen.woken[..]),
        ((cycle, AcquireKind::Extend, 64), &[][..])
    );
    assert_eq!(bench.reply(cycle, extended(100, 163)).woken, [1]);
    let guard = bench.guard(id);
    assert_eq!(guard.token.get(), 100, "earlier tokens are discarded");
    assert_eq!(bench.release_held(&guard), NOTHING);
    let (id, seen) = bench.want_as(2, KEPT);
    assert_eq!(seen.request, None, "once is enough");
    assert_eq!(bench.guard(id).token.get(), 101);
}

#[test]
fn what_the_store_has_forgotten_is_asked_for_anew() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    bench.epoch += 1;
    let (id, _) = bench.want_as(1, KEPT);
    let seen = bench.reply(cycle, AcquireReply::Busy);
    let (next, kind, _) = seen.asks();
    assert!(next > cycle && kind == AcquireKind::Enqueue);
    assert_eq!((seen.lost, &seen.woken[..]), (None, &[][..]), "no guard was out");
    assert_eq!(bench.reply(next, granted(100, 163)).woken, [1]);
    assert_eq!(bench.guard(id).token.get(), 100);
}

#[test]
fn a_lease_whose_renewal_is_overdue_is_confirmed_before_the_next_task_has_it() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    bench.pass(ms(151));
    let (id, seen) = bench.want_as(1, KEPT);
    assert_eq!(
        (seen.asks(), &seen.woken[..]),
        ((cycle, AcquireKind::Extend, 64), &[][..])
    );
    assert_eq!(bench.reply(cycle, extended(100, 163)).woken, [1]);
    assert_eq!(bench.guard(id).token.get(), 2);
}

#[test]
fn what_another_manager_wants_is_given_back_at_once_and_its_next_lease_is_not_kept() {
    for by_renewal in [false, true] {
        let mut bench = Bench::new();
        let cycle = keep(&mut bench, 1, 64);
        let seen = if by_renewal {
            bench.renewed(cycle, bench.now, Some(RenewReply::Extended { wanted: true }))
        } else {
            bench.wanted(cycle)
        };
        assert_eq!(seen.releases(), (cycle, None));
        assert!(bench.queue.is_evictable(), "until the reply comes");
        // A task that arrives now waits for the reply and then enters the store's queue.
        let (id, seen) = bench.want_as(0, KEPT);
        assert_eq!(seen, NOTHING);
        assert!(!bench.queue.is_evictable());
        let (cycle, kind, _) = bench.released_remotely(cycle, None).asks();
        assert!(kind == AcquireKind::Enqueue && cycle.expects_rivals());
        bench.reply(cycle, granted(100, 163));
        let guard = bench.guard(id);
        // As an odd cycle it would not be notified of remote waiters.
        assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
    }
}

#[test]
fn what_is_wanted_while_a_guard_is_out_is_not_kept() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want_as(0, KEPT);
    let (cycle, ..) = seen.asks();
    bench.reply(cycle, granted(1, 64));
    let guard = bench.guard(id);
    assert_eq!(bench.wanted(cycle), NOTHING);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
}

#[test]
fn what_is_wanted_while_an_extension_is_under_way_is_given_back_after_it() {
    let mut bench = Bench::new();
    let cycle = keep_without_tokens(&mut bench);
    assert_eq!(
        bench.wanted(cycle),
        NOTHING,
        "the extension could execute after the release"
    );
    assert_eq!(bench.queue.lingers_until(), None);
    let try_it = WaiterOptions { try_only: true, ..KEPT };
    let (id, _) = bench.want_as(0, try_it);
    assert!(matches!(bench.collect(id), Some(Outcome::Busy)), "others wait");
    let seen = bench.reply(cycle, extended(10, 1033));
    assert_eq!(seen.releases(), (cycle, None));
}

/// As above, but an extension is in flight.
fn keep_without_tokens(bench: &mut Bench) -> Cycle {
    let (id, seen) = bench.want_as(0, KEPT);
    let (cycle, ..) = seen.asks();
    bench.reply(cycle, granted(1, 1));
    let guard = bench.guard(id);
    bench.release_held(&guard).asks();
    cycle
}

#[test]
fn a_try_that_waits_for_an_extension_does_not_wait_for_others() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let cycle = keep_without_tokens(&mut bench);
    let (id, seen) = bench.want_as(0, WaiterOptions { try_only: true, ..KEPT });
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
fn a_failed_extension_ends_it() {
    for fails in [true, false] {
        let mut bench = Bench::new();
        let cycle = keep_without_tokens(&mut bench);
        let seen = if fails {
            bench.failed(cycle)
        } else {
            bench.dropped(cycle)
        };
        // The extension may still execute, even after the release.
        assert_eq!((seen.releases(), &seen.abandoned[..]), ((cycle, None), &[cycle][..]));
    }
}

#[test]
fn it_ends_in_its_time_or_a_little_before() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    let until = bench.queue.lingers_until().unwrap();
    assert_eq!(until, bench.now + ms(400));
    bench.pass(ms(100));
    assert_eq!(bench.renewal(), Some(cycle), "it is renewed like any other");
    bench.renewed(cycle, bench.now, Some(RenewReply::Extended { wanted: false }));
    bench.pass(ms(249));
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(1));
    assert_eq!(bench.tick().releases(), (cycle, None));
    bench.released_remotely(cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn its_end_is_looked_for() {
    let mut bench = Bench::new();
    let (id, seen) = bench.want_as(
        0,
        WaiterOptions {
            linger: Linger::of_millis(5),
            ..WANT
        },
    );
    bench.reply(seen.asks().0, granted(1, 64));
    let guard = bench.guard(id);
    bench.release_held(&guard);
    assert_eq!(bench.queue.next_deadline(), Some(bench.now + ms(5)));
}

#[test]
fn a_lease_that_ended_is_not_given_to_the_next_task_and_nobody_is_told() {
    for noticed in [true, false] {
        let mut bench = Bench::new();
        let cycle = keep(&mut bench, 1, 64);
        bench.pass(TTL);
        let seen = if noticed { Some(bench.tick()) } else { None };
        let (id, wanted) = bench.want_as(0, KEPT);
        let (next, kind, _) = wanted.asks();
        assert!(next > cycle && kind == AcquireKind::Enqueue);
        // The reply to a renewal may have been lost, so the store may still have the lease.
        assert_eq!(seen.as_ref().unwrap_or(&wanted).abandoned, [cycle]);
        assert!(seen.is_none_or(|seen| seen.lost.is_none()) && wanted.lost.is_none());
        assert!(bench.collect(id).is_none());
    }
}

#[test]
fn a_lease_that_was_taken_is_not_given_to_the_next_task_and_nobody_is_told() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    let seen = bench.renewed(cycle, bench.now, Some(RenewReply::NotOurs));
    assert_eq!((seen.lost, seen.request), (None, None));
    assert!(bench.queue.is_unused());
    assert!(bench.want_as(0, KEPT).1.asks().0 > cycle);
}

#[test]
fn a_shutdown_or_the_last_handles_end_gives_it_back_at_once() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    let seen = bench.close();
    assert_eq!((seen.releases(), seen.lost), ((cycle, None), None));

    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    let (_, seen) = bench.event(|queue, cx| ((), queue.stop_lingering(cx)));
    assert_eq!(seen.releases(), (cycle, None));

    // The same if a guard is still out at that time.
    let mut bench = Bench::new();
    let (id, seen) = bench.want_as(0, KEPT);
    let (cycle, ..) = seen.asks();
    bench.reply(cycle, granted(1, 64));
    let guard = bench.guard(id);
    let (_, seen) = bench.event(|queue, cx| ((), queue.stop_lingering(cx)));
    assert_eq!(seen, NOTHING);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
}

#[test]
fn the_last_guard_says_for_how_long() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    let (id, _) = bench.want_as(0, WANT);
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
}

#[test]
fn nothing_is_kept_where_there_is_no_room() {
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    bench.keys.0 = 11;
    let (id, _) = bench.want_as(0, KEPT);
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).releases(), (cycle, None));
    // A lease that already lingers is released when evicted.
    let mut bench = Bench::new();
    let cycle = keep(&mut bench, 1, 64);
    assert_eq!(bench.let_go().releases(), (cycle, None));
    assert!(bench.queue.is_evictable());
    bench.released_remotely(cycle, None);
    assert!(bench.queue.is_unused());
}

#[test]
fn it_goes_to_a_try_and_tasks_line_up_behind_its_guard() {
    let mut bench = Bench::new();
    keep(&mut bench, 1, 64);
    let (id, _) = bench.want_as(0, WaiterOptions { try_only: true, ..KEPT });
    let guard = bench.guard(id);
    assert_eq!(guard.path, Path::Lingering);
    let (next, seen) = bench.want_as(1, KEPT);
    assert_eq!(seen, NOTHING);
    let (id, _) = bench.want_as(2, WaiterOptions { try_only: true, ..KEPT });
    assert!(matches!(bench.collect(id), Some(Outcome::Busy)));
    assert_eq!(bench.release_held(&guard).woken, [1]);
    assert_eq!(bench.guard(next).path, Path::LocalHandOff);
}

#[test]
fn a_waiter_that_gives_up_leaves_it_as_it_was() {
    let mut bench = Bench::new();
    keep(&mut bench, 1, 64);
    let (id, _) = bench.want_as(0, KEPT);
    assert_eq!(bench.give_up(id), NOTHING);
    assert!(bench.queue.lingers_until().is_some());
    let (id, _) = bench.want_as(0, KEPT);
    assert_eq!(bench.guard(id).token.get(), 3);
}

#[test]
fn it_takes_no_more_room_in_an_entry() {
    let without = size_of::<Option<crate::engine::key::phase::Holder>>();
    assert_eq!(size_of::<crate::engine::key::phase::Occupant>(), without);
}
