//! Requests that may still be executed on a connection that was given up, and the releases that are
//! repeated because of them.
//!
//! An acquire that is executed late takes the lease for a cycle that is over. So a release that was
//! answered while that could still happen is sent once more, when it no longer can.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Moment;
use crate::cycle::Cycle;

/// Which cycles had their requests on a connection that was given up recently.
#[derive(Debug, Default)]
pub(crate) struct LateRequests {
    /// When a connection was last given up, and the largest cycle number at that time.
    newest_at_cut: (Moment, u64),
}

impl LateRequests {
    /// Whether a request of the cycle may have been sent on a connection that was given up at
    /// `cut`, and may still be executed. `newest` is the largest cycle number so far.
    pub(crate) fn may_include(&mut self, cycle: Cycle, cut: Moment, newest: impl FnOnce() -> u64) -> bool {
        if self.newest_at_cut.0 != cut {
            // This includes cycles opened since the cut, which is harmless.
            self.newest_at_cut = (cut, newest());
        }
        self.has_included(cycle)
    }

    /// Whether [`may_include`](Self::may_include) was true for that cycle, or could have been.
    pub(crate) const fn has_included(&self, cycle: Cycle) -> bool {
        cycle.number() <= self.newest_at_cut.1
    }
}

/// Releases that are due once more. `T` is what is released.
#[derive(Debug)]
pub(crate) struct SecondReleases<T> {
    /// How long after its connection was given up a request may still be executed.
    late_max: Duration,
    /// Ordered by due time.
    waiting: VecDeque<SecondRelease<T>>,
}

#[derive(Debug)]
struct SecondRelease<T> {
    due: Moment,
    is_postponed: bool,
    release: T,
}

impl<T> SecondReleases<T> {
    pub(crate) const fn new(late_max: Duration) -> Self {
        Self {
            late_max,
            waiting: VecDeque::new(),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Adds a release, due when no request of its cycle can arrive any more.
    pub(crate) fn add(&mut self, release: T, now: Moment) {
        self.waiting.push_back(SecondRelease {
            due: now + self.late_max,
            is_postponed: false,
            release,
        });
    }

    /// When the first one is due.
    pub(crate) fn next_due(&self) -> Option<Moment> {
        self.waiting.front().map(|second| second.due)
    }

    /// The first one, if it is due. It stays first until it is postponed or removed.
    pub(crate) fn first_due(&self, now: Moment) -> Option<&T> {
        let first = self.waiting.front().filter(|first| first.due <= now);
        first.map(|first| &first.release)
    }

    /// Postpones the first one if a connection was given up lately: that of its acquire may have
    /// been given up only after the release was answered. Each is postponed once at most. Returns
    /// whether it was.
    pub(crate) fn postpone_first(&mut self, now: Moment, last_cut: Option<Moment>) -> bool {
        let must_wait = |first: &SecondRelease<T>| !first.is_postponed && was_cut_lately(now, last_cut, self.late_max);
        if !self.waiting.front().is_some_and(must_wait) {
            return false;
        }
        if let Some(first) = self.waiting.pop_front() {
            self.waiting.push_back(SecondRelease {
                due: now + self.late_max,
                is_postponed: true,
                ..first
            });
        }
        true
    }

    /// Whether a release for which `is_one` holds is due.
    pub(crate) fn has_due(&self, now: Moment, is_one: impl Fn(&T) -> bool) -> bool {
        let mut due = self.waiting.iter().take_while(|second| second.due <= now);
        due.any(|second| is_one(&second.release))
    }

    /// Forgets the releases for which `is_one` holds.
    pub(crate) fn forget(&mut self, is_one: impl Fn(&T) -> bool) {
        self.waiting.retain(|second| !is_one(&second.release));
    }

    pub(crate) fn remove_first(&mut self) -> Option<T> {
        self.waiting.pop_front().map(|first| first.release)
    }
}

/// Whether a request sent on a connection that was given up at `last_cut` may still arrive.
pub(crate) fn was_cut_lately(now: Moment, last_cut: Option<Moment>, late_max: Duration) -> bool {
    last_cut.is_some_and(|cut| now.since(cut) < late_max)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LATE_MAX: Duration = Duration::from_secs(30);

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    #[test]
    fn only_cycles_from_before_a_cut_may_arrive_late() {
        let mut late = LateRequests::default();
        let old = Cycle::of(4);
        assert!(late.may_include(old, at(10), || 5));
        assert!(
            !late.may_include(Cycle::of(6), at(10), || 7),
            "it was opened after the cut"
        );
        assert!(late.may_include(Cycle::of(6), at(20), || 7), "there was another cut");
    }

    #[test]
    fn second_release_is_due_when_nothing_can_arrive_and_postponed_once() {
        let mut second_releases = SecondReleases::new(LATE_MAX);
        second_releases.add("one", at(0));
        second_releases.add("other", at(5));
        let due = at(0) + LATE_MAX;
        assert_eq!(
            (second_releases.next_due(), second_releases.first_due(at(10))),
            (Some(due), None)
        );
        assert_eq!(second_releases.first_due(due), Some(&"one"));
        assert!(!second_releases.postpone_first(due, None), "no connection was given up");
        assert!(
            !second_releases.postpone_first(due, Some(at(0))),
            "that one can't carry anything any more"
        );
        assert!(second_releases.postpone_first(due, Some(at(1))));
        let due = at(5) + LATE_MAX;
        assert_eq!(second_releases.first_due(due), Some(&"other"));
        assert_eq!(second_releases.remove_first(), Some("other"));
        let later = at(0) + 2 * LATE_MAX;
        assert_eq!(
            (second_releases.first_due(due), second_releases.first_due(later)),
            (None, Some(&"one"))
        );
        assert!(!second_releases.postpone_first(later, Some(later)), "only once");
    }

    #[test]
    fn second_release_can_be_looked_up_and_forgotten() {
        let mut second_releases = SecondReleases::new(LATE_MAX);
        second_releases.add("one", at(0));
        second_releases.add("other", at(5));
        let (due, later) = (at(0) + LATE_MAX, at(5) + LATE_MAX);
        let has_due = |second_releases: &SecondReleases<_>, now| {
            ["one", "other"].map(|name| second_releases.has_due(now, |it| *it == name))
        };
        assert_eq!(has_due(&second_releases, at(10)), [false, false]);
        assert_eq!(has_due(&second_releases, due), [true, false]);
        assert_eq!(has_due(&second_releases, later), [true, true]);
        second_releases.forget(|it| *it == "one");
        assert_eq!(has_due(&second_releases, later), [false, true]);
    }
}
