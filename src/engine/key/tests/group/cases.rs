//! Single runs of events on a group, each with what must come out.

use super::*;

/// Readers share a lease, each with a token of its own, and the last one releases it.
#[test]
fn last_of_the_shared_guards_releases_the_lease() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    for step in [Step::Want(0), Step::Granted(Oldest), Step::Collect(0), Step::Want(1)] {
        assert!(bench.step(step));
    }
    assert_eq!(bench.in_flight, [], "the second joins without a request");
    assert!(bench.step(Step::Collect(1)) && bench.step(Step::Release(0)));
    assert_eq!(bench.in_flight, []);
    assert!(
        bench.guards[1]
            .as_ref()
            .is_some_and(|guard| guard.lease.loss_at(bench.now).is_none())
    );
    assert!(bench.step(Step::Release(1)));
    assert!(
        matches!(bench.in_flight[..], [Request::Release { requeue: None, .. }]),
        "{:?}",
        bench.in_flight
    );
    bench.check_end();
}

/// A permit passes to the next task that wants as many, without a request.
#[test]
fn permit_passes_to_the_next_task_that_requests_as_many() {
    let mut bench = GroupBench::new([permits(1, 1); 2]);
    for step in [Step::Want(0), Step::Granted(Oldest), Step::Collect(0), Step::Want(1)] {
        assert!(bench.step(step));
    }
    assert_eq!(bench.in_flight, [], "the process has all permits that it may have");
    assert!(bench.step(Step::Release(0)));
    // The lease came with a token for one task, so the next one needs more.
    assert!(matches!(
        bench.in_flight[..],
        [Request::Acquire {
            kind: AcquireKind::Extend,
            ..
        }]
    ));
    assert!(bench.step(Step::Granted(Oldest)) && bench.step(Step::Collect(1)));
    assert!(bench.guards[1].is_some());
    assert!(bench.step(Step::Release(1)));
    bench.check_end();
}

/// While no other manager waits, a reader joins those that read already. Once one waits, readers
/// that come later wait for the next turn, behind it.
#[test]
fn reader_that_comes_after_a_turn_began_waits_for_the_next_one() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    for step in [Step::Want(0), Step::Granted(Oldest), Step::Collect(0), Step::Wanted] {
        assert!(bench.step(step));
    }
    assert!(bench.step(Step::Want(1)) && !bench.step(Step::Collect(1)));
    let trial = WaiterOptions {
        mode: LockMode::Shared,
        try_only: true,
        ..OPTIONS
    };
    let trial = bench.event(|group, cx| group.enqueue(trial, Some(9), cx));
    assert!(matches!(bench.key.collect(trial), Some(Outcome::Busy)));
    assert!(bench.step(Step::Release(0)));
    assert!(matches!(
        bench.in_flight[..],
        [Request::Release { requeue: Some(_), .. }]
    ));
    assert!(bench.step(Step::Queued(Oldest)) && bench.step(Step::Pushed));
    assert!(bench.step(Step::Collect(1)) && bench.guards[1].is_some());
    bench.check_end();
}

/// The turn of a lease of permits serves the tasks that waited when it began, too.
#[test]
fn permit_passes_to_the_tasks_that_waited_when_the_turn_began() {
    let mut bench = GroupBench::new([permits(1, 1); 2]);
    for step in [
        Step::Want(0),
        Step::Granted(Oldest),
        Step::Collect(0),
        Step::Want(1),
        Step::Wanted,
        Step::Release(0),
    ] {
        assert!(bench.step(step));
    }
    let cycle = bench.in_flight[0].cycle();
    assert!(bench.step(Step::Granted(Oldest)) && bench.step(Step::Collect(1)));
    assert_eq!(bench.guards[1].as_ref().map(|guard| guard.lease.cycle), Some(cycle));
    assert!(bench.step(Step::Want(0)) && bench.step(Step::Release(1)));
    let [
        Request::Release {
            cycle: released,
            requeue: Some(next),
            ..
        },
    ] = bench.in_flight[..]
    else {
        panic!("{:?}", bench.in_flight)
    };
    assert!(released == cycle && next > cycle);
    assert!(bench.step(Step::Queued(Oldest)) && bench.step(Step::Pushed) && bench.step(Step::Collect(0)));
    bench.check_end();
}

/// The task already waits in the store's queue, with a claim in another lane. It needs no place at
/// the tail.
#[test]
fn lease_whose_turn_is_over_is_released_if_all_tasks_have_claims() {
    let mut bench = GroupBench::new([permits(1, 2); 2]);
    for step in [
        Step::Want(0),
        Step::Granted(Oldest),
        Step::Collect(0),
        Step::Wanted,
        Step::Want(1),
        Step::Queued(Oldest),
        Step::Release(0),
    ] {
        assert!(bench.step(step), "{step:?}");
    }
    assert!(matches!(bench.in_flight[..], [Request::Release { requeue: None, .. }]));
    assert!(bench.step(Step::Pushed) && bench.step(Step::Collect(1)));
    assert!(bench.guards[1].is_some());
    bench.check_end();
}

/// A task gave up, so there is a claim too many. The one that joined the store's queue last is
/// given up, in whichever lane it is: another task depends on the place of the first.
#[test]
fn latest_claim_is_given_up_if_there_are_too_many() {
    let mut bench = GroupBench::new([permits(1, 2); 2]);
    for step in [
        Step::Want(0),
        Step::Granted(Oldest),
        Step::Collect(0),
        Step::Wanted,
        Step::Want(1),
        Step::Queued(Oldest),
    ] {
        assert!(bench.step(step), "{step:?}");
    }
    let third = WaiterOptions {
        mode: permits(1, 2),
        ..OPTIONS
    };
    let third = bench.event(|group, cx| group.enqueue(third, Some(9), cx));
    assert!(bench.step(Step::Release(0)));
    let [
        Request::Release {
            requeue: Some(next), ..
        },
    ] = bench.in_flight[..]
    else {
        panic!("{:?}", bench.in_flight)
    };
    assert!(bench.queued[0] < next);
    bench.event(|group, cx| ((), group.give_up(third, cx)));
    assert!(bench.step(Step::Queued(Oldest)));
    assert!(matches!(bench.in_flight[..], [Request::Release { cycle, requeue: None, .. }] if cycle == next));
    assert_eq!(bench.queued.pop(), Some(next));
    assert!(bench.step(Step::Pushed) && bench.step(Step::Collect(1)));
    assert!(bench.guards[1].is_some());
    bench.check_end();
}

/// A claim that waits for an extension is of a turn that includes the task it was made for. If that
/// task is served by another lane, a task that came later must not take its place in the turn.
#[test]
fn claim_of_a_turn_serves_no_task_that_came_later() {
    let mut bench = GroupBench::new([permits(1, 2); 2]);
    for step in [
        Step::Want(0),
        Step::Granted(Oldest),
        Step::Collect(0),
        Step::Want(1),
        Step::Queued(Oldest),
    ] {
        assert!(bench.step(step), "{step:?}");
    }
    let options = WaiterOptions {
        mode: permits(1, 2),
        ..OPTIONS
    };
    let [included, gives_up] = [7, 8].map(|waker| bench.event(|group, cx| group.enqueue(options, Some(waker), cx)));
    // The turns of both leases begin. The second has a token to spare.
    assert!(bench.step(Step::Wanted) && bench.step(Step::Pushed) && bench.step(Step::Collect(1)));
    bench.event(|group, cx| ((), group.give_up(gives_up, cx)));
    let cycles = [0, 1].map(|task| bench.guards[task].as_ref().unwrap().lease.cycle);
    assert!(bench.step(Step::Release(0)));
    assert!(matches!(bench.in_flight[..], [Request::Acquire { cycle, .. }] if cycle == cycles[0]));
    let newcomer = bench.event(|group, cx| group.enqueue(options, Some(9), cx));
    assert!(bench.step(Step::Release(1)));
    assert!(bench.key.is_settled(included), "the other lane has a token");
    assert!(bench.step(Step::Granted(Oldest)));
    assert!(!bench.key.is_settled(newcomer));
    let is_requeued =
        |request: &Request| matches!(*request, Request::Release { cycle, requeue: Some(_), .. } if cycle == cycles[0]);
    assert!(bench.in_flight.iter().any(is_requeued), "{:?}", bench.in_flight);
    assert!(bench.step(Step::Queued(Oldest)) && bench.step(Step::Pushed));
    for id in [included, newcomer] {
        let Some(Outcome::Granted(guard)) = bench.key.collect(id) else {
            panic!("no guard")
        };
        bench.event(|group, cx| group.released(guard.lease.cycle, guard.token, cx));
    }
    bench.check_end();
}

/// A process with few leases would otherwise have longer turns than one with many.
#[test]
fn turn_of_a_permit_serves_its_share_of_the_waiters() {
    for (limit, waiting, served) in [(1, 3, 3), (2, 6, 3), (2, 5, 3), (4, 6, 2), (10, 6, 1), (1_000, 16, 2)] {
        let mode = permits(1, limit);
        let mut bench = GroupBench::new([mode; 2]);
        for step in [Step::Want(0), Step::Granted(Oldest), Step::Collect(0)] {
            assert!(bench.step(step));
        }
        let options = WaiterOptions { mode, ..OPTIONS };
        let ask = |_| bench.event(|group, cx| group.enqueue(options, Some(9), cx));
        let waiting: Vec<_> = (0..waiting).map(ask).collect();
        // Other processes have the other permits.
        while bench.step(Step::Queued(Oldest)) {}
        assert!(bench.step(Step::Wanted) && bench.step(Step::Release(0)));
        let mut in_turn = 0;
        for id in waiting {
            // The tokens may be used up.
            if let Some(Request::Acquire { .. }) = bench.in_flight.first() {
                assert!(bench.step(Step::Granted(Oldest)));
            }
            let Some(Outcome::Granted(guard)) = bench.key.collect(id) else {
                break;
            };
            in_turn += 1;
            bench.event(|group, cx| group.released(guard.lease.cycle, guard.token, cx));
        }
        assert_eq!(in_turn, served, "a limit of {limit}");
    }
}
