//! Rules of shared locks and permits, one test each.

use super::group::{End, Few, Step, permits};
use super::*;

const SHARED: WaiterOptions = WaiterOptions {
    mode: LockMode::Shared,
    ..OPTIONS
};

fn want(few: &mut Few, options: WaiterOptions) -> WaiterId {
    few.event(|key, cx| key.enqueue(options, Some(7), cx))
}

#[track_caller]
fn guard(few: &mut Few, id: WaiterId) -> Granted {
    match few.group.collect(id) {
        Some(Outcome::Granted(granted)) => granted,
        outcome => panic!("expected a guard, got {outcome:?}"),
    }
}

/// A guard of the first request, with `options`.
#[track_caller]
fn first_guard(few: &mut Few, options: WaiterOptions) -> Granted {
    let id = want(few, options);
    assert!(few.step(Step::Granted(End::Oldest)));
    guard(few, id)
}

/// Whether a try in this mode is refused at once.
fn is_busy(few: &mut Few, mode: LockMode) -> bool {
    let id = want(
        few,
        WaiterOptions {
            mode,
            try_only: true,
            ..OPTIONS
        },
    );
    let outcome = few.group.collect(id);
    let is_busy = matches!(outcome, Some(Outcome::Busy));
    if outcome.is_none() {
        few.event(|key, cx| ((), key.give_up(id, cx)));
    } else if let Some(Outcome::Granted(granted)) = outcome {
        few.event(|key, cx| key.released(granted.lease.cycle, granted.token, cx));
    }
    is_busy
}

/// The losses that an event reported to guards.
fn lost_by(few: &mut Few, event: impl FnOnce(&mut Contender<u32>, Context<'_>) -> Effects<u32>) -> Vec<LossReason> {
    few.event(|key, cx| {
        let effects = event(key, cx);
        (
            effects.rare.as_ref().map(|rare| rare.lost.clone()).unwrap_or_default(),
            effects,
        )
    })
}

#[test]
fn try_shares_a_lease_and_passes_no_waiter() {
    let mut few = Few::new([LockMode::Shared; 2]);
    assert!(!is_busy(&mut few, LockMode::Shared), "nobody has the key");
    let mut few = Few::new([LockMode::Shared; 2]);
    let _first = first_guard(&mut few, SHARED);
    assert!(!is_busy(&mut few, LockMode::Shared), "the lease is shared");

    let mut few = Few::new([LockMode::Shared; 2]);
    want(&mut few, SHARED);
    assert!(is_busy(&mut few, LockMode::Shared), "a task waits");
}

#[test]
fn try_takes_no_more_permits_than_there_are() {
    let mode = permits(1, 2);
    let mut few = Few::new([mode; 2]);
    let _first = first_guard(&mut few, WaiterOptions { mode, ..OPTIONS });
    assert!(!is_busy(&mut few, mode), "one of two permits is in use");

    let mut few = Few::new([mode; 2]);
    let _guards = [(); 2].map(|()| first_guard(&mut few, WaiterOptions { mode, ..OPTIONS }));
    assert!(is_busy(&mut few, mode), "both permits are in use");
    let mut few = Few::new([permits(2, 2); 2]);
    let mode = permits(2, 2);
    let _guard = first_guard(&mut few, WaiterOptions { mode, ..OPTIONS });
    assert!(is_busy(&mut few, permits(1, 2)), "one task has both");
}

#[test]
fn lease_that_lingers_serves_a_try() {
    let mut few = Few::new([LockMode::Shared; 2]);
    let linger = Linger::of_millis(400);
    let first = first_guard(&mut few, WaiterOptions { linger, ..SHARED });
    few.event(|key, cx| key.released(first.lease.cycle, first.token, cx));
    assert!(few.group.lingers_until().is_some());
    assert!(!is_busy(&mut few, LockMode::Shared));
}

#[test]
fn max_hold_of_a_shared_guard_ends_that_guard_alone() {
    let mut few = Few::new([LockMode::Shared; 2]);
    let first = first_guard(&mut few, SHARED);
    let id = want(
        &mut few,
        WaiterOptions {
            max_hold: Some(ms(50)),
            ..SHARED
        },
    );
    let second = guard(&mut few, id);
    let until = few.now + ms(50);
    assert_eq!(few.group.next_deadline(), Some(until));
    few.now = at(until.as_nanos() / 1_000_000 - 1);
    assert_eq!(lost_by(&mut few, Contender::tick), []);
    few.now = until;
    assert_eq!(lost_by(&mut few, Contender::tick), [LossReason::MaxHold]);
    assert_eq!(second.lease.loss(), Some(LossReason::MaxHold));
    assert_eq!(first.lease.loss_at(few.now), None);
    assert_eq!(few.group.guards().count(), 1);
}

#[test]
fn renewal_extends_the_lease_of_every_shared_guard() {
    let mut few = Few::new([LockMode::Shared; 2]);
    let guards = [first_guard(&mut few, SHARED), {
        let id = want(&mut few, SHARED);
        guard(&mut few, id)
    }];
    let cycle = guards[0].lease.cycle;
    few.now = few.now + ms(500);
    let sent_at = few.now;
    let renewed = StoreEvent::RenewalReply {
        ttl: TTL,
        sent_at,
        reply: Some(RenewReply::Extended { has_waiters: false }),
    };
    few.event(|key, cx| ((), key.on_event(cycle, renewed, cx)));
    for guard in &guards {
        assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);
    }
}

#[test]
fn waiters_bear_an_outage_for_as_long_as_they_may() {
    let mut few = Few::new([LockMode::Shared; 2]);
    assert_eq!((few.group.failed_attempts(), few.group.outage().is_some()), (0, false));
    let options = |in_outage| WaiterOptions { in_outage, ..SHARED };
    let brief = want(&mut few, options(InOutage::UntilStoreTimeout));
    let own = want(&mut few, options(InOutage::UntilOwnLimit));
    assert!(few.step(Step::Failed(End::Oldest)));
    assert!(few.group.outage().is_some() && few.group.failed_attempts() == 1);
    assert!(!few.group.is_settled(brief) && !few.group.is_settled(own));

    // The outage of this harness is borne for a TTL.
    few.now = few.now + TTL + ms(20);
    few.event(|key, cx| ((), key.tick(cx)));
    assert!(matches!(few.group.collect(brief), Some(Outcome::Failed(_))));
    assert!(!few.group.is_settled(own));
    let refused = want(&mut few, options(InOutage::Fail));
    assert!(matches!(few.group.collect(refused), Some(Outcome::Failed(_))));

    assert!(few.step(Step::Granted(End::Oldest)));
    assert!(matches!(few.group.collect(own), Some(Outcome::Granted(_))));
    assert!(few.group.outage().is_none());
}

#[test]
fn hint_of_remote_waiters_is_kept() {
    for contended_hint in [false, true] {
        let mut few = Few::new([LockMode::Shared; 2]);
        assert!(!few.group.remote_waiters_seen());
        want(
            &mut few,
            WaiterOptions {
                contended_hint,
                ..SHARED
            },
        );
        assert_eq!(few.group.remote_waiters_seen(), contended_hint);
    }
}

#[test]
fn waker_is_the_one_that_was_set_last() {
    let mut few = Few::new([LockMode::Shared; 2]);
    let id = want(&mut few, SHARED);
    assert_eq!(few.group.waker(id), Some(&7));
    assert_eq!(few.group.set_waker(id, 8), Some(7));
    assert_eq!(few.group.waker(id), Some(&8));
}

/// A grant from before the key's tokens that are already known is reported for metrics.
#[test]
fn stale_grant_of_a_lane_is_reported() {
    let mut few = Few::new([LockMode::Shared; 2]);
    want(&mut few, SHARED);
    let cycle = few.in_flight[0].cycle();
    assert!(few.step(Step::Queued(End::Oldest)));
    let stale = StoreEvent::Grant(grant(cycle, 50, 60));
    let is_stale = few.event(|key, cx| {
        let effects = key.on_event(cycle, stale, cx);
        (effects.rare.as_ref().is_some_and(|rare| rare.stale_grant), effects)
    });
    assert!(is_stale);
}

#[test]
fn what_arrives_for_a_cycle_that_is_over_releases_it() {
    let mut few = Few::new([LockMode::Shared; 2]);
    let guard = first_guard(&mut few, SHARED);
    let over = Cycle::of(1_000);
    let now = few.now;
    let mut abandoned_by = |cycle, event: StoreEvent<'_>| {
        few.event(|key, cx| {
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
    let mut few = Few::new([LockMode::Shared; 2]);
    let guard = first_guard(&mut few, SHARED);
    few.now = few.now + TTL / 2;
    let renewal = few.event(|key, cx| (key.renewal(cx), Effects::none()));
    assert_eq!(
        renewal.map(|(cycle, ttl, _)| (cycle, ttl)),
        Some((guard.lease.cycle, TTL))
    );
}

#[test]
fn bounds_are_named_after_their_settings() {
    assert_eq!(Bound::ALL.map(Bound::as_str), ["gate", "max_burst", "max_slice"]);
}
