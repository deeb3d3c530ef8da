//! Passing the lock on: to the next local task while that is fair, otherwise to other processes.

use super::*;

/// A bench with a guard out, these tokens left, and `waiting` waiters with wakers 1, 2, ...
fn held_with_waiters(first: u64, last: u64, waiting: u32) -> (Bench, Granted, Vec<WaiterId>) {
    let mut bench = Bench::new();
    let guard = bench.hold(first, last);
    let ids = (1..=waiting).map(|waker| bench.enqueue(waker).0).collect();
    (bench, guard, ids)
}

#[test]
fn next_local_waiter_gets_the_lock_without_a_message() {
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
fn local_hand_off_is_unlimited_without_remote_waiters() {
    let mut bench = Bench::new();
    bench.rules.max_slice = ms(1);
    let mut guard = bench.hold(1, 1_000);
    for _ in 0..100 {
        let (id, _) = bench.enqueue(1);
        bench.pass(ms(1));
        assert_eq!(bench.release_held(&guard).request, None);
        guard = bench.guard(id);
    }
}

#[test]
fn used_up_tokens_are_replaced_before_the_next_guard() {
    let (mut bench, guard, ids) = held_with_waiters(100, 100, 1);
    let seen = bench.release_held(&guard);
    let cycle = guard.lease.cycle;
    assert_eq!(seen.acquires(), (cycle, AcquireKind::Extend, 64));
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
    assert_eq!(seen.acquires(), (cycle, AcquireKind::Extend, 64));
    let second = bench.guard(ids[0]);
    assert_eq!(bench.release_held(&second).request, None, "one request at a time");
    let third = bench.guard(ids[1]);
    assert_eq!(bench.reply(cycle, extended(200, 263)), NOTHING);
    bench.release_held(&third);
    let fourth = bench.guard(ids[2]);
    assert_eq!(fourth.token.get(), 103, "the older block first");
    let (fifth, _) = bench.enqueue(4);
    bench.release_held(&fourth);
    assert_eq!(bench.guard(fifth).token.get(), 200);
}

#[test]
fn token_blocks_grow_with_the_tokens_used_in_a_round_trip() {
    let mut bench = Bench::new();
    let mut guard = bench.hold(1, 70);
    let cycle = guard.lease.cycle;
    let mut ids: std::collections::VecDeque<_> = (1..=90).map(|waker| bench.enqueue(waker).0).collect();
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
fn lease_with_an_overdue_renewal_is_passed_on_once_confirmed() {
    let (mut bench, guard, ids) = held_with_waiters(100, 163, 2);
    let cycle = guard.lease.cycle;
    bench.pass(ms(150));
    bench.release_held(&guard);
    let second = bench.guard(ids[0]);
    assert_eq!(second.token.get(), 101, "a renewal may be late by half its interval");
    bench.pass(ms(1));
    let seen = bench.release_held(&second);
    assert_eq!(
        (seen.acquires(), &seen.woken[..]),
        ((cycle, AcquireKind::Extend, 64), &[][..])
    );
    // The reply serves the next guard no matter how long it took.
    let sent_at = bench.now;
    bench.pass(ms(200));
    assert_eq!(bench.reply_to(sent_at, cycle, extended(200, 263)).woken, [2]);
    assert_eq!(bench.guard(ids[1]).token.get(), 102);
}

#[test]
fn next_guard_after_a_change_of_servers_is_confirmed_and_gets_a_new_token() {
    for by_renewal in [false, true] {
        let (mut bench, guard, ids) = held_with_waiters(100, 163, 2);
        let cycle = guard.lease.cycle;
        bench.epoch += 1;
        if by_renewal {
            // A renewal already in flight does not count. The next one is sent at once.
            assert_eq!(bench.resubscribed(), NOTHING);
            assert_eq!(bench.renewal(), Some(cycle));
            bench.renewed(cycle, bench.now, Some(RenewReply::Extended { has_waiters: false }));
        }
        let seen = bench.release_held(&guard);
        assert_eq!(
            (seen.acquires(), &seen.woken[..]),
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
fn confirmation_from_before_a_change_of_servers_does_not_count() {
    let (mut bench, guard, ids) = held_with_waiters(100, 163, 1);
    let cycle = guard.lease.cycle;
    bench.pass(ms(100));
    assert_eq!(bench.renewal(), Some(cycle));
    bench.epoch += 1;
    bench.renewed(cycle, bench.now, Some(RenewReply::Extended { has_waiters: false }));
    assert_eq!(bench.renewal(), Some(cycle), "another renewal follows at once");
    bench.epoch += 1;
    bench.renewed(cycle, bench.now, None);
    assert_eq!(bench.renewal(), Some(cycle), "also after one without a reply");
    let extension = (cycle, AcquireKind::Extend, 64);
    assert_eq!(bench.release_held(&guard).acquires(), extension);
    bench.epoch += 1;
    // The reply may come from the previous server.
    assert_eq!(bench.reply(cycle, extended(200, 263)).acquires(), extension);
    assert_eq!(bench.reply(cycle, extended(300, 363)).woken, [1]);
    assert_eq!(bench.guard(ids[0]).token.get(), 300);
}

/// An extension may be in flight although there is a spare block: one is also sent when little
/// validity is left. When its reply arrived just after the last token of the current block was
/// used, the newest block was put before the spare one, so later guards got smaller tokens than
/// earlier ones.
#[test]
fn tokens_grow_even_if_a_second_spare_block_arrives() {
    let (mut bench, guard, ids) = held_with_waiters(100, 102, 4);
    let cycle = guard.lease.cycle;
    let sent_at = bench.now;
    assert_eq!(bench.release_held(&guard).acquires(), (cycle, AcquireKind::Extend, 64));
    let second = bench.guard(ids[0]);
    assert_eq!(second.token.get(), 101);
    bench.reply_to(sent_at, cycle, extended(200, 263));
    bench.release_held(&second);
    let third = bench.guard(ids[1]);
    assert_eq!(third.token.get(), 102);
    // No renewal succeeds for most of the TTL, so the lease must not be passed on.
    bench.pass(ms(800));
    assert_eq!(bench.release_held(&third).acquires().1, AcquireKind::Extend);
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
    assert_eq!(seen.acquires().0, guard.lease.cycle);
    assert!(seen.woken.is_empty());
    bench.reply(guard.lease.cycle, extended(200, 263));
    let next = bench.guard(ids[0]);
    assert_eq!(next.token.get(), 101, "the older block first");
    assert_eq!(next.lease.valid_until(), bench.now + TTL - DRIFT);
}

#[test]
fn known_remote_waiters_bound_the_bypass_by_the_number_of_guards() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    let ids: Vec<_> = (1..=8).map(|waker| bench.enqueue(waker).0).collect();
    bench.grant(grant(cycle, 11, 74));
    let mut guard = bench.guard(id);
    for &id in &ids[..3] {
        assert_eq!(bench.release_held(&guard).request, None);
        guard = bench.guard(id);
    }
    let seen = bench.release_held(&guard);
    let (released, next) = seen.releases();
    assert_eq!(released, cycle);
    assert!(next.is_some_and(|next| next > cycle && next.expects_remote_waiters()));
    assert!(seen.woken.is_empty());
}

#[test]
fn known_remote_waiters_bound_the_bypass_by_time() {
    let mut bench = Bench::new();
    bench.rules.max_slice = ms(10);
    let (id, cycle) = bench.join_store_queue(10);
    let (next, _) = bench.enqueue(1);
    bench.enqueue(2);
    bench.grant(grant(cycle, 11, 74));
    bench.pass(ms(9));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).request, None);
    let guard = bench.guard(next);
    bench.pass(ms(1));
    assert_eq!(bench.release_held(&guard).releases().0, cycle);
}

#[test]
fn processes_alternate_with_a_burst_of_one() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.join_store_queue(10);
    let (other, _) = bench.enqueue(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    bench.reply_to_release(cycle, Some(queued(12)));
    assert_eq!(bench.grant(grant(next, 13, 13)).woken, [1]);
    assert_eq!(bench.guard(other).token.get(), 13);
}

#[test]
fn bypass_counts_from_when_a_remote_waiter_is_known() {
    for how in ["push", "renewal", "extension"] {
        let mut bench = Bench::new();
        let mut guard = bench.hold(1, 64);
        let cycle = guard.lease.cycle;
        for _ in 0..10 {
            let (id, _) = bench.enqueue(1);
            bench.pass(ms(1));
            assert_eq!(bench.release_held(&guard).request, None);
            guard = bench.guard(id);
        }
        let mut waiting: std::collections::VecDeque<_> = (0..5).map(|_| bench.enqueue(1).0).collect();
        bench.pass(ms(1));
        match how {
            "push" => assert_eq!(bench.remote_waiter(cycle), NOTHING),
            "renewal" => {
                let reply = RenewReply::Extended { has_waiters: true };
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
        assert_eq!(bench.reported.yielded, Some(Bound::Burst), "{how}");
    }
}

#[test]
fn remote_waiter_reported_before_the_reply_counts() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    assert_eq!(bench.remote_waiter(cycle), NOTHING);
    bench.enqueue(1);
    bench.reply(cycle, granted(1, 2));
    let guard = bench.guard(id);
    assert!(bench.release_held(&guard).releases().1.is_some());
    assert!(bench.queue.remote_waiters_seen());
}

#[test]
fn remote_waiters_reported_by_the_reply_count() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    bench.enqueue(1);
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
    let (id, cycle) = bench.join_store_queue(10);
    let (other, _) = bench.enqueue(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    bench.release_held(&guard);
    let seen = bench.reply_to_release(cycle, Some(granted(12, 12)));
    assert_eq!(seen.woken, [1], "no other cycle was left in the store's queue");
    let guard = bench.guard(other);
    assert_eq!(guard.token.get(), 12);
    assert!(guard.lease.cycle > cycle);
}

#[test]
fn a_grant_for_a_requeued_cycle_may_overtake_the_reply() {
    let mut bench = Bench::new();
    bench.rules.max_burst = 1;
    let (id, cycle) = bench.join_store_queue(10);
    let (other, _) = bench.enqueue(1);
    bench.grant(grant(cycle, 11, 11));
    let guard = bench.guard(id);
    let next = bench.release_held(&guard).releases().1.unwrap();
    assert_eq!(bench.grant(grant(next, 20, 20)), NOTHING);
    assert_eq!(bench.reply_to_release(cycle, Some(queued(15))).woken, [1]);
    assert_eq!(bench.guard(other).token.get(), 20);
}

#[test]
fn request_of_a_task_that_arrives_during_a_release_is_sent_after_it() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    bench.release_held(&guard);
    let (_, seen) = bench.enqueue(1);
    assert_eq!(seen, NOTHING);
    let seen = bench.reply_to_release(guard.lease.cycle, None);
    assert_eq!(seen.acquires().1, AcquireKind::Fast);
    assert!(seen.acquires().0 > guard.lease.cycle);
}

#[test]
fn lease_is_not_released_while_its_extension_is_in_flight() {
    let (mut bench, guard, ids) = held_with_waiters(100, 101, 2);
    let cycle = guard.lease.cycle;
    assert_eq!(bench.release_held(&guard).acquires().0, cycle);
    let second = bench.guard(ids[0]);
    assert_eq!(bench.give_up(ids[1]), NOTHING);
    // No waiter is left. But the extension could overtake a release and acquire the lease again.
    assert_eq!(bench.release_held(&second), NOTHING);
    assert_eq!(bench.reply(cycle, extended(200, 263)).releases(), (cycle, None));
}

#[test]
fn tries_neither_wait_nor_overtake_waiters() {
    let options = WaiterOptions {
        try_only: true,
        ..OPTIONS
    };
    let is_busy = |bench: &mut Bench| {
        let (id, seen) = bench.enqueue_as(9, options);
        seen == NOTHING && matches!(bench.collect(id), Some(Outcome::Busy))
    };
    let mut bench = Bench::new();
    let (first, seen) = bench.enqueue(0);
    assert!(is_busy(&mut bench), "an acquire is in flight");
    let cycle = seen.acquires().0;
    bench.reply(cycle, granted(1, 9));
    assert!(is_busy(&mut bench), "a guard is out");
    let guard = bench.guard(first);
    bench.enqueue(1);
    bench.release_held(&guard);
    assert!(is_busy(&mut bench), "a waiter was just served");
}

#[test]
fn try_on_an_unused_key_sends_one_request() {
    let options = WaiterOptions {
        try_only: true,
        ..OPTIONS
    };
    for reply in [granted(5, 5), AcquireReply::Busy] {
        let mut bench = Bench::new();
        let (id, seen) = bench.enqueue_as(3, options);
        let (cycle, kind, _) = seen.acquires();
        assert_eq!(kind, AcquireKind::Try);
        assert!(
            !cycle.expects_remote_waiters(),
            "it is never queued, so it must be notified of remote waiters"
        );
        // A waiter behind a try is not affected by its failure.
        bench.enqueue(4);
        let seen = bench.reply(cycle, reply);
        assert_eq!(seen.woken, [3]);
        match reply {
            AcquireReply::Busy => {
                assert!(matches!(bench.collect(id), Some(Outcome::Busy)));
                assert_eq!(seen.acquires().1, AcquireKind::Enqueue);
            }
            _ => assert_eq!(bench.guard(id).token.get(), 5),
        }
    }
}
