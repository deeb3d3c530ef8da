//! Pending releases: cycles that are over but may still exist in the store. Each is released until
//! the store confirms it and nothing of it can arrive late.
//!
//! # Implementation details
//!
//! The cost of pending releases is bounded. Each is a key and a number, and a manager keeps at most
//! [`PENDING_MAX`] of them. A shard has at most [`IN_FLIGHT_MAX`] releases in flight. This number
//! is halved by each release without a reply and grows by one with each reply, so that old releases
//! do not crowd out new requests when a server comes back. Cycles beyond the limits are left to
//! expire. So is a lease whose release has failed for as long as the longest TTL.
//!
//! The first attempt is *ordered*: it is sent where an acquire of the same cycle may still be in
//! flight, and arrives after it. Further attempts are sent in the background, which works even if
//! the application's runtime is gone. But a reply to such an attempt proves nothing about requests
//! in flight elsewhere. Neither does a reply that arrives after a connection was given up. An
//! acquire may execute later and acquire the lease for a cycle that is over. Such a cycle is
//! released once more when no request of it can arrive any more ([`OrphanRules::late_max`]). The
//! same applies to a cycle whose acquire was sent again on another connection and got its reply
//! there.

use std::cmp::{Ordering, Reverse};
use std::collections::{BinaryHeap, VecDeque};
use std::ops::RangeInclusive;
use std::time::Duration;

#[cfg(test)]
use super::Flaw;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::late_requests::{SecondReleases, was_cut_lately};
use crate::protocol::Cycle;

/// How many releases of a manager may be pending.
pub(crate) const PENDING_MAX: usize = 100_000;
/// The largest and smallest number of releases that a shard has in flight. If one of several nodes
/// does not reply, the others still need a share.
const IN_FLIGHT_MAX: usize = 1_000;
const IN_FLIGHT_MIN: usize = 64;
/// How many cycles of a shard may wait to be released once more.
const SECOND_RELEASES_MAX: usize = 10_000;

/// The times of the retry rules.
#[derive(Debug, Clone)]
pub(crate) struct OrphanRules {
    /// How long after its connection was given up a request may still be executed.
    pub(crate) late_max: Duration,
    /// The first and the longest pause after a release without a reply.
    pub(crate) pause_min: Duration,
    pub(crate) pause_max: Duration,
    /// The longest pause after a while: a server that is down for hours is not queried every second
    /// for each key. Kept short because a shutdown of the manager waits for it.
    pub(crate) pause_later: Duration,
    /// Deliberate bugs, to verify that the simulation finds them.
    #[cfg(test)]
    pub(crate) flaw: Option<Flaw>,
}

impl OrphanRules {
    pub(crate) const fn new(late_max: Duration) -> Self {
        Self {
            late_max,
            pause_min: Duration::from_millis(20),
            pause_max: Duration::from_secs(1),
            pause_later: Duration::from_secs(4),
            #[cfg(test)]
            flaw: None,
        }
    }
}

/// What the caller knows when a reply arrives.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Circumstances {
    pub(crate) now: Moment,
    /// When a connection was last given up.
    pub(crate) last_cut: Option<Moment>,
    /// Whether the manager shuts down. It does not wait for the longest leases.
    pub(crate) is_ending: bool,
    pub(crate) default_ttl: Duration,
    /// The longest time that a lease can last without a renewal.
    pub(crate) longest_ttl: Duration,
}

/// The result of one attempt to release a cycle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Released {
    Confirmed,
    /// There was no reply.
    Unavailable,
    /// The server refuses.
    Refused,
    /// The shard has another shard map. Managers with that map do not use this lease, and this
    /// manager holds nothing on the shard any more.
    OtherMap,
}

/// What becomes of a pending release, which `P` counts as pending.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "leases that are left to expire are reported"]
pub(crate) enum Verdict<P> {
    /// The release is no longer pending.
    Done,
    /// The cycle is released once more when nothing of it can arrive any more.
    ReleasedAgainLater,
    Retried,
    /// The release is given up: it has failed for as long as a lease can last, or the shard does
    /// not accept it any more.
    LeftToExpire(P),
    /// Too many cycles wait to be released once more.
    TooManySecondReleases,
}

/// A release to send. `K` identifies a key. `P` counts the release as pending until it is dropped.
#[derive(Debug)]
pub(crate) struct Attempt<K, P> {
    pub(crate) key: K,
    pub(crate) cycle: Cycle,
    since: Moment,
    due: Moment,
    backoff: Backoff,
    is_ordered: bool,
    /// Whether no request of the cycle can arrive any more after its release.
    is_final: bool,
    /// Held until the release is no longer pending.
    pending: P,
}

/// Ordered by the time of the next attempt.
impl<K, P> Ord for Attempt<K, P> {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.due, self.cycle).cmp(&(other.due, other.cycle))
    }
}

impl<K, P> PartialOrd for Attempt<K, P> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<K, P> PartialEq for Attempt<K, P> {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl<K, P> Eq for Attempt<K, P> {}

impl<K, P> Attempt<K, P> {
    /// Whether the release must be sent after all earlier requests of the cycle, on the same
    /// connection.
    pub(crate) const fn is_ordered(&self) -> bool {
        self.is_ordered
    }

    /// Whether an earlier release of the cycle was confirmed.
    pub(crate) const fn is_final(&self) -> bool {
        self.is_final
    }

    /// The attempt failed. Returns whether it is to be sent again at once, in the background.
    pub(crate) fn falls_back(&mut self) -> bool {
        std::mem::replace(&mut self.is_ordered, false)
    }
}

/// The pending releases of a shard.
#[derive(Debug)]
pub(crate) struct Orphans<K, P> {
    rules: OrphanRules,
    fresh: VecDeque<Attempt<K, P>>,
    failed: BinaryHeap<Reverse<Attempt<K, P>>>,
    second_releases: SecondReleases<(K, Cycle)>,
    in_flight: usize,
    in_flight_max: usize,
}

impl<K, P> Orphans<K, P> {
    pub(crate) const fn new(rules: OrphanRules) -> Self {
        Self {
            second_releases: SecondReleases::new(rules.late_max),
            rules,
            fresh: VecDeque::new(),
            failed: BinaryHeap::new(),
            in_flight: 0,
            in_flight_max: IN_FLIGHT_MAX,
        }
    }

    /// A cycle is over since then, and the store may still know it.
    pub(crate) fn add(&mut self, key: K, cycle: Cycle, pending: P, since: Moment) {
        self.push(key, cycle, pending, since, false);
    }

    fn push(&mut self, key: K, cycle: Cycle, pending: P, since: Moment, is_final: bool) {
        self.fresh.push_back(Attempt {
            key,
            cycle,
            since,
            due: since,
            backoff: Backoff::new(self.rules.pause_min, self.rules.pause_max),
            is_ordered: true,
            is_final,
            pending,
        });
    }

    /// A request of the cycle may still arrive. The cycle is released once more later.
    pub(crate) fn release_again_later(&mut self, key: K, cycle: Cycle, now: Moment) -> Verdict<P> {
        #[cfg(test)]
        if self.rules.flaw == Some(Flaw::TrustsReleases) {
            return Verdict::Done;
        }
        if self.second_releases.len() >= SECOND_RELEASES_MAX {
            return Verdict::TooManySecondReleases;
        }
        self.second_releases.add((key, cycle), now);
        Verdict::ReleasedAgainLater
    }

    /// Schedules the second release of the next cycle of which no request can arrive any more.
    /// `None` if none is due.
    ///
    /// A cycle that is still in use is skipped: it is released as usual when it is over. So is one
    /// that can't be counted as pending.
    pub(crate) fn next_second_release(
        &mut self,
        now: Moment,
        last_cut: Option<Moment>,
        is_current: impl FnOnce(&K, Cycle) -> bool,
        count: impl FnOnce() -> Option<P>,
    ) -> Option<Verdict<P>> {
        let (key, cycle) = self.second_releases.first_due(now)?;
        let is_over = !is_current(key, *cycle);
        if is_over && self.second_releases.postpone_first(now, last_cut) {
            return Some(Verdict::ReleasedAgainLater);
        }
        let (key, cycle) = self.second_releases.remove_first()?;
        if is_over && let Some(pending) = count() {
            self.push(key, cycle, pending, now, true);
        }
        Some(Verdict::Done)
    }

    /// The next release to send, unless too many are in flight. It is in flight until
    /// [`on_result`](Self::on_result) is called.
    pub(crate) fn next(&mut self, now: Moment) -> Option<Attempt<K, P>> {
        if self.in_flight >= self.in_flight_max {
            return None;
        }
        let is_due = self.failed.peek().is_some_and(|Reverse(failed)| failed.due <= now);
        let next = if is_due {
            self.failed.pop().map(|Reverse(failed)| failed)
        } else {
            self.fresh.pop_front()
        };
        self.in_flight += usize::from(next.is_some());
        next
    }

    /// When the next release or second release is due. `None` if a reply has to arrive first.
    pub(crate) fn next_due(&self) -> Option<Moment> {
        if self.in_flight >= self.in_flight_max {
            return None;
        }
        let failed = self.failed.peek().map(|Reverse(failed)| failed.due);
        failed.into_iter().chain(self.second_releases.next_due()).min()
    }

    /// An attempt got its reply or none. A failed one is retried after a pause drawn from a range,
    /// unless the lease must have expired by now.
    pub(crate) fn on_result(
        &mut self,
        attempt: Attempt<K, P>,
        released: Released,
        cx: Circumstances,
        draw: impl FnOnce(RangeInclusive<Duration>) -> Duration,
    ) -> Verdict<P> {
        debug_assert!(self.in_flight > 0, "the result of a release that is not in flight");
        self.in_flight = self.in_flight.saturating_sub(1);
        self.in_flight_max = match released {
            Released::Unavailable => (self.in_flight_max / 2).max(IN_FLIGHT_MIN),
            _ => (self.in_flight_max + 1).min(IN_FLIGHT_MAX),
        };
        match released {
            Released::Confirmed => {
                let was_cut_lately = was_cut_lately(cx.now, cx.last_cut, self.rules.late_max);
                if !attempt.is_final && (!attempt.is_ordered || was_cut_lately) {
                    return self.release_again_later(attempt.key, attempt.cycle, cx.now);
                }
                Verdict::Done
            }
            Released::OtherMap => Verdict::LeftToExpire(attempt.pending),
            Released::Refused => self.on_failure(attempt, true, cx, draw),
            Released::Unavailable => self.on_failure(attempt, false, cx, draw),
        }
    }

    fn on_failure(
        &mut self,
        mut attempt: Attempt<K, P>,
        is_refused: bool,
        cx: Circumstances,
        draw: impl FnOnce(RangeInclusive<Duration>) -> Duration,
    ) -> Verdict<P> {
        debug_assert!(!attempt.is_ordered, "a failed release was not sent in the background");
        let waited = cx.now.since(attempt.since);
        let patience = match (cx.is_ending, is_refused) {
            (true, true) => Duration::ZERO,
            (true, false) => cx.default_ttl,
            (false, _) => cx.longest_ttl,
        };
        if waited >= patience {
            return Verdict::LeftToExpire(attempt.pending);
        }
        let OrphanRules {
            pause_min,
            pause_max,
            pause_later,
            ..
        } = self.rules;
        // A refused release may be accepted once replicas are back or a disk has space again, which
        // takes a while.
        let bound = if is_refused { pause_max } else { pause_min };
        attempt
            .backoff
            .set_limits(bound, (waited / 16).clamp(pause_max, pause_later));
        attempt.due = cx.now + draw(attempt.backoff.next_range());
        self.failed.push(Reverse(attempt));
        Verdict::Retried
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE_MAX: Duration = Duration::from_secs(30);

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    fn of(cycles: impl IntoIterator<Item = u64>) -> Orphans<(), ()> {
        let mut orphans = Orphans::new(OrphanRules::new(LATE_MAX));
        for cycle in cycles {
            orphans.add((), Cycle::of(cycle), (), at(0));
        }
        orphans
    }

    fn circumstances(now: Moment) -> Circumstances {
        Circumstances {
            now,
            last_cut: None,
            is_ending: false,
            default_ttl: Duration::from_secs(10),
            longest_ttl: Duration::from_secs(60),
        }
    }

    /// The next attempt fails at `now`, also in the background. Returns the verdict and the range
    /// of the pause.
    fn fail(
        orphans: &mut Orphans<(), ()>,
        released: Released,
        cx: Circumstances,
    ) -> (Verdict<()>, Option<RangeInclusive<Duration>>) {
        let mut attempt = orphans.next(cx.now).unwrap();
        attempt.falls_back();
        let mut range = None;
        let verdict = orphans.on_result(attempt, released, cx, |drawn| {
            range = Some(drawn.clone());
            *drawn.end()
        });
        (verdict, range)
    }

    #[test]
    fn first_attempt_is_ordered_and_repeated_in_the_background_if_it_fails() {
        let mut orphans = of([2]);
        let mut attempt = orphans.next(at(0)).unwrap();
        assert!(attempt.is_ordered() && attempt.falls_back());
        assert!(!attempt.is_ordered() && !attempt.falls_back());
        assert!(orphans.next(at(0)).is_none());
    }

    #[test]
    fn confirmed_release_is_repeated_only_if_a_request_may_arrive_later() {
        for (in_background, cut, again) in [
            (false, None, false),
            (true, None, true),
            (false, Some(at(0)), true),
            (true, Some(at(0)), true),
        ] {
            let mut orphans = of([2]);
            let mut attempt = orphans.next(at(0)).unwrap();
            assert!(!in_background || attempt.falls_back());
            let cx = Circumstances {
                last_cut: cut,
                ..circumstances(at(10))
            };
            let verdict = orphans.on_result(attempt, Released::Confirmed, cx, |range| *range.end());
            let expected = if again {
                Verdict::ReleasedAgainLater
            } else {
                Verdict::Done
            };
            assert_eq!(verdict, expected, "{in_background} {cut:?}");
            let due = again.then_some(at(10) + LATE_MAX);
            assert_eq!(orphans.next_due(), due, "{in_background} {cut:?}");
            let Some(due) = due else { continue };
            assert_eq!(
                orphans.next_second_release(at(10), cut, |(), _| false, || Some(())),
                None
            );
            let verdict = orphans.next_second_release(due, cut, |(), _| false, || Some(()));
            assert_eq!(verdict, Some(Verdict::Done));
            let attempt = orphans.next(due).unwrap();
            assert!(attempt.is_ordered());
            let cx = Circumstances {
                last_cut: Some(due),
                ..circumstances(due)
            };
            let verdict = orphans.on_result(attempt, Released::Confirmed, cx, |range| *range.end());
            assert_eq!((verdict, orphans.next_due()), (Verdict::Done, None), "it is final");
        }
    }

    #[test]
    fn second_release_is_postponed_once_by_a_later_cut_and_skipped_for_a_cycle_in_use() {
        let mut orphans = of([]);
        assert_eq!(
            orphans.release_again_later((), Cycle::of(2), at(0)),
            Verdict::ReleasedAgainLater
        );
        assert_eq!(
            orphans.release_again_later((), Cycle::of(4), at(0)),
            Verdict::ReleasedAgainLater
        );
        let (due, later) = (at(0) + LATE_MAX, at(0) + 2 * LATE_MAX);
        let mut next =
            |now| orphans.next_second_release(now, Some(now), |(), cycle| cycle == Cycle::of(4), || Some(()));
        assert_eq!(
            [next(due), next(due), next(due)],
            [Some(Verdict::ReleasedAgainLater), Some(Verdict::Done), None]
        );
        assert_eq!(next(later), Some(Verdict::Done));
        assert_eq!(orphans.next(later).map(|attempt| attempt.cycle), Some(Cycle::of(2)));
        assert!(orphans.next(later).is_none());
    }

    #[test]
    fn pauses_grow_with_an_outage_and_a_lease_that_must_have_expired_is_left() {
        let mut orphans = of([2]);
        let (mut now, mut ends) = (at(0), Vec::new());
        let verdict = loop {
            let (verdict, range) = fail(&mut orphans, Released::Unavailable, circumstances(now));
            let Some(range) = range else { break verdict };
            assert_eq!(verdict, Verdict::Retried);
            assert!(orphans.next(now).is_none(), "it pauses");
            now = orphans.next_due().unwrap();
            ends.push(range.end().as_millis());
        };
        assert_eq!(verdict, Verdict::LeftToExpire(()));
        assert_eq!(ends[..8], [20, 40, 80, 160, 320, 640, 1_000, 1_000]);
        assert!(ends.iter().all(|&millis| millis <= 4_000) && ends.last() > Some(&3_000));
        assert!(now >= at(60_000) && now < at(64_001));
    }

    #[test]
    fn refused_release_pauses_longer_and_is_not_awaited_by_a_shutdown() {
        let mut orphans = of([2]);
        let (verdict, range) = fail(&mut orphans, Released::Refused, circumstances(at(0)));
        assert_eq!(verdict, Verdict::Retried);
        assert_eq!(range, Some(Duration::from_millis(10)..=Duration::from_secs(1)));
        let ending = |now| Circumstances {
            is_ending: true,
            ..circumstances(now)
        };
        let (verdict, _) = fail(&mut orphans, Released::Refused, ending(at(1_000)));
        assert_eq!(verdict, Verdict::LeftToExpire(()));
        for (millis, expected) in [(9_999, Verdict::Retried), (10_000, Verdict::LeftToExpire(()))] {
            let (verdict, _) = fail(&mut of([2]), Released::Unavailable, ending(at(millis)));
            assert_eq!(verdict, expected, "after {millis} ms");
        }
        let (verdict, _) = fail(&mut of([2]), Released::OtherMap, circumstances(at(0)));
        assert_eq!(verdict, Verdict::LeftToExpire(()));
    }

    #[test]
    fn releases_in_flight_are_limited_to_what_is_answered() {
        let mut orphans = of((0..4_000).map(|number| 2 * number));
        let send = |orphans: &mut Orphans<(), ()>| -> Vec<Attempt<(), ()>> {
            std::iter::from_fn(|| orphans.next(at(0))).collect()
        };
        let sent = send(&mut orphans);
        assert_eq!(sent.len(), IN_FLIGHT_MAX);
        assert_eq!(orphans.next_due(), None);
        for mut attempt in sent {
            attempt.falls_back();
            let cx = circumstances(at(0));
            let verdict = orphans.on_result(attempt, Released::Unavailable, cx, |range| *range.end());
            assert_eq!(verdict, Verdict::Retried);
        }
        let mut sent = send(&mut orphans);
        assert_eq!(sent.len(), IN_FLIGHT_MIN);
        let attempt = sent.pop().unwrap();
        let cx = circumstances(at(0));
        let verdict = orphans.on_result(attempt, Released::Confirmed, cx, |range| *range.end());
        assert_eq!((verdict, send(&mut orphans).len()), (Verdict::Done, 2));
    }

    #[test]
    fn second_releases_have_a_limit() {
        let mut orphans = of([]);
        for _ in 0..SECOND_RELEASES_MAX {
            assert_eq!(
                orphans.release_again_later((), Cycle::of(2), at(0)),
                Verdict::ReleasedAgainLater
            );
        }
        assert_eq!(
            orphans.release_again_later((), Cycle::of(2), at(0)),
            Verdict::TooManySecondReleases
        );
    }

    #[test]
    fn failed_release_that_is_due_first_is_sent_first() {
        let mut orphans = of([2, 4, 6]);
        let sent: Vec<Attempt<(), ()>> = std::iter::from_fn(|| orphans.next(at(0))).collect();
        for (mut attempt, millis) in sent.into_iter().zip([30, 10, 20]) {
            attempt.falls_back();
            let pause = |_| Duration::from_millis(millis);
            let verdict = orphans.on_result(attempt, Released::Unavailable, circumstances(at(0)), pause);
            assert_eq!(verdict, Verdict::Retried);
        }
        assert_eq!(orphans.next_due(), Some(at(10)));
        for (now, cycle) in [(10, 4), (20, 6), (30, 2)] {
            let mut next = || orphans.next(at(now)).map(|attempt| attempt.cycle);
            assert_eq!((next(), next()), (Some(Cycle::of(cycle)), None));
        }
    }

    #[test]
    fn number_in_flight_is_halved_by_a_missing_reply_and_grows_with_each_reply() {
        let mut orphans = of((1..=2 * IN_FLIGHT_MAX as u64).map(|number| 2 * number));
        let mut sent: Vec<Attempt<(), ()>> = std::iter::from_fn(|| orphans.next(at(0))).collect();
        let mut ends = |orphans: &mut Orphans<(), ()>, released| {
            let mut attempt = sent.pop().unwrap();
            if released == Released::Unavailable {
                attempt.falls_back();
            }
            let _verdict = orphans.on_result(attempt, released, circumstances(at(0)), |pause| *pause.start());
        };
        ends(&mut orphans, Released::Unavailable);
        // Half as many may be in flight, and one more for each reply.
        for _ in 1..IN_FLIGHT_MAX / 4 {
            ends(&mut orphans, Released::Confirmed);
        }
        assert!(orphans.next(at(0)).is_none());
        ends(&mut orphans, Released::Confirmed);
        assert!(orphans.next(at(0)).is_some());
    }
}
