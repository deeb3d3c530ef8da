//! Turns: a lease that others want serves the tasks that waited when its turn began.

use super::*;

/// A queue that gets a lease while others wait: `waiting` tasks with the wakers 1, 2, ... are in
/// line behind the one that has the guard. The block has `tokens` tokens, the first of which is 11.
fn turn_with(waiting: u32, tokens: u64) -> (Bench, Granted, std::vec::IntoIter<WaiterId>) {
    let mut bench = Bench::new();
    bench.rules.max_burst = u32::MAX;
    let (id, cycle) = bench.join_store_queue(10);
    let ids: Vec<_> = (1..=waiting).map(|waker| bench.enqueue(waker).0).collect();
    bench.pass(ms(1));
    assert_eq!(bench.grant(grant(cycle, 11, 10 + tokens)).woken, [0]);
    bench.pass(ms(1));
    let guard = bench.guard(id);
    (bench, guard, ids.into_iter())
}

#[test]
fn turn_serves_tasks_that_waited_when_it_began_and_none_that_came_later() {
    let (mut bench, mut guard, ids) = turn_with(3, 64);
    let cycle = guard.lease.cycle;
    let mut newcomers = Vec::new();
    for id in ids {
        newcomers.push(bench.enqueue(10).0);
        assert_eq!(bench.release_held(&guard).request, None);
        guard = bench.guard(id);
    }
    newcomers.push(bench.enqueue(10).0);
    let seen = bench.release_held(&guard);
    let (released, next) = seen.releases();
    assert_eq!((released, &seen.woken[..]), (cycle, &[][..]));
    assert_eq!(
        (bench.reported.served, bench.reported.yielded),
        (Some(4), Some(Bound::Gate))
    );

    // The next turn serves the newcomers, in order.
    let next = next.unwrap();
    bench.pass(ms(1));
    bench.reply_to_release(cycle, Some(queued(90)));
    bench.pass(ms(1));
    bench.grant(grant(next, 91, 154));
    for id in newcomers {
        let guard = bench.guard(id);
        assert_eq!(guard.lease.cycle, next);
        bench.release_held(&guard);
    }
    assert_eq!(bench.reported.yielded, None, "no task was left");
}

/// A task that has just released the lock asks again. Its request counts as any other newcomer.
#[test]
fn task_that_requests_again_waits_for_the_next_turn() {
    let (mut bench, first, mut ids) = turn_with(1, 64);
    bench.release_held(&first);
    bench.pass(ms(1));
    bench.enqueue(0);
    let second = bench.guard(ids.next().unwrap());
    assert!(bench.release_held(&second).releases().1.is_some());
}

#[test]
fn turn_begins_when_a_remote_waiter_is_known() {
    for how in ["push", "renewal", "extension", "reply"] {
        let mut bench = Bench::new();
        bench.rules.max_burst = u32::MAX;
        let remote_waiters = |first, extended| AcquireReply::Granted {
            tokens: tokens(first, first + 63),
            queued: 3,
            extended,
        };
        let (first, seen) = bench.enqueue(0);
        let cycle = seen.acquires().0;
        // Before that, it serves all that come.
        if how != "reply" {
            bench.reply(cycle, granted(1, 64));
        }
        let included = bench.enqueue(1).0;
        bench.pass(ms(1));
        match how {
            "push" => assert_eq!(bench.remote_waiter(cycle), NOTHING),
            "renewal" => {
                let reply = RenewReply::Extended { has_waiters: true };
                bench.renewed(cycle, bench.now, Some(reply));
            }
            "extension" => {
                bench.pass(ms(800));
                let guard = bench.guard(first);
                bench.release_held(&guard).acquires();
                bench.reply(cycle, remote_waiters(100, true));
            }
            _ => {
                bench.reply(cycle, remote_waiters(1, false));
            }
        }
        bench.pass(ms(1));
        bench.enqueue(2);
        if how != "extension" {
            let guard = bench.guard(first);
            assert_eq!(bench.release_held(&guard).woken, [1], "{how}");
        }
        let guard = bench.guard(included);
        let seen = bench.release_held(&guard);
        assert_eq!(seen.releases().0, cycle, "{how}");
        assert_eq!(bench.reported.yielded, Some(Bound::Gate), "{how}");
    }
}

#[test]
fn slice_ends_a_turn_early_and_the_tasks_left_are_first_in_the_next_one() {
    let (mut bench, guard, mut ids) = turn_with(2, 64);
    bench.rules.max_slice = ms(10);
    let cycle = guard.lease.cycle;
    let newcomer = bench.enqueue(3).0;
    bench.pass(ms(8));
    bench.release_held(&guard);
    let guard = bench.guard(ids.next().unwrap());
    bench.pass(ms(1));
    let next = bench.release_held(&guard).releases().1.unwrap();
    assert_eq!(bench.reported.yielded, Some(Bound::Slice));
    bench.reply_to_release(cycle, Some(queued(90)));
    bench.pass(ms(1));
    assert_eq!(bench.grant(grant(next, 91, 154)).woken, [2]);
    let guard = bench.guard(ids.next().unwrap());
    assert_eq!(bench.release_held(&guard).woken, [3], "it waited when this turn began");
    bench.guard(newcomer);
}

#[test]
fn turn_ends_when_its_remaining_waiters_gave_up() {
    let (mut bench, guard, ids) = turn_with(2, 64);
    bench.enqueue(3);
    for id in ids {
        assert_eq!(bench.give_up(id), NOTHING);
    }
    assert!(bench.release_held(&guard).releases().1.is_some());
    assert_eq!(bench.reported.yielded, Some(Bound::Gate));
}

/// The guard was lost before its task collected it. The task has waited since it asked.
#[test]
fn waiter_that_lost_its_guard_uncollected_keeps_its_place_in_the_next_turn() {
    let (mut bench, guard, mut ids) = turn_with(1, 64);
    bench.release_held(&guard);
    let id = ids.next().unwrap();
    bench.pass(TTL);
    let next = bench.tick().acquires().0;
    bench.enqueue(2);
    bench.pass(ms(1));
    bench.reply(next, granted(100, 163));
    let guard = bench.guard(id);
    assert_eq!(bench.release_held(&guard).woken, [2]);
}

#[test]
fn turn_whose_tokens_suffice_requests_no_more() {
    let (mut bench, mut guard, ids) = turn_with(63, 64);
    for id in ids {
        // Newcomers need none of these tokens.
        bench.enqueue(100);
        assert_eq!(bench.release_held(&guard).request, None);
        guard = bench.guard(id);
    }
    assert_eq!(guard.token.get(), 74, "the last one of the block");
    assert!(bench.release_held(&guard).releases().1.is_some());
}

/// A grant has a block of a fixed size. A longer turn is not cut short: it requests what it needs
/// once, while it serves.
#[test]
fn turn_that_needs_more_tokens_than_its_grant_has_requests_them_once() {
    let (mut bench, mut guard, ids) = turn_with(300, 64);
    let cycle = guard.lease.cycle;
    let mut requests = Vec::new();
    let mut last = guard.token;
    for (number, id) in ids.enumerate() {
        bench.enqueue(1_000);
        let seen = bench.release_held(&guard);
        assert_eq!(seen.woken, [number as u32 + 1], "no task waits for tokens");
        requests.extend(seen.request);
        guard = bench.guard(id);
        assert!(guard.token > last && guard.lease.cycle == cycle);
        last = guard.token;
        // The reply takes as long as three guards.
        if number == 50 {
            bench.reply(cycle, extended(1_001, 1_400));
        }
    }
    let [Request::Acquire { kind, tokens, .. }] = requests[..] else {
        panic!("{requests:?}")
    };
    assert_eq!(kind, AcquireKind::Extend);
    assert!(tokens >= 300 - 48, "enough for the rest of the turn: {tokens}");
    assert_eq!(last.get(), 1_001 + 300 - 64);
    assert!(bench.release_held(&guard).releases().1.is_some());
}

/// The lease must not be released while an extension of it is in flight, or the extension could
/// acquire the key again. Tasks that came meanwhile are not served in place of it.
#[test]
fn turn_that_ends_during_its_extension_is_passed_on_after_the_reply() {
    let (mut bench, guard, mut ids) = turn_with(2, 1);
    let cycle = guard.lease.cycle;
    assert_eq!(
        bench.release_held(&guard),
        NOTHING,
        "more tokens are requested since the grant"
    );
    let newcomer = bench.enqueue(9).0;
    for id in ids.by_ref() {
        bench.give_up(id);
    }
    let reply = AcquireReply::Granted {
        tokens: tokens(100, 163),
        queued: 1,
        extended: true,
    };
    let seen = bench.reply(cycle, reply);
    assert!(seen.releases().1.is_some());
    assert!(!bench.queue.is_settled(newcomer));
}

#[test]
fn release_reserves_a_block_of_a_fixed_size_for_the_next_owner() {
    for max_burst in [1, 10_000, u32::MAX] {
        let (mut bench, guard, _) = turn_with(1, 64);
        bench.rules.max_burst = max_burst;
        bench.enqueue(2);
        bench.rules.max_slice = Duration::ZERO;
        let Some(Request::Release { tokens, .. }) = bench.release_held(&guard).request else {
            panic!("no release");
        };
        assert_eq!(tokens, 64);
    }
}

/// Two managers with forty tasks and one, each of which asks again at once. In the rounds of the
/// store's queue every task is served once.
#[test]
fn share_of_a_manager_grows_with_its_number_of_tasks() {
    const TASKS: u32 = 40;
    let (mut bench, mut guard, ids) = turn_with(TASKS - 1, 64);
    let mut line: std::collections::VecDeque<_> = ids.collect();
    for round in 0..3 {
        for left in (0..TASKS).rev() {
            bench.pass(ms(1));
            // The task that asked first is granted first, and asks again.
            let seen = bench.release_held(&guard);
            assert_eq!(seen.request.is_some(), left == 0, "round {round}, {left} left");
            line.push_back(bench.enqueue(left).0);
            if left > 0 {
                guard = bench.guard(line.pop_front().unwrap());
                continue;
            }
            // The lone task of the other manager is served once, and joins the queue again.
            let Some(Request::Release { cycle, requeue, .. }) = seen.request else {
                continue;
            };
            let next = requeue.unwrap();
            let first = 1_000 * (round + 1);
            bench.reply_to_release(cycle, Some(queued(first)));
            bench.pass(ms(1));
            bench.grant(grant(next, first + 1, first + 64));
            guard = bench.guard(line.pop_front().unwrap());
        }
    }
}
