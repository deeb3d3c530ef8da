//! Waiting in the store's queue, and who may enter when a grant is pushed.

use super::*;

#[test]
fn grant_serves_the_first_waiter_with_validity_counted_from_the_request() {
    let mut bench = Bench::new();
    let asked_at = bench.now;
    let (id, cycle) = bench.join_store_queue(10);
    bench.pass(ms(300));
    let seen = bench.grant(grant(cycle, 11, 12));
    assert_eq!((seen.woken, seen.request), (vec![0], None));
    let guard = bench.guard(id);
    assert_eq!((guard.token.get(), guard.path), (11, Path::RemoteGrant));
    assert_eq!(guard.lease.valid_until(), asked_at + TTL - DRIFT, "rule 3");
    assert_eq!(bench.renewal(), Some(cycle), "a renewal goes out at once");
}

#[test]
fn rule_1_grant_for_another_cycle_is_released() {
    let mut bench = Bench::new();
    let stale = Cycle::of(99);
    assert_eq!(bench.grant(grant(stale, 1, 1)).abandoned, [stale], "no task wants it");
    let (id, _) = bench.join_store_queue(10);
    assert_eq!(bench.grant(grant(stale, 11, 11)).abandoned, [stale]);
    assert!(!bench.queue.is_settled(id));
}

#[test]
fn rule_2_expired_grant_is_ignored() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    // It was granted tokens 11 and 12, but the push was slow. The lease expired, and the key has
    // another owner.
    bench.pass(ms(502));
    assert_eq!(bench.tick().acquires(), (cycle, AcquireKind::Enqueue, 1));
    assert_eq!(bench.reply(cycle, queued(13)), NOTHING);
    assert_eq!(bench.grant(grant(cycle, 11, 12)), NOTHING);
    assert!(!bench.queue.is_settled(id));
    assert_eq!(bench.grant(grant(cycle, 14, 14)).woken, [0]);
}

/// Any client that can publish to the inbox chooses the numbers in a message.
#[test]
fn grant_of_the_largest_number_is_ignored() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    let forged = Grant {
        tokens: TokenBlock::ending_at(u64::MAX, 64),
        ..grant(cycle, 11, 12)
    };
    assert_eq!(bench.grant(forged), NOTHING);
    assert!(!bench.queue.is_settled(id));
    assert_eq!(bench.grant(grant(cycle, 11, 12)).woken, [0]);
}

#[test]
fn rule_3_late_grant_is_confirmed_by_a_request() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    bench.pass(TTL / 2);
    assert_eq!(
        bench.grant(grant(cycle, 11, 12)).acquires(),
        (cycle, AcquireKind::Enqueue, 1)
    );
    assert!(!bench.queue.is_settled(id));
    let sent_at = bench.now;
    bench.pass(ms(1));
    bench.reply_to(sent_at, cycle, extended(13, 13));
    let guard = bench.guard(id);
    assert_eq!((guard.token.get(), guard.path), (13, Path::RemoteGrant));
    assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);
}

#[test]
fn a_grant_that_overtakes_the_queued_reply_waits_for_it() {
    let mut bench = Bench::new();
    let options = WaiterOptions {
        contended_hint: true,
        ..OPTIONS
    };
    for (mark, enters) in [(10, true), (11, false)] {
        let (id, seen) = bench.enqueue_as(0, options);
        let cycle = seen.acquires().0;
        assert_eq!(bench.grant(grant(cycle, 11, 11)), NOTHING);
        bench.reply(cycle, queued(mark));
        assert_eq!(bench.queue.is_settled(id), enters, "mark {mark}");
        bench.collect(id);
        bench.give_up(id);
        bench = Bench::new();
    }
}

#[test]
fn later_of_two_grants_that_overtook_the_reply_counts() {
    for tokens in [[15, 11], [11, 15]] {
        let mut bench = Bench::new();
        let (id, seen) = bench.enqueue(0);
        let cycle = seen.acquires().0;
        for token in tokens {
            bench.grant(grant(cycle, token, token));
        }
        // The grant of token 11 expired: the store queued the cycle again.
        bench.reply(cycle, queued(12));
        assert_eq!(bench.guard(id).token.get(), 15);
    }
}

#[test]
fn waiter_retries_when_the_owners_lease_has_expired() {
    let mut bench = Bench::new();
    let (_, cycle) = bench.join_store_queue(10);
    assert_eq!(
        bench.queue.next_deadline(),
        Some(bench.now + ms(502)),
        "its TTL and a spread"
    );
    bench.pass(ms(501));
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(1));
    assert_eq!(bench.tick().acquires(), (cycle, AcquireKind::Enqueue, 1));
    assert_eq!(bench.tick(), NOTHING, "one request at a time");
}

#[test]
fn waiters_further_back_retry_later_and_foreign_owners_cause_more_retries() {
    for (owner_ttl, owner_foreign, ahead, retry_in) in [
        (Some(ms(5_000)), false, 0, 5_002),
        (Some(ms(5_000)), false, 9, 5_020),
        (Some(ms(5_000)), true, 0, 402),
        (Some(ms(5_000)), true, 1, 804),
        (Some(ms(100)), true, 1, 104),
        (None, true, 0, 402),
        (None, true, 100, 10_202),
    ] {
        let mut bench = Bench::new();
        let cycle = bench.enqueue(0).1.acquires().0;
        let position = QueuePosition {
            enqueue_token: 1,
            owner_ttl,
            owner_foreign,
            ahead,
            is_subscribed: true,
        };
        bench.reply(cycle, AcquireReply::Queued(position));
        assert_eq!(
            bench.queue.next_deadline(),
            Some(bench.now + ms(retry_in)),
            "{position:?}"
        );
    }
}

#[test]
fn waiter_retries_after_a_new_subscription() {
    let mut bench = Bench::new();
    assert_eq!(bench.resubscribed(), NOTHING, "there is no waiter");
    let (_, cycle) = bench.join_store_queue(10);
    assert_eq!(bench.resubscribed().acquires(), (cycle, AcquireKind::Enqueue, 1));
}

#[test]
fn queued_reply_to_a_request_from_before_a_subscription_is_not_trusted() {
    let mut bench = Bench::new();
    let cycle = bench.enqueue(0).1.acquires().0;
    assert_eq!(bench.resubscribed(), NOTHING);
    assert_eq!(
        bench.reply(cycle, queued(10)).acquires(),
        (cycle, AcquireKind::Enqueue, 1)
    );
    assert_eq!(bench.reply(cycle, queued(11)), NOTHING);
}

#[test]
fn notified_cycle_sends_a_request_and_only_its_reply_grants_the_lease() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    bench.pass(ms(300));
    let seen = bench.your_turn(cycle);
    assert_eq!(
        (seen.acquires(), &seen.woken[..]),
        ((cycle, AcquireKind::Enqueue, 1), &[][..])
    );
    assert!(!bench.queue.is_settled(id));
    assert_eq!(bench.your_turn(cycle), NOTHING, "one request at a time");
    let sent_at = bench.now;
    bench.pass(ms(10));
    assert_eq!(bench.reply_to(sent_at, cycle, extended(11, 11)).woken, [0]);
    let guard = bench.guard(id);
    assert_eq!((guard.token.get(), guard.path), (11, Path::RemoteGrant));
    assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);
}

#[test]
fn notification_that_overtakes_the_queued_reply_is_not_forgotten() {
    let mut bench = Bench::new();
    let cycle = bench.enqueue(0).1.acquires().0;
    assert_eq!(bench.your_turn(cycle), NOTHING);
    assert_eq!(
        bench.reply(cycle, queued(10)).acquires(),
        (cycle, AcquireKind::Enqueue, 1)
    );
    assert_eq!(bench.reply(cycle, queued(11)), NOTHING, "the turn counts once");
}

#[test]
fn notified_cycle_whose_reply_is_queued_continues_to_wait() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    bench.your_turn(cycle);
    assert_eq!(bench.reply(cycle, queued(12)), NOTHING);
    assert!(!bench.queue.is_settled(id));
    assert_eq!(bench.grant(grant(cycle, 13, 13)).woken, [0]);
}

#[test]
fn failed_request_of_a_notified_cycle_is_reported_and_cleaned_up() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    bench.your_turn(cycle);
    let seen = bench.failed(cycle);
    assert_eq!((seen.abandoned, seen.woken), (vec![cycle], vec![0]));
    assert!(matches!(bench.collect(id), Some(Outcome::Failed(_))));
    assert!(bench.queue.is_unused());
}

#[test]
fn old_cycle_that_is_notified_is_released() {
    let mut bench = Bench::new();
    let stale = Cycle::of(99);
    assert_eq!(bench.your_turn(stale).abandoned, [stale], "no task wants it");
    let (id, cycle) = bench.join_store_queue(10);
    assert_eq!(bench.your_turn(stale).abandoned, [stale]);
    assert!(!bench.queue.is_settled(id));
    // A release is already in flight and does the same.
    assert_eq!(bench.give_up(id).releases(), (cycle, None));
    assert_eq!(bench.your_turn(cycle), NOTHING);
}

#[test]
fn notification_of_a_held_cycle_changes_nothing() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 1);
    assert_eq!(bench.your_turn(guard.lease.cycle), NOTHING);
    assert!(bench.release(&guard).0);
}

#[test]
fn reply_later_than_the_end_of_its_lease_grants_no_guard() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    for _ in 0..2 {
        let sent_at = bench.now;
        bench.pass(TTL - DRIFT);
        assert_eq!(
            bench.reply_to(sent_at, cycle, granted(1, 1)).acquires().1,
            AcquireKind::Enqueue
        );
    }
    let sent_at = bench.now;
    bench.pass(TTL - DRIFT);
    let seen = bench.reply_to(sent_at, cycle, granted(1, 1));
    assert_eq!((seen.abandoned, seen.woken), (vec![cycle], vec![0]));
    assert!(matches!(bench.collect(id), Some(Outcome::TooLate)));
    assert!(bench.queue.is_unused());
}

/// Regression: tasks with a longer TTL failed as well, at once.
#[test]
fn late_replies_fail_only_the_tasks_whose_leases_are_as_short() {
    let mut bench = Bench::new();
    let (short, seen) = bench.enqueue(0);
    let cycle = seen.acquires().0;
    let long = WaiterOptions {
        ttl: 10 * TTL,
        ..OPTIONS
    };
    let (long, _) = bench.enqueue_as(1, long);
    let mut seen = NOTHING;
    for _ in 0..3 {
        let sent_at = bench.now;
        bench.pass(TTL);
        seen = bench.reply_to(sent_at, cycle, granted(1, 1));
    }
    assert_eq!((&seen.abandoned[..], &seen.woken[..]), (&[cycle][..], &[0][..]));
    assert!(matches!(bench.collect(short), Some(Outcome::TooLate)));
    let next = seen.acquires().0;
    assert_eq!(next.ttl(), 10 * TTL);
    bench.reply(next, granted(2, 2));
    bench.guard(long);
}

/// A try whose reply came too late was sent again as an ordinary acquire. It joined the store's
/// queue, and its task waited for other holders although a try must return at once.
#[test]
fn a_try_whose_reply_comes_too_late_stays_a_try() {
    let mut bench = Bench::new();
    let options = WaiterOptions {
        try_only: true,
        ..OPTIONS
    };
    let cycle = bench.enqueue_as(0, options).1.acquires().0;
    let sent_at = bench.now;
    bench.pass(TTL);
    assert_eq!(
        bench.reply_to(sent_at, cycle, granted(1, 1)).acquires(),
        (cycle, AcquireKind::Try, 1)
    );
}

#[test]
fn a_reply_that_nobody_waits_for_is_cleaned_up() {
    let mut bench = Bench::new();
    let old = Cycle::of(50);
    assert_eq!(bench.reply(old, granted(1, 1)).abandoned, [old]);
    assert_eq!(bench.reply(old, queued(1)).abandoned, [old]);
    assert_eq!(bench.reply(old, AcquireReply::Busy), NOTHING);
    assert_eq!(bench.reply(old, AcquireReply::Taken), NOTHING);
    assert_eq!(bench.reply_to_release(old, None), NOTHING);
}

/// Regression: a grant that was on its way while the server was replaced was accepted, although the
/// new server knows nothing of it and may pass the key to another manager.
#[test]
fn rule_4_grant_of_a_replaced_server_is_confirmed_by_a_request() {
    let mut bench = Bench::new();
    let (id, cycle) = bench.join_store_queue(10);
    bench.epoch += 1;
    let seen = bench.grant(grant(cycle, 11, 12));
    assert_eq!(seen.acquires(), (cycle, AcquireKind::Enqueue, 1));
    assert!(!bench.queue.is_settled(id));
    // The new server has it wait, too, and passes the key on later.
    assert_eq!(bench.reply(cycle, queued(13)), NOTHING);
    assert_eq!(bench.grant(grant(cycle, 14, 14)).woken, [0]);
}
