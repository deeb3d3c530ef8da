//! Rules of shared locks and permits, one test each.

use super::group::{End, GroupBench, Step, permits};
use super::*;

const SHARED: WaiterOptions = WaiterOptions {
    mode: LockMode::Shared,
    ..OPTIONS
};

fn want(bench: &mut GroupBench, options: WaiterOptions) -> WaiterId {
    bench.event(|key, cx| key.enqueue(options, Some(7), cx))
}

#[track_caller]
fn guard(bench: &mut GroupBench, id: WaiterId) -> Granted {
    match bench.key.collect(id) {
        Some(Outcome::Granted(granted)) => granted,
        outcome => panic!("expected a guard, got {outcome:?}"),
    }
}

/// A guard of the first request, with `options`.
#[track_caller]
fn first_guard(bench: &mut GroupBench, options: WaiterOptions) -> Granted {
    let id = want(bench, options);
    assert!(bench.step(Step::Granted(End::Oldest)));
    guard(bench, id)
}

/// Whether a try in this mode is refused at once.
fn is_busy(bench: &mut GroupBench, mode: LockMode) -> bool {
    let id = want(
        bench,
        WaiterOptions {
            mode,
            try_only: true,
            ..OPTIONS
        },
    );
    let outcome = bench.key.collect(id);
    let is_busy = matches!(outcome, Some(Outcome::Busy));
    if outcome.is_none() {
        bench.event(|key, cx| ((), key.give_up(id, cx)));
    } else if let Some(Outcome::Granted(granted)) = outcome {
        bench.event(|key, cx| key.released(granted.lease.cycle, granted.token, cx));
    }
    is_busy
}

/// The losses that an event reported to guards.
fn lost_by(
    bench: &mut GroupBench,
    event: impl FnOnce(&mut Contender<u32>, Context<'_>) -> Effects<u32>,
) -> Vec<LossReason> {
    bench.event(|key, cx| {
        let effects = event(key, cx);
        (
            effects.rare.as_ref().map(|rare| rare.lost.clone()).unwrap_or_default(),
            effects,
        )
    })
}

#[test]
fn try_shares_a_lease_and_passes_no_waiter() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    assert!(!is_busy(&mut bench, LockMode::Shared), "nobody has the key");
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let _first = first_guard(&mut bench, SHARED);
    assert!(!is_busy(&mut bench, LockMode::Shared), "the lease is shared");

    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    want(&mut bench, SHARED);
    assert!(is_busy(&mut bench, LockMode::Shared), "a task waits");
}

#[test]
fn try_does_not_wait_for_a_request_that_nobody_needs_any_more() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let id = want(&mut bench, SHARED);
    bench.event(|key, cx| ((), key.give_up(id, cx)));
    assert!(!bench.in_flight.is_empty());
    assert!(is_busy(&mut bench, LockMode::Shared));
}

/// Another manager waits, and the turn has served its share: a try would have to wait as well.
#[test]
fn try_does_not_join_a_turn_that_is_over() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    bench.rules.max_burst = 1;
    let first = first_guard(&mut bench, SHARED);
    bench.event(|key, cx| ((), key.on_event(first.lease.cycle, StoreEvent::RemoteWaiter, cx)));
    assert!(is_busy(&mut bench, LockMode::Shared));
}

#[test]
fn lock_counts_as_joined_only_if_its_task_did_not_wait() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let waits = [(); 2].map(|()| want(&mut bench, SHARED));
    assert!(bench.step(Step::Granted(End::Oldest)));
    let paths = waits.map(|id| guard(&mut bench, id).path);
    assert_eq!(paths, [Path::Uncontended, Path::LocalHandOff]);
    let late = want(&mut bench, SHARED);
    assert_eq!(guard(&mut bench, late).path, Path::Joined);
}

#[test]
fn every_hold_of_a_lane_is_reported() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let guards = [first_guard(&mut bench, SHARED), {
        let id = want(&mut bench, SHARED);
        guard(&mut bench, id)
    }];
    let served = guards.map(|guard| {
        bench.event(|key, cx| {
            let (_, effects) = key.released(guard.lease.cycle, guard.token, cx);
            (effects.served, effects)
        })
    });
    assert_eq!(served, [None, Some(2)], "the second one ends the hold");
}

/// The failure of a release concerns no task that comes later.
#[test]
fn failed_release_refuses_no_later_task() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let first = first_guard(&mut bench, SHARED);
    bench.event(|key, cx| key.released(first.lease.cycle, first.token, cx));
    assert!(bench.step(Step::Failed(End::Oldest)));
    assert!(bench.key.outage().is_none());
    let in_outage = InOutage::Fail;
    let id = want(&mut bench, WaiterOptions { in_outage, ..SHARED });
    assert!(!bench.key.is_settled(id));
}

#[test]
fn try_takes_no_more_permits_than_there_are() {
    let mode = permits(1, 2);
    let mut bench = GroupBench::new([mode; 2]);
    let _first = first_guard(&mut bench, WaiterOptions { mode, ..OPTIONS });
    assert!(!is_busy(&mut bench, mode), "one of two permits is in use");

    let mut bench = GroupBench::new([mode; 2]);
    let _guards = [(); 2].map(|()| first_guard(&mut bench, WaiterOptions { mode, ..OPTIONS }));
    assert!(is_busy(&mut bench, mode), "both permits are in use");
    let mut bench = GroupBench::new([permits(2, 2); 2]);
    let mode = permits(2, 2);
    let _guard = first_guard(&mut bench, WaiterOptions { mode, ..OPTIONS });
    assert!(is_busy(&mut bench, permits(1, 2)), "one task has both");
}

#[test]
fn lease_that_lingers_serves_a_try() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let linger = Linger::of_millis(400);
    let first = first_guard(&mut bench, WaiterOptions { linger, ..SHARED });
    bench.event(|key, cx| key.released(first.lease.cycle, first.token, cx));
    assert!(bench.key.lingers_until().is_some());
    assert!(!is_busy(&mut bench, LockMode::Shared));
}

#[test]
fn max_hold_of_a_shared_guard_ends_that_guard_alone() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let first = first_guard(&mut bench, SHARED);
    let id = want(
        &mut bench,
        WaiterOptions {
            max_hold: Some(ms(50)),
            ..SHARED
        },
    );
    let second = guard(&mut bench, id);
    let until = bench.now + ms(50);
    assert_eq!(bench.key.next_deadline(), Some(until));
    bench.now = at(until.as_nanos() / 1_000_000 - 1);
    assert_eq!(lost_by(&mut bench, Contender::tick), []);
    bench.now = until;
    assert_eq!(lost_by(&mut bench, Contender::tick), [LossReason::MaxHold]);
    assert_eq!(second.lease.loss(), Some(LossReason::MaxHold));
    assert_eq!(first.lease.loss_at(bench.now), None);
    assert_eq!(bench.key.guards().count(), 1);
}

#[test]
fn max_hold_of_a_permit_ends_its_lease() {
    let mode = permits(1, 2);
    let mut bench = GroupBench::new([mode; 2]);
    let max_hold = Some(ms(50));
    let options = WaiterOptions {
        mode,
        max_hold,
        ..OPTIONS
    };
    let held = first_guard(&mut bench, options);
    let until = bench.key.next_deadline().unwrap();
    assert!(until > bench.now + ms(48) && until <= bench.now + ms(50), "{until:?}");
    assert_eq!(lost_by(&mut bench, Contender::tick), []);
    bench.now = until;
    assert_eq!(lost_by(&mut bench, Contender::tick), [LossReason::MaxHold]);
    assert_eq!(held.lease.loss(), Some(LossReason::MaxHold));
}

/// A task joins only under a lease that the store has confirmed lately, and that has a quarter of
/// its time left. Otherwise the lease is extended first.
#[test]
fn lease_is_extended_before_a_task_joins_it_late() {
    for (after, joins) in [(ms(100), true), (ms(500), false), (ms(900), false)] {
        let mut bench = GroupBench::new([LockMode::Shared; 2]);
        let first = first_guard(&mut bench, SHARED);
        bench.now = bench.now + after;
        let id = want(&mut bench, SHARED);
        assert_eq!(bench.key.is_settled(id), joins, "after {after:?}");
        let extends = |request: &Request| request.cycle() == first.lease.cycle;
        assert_eq!(bench.in_flight.iter().any(extends), !joins, "after {after:?}");
    }
}

/// Tokens are requested before they are used up, so that no task waits for them.
#[test]
fn tokens_are_extended_early_while_tasks_join() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let first = first_guard(&mut bench, SHARED);
    let mut joined = 0;
    while bench.in_flight.is_empty() {
        let id = want(&mut bench, SHARED);
        guard(&mut bench, id);
        joined += 1;
        assert!(joined < BLOCK_MAX, "no tokens were requested");
    }
    assert_eq!(bench.in_flight[0].cycle(), first.lease.cycle);
    let id = want(&mut bench, SHARED);
    guard(&mut bench, id);
}

/// A shared lease whose tokens are used up, a task that waits for more, and the cycle of the
/// extension that it waits for.
fn out_of_tokens() -> (GroupBench, Granted, WaiterId, Cycle) {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let first = first_guard(&mut bench, SHARED);
    let in_outage = InOutage::UntilOwnLimit;
    let id = loop {
        let id = want(&mut bench, WaiterOptions { in_outage, ..SHARED });
        if !bench.key.is_settled(id) {
            break id;
        }
        guard(&mut bench, id);
    };
    assert_eq!(bench.in_flight.len(), 1);
    let cycle = bench.in_flight[0].cycle();
    assert_eq!(cycle, first.lease.cycle);
    (bench, first, id, cycle)
}

/// Regression: after one failure no extension was sent while any task held the key.
#[test]
fn failed_extension_is_repeated_after_a_renewal() {
    let (mut bench, _first, waiting, cycle) = out_of_tokens();
    assert!(bench.step(Step::Failed(End::Oldest)));
    assert!(bench.in_flight.is_empty() && !bench.key.is_settled(waiting));
    let renewed = StoreEvent::RenewalReply {
        ttl: TTL,
        sent_at: bench.now,
        reply: Some(RenewReply::Extended { has_waiters: false }),
    };
    bench.event(|key, cx| ((), key.on_event(cycle, renewed, cx)));
    assert!(bench.step(Step::Granted(End::Oldest)), "no extension was sent");
    guard(&mut bench, waiting);
}

/// A try must not wait for a renewal.
#[test]
fn failed_extension_is_repeated_for_each_new_task() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let _first = first_guard(&mut bench, SHARED);
    while bench.in_flight.is_empty() {
        let id = want(&mut bench, SHARED);
        guard(&mut bench, id);
    }
    assert!(bench.step(Step::Failed(End::Oldest)));
    assert!(bench.in_flight.is_empty());
    let id = want(&mut bench, SHARED);
    guard(&mut bench, id);
    assert_eq!(bench.in_flight.len(), 1, "no extension was sent");
}

/// Regression: the tasks waited until the last guard was dropped.
#[test]
fn refused_extension_fails_the_tasks_that_wait_for_it() {
    let (mut bench, first, waiting, cycle) = out_of_tokens();
    bench.in_flight.clear();
    let refused = StoreEvent::RequestFailed {
        error: &no_answer(),
        outage: None,
    };
    bench.event(|key, cx| ((), key.on_event(cycle, refused, cx)));
    assert!(matches!(bench.key.collect(waiting), Some(Outcome::Failed(_))));
    assert_eq!(first.lease.loss_at(bench.now), None);
}

/// Regression: the try was refused, although it was the only task that wanted a permit.
#[test]
fn try_gets_a_permit_that_is_released_meanwhile() {
    let mode = permits(1, 2);
    let mut bench = GroupBench::new([mode; 2]);
    let options = WaiterOptions { mode, ..OPTIONS };
    let held = first_guard(&mut bench, options);
    let try_only = true;
    let id = want(&mut bench, WaiterOptions { try_only, ..options });
    assert!(!bench.key.is_settled(id), "the store is asked for the other permit");
    bench.event(|key, cx| key.released(held.lease.cycle, held.token, cx));
    assert!(bench.step(Step::Granted(End::Newest)), "the lease is extended");
    guard(&mut bench, id);
}

#[test]
fn try_that_waits_for_an_extension_gets_the_lease_when_the_last_guard_goes() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let first = first_guard(&mut bench, SHARED);
    bench.now = bench.now + ms(500);
    let try_only = true;
    let id = want(&mut bench, WaiterOptions { try_only, ..SHARED });
    assert!(!bench.key.is_settled(id), "the lease is extended first");
    bench.event(|key, cx| key.released(first.lease.cycle, first.token, cx));
    assert!(bench.step(Step::Granted(End::Oldest)));
    guard(&mut bench, id);
}

#[test]
fn try_does_not_join_a_lease_that_has_ended() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let _first = first_guard(&mut bench, SHARED);
    bench.now = bench.now + TTL;
    assert!(is_busy(&mut bench, LockMode::Shared));
}

/// What the group waits for may be the patience of a task, and not its lanes' next attempt.
#[test]
fn patience_of_a_task_is_a_deadline_of_its_group() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let in_outage = InOutage::UntilStoreTimeout;
    want(&mut bench, WaiterOptions { in_outage, ..SHARED });
    let cycle = bench.in_flight.remove(0).cycle();
    let since = bench.now;
    let outage = StoreOutage {
        since,
        patience: ms(40),
        retry_at: since + ms(5_000),
    };
    let failed = StoreEvent::RequestFailed {
        error: &no_answer(),
        outage: Some(outage),
    };
    bench.event(|key, cx| ((), key.on_event(cycle, failed, cx)));
    assert_eq!(bench.key.next_deadline(), Some(since + ms(40)));
}

#[test]
fn renewal_extends_the_lease_of_every_shared_guard() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let guards = [first_guard(&mut bench, SHARED), {
        let id = want(&mut bench, SHARED);
        guard(&mut bench, id)
    }];
    let cycle = guards[0].lease.cycle;
    bench.now = bench.now + ms(500);
    let sent_at = bench.now;
    let renewed = StoreEvent::RenewalReply {
        ttl: TTL,
        sent_at,
        reply: Some(RenewReply::Extended { has_waiters: false }),
    };
    bench.event(|key, cx| ((), key.on_event(cycle, renewed, cx)));
    for guard in &guards {
        assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);
    }
}

#[test]
fn waiters_bear_an_outage_for_as_long_as_they_may() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    assert_eq!((bench.key.failed_attempts(), bench.key.outage().is_some()), (0, false));
    let options = |in_outage| WaiterOptions { in_outage, ..SHARED };
    let brief = want(&mut bench, options(InOutage::UntilStoreTimeout));
    let own = want(&mut bench, options(InOutage::UntilOwnLimit));
    assert!(bench.step(Step::Failed(End::Oldest)));
    assert!(bench.key.outage().is_some() && bench.key.failed_attempts() == 1);
    assert!(!bench.key.is_settled(brief) && !bench.key.is_settled(own));

    // The outage of this harness is borne for a TTL.
    bench.now = bench.now + TTL + ms(20);
    bench.event(|key, cx| ((), key.tick(cx)));
    assert!(matches!(bench.key.collect(brief), Some(Outcome::Failed(_))));
    assert!(!bench.key.is_settled(own));
    let refused = want(&mut bench, options(InOutage::Fail));
    assert!(matches!(bench.key.collect(refused), Some(Outcome::Failed(_))));

    assert!(bench.step(Step::Granted(End::Oldest)));
    assert!(matches!(bench.key.collect(own), Some(Outcome::Granted(_))));
    assert!(bench.key.outage().is_none());
}

#[test]
fn hint_of_remote_waiters_is_kept() {
    for contended_hint in [false, true] {
        let mut bench = GroupBench::new([LockMode::Shared; 2]);
        assert!(!bench.key.remote_waiters_seen());
        want(
            &mut bench,
            WaiterOptions {
                contended_hint,
                ..SHARED
            },
        );
        assert_eq!(bench.key.remote_waiters_seen(), contended_hint);
    }
}

#[test]
fn waker_is_the_one_that_was_set_last() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let id = want(&mut bench, SHARED);
    assert_eq!(bench.key.waker(id), Some(&7));
    assert_eq!(bench.key.set_waker(id, 8), Some(7));
    assert_eq!(bench.key.waker(id), Some(&8));
}

/// A grant from before the key's tokens that are already known is reported for metrics.
#[test]
fn stale_grant_of_a_lane_is_reported() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    want(&mut bench, SHARED);
    let cycle = bench.in_flight[0].cycle();
    assert!(bench.step(Step::Queued(End::Oldest)));
    let stale = StoreEvent::Grant(grant(cycle, 50, 60));
    let is_stale = bench.event(|key, cx| {
        let effects = key.on_event(cycle, stale, cx);
        (effects.rare.as_ref().is_some_and(|rare| rare.stale_grant), effects)
    });
    assert!(is_stale);
}

#[test]
fn what_arrives_for_a_cycle_that_is_over_releases_it() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let guard = first_guard(&mut bench, SHARED);
    let over = Cycle::of(1_000);
    let now = bench.now;
    let mut abandoned_by = |cycle, event: StoreEvent<'_>| {
        bench.event(|key, cx| {
            let effects = key.on_event(cycle, event, cx);
            (
                effects
                    .rare
                    .as_ref()
                    .map(|rare| rare.abandoned.clone())
                    .unwrap_or_default(),
                effects,
            )
        })
    };
    for event in [
        StoreEvent::AcquireReply(answer(now, granted(500, 501))),
        StoreEvent::AcquireReply(answer(now, queued(500))),
        StoreEvent::Grant(grant(over, 500, 501)),
        StoreEvent::YourTurn,
        StoreEvent::RemoteWaiter,
    ] {
        assert_eq!(abandoned_by(over, event), [over], "{event:?}");
    }
    let busy = StoreEvent::AcquireReply(answer(now, AcquireReply::Busy));
    assert_eq!(abandoned_by(over, busy), [], "it left nothing in the store");
    assert_eq!(abandoned_by(guard.lease.cycle, StoreEvent::RemoteWaiter), []);
    assert_eq!(guard.lease.loss_at(now), None);
}

#[test]
fn shared_lease_is_renewed_like_any_other() {
    let mut bench = GroupBench::new([LockMode::Shared; 2]);
    let guard = first_guard(&mut bench, SHARED);
    bench.now = bench.now + TTL / 2;
    let renewal = bench.event(|key, cx| (key.renewal(cx), Effects::none()));
    assert_eq!(
        renewal.map(|(cycle, ttl, _)| (cycle, ttl)),
        Some((guard.lease.cycle, TTL))
    );
}

#[test]
fn bounds_are_named_after_their_settings() {
    assert_eq!(Bound::ALL.map(Bound::as_str), ["gate", "max_burst", "max_slice"]);
}
