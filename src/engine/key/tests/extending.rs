//! Extending a lease that is ours: which replies count, and how much validity they bring.

use std::collections::VecDeque;

use super::*;

/// A guard whose release leaves a waiter but no token, so that the lease must be extended.
fn extend(bench: &mut Bench) -> (Granted, WaiterId, Cycle) {
    let guard = bench.hold(10, 10);
    let (id, _) = bench.enqueue(1);
    let (cycle, kind, _) = bench.release_held(&guard).acquires();
    assert_eq!((cycle, kind), (guard.lease.cycle, AcquireKind::Extend));
    (guard, id, cycle)
}

/// A server that restarts without its data, but with the lease, counts tokens from the beginning
/// again. The next guard would get a smaller token than an earlier one, and a resource would refuse
/// its writes although it holds the lock.
#[test]
fn extension_with_tokens_that_are_not_above_the_floor_loses_the_lease() {
    for (first, floor, holds) in [(41, 40, true), (40, 40, false), (11, 40, false)] {
        let mut bench = Bench::new();
        let (guard, id, cycle) = extend(&mut bench);
        let reply = Answer {
            floor,
            ..answer(bench.now, extended(first, first + 63))
        };
        let (_, seen) = bench.event(|queue, cx| ((), queue.on_acquire_reply(cycle, reply, cx)));
        assert_eq!(bench.queue.is_settled(id), holds, "token {first}, floor {floor}");
        if holds {
            assert_eq!(bench.guard(id).token.get(), first);
        } else {
            assert_eq!(guard.lease.loss(), Some(LossReason::Taken));
            assert_eq!(seen.abandoned, [cycle]);
            assert!(seen.acquires().0 > cycle, "the waiter starts over");
        }
    }
}

/// The server counts the TTL from when it executes the extension, which may be just after it was
/// sent. If a guard counted from the receipt of a slow reply, it would consider itself the holder
/// while the next process has the lock.
#[test]
fn validity_of_an_extension_counts_from_its_sending() {
    let mut bench = Bench::new();
    let (guard, id, cycle) = extend(&mut bench);
    let sent_at = bench.now;
    bench.pass(ms(400));
    bench.reply_to(sent_at, cycle, extended(11, 74));
    assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);
    assert_eq!(bench.guard(id).lease.valid_until(), sent_at + TTL - DRIFT);
}

/// Replies may arrive in a different order than their requests were executed, and the store never
/// shortens a lease. Moving the end of the validity back would end the lease of a legitimate
/// holder.
#[test]
fn reply_to_an_earlier_request_does_not_shorten_the_validity() {
    let mut bench = Bench::new();
    let (guard, _, cycle) = extend(&mut bench);
    let extension_sent_at = bench.now;
    bench.pass(ms(100));
    let renewal_sent_at = bench.now;
    bench.renewed(
        cycle,
        renewal_sent_at,
        Some(RenewReply::Extended { has_waiters: false }),
    );
    bench.reply_to(extension_sent_at, cycle, extended(11, 74));
    assert_eq!(guard.lease.valid_until(), renewal_sent_at + TTL - DRIFT);
}

/// The validity ended before any timer fired, and another process may have had the key since. A
/// late reply to an extension that was executed in time must not revive the lease.
#[test]
fn late_reply_to_an_extension_does_not_revive_the_lease() {
    let mut bench = Bench::new();
    let (guard, id, cycle) = extend(&mut bench);
    bench.pass(ms(500));
    let sent_at = bench.now;
    bench.now = guard.lease.valid_until();
    let seen = bench.reply_to(sent_at, cycle, extended(11, 74));
    assert_eq!(guard.lease.loss(), Some(LossReason::Expired));
    assert!(!bench.queue.is_settled(id));
    assert_eq!(seen.abandoned, [cycle], "the store still has it");
    assert!(seen.acquires().0 > cycle);
}

/// The same for a guard that is out while more tokens are fetched: it has already reported its loss
/// and stays lost.
#[test]
fn late_reply_to_an_extension_does_not_revive_a_guard() {
    let mut bench = Bench::new();
    let guard = bench.hold(1, 2);
    let ids: Vec<_> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    let cycle = bench.release_held(&guard).acquires().0;
    let second = bench.guard(ids[0]);
    bench.pass(ms(500));
    let sent_at = bench.now;
    bench.now = second.lease.valid_until();
    let seen = bench.reply_to(sent_at, cycle, extended(3, 66));
    assert_eq!(seen.lost, Some(LossReason::Expired));
    assert_eq!(seen.abandoned, [cycle], "the store still has it");
    assert!(second.lease.loss_at(bench.now).is_some());
}

/// The owner of an odd cycle learns of remote waiters from the reply to an extension. From then on
/// its bypass is bounded, whether or not a guard is out at that moment.
#[test]
fn extension_that_reports_remote_waiters_bounds_the_bypass() {
    for is_out in [false, true] {
        let mut bench = Bench::new();
        bench.rules.max_burst = 1;
        let guard = bench.hold(1, if is_out { 2 } else { 1 });
        let ids: Vec<_> = (1..=3).map(|waker| bench.enqueue(waker).0).collect();
        let cycle = bench.release_held(&guard).acquires().0;
        let reply = AcquireReply::Granted {
            tokens: tokens(100, 163),
            queued: 1,
            extended: true,
        };
        let seen = bench.reply(cycle, reply);
        assert!(bench.queue.remote_waiters_seen());
        let seen = if is_out {
            let second = bench.guard(ids[0]);
            bench.release_held(&second)
        } else {
            seen
        };
        let (released, next) = seen.releases();
        assert_eq!(released, cycle, "is_out: {is_out}");
        assert!(next.is_some_and(Cycle::expects_remote_waiters));
    }
}

/// A lease is passed on while at least a quarter of its validity is left.
#[test]
fn lease_is_passed_on_until_less_than_a_quarter_of_its_time_is_left() {
    for (passed, is_passed_on) in [(738, true), (739, false)] {
        let mut bench = Bench::new();
        bench.rules.renew_fraction = 0.9;
        let guard = bench.hold(1, 64);
        bench.enqueue(1);
        bench.pass(ms(passed));
        let seen = bench.release_held(&guard);
        assert_eq!(seen.request.is_none(), is_passed_on, "{passed}");
        assert_eq!(!seen.woken.is_empty(), is_passed_on);
    }
}

/// An extension without a reply may be executed after the lease was passed to another process. Its
/// dead cycle would then block that process, or take a place in the queue.
#[test]
fn requeue_after_an_extension_without_an_answer_repeats_the_release() {
    let mut bench = Bench::new();
    bench.rules.max_slice = ms(10);
    let guard = bench.hold(1, 2);
    let ids: Vec<_> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    let cycle = bench.release_held(&guard).acquires().0;
    let second = bench.guard(ids[0]);
    bench.failed(cycle);
    bench.remote_waiter(cycle);
    bench.pass(ms(10));
    let seen = bench.release_held(&second);
    assert!(seen.releases().1.is_some());
    bench.assert_repeated(&seen, Some(queued(20)));
}

/// The more tokens were used during the last round trip, the earlier the next ones are requested.
#[test]
fn tokens_are_requested_early_enough_for_two_round_trips() {
    let mut bench = Bench::new();
    let mut guard = bench.hold(1, 64);
    let mut line: VecDeque<WaiterId> = (1..=2).map(|waker| bench.enqueue(waker).0).collect();
    // Serves one more task while others wait, and returns the request that is sent with it.
    let mut serve = |bench: &mut Bench| {
        line.push_back(bench.enqueue(3).0);
        let request = bench.release_held(&guard).request;
        guard = bench.guard(line.pop_front().unwrap());
        request
    };
    let asked_at = (2..=64).find(|_| serve(&mut bench).is_some()).unwrap();
    let cycle = bench.queue.lease().unwrap().0.cycle;
    let used = 64 - asked_at;
    assert_eq!(used, 16);
    (0..used).for_each(|_| assert_eq!(serve(&mut bench), None));
    bench.reply(cycle, extended(65, 164));
    let served = (65..=164).find(|_| serve(&mut bench).is_some()).unwrap();
    assert_eq!(164 - served, 2 * used);
}
