//! What happens to waiters while the store is unreachable.

use super::*;

/// Three waiters: one that tolerates no outage, one with the shard's patience, and one with its own
/// limit.
fn in_an_outage(bench: &mut Bench) -> ([WaiterId; 3], Cycle) {
    let kinds = [InOutage::Fail, InOutage::UntilStoreTimeout, InOutage::UntilOwnLimit];
    let mut wakers = 0..;
    let waiters = kinds.map(|in_outage| {
        let waker = wakers.next().unwrap();
        let (id, seen) = bench.enqueue_as(waker, WaiterOptions { in_outage, ..OPTIONS });
        (id, seen)
    });
    let cycle = waiters[0].1.acquires().0;
    (waiters.map(|(id, _)| id), cycle)
}

#[track_caller]
fn failed_after(outcome: Option<Outcome>) -> Duration {
    match outcome {
        Some(Outcome::Failed(error)) => error.waited().unwrap_or_else(|| panic!("{error}")),
        outcome => panic!("{outcome:?}"),
    }
}

#[test]
fn each_waiter_tolerates_an_outage_up_to_its_own_limit() {
    let mut bench = Bench::new();
    let (ids, cycle) = in_an_outage(&mut bench);
    bench.pass(ms(5));
    let seen = bench.failed(cycle);
    assert_eq!((seen.woken, seen.abandoned, seen.request), (vec![0], vec![], None));
    assert_eq!(failed_after(bench.collect(ids[0])), ms(5));
    // The same cycle is retried, but not before the retry is due.
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(10));
    assert_eq!(bench.tick().acquires().0, cycle);
    // This request hangs. The outage counts from the first failed request, and the second waiter
    // tolerates one second of it.
    bench.pass(ms(985));
    assert_eq!(bench.tick(), NOTHING);
    bench.pass(ms(5));
    let seen = bench.tick();
    assert_eq!((seen.woken, seen.abandoned), (vec![1], vec![]));
    assert_eq!(failed_after(bench.collect(ids[1])), ms(1_005));
    assert_eq!(bench.failed(cycle), NOTHING);
    // The remaining waiter has no limit in the queue.
    bench.pass(ms(60_000));
    assert_eq!(bench.tick().acquires().0, cycle);
    bench.reply(cycle, granted(1, 64));
    assert!(bench.guard(ids[2]).lease.loss_at(bench.now).is_none());
    assert!(bench.queue.outage().is_none());
}

#[test]
fn next_deadline_in_an_outage_is_the_retry_or_the_end_of_patience() {
    let mut bench = Bench::new();
    let (_, cycle) = in_an_outage(&mut bench);
    bench.failed(cycle);
    let grid = ms(17);
    let retry_at = bench.queue.next_deadline().unwrap();
    assert!(
        retry_at >= bench.now + ms(10) && retry_at <= bench.now + ms(10) + grid,
        "{retry_at:?}"
    );
    bench.now = retry_at;
    bench.tick().acquires();
    // During the retry, the second waiter may run out of patience.
    let deadline = bench.queue.next_deadline().unwrap();
    assert!(deadline >= at(2_000) && deadline <= at(2_000) + grid, "{deadline:?}");
}

#[test]
fn the_last_waiter_that_leaves_in_an_outage_leaves_nothing() {
    let mut bench = Bench::new();
    let (ids, cycle) = in_an_outage(&mut bench);
    bench.failed(cycle);
    assert_eq!(bench.give_up(ids[1]), NOTHING);
    assert_eq!(bench.give_up(ids[2]).abandoned, [cycle]);
    bench.collect(ids[0]);
    assert!(bench.queue.is_unused() && bench.queue.next_deadline().is_none());
}

#[test]
fn outage_is_reported_with_its_failed_requests_until_a_reply() {
    let mut bench = Bench::new();
    let (_, cycle) = in_an_outage(&mut bench);
    assert!(bench.queue.outage().is_none() && bench.queue.failed_attempts() == 0);
    for attempt in 1..=3 {
        bench.failed(cycle);
        assert_eq!(bench.queue.failed_attempts(), attempt);
        assert_eq!(bench.queue.outage().map(LockError::kind), Some(no_answer().kind()));
        bench.pass(ms(20));
        bench.tick();
    }
    bench.reply(cycle, queued(10));
    assert!(bench.queue.outage().is_none() && bench.queue.failed_attempts() == 0);
}

/// The waiter has been in the store's queue, so its lock is not an uncontended one.
#[test]
fn retry_remembers_that_its_cycle_was_queued() {
    let mut bench = Bench::new();
    let in_outage = InOutage::UntilOwnLimit;
    let (id, seen) = bench.enqueue_as(0, WaiterOptions { in_outage, ..OPTIONS });
    let cycle = seen.acquires().0;
    bench.reply(cycle, queued(10));
    bench.your_turn(cycle).acquires();
    bench.failed(cycle);
    bench.pass(ms(20));
    bench.tick().acquires();
    bench.reply(cycle, granted(11, 74));
    assert_eq!(bench.guard(id).path, Path::RemoteGrant);
}

#[test]
fn task_that_arrives_while_a_retry_hangs_waits_until_its_own_deadline() {
    let mut bench = Bench::new();
    let options = |in_outage| WaiterOptions { in_outage, ..OPTIONS };
    let (_, seen) = bench.enqueue_as(0, options(InOutage::UntilOwnLimit));
    bench.failed(seen.acquires().0);
    bench.pass(ms(30));
    bench.tick().acquires();
    let (id, _) = bench.enqueue_as(1, options(InOutage::UntilStoreTimeout));
    let until = bench.now + ms(1_000);
    let deadline = bench.queue.next_deadline().unwrap();
    assert!(deadline >= until && deadline <= until + ms(17), "{deadline:?}");
    bench.now = deadline;
    assert_eq!(bench.tick().woken, [1]);
    assert!(failed_after(bench.collect(id)) >= ms(1_000));
}

/// The deadlines of all processes that see the outage must not fall into the same moment.
#[test]
fn deadline_in_an_outage_is_on_the_grid_of_its_own_start() {
    const GRID: u64 = 1 << 24;
    for shift in [0, 1, 5_000_000] {
        let mut bench = Bench::new();
        bench.now = Moment::from_nanos(bench.now.as_nanos() + shift);
        let since = bench.now.as_nanos();
        let (_, cycle) = in_an_outage(&mut bench);
        bench.failed(cycle);
        let deadline = bench.queue.next_deadline().unwrap().as_nanos();
        assert_eq!((deadline - since) % GRID, 0, "{shift}");
    }
}

#[test]
fn task_that_arrives_during_an_outage_waits_or_fails_at_once() {
    let mut bench = Bench::new();
    let (_, cycle) = in_an_outage(&mut bench);
    bench.failed(cycle);
    let (id, seen) = bench.enqueue_as(7, OPTIONS);
    assert_eq!((seen.request, seen.woken), (None, vec![7]));
    assert_eq!(failed_after(bench.collect(id)), Duration::ZERO);
    let patient = WaiterOptions {
        in_outage: InOutage::UntilStoreTimeout,
        ..OPTIONS
    };
    bench.pass(ms(900));
    let (late, _) = bench.enqueue_as(8, patient);
    bench.tick().acquires();
    bench.failed(cycle);
    bench.pass(ms(100));
    assert_eq!(bench.tick().woken, [1], "the later waiter fails later");
    assert!(bench.collect(late).is_none());
    bench.failed(cycle);
    bench.pass(ms(900));
    assert!(bench.tick().woken.contains(&8), "at its own deadline");
}

/// The request may have been executed: its cycle is queued or has the lease, and its enqueue mark
/// is unknown.
#[test]
fn push_during_an_outage_causes_a_request_and_is_not_trusted() {
    for push in 0..3 {
        let mut bench = Bench::new();
        let (_, cycle) = in_an_outage(&mut bench);
        bench.failed(cycle);
        let seen = match push {
            0 => bench.grant(grant(cycle, 5, 5)),
            1 => bench.your_turn(cycle),
            _ => bench.resubscribed(),
        };
        assert_eq!((seen.acquires().0, seen.abandoned), (cycle, vec![]));
        assert!(!bench.queue.holds());
    }
}

#[test]
fn refusal_is_not_an_outage_and_fails_all_waiters() {
    let mut bench = Bench::new();
    let (_, cycle) = in_an_outage(&mut bench);
    let seen = bench
        .event(|queue, cx| ((), queue.on_request_failed(cycle, &no_answer(), None, cx)))
        .1;
    assert_eq!((seen.woken, seen.abandoned), (vec![0, 1, 2], vec![cycle]));
}

#[test]
fn a_shutdown_during_an_outage_refuses_all_and_leaves_nothing() {
    let mut bench = Bench::new();
    let (_, cycle) = in_an_outage(&mut bench);
    bench.failed(cycle);
    let seen = bench.close();
    assert_eq!((seen.woken, seen.abandoned), (vec![1, 2], vec![cycle]));
    assert_eq!(bench.tick(), NOTHING);
}
