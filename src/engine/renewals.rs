//! The renewals of a shard that are due, in the order in which they are sent.
//!
//! # Implementation details
//!
//! A server renews some 100,000 leases per second, fewer under other load. Renewals sent beyond
//! that queue up at the server, time out there, are executed anyway, and are sent again: the more
//! renewals there are, the fewer succeed in time. So only as many batches are in flight as get a
//! reply in time. The others wait here, ordered by when their leases end. The number of batches in
//! flight is halved when one times out, and grows by one with each reply.
//!
//! If batches are sent when more than a third of a lease's time is gone (more, if `renew_fraction`
//! is larger than its default), the shard holds more leases than it can renew
//! ([`Renewals::is_strained`]), and accepts no new keys until it keeps up again.

use std::collections::BTreeMap;
use std::time::Duration;

use super::Rules;
use crate::clock::Moment;

/// The maximum number of leases in a batch.
const BATCH_MAX: usize = 1024;
/// The largest and smallest limit on batches in flight. If one of several nodes does not reply, the
/// leases on the others must still be renewed in time.
const IN_FLIGHT_MAX: usize = 64;
const IN_FLIGHT_MIN: usize = 24;
/// With fewer leases, renewals are late for reasons other than their number.
pub(crate) const STRAIN_MIN: usize = 8 * BATCH_MAX;
/// The shortest time limit of a batch.
const LIMIT_MIN: Duration = Duration::from_millis(10);

/// A lease to renew.
pub(crate) struct Due<T> {
    pub(crate) what: T,
    pub(crate) ttl: Duration,
    /// The approximate time at which the lease ends.
    pub(crate) ends_at: Moment,
    /// With less time left, its renewal is late.
    late_below: Duration,
}

impl<T> Due<T> {
    /// A lease whose renewal is late by that time.
    pub(crate) fn new(what: T, ttl: Duration, late: Duration, rules: &Rules, now: Moment) -> Self {
        let left = ttl.mul_f64(1.0 - rules.renew_fraction).saturating_sub(late);
        Self {
            what,
            ttl,
            ends_at: now + left,
            late_below: ttl.mul_f64(1.0 - late_after(rules.renew_fraction)),
        }
    }
}

/// The fraction of its TTL after which the renewal of a lease is late: a third, but not before a
/// quarter of the time that was left when it became due has passed.
fn late_after(renew_fraction: f64) -> f64 {
    (1.0_f64 / 3.0).max(renew_fraction + (1.0 - renew_fraction) / 4.0)
}

/// How long to wait for the reply to a batch of leases with these TTLs, at most `timeout`. A batch
/// that hangs must leave time for another attempt before its first lease ends.
pub(crate) fn time_limit(ttls: impl IntoIterator<Item = Duration>, timeout: Duration) -> Duration {
    let shortest = ttls.into_iter().min().unwrap_or(timeout);
    timeout.min((shortest / 3).max(LIMIT_MIN))
}

/// See the module documentation.
pub(crate) struct Renewals<T> {
    /// Keyed by the earliest end of a lease in the batch, and a number to break ties.
    waiting: BTreeMap<(Moment, u64), Vec<Due<T>>>,
    next_number: u64,
    /// Whether the last batch was sent late.
    is_late: bool,
    in_flight: usize,
    in_flight_max: usize,
}

impl<T> Renewals<T> {
    pub(crate) const fn new() -> Self {
        Self {
            waiting: BTreeMap::new(),
            next_number: 0,
            is_late: false,
            in_flight: 0,
            in_flight_max: IN_FLIGHT_MAX,
        }
    }

    /// Adds leases that are due, in batches.
    pub(crate) fn add(&mut self, due: Vec<Due<T>>) {
        for batch in batches(due) {
            let Some(ends_at) = batch.iter().map(|due| due.ends_at).min() else {
                continue;
            };
            self.waiting.insert((ends_at, self.next_number), batch);
            self.next_number += 1;
        }
    }

    /// The next batch to send, unless the limit on batches in flight is reached. The batch is in
    /// flight until [`ended`](Self::ended) is called.
    pub(crate) fn next(&mut self, now: Moment) -> Option<Vec<Due<T>>> {
        if self.in_flight >= self.in_flight_max {
            return None;
        }
        let (_, batch) = self.waiting.pop_first()?;
        self.is_late = is_late(&batch, now);
        self.in_flight += 1;
        Some(batch)
    }

    /// A batch got its reply or timed out.
    pub(crate) fn ended(&mut self, in_time: bool) {
        debug_assert!(self.in_flight > 0, "the end of a batch that is not in flight");
        self.in_flight = self.in_flight.saturating_sub(1);
        self.in_flight_max = if in_time {
            (self.in_flight_max + 1).min(IN_FLIGHT_MAX)
        } else {
            (self.in_flight_max / 2).max(IN_FLIGHT_MIN)
        };
    }

    /// Whether there are more leases than are renewed in time: the last batch was sent late, or the
    /// next one is late by now.
    pub(crate) fn is_strained(&self, leases: usize, now: Moment) -> bool {
        leases >= STRAIN_MIN && self.has_late_batch(now)
    }

    fn has_late_batch(&self, now: Moment) -> bool {
        self.is_late || self.waiting.values().next().is_some_and(|batch| is_late(batch, now))
    }
}

fn is_late<T>(batch: &[Due<T>], now: Moment) -> bool {
    batch.iter().any(|due| due.ends_at.since(now) < due.late_below)
}

/// Splits leases into batches of limited size in which no TTL is more than twice the shortest. A
/// batch waits for its reply for a fraction of its shortest TTL. That may be too short for any
/// reply, which must not affect leases that could wait longer.
fn batches<T>(mut due: Vec<Due<T>>) -> Vec<Vec<Due<T>>> {
    due.sort_by_key(|due| due.ttl);
    let mut batches = Vec::new();
    while let Some(shortest) = due.first().map(|due| due.ttl) {
        let alike = due.partition_point(|due| due.ttl <= 2 * shortest).min(BATCH_MAX);
        let rest = due.split_off(alike);
        batches.push(std::mem::replace(&mut due, rest));
    }
    batches
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(10);

    fn at(millis: u64) -> Moment {
        Moment::from_nanos(millis * 1_000_000)
    }

    fn due(ttl: Duration, ends_at: Moment) -> Due<()> {
        Due {
            what: (),
            ttl,
            ends_at,
            late_below: ttl * 2 / 3,
        }
    }

    fn rules(renew_fraction: f64) -> Rules {
        Rules {
            max_burst: 1,
            max_slice: TTL,
            renew_fraction,
            flaw: None,
        }
    }

    fn many(count: usize, ends_at: Moment) -> Vec<Due<()>> {
        std::iter::repeat_with(|| due(TTL, ends_at)).take(count).collect()
    }

    #[test]
    fn lease_that_is_due_ends_after_what_is_left_of_its_ttl() {
        let rules = rules(0.25);
        let end = |late| Due::new((), TTL, Duration::from_millis(late), &rules, at(100)).ends_at;
        assert_eq!([end(0), end(500), end(8_000)], [at(7_600), at(7_100), at(100)]);
    }

    #[test]
    fn leases_that_can_wait_are_not_in_a_batch_with_those_that_cannot() {
        let of = |ttls: &[u64]| -> Vec<Vec<u64>> {
            let ttl = |&millis: &u64| due(Duration::from_millis(millis), at(0));
            let millis = |batch: Vec<Due<()>>| batch.iter().map(|due| due.ttl.as_millis() as u64).collect();
            batches(ttls.iter().map(ttl).collect())
                .into_iter()
                .map(millis)
                .collect()
        };
        assert!(of(&[]).is_empty());
        assert_eq!(of(&[10_000; 3]), [[10_000; 3]]);
        assert_eq!(
            of(&[10_000, 150, 300, 301, 150, 20_000, 20_001]),
            [vec![150, 150, 300], vec![301], vec![10_000, 20_000], vec![20_001]]
        );
        let sizes: Vec<usize> = batches(many(2 * BATCH_MAX + 1, at(0))).iter().map(Vec::len).collect();
        assert_eq!(sizes, [BATCH_MAX, BATCH_MAX, 1]);
    }

    #[test]
    fn batches_in_flight_are_limited_to_what_is_answered_in_time() {
        let mut renewals = Renewals::new();
        renewals.add(many(200 * BATCH_MAX, at(0)));
        let send = |renewals: &mut Renewals<()>| std::iter::from_fn(|| renewals.next(at(0))).count();
        assert_eq!(send(&mut renewals), IN_FLIGHT_MAX);
        renewals.ended(false);
        assert_eq!(send(&mut renewals), 0);
        (1..IN_FLIGHT_MAX).for_each(|_| renewals.ended(false));
        assert_eq!(send(&mut renewals), IN_FLIGHT_MIN);
        renewals.ended(true);
        assert_eq!(send(&mut renewals), 2);
    }

    #[test]
    fn number_in_flight_is_halved_by_a_missing_reply_and_grows_with_each_reply() {
        let mut renewals = Renewals::new();
        renewals.add(many(200 * BATCH_MAX, at(0)));
        let sent = std::iter::from_fn(|| renewals.next(at(0))).count();
        assert_eq!(sent, IN_FLIGHT_MAX);
        renewals.ended(false);
        // Half as many may be in flight, and one more for each reply.
        (1..IN_FLIGHT_MAX / 4).for_each(|_| renewals.ended(true));
        assert!(renewals.next(at(0)).is_none());
        renewals.ended(true);
        assert!(renewals.next(at(0)).is_some());
    }

    #[test]
    fn few_leases_are_no_strain() {
        let mut renewals = Renewals::new();
        renewals.add(many(1, at(0)));
        assert!(!renewals.is_strained(STRAIN_MIN - 1, at(5_000)));
        assert!(renewals.is_strained(STRAIN_MIN, at(5_000)));
    }

    #[test]
    fn batch_is_late_once_more_than_a_third_of_a_ttl_is_gone() {
        let mut renewals = Renewals::new();
        let ttl = Duration::from_secs(9);
        renewals.add(vec![due(ttl, at(9_000))]);
        assert!(!renewals.is_strained(STRAIN_MIN, at(3_000)));
        assert!(renewals.is_strained(STRAIN_MIN, at(3_001)));
    }

    /// Regression: with a `renew_fraction` above a third, every renewal counted as late, and a
    /// shard with many leases refused new keys for ever.
    #[test]
    fn renewal_in_time_is_not_late_with_any_renew_fraction() {
        for renew_fraction in [0.02, 0.1, 0.34, 0.5] {
            let due = || vec![Due::new((), TTL, Duration::ZERO, &rules(renew_fraction), at(0))];
            let mut renewals = Renewals::new();
            renewals.add(due());
            assert!(!renewals.is_strained(STRAIN_MIN, at(0)), "{renew_fraction}");
            let left = due()[0].ends_at.since(at(0)).as_millis() as u64;
            assert!(!renewals.is_strained(STRAIN_MIN, at(left / 5)), "{renew_fraction}");
            assert!(renewals.is_strained(STRAIN_MIN, at(left / 2)), "{renew_fraction}");
        }
    }

    #[test]
    fn batch_that_hangs_leaves_time_for_another_attempt() {
        let ms = Duration::from_millis;
        let limit = |ttls: &[u64], timeout| time_limit(ttls.iter().copied().map(ms), ms(timeout));
        assert_eq!(limit(&[10_000, 3_000], 5_000), ms(1_000));
        assert_eq!(limit(&[60_000], 5_000), ms(5_000));
        assert_eq!(limit(&[15], 5_000), ms(10));
        assert_eq!(limit(&[], 5_000), ms(5_000) / 3);
    }

    #[test]
    fn leases_that_end_first_are_renewed_first() {
        let mut renewals = Renewals::new();
        for ends_at in [3, 1, 2, 1] {
            renewals.add(many(1, at(ends_at)));
        }
        let order: Vec<Moment> = std::iter::from_fn(|| renewals.next(at(0)))
            .map(|batch| batch[0].ends_at)
            .collect();
        assert_eq!(order, [at(1), at(1), at(2), at(3)]);
    }

    #[test]
    fn batches_that_are_sent_late_are_a_strain() {
        let mut renewals = Renewals::new();
        renewals.add(many(1, at(12_000)));
        assert!(!renewals.has_late_batch(at(5_000)));
        assert!(renewals.has_late_batch(at(6_000)), "it waits");
        assert!(renewals.next(at(6_000)).is_some());
        assert!(renewals.has_late_batch(at(6_000)), "it was late");
        renewals.add(many(1, at(20_000)));
        assert!(renewals.next(at(11_000)).is_some());
        assert!(!renewals.has_late_batch(at(11_000)));
    }
}
