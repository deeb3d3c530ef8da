//! Passing the lock on: to the next local task while that is fair, otherwise to other processes.

use super::*;

/// A bench with a guard out, these tokens left, and `waiting` waiters with wakers 1, 2, ...
fn held_with_waiters(first: u64, last: u64, waiting: u32) -> (Bench, Granted, Vec<WaiterId>) {
    let mut bench = Bench::new();
    let guard = bench.hold(first, last);
    let ids = (1..=waiting).map(|waker| bench.want(waker).0).collect();
    (bench, guard, ids)
}

#[test]
fn the_next_task_gets_the_lock_without_a_message() {
    let (mut bench, guard, ids) = held_with_waiters(100, 120, 2);
    let mut guard = guard;
    for (number, id) in ids.into_iter().enumerate() {
        let seen = bench.release_held(&guard);
        assert_eq!((seen.woken, seen.request), (vec![number as u32 + 1], None));
        guard = bench.guard(id);
        assert_eq!(guard.token.get(), 101 + number as u64);
        assert_eq!(guard.path, Path::LocalHandOff);
    }
    let seen = bench.release_held(&guard);
    assert_eq!(seen.releases(), (guard.lease.cycle, None));
    assert_eq!(seen.abandoned, [], "one release is enough");
}

#[test]
fn without_rivals_it_may_go_on_for_ever() {
    let mut bench = Bench::new();
    bench.rules.max_slice = ms(1);
    let mut guard = bench.hold(1, 1_000);
    for _ in 0..100 {
        let (id, _) = bench.want(1);
        bench.pass(ms(1));
        assert_eq!(bench.release_held(&guard).request, None);
        guard = bench.guard(id);
    }
}

#[test]
fn where_the_tokens_are_used_up_more_are_reserved_before_the_next_guard() {
    let (mut bench, guard, ids) = held_with_waiters(100, 100, 1);
    let seen = bench.release_held(&guard);
    let cycle = guard.lease.cycle;
    assert_eq!(seen.asks(), (cycle, AcquireKind::Extend, 64));
    assert!(seen.woken.is_empty(), "no token, no guard");
    let seen = bench.reply(cycle, extended(200, 263));
    assert_eq!(seen.woken, [1]);
    assert_eq!(bench.guard(ids[0]).token.get(), 200);
}

#[test]
fn tokens_are_reserved_in_the_background_before_they_run_out() {
    let (mut bench, guard, ids) = held_with_waiters(100, 103, 3);
    let cycle = guard.lease.cycle;
    let seen = bench.release_held(&guard);
    assert_eq!(seen.woken, [1], "the guard does not wait for the tokens");
    assert_eq!(seen.asks(), (cycle, AcquireKind::Extend, 64));
    let second = bench.guard(ids[0]);
    assert_eq!(bench.release_held(&second).request, None, "one request at a time");
    let third = bench.guard(ids[1]);
    assert_eq!(bench.reply(cycle, extended(200, 263)), NOTHING);
    bench.release_held(&third);
    let fourth = bench.guard(ids[2]);
    assert_eq!(fourth.token.get(), 103, "the older block first");
    let (fifth, _) = bench.want(4);
    bench.release_held(&fourth);
    assert_eq!(bench.guard(fifth).token.get(), 200);
}

#[test]
fn blocks_grow_with_what_is_used_up_in_a_round_trip() {
    let mut bench = Bench::new();
    let mut guard = bench.hold(1, 70);
    let cycle = guard.lease.cycle;
    let mut ids: std::collections::VecDeque<_> = (1..=90).map(|waker| bench.want(waker).0).collect();
    let mut asked = None;
    // 69 tokens are left. At 16 more are requested, and 10 are used before the reply arrives.
    for _ in 0..64 {
        let seen = bench.release_held(&guard);
        asked = asked.or(seen.request);
        guard = bench.guard(ids.pop_front().unwrap());
    }
    assert!(asked.is_some());
    bench.reply(cycle, extended(1_001, 1_020));
    let mut second = None;
    for _ in 0..10 {
        let seen = bench.release_held(&guard);
        second = second.or(seen.request);
        guard = bench.guard(ids.pop_front().unwrap());
    }
    let Some(Request::Acquire { tokens, .. }) = second else {
        panic!("{second:?}")
    };
    assert_eq!(tokens, 176, "enough for sixteen such round trips of eleven");
}

#[test]
fn a_lease_whose_renewal_is_overdue_is_passed_on_when_the_store_has_confirmed_it() {
    let (mut bench, guard, ids) = held_with_waiters(100, 163, 2);
    let cycle = guard.lease.cycle;
    bench.pass(ms(150));
    bench.release_held(&guard);
    let second = bench.guard(ids[0]);
    assert_eq!(second.token.get(), 101, "a renewal may be late by half its interval");
    bench.pass(ms(1));
    let seen = bench.release_held(&second);
    assert_eq!(
        (seen.asks(), &seen.woken[..]),
        ((cycle, AcquireKind::Extend, 64), &[][..])
    );
    // The reply serves the next guard no matter how long it took.
    let sent_at = bench.now;
    bench.pass(ms(200));
    assert_eq!(bench.reply_to(sent_at, cycle, extended(200, 263)).woken, [2]);
    assert_eq!(bench.guard(ids[1]).token.get(), 102);
}

#[test]
fn after_a_change_of_servers_the_next_guard_waits_for_a_confirmation_and_has_a_newer_token() {
    for by_renewal in [false, true] {
        let (mut bench, guard, ids) = held_with_waiters(100, 163, 2);
        let cycle = guard.lease.cycle;
        bench.epoch += 1;
        if by_renewal {
            // A renewal already in flight does not count. The next one is sent at once.
            assert_eq!(bench.resubscribed(), NOTHING);
            assert_eq!(bench.renewal(), Some(cycle));
            bench.renewed(cycle, bench.now, Some(RenewReply::Extended { wanted: false }));
        }
        let seen = bench.release_held(&guard);
        assert_eq!(
            (seen.asks(), &seen.woken[..]),
            ((cycle, AcquireKind::Extend, 64), &[][..])
        );
        assert_eq!(bench.reply(cycle, extended(200, 263)).woken, [1]);
        let second = bench.guard(ids[0]);
        assert_eq!(second.token.get(), 200);
        assert_eq!(bench.release_held(&second).request, None);
        assert_eq!(bench.guard(ids[1]).token.get(), 201);
    }
}

#[test]
fn a_confirmation_of_before_the_change_of_servers_does_not_count() {
    let (mut bench, guard, ids) = held_with_waiters(100, 163, 1);
    let cycle = guard.lease.cycle;
    bench.pass(ms(100));
    assert_eq!(bench.renewal(), Some(cycle));
    bench.epoch += 1;
    bench.renewed(cycle, bench.now, Some(RenewReply::Extended { wanted: false }));
    assert_eq!(bench.renewal(), Some(cycle), "another renewal follows at once");
    bench.epoch += 1;
    bench.renewed(cycle, bench.now, None);
    assert_eq!(bench.renewal(), Some(cycle), "also after one without a reply");
    let asks = (cycle, AcquireKind::Extend, 64);
    assert_eq!(bench.release_held(&guard).asks(), asks);
    bench.epoch += 1;
    // The reply may come from the previous server.
    assert_eq!(bench.reply(cycle, extended(200, 263)).asks(), asks);
    assert_eq!(bench.reply(cycle, extended(300, 363)).woken, [1]);
    assert_eq!(bench.guard(ids[0]).token.get(), 300);
}

/// An extension may be in flight although there is a spare block: one is also sent when little
/// validity is left. When its reply arrived just after the last token of the current block was
/// used, the newest block was put before the spare one, so later guards got smaller tokens than
/// earlier ones.
#[test]
fn tokens_grow_although_a_spare_block_is_there_when_another_comes() {
    let (mut bench, guard, ids) = held_with_waiters(100, 102, 4);
    let cycle = guard.lease.cycle;
    let sent_at = bench.now;
    assert_eq!(bench.release_held(&guard).asks(), (cycle, AcquireKind::Extend, 64));
    let second = bench.guard(ids[0]);
    assert_eq!(second.token.get(), 101);
    bench.reply_to(sent_at, cycle, extended(200, 263));
    bench.release_held(&second);
    let third = bench.guard(ids[1]);
    assert_eq!(third.token.get(), 102);
    // No renewal succeeds for most of the TTL, so the lease must not be passed on.
    bench.pass(ms(800));
    assert_eq!(bench.release_held(&third).asks().1, AcquireKind::Extend);
    bench.reply(cycle, extended(300, 300));
    let fourth = bench.guard(ids[2]);
    bench.release_held(&fourth);
    let fifth = bench.guard(ids[3]);
    assert!(
        fourth.token > third.token && fifth.token > fourth.token,
        "{fourth:?} {fifth:?}"
    );
}

#[test]
fn a_lease_with_little_time_left_is_extended_before_it_is_passed_on() {
    let (mut bench, guard, ids) = held_with_waiters(100, 120, 1);
    bench.pass(ms(750));
    let seen = bench.release_held(&guard);
    assert_eq!(seen.asks().0, guard.lease.cycle);
    assert!(seen.woken.is_empty());
    bench.reply(guard.lease.cycle, extended(200, 263));
    let next = bench.guard(ids[0]);
    assert_eq!(next.token.get(), 101, "the older block first");
    assert_eq!(next.lease.valid_until(), bench.now + TTL - DRIFT);
}

#[test]
fn known_rivals_bound_the_bypass_by_the_number_of_guards() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.stand_in_queue(10);
    let ids: Vec<_> = (1..=8).map(|waker| bench.want(waker).0).collect();
    bench.grant(grant(cycle, 11, 74));
    let mut guard = bench.guard(id);
    for &id in &ids[..3] {
        assert_eq!(bench.release_held(&guard).request, None);
        guard = bench.guard(id);
    }
    let seen = bench.release_held(&guard);
    let (released, next) = seen.releases();
    assert_eq!(released, cycle);
    assert!(next.is_some_and(|next| next > cycle && next.expects_rivals()));
    assert!(seen.woken.is_empty());
}

#[test]
fn known_rivals_bound_the_bypass_by_time() {
    let mut bench = Bench::new();
    bench.rules.max_slice = ms(10);
    let (id, cycle) = bench.stand_in_queue(10);
    let (next, _) = bench.want(1);
    bench.want(2);
    bench.grant(grant(cycle, 11, 74));
    bench.pass(ms(9));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).request, None);
    let guard = bench.guard(next);
    bench.pass(ms(1));
    assert_eq!(bench.release_held(&guard).releases().0, cycle);
}

#[test]
fn with_a_burst_of_one_processes_alternate() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.stand_in_queue(10);
    let (other, _) = bench.want(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    bench.released_remotely(cycle, Some(queued(12)));
    assert_eq!(bench.grant(grant(next, 13, 13)).woken, [1]);
    assert_eq!(bench.guard(other).token.get(), 13);
}

#[test]
fn bypass_counts_from_the_moment_at_which_rivals_are_known() {
    for how in ["wanted", "renewal", "extension"] {
        let mut bench = Bench::new();
        let mut guard = bench.hold(1, 64);
        let cycle = guard.lease.cycle;
        for _ in 0..10 {
            let (id, _) = bench.want(1);
            bench.pass(ms(1));
            assert_eq!(bench.release_held(&guard).request, None);
            guard = bench.guard(id);
        }
        let mut waiting: std::collections::VecDeque<_> = (0..5).map(|_| bench.want(1).0).collect();
        bench.pass(ms(1));
        match how {
            "wanted" => assert_eq!(bench.wanted(cycle), NOTHING),
            "renewal" => {
                let reply = RenewReply::Extended { wanted: true };
                bench.renewed(cycle, bench.now, Some(reply));
            }
            _ => {
                bench.pass(ms(800));
                bench.release_held(&guard);
                let reply = AcquireReply::Granted {
                    tokens: tokens(100, 163),
                    queued: 3,
                    extended: true,
                };
                bench.reply(cycle, reply);
                guard = bench.guard(waiting.pop_front().unwrap());
            }
        }
        // The current guard counts, and three more follow.
        for _ in 0..if how == "extension" { 2 } else { 3 } {
            assert_eq!(bench.release_held(&guard).request, None, "{how}");
            guard = bench.guard(waiting.pop_front().unwrap());
        }
        assert_eq!(bench.release_held(&guard).releases().0, cycle, "{how}");
        assert_eq!(bench.told.yielded, Some(Bound::Burst), "{how}");
    }
}

#[test]
fn rivals_that_are_told_of_before_the_reply_count() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, seen) = bench.want(0);
    let cycle = seen.asks().0;
    assert_eq!(bench.wanted(cycle), NOTHING);
    bench.want(1);
    bench.reply(cycle, granted(1, 2));
    let guard = bench.guard(id);
    assert!(bench.release_held(&guard).releases().1.is_some());
    assert!(bench.queue.remote_waiters_seen());
}

#[test]
fn rivals_that_the_reply_tells_of_count() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, seen) = bench.want(0);
    let cycle = seen.asks().0;
    bench.want(1);
    let reply = AcquireReply::Granted {
        tokens: tokens(1, 2),
        queued: 1,
        extended: false,
    };
    bench.reply(cycle, reply);
    assert!(bench.queue.remote_waiters_seen());
    let guard = bench.guard(id);
    assert!(bench.release_held(&guard).releases().1.is_some());
}

#[test]
fn a_requeued_cycle_may_be_granted_at_once() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.stand_in_queue(10);
    let (other, _) = bench.want(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    bench.release_held(&guard);
    let seen = bench.released_remotely(cycle, Some(granted(12, 12)));
    assert_eq!(seen.woken, [1], "no other cycle was left in the store's queue");
    let guard = bench.guard(other);
    assert_eq!(guard.token.get(), 12);
    assert!(guard.lease.cycle > cycle);
}

#[test]
fn a_grant_for_a_requeued_cycle_may_overtake_the_reply() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.stand_in_queue(10);
    let (other, _) = bench.want(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    assert_eq!(bench.grant(grant(next, 20, 20)), NOTHING);
    assert_eq!(bench.released_remotely(cycle, Some(queued(15))).woken, [1]);
    assert_eq!(bench.guard(other).token.get(), 20);
}

#[test]
fn who_comes_while_a_release_is_under_way_is_asked_for_after_it() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    bench.release_held(&guard);
    let (_, seen) = bench.want(1);
    assert_eq!(seen, NOTHING);
    let seen = bench.released_remotely(guard.lease.cycle, None);
    assert_eq!(seen.asks().1, AcquireKind::Fast);
    assert!(seen.asks().0 > guard.lease.cycle);
}

#[test]
fn a_lease_is_not_given_up_while_its_extension_is_under_way() {
    let (mut bench, guard, ids) = held_with_waiters(100, 101, 2);
    let cycle = guard.lease.cycle;
    assert_eq!(bench.release_held(&guard).asks().0, cycle);
    let second = bench.guard(ids[0]);
    assert_eq!(bench.give_up(ids[1]), NOTHING);
    // No waiter is left. But the extension could overtake a release and acquire the lease again.
    assert_eq!(bench.release_held(&second), NOTHING);
    assert_eq!(bench.reply(cycle, extended(200, 263)).releases(), (cycle, None));
}

#[test]
fn tries_neither_wait_nor_pass_anybody() {
    let want = WaiterOptions { try_only: true, ..WANT };
    let is_busy = |bench: &mut Bench| {
        let (id, seen) = bench.want_as(9, want);
        seen == NOTHING && matches!(bench.collect(id), Some(Outcome::Busy))
    };
    let mut bench = Bench::new();
    let (first, seen) = bench.want(0);
    assert!(is_busy(&mut bench), "an acquire is in flight");
    let cycle = seen.asks().0;
    bench.reply(cycle, granted(1, 9));
    assert!(is_busy(&mut bench), "a guard is out");
    let guard = bench.guard(first);
    bench.want(1);
    bench.release_held(&guard);
    assert!(is_busy(&mut bench), "a waiter was just served");
}

#[test]
fn a_try_on_an_unused_key_asks_once() {
    let want = WaiterOptions { try_only: true, ..WANT };
    for reply in [granted(5, 5), AcquireReply::Busy] {
        let mut bench = Bench::new();
        let (id, seen) = bench.want_as(3, want);
        let (cycle, kind, _) = seen.asks();
        assert_eq!(kind, AcquireKind::Try);
        assert!(
            !cycle.expects_rivals(),
            "it is never queued, so it must be notified of remote waiters"
        );
        // A waiter behind a try is not affected by its failure.
        bench.want(4);
        let seen = bench.reply(cycle, reply);
        assert_eq!(seen.woken, [3]);
        match reply {
            AcquireReply::Busy => {
                assert!(matches!(bench.collect(id), Some(Outcome::Busy)));
                assert_eq!(seen.asks().1, AcquireKind::Enqueue);
            }
            _ => assert_eq!(bench.guard(id).token.get(), 5),
        }
    }
}
