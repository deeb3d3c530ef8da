//! Delays between retries: exponential, with random jitter.

use std::ops::RangeInclusive;
use std::time::Duration;

use crate::random;

/// Delays for consecutive failed attempts.
///
/// The bound of the delay doubles with each attempt, up to a limit. The delay itself is drawn
/// uniformly from half the smallest bound to the current bound ("full jitter"), so that processes
/// that lost the same server at the same time do not all return at the same time.
#[derive(Debug, Clone)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    bound: Duration,
}

impl Backoff {
    /// The first delay is at most `min`, later ones at most `max`.
    #[must_use]
    pub fn new(min: Duration, max: Duration) -> Self {
        Self { min, max, bound: min }
    }

    /// An attempt succeeded: start over with the first delay.
    pub(crate) fn reset(&mut self) {
        self.bound = self.min;
    }

    /// From now on, delays are at most `max`, and the bound of the next one is at least `bound`.
    pub(crate) fn set_limits(&mut self, bound: Duration, max: Duration) {
        self.max = max;
        self.bound = self.bound.max(bound).min(max);
    }

    /// The next delay.
    pub fn next_delay(&mut self) -> Duration {
        random::time_in(self.next_range())
    }

    /// The range from which the next delay is to be drawn, for callers that must not draw it
    /// themselves.
    pub(crate) fn next_range(&mut self) -> RangeInclusive<Duration> {
        let bound = self.bound;
        self.bound = bound.saturating_mul(2).min(self.max);
        self.min.min(bound) / 2..=bound
    }

    /// The delay after this many failed attempts, for callers that keep their own count.
    pub(crate) fn delay_after(attempts: u32, min: Duration, max: Duration) -> Duration {
        let doubled = 2_u32.saturating_pow(attempts.saturating_sub(1));
        let bound = min.saturating_mul(doubled).min(max);
        Self { min, max, bound }.next_delay()
    }

    /// Sleeps for the next delay.
    pub(crate) async fn wait(&mut self) {
        tokio::time::sleep(self.next_delay()).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIN: Duration = Duration::from_millis(5);
    const MAX: Duration = Duration::from_secs(1);

    /// Delays of consecutive failed attempts.
    fn delays(count: usize) -> Vec<Duration> {
        let mut backoff = Backoff::new(MIN, MAX);
        (0..count).map(|_| backoff.next_delay()).collect()
    }

    #[test]
    fn delays_grow_within_their_bounds() {
        for _ in 0..100 {
            for (attempt, delay) in delays(12).into_iter().enumerate() {
                let bound = (MIN * 2_u32.pow(attempt as u32)).min(MAX);
                assert!((MIN / 2..=bound).contains(&delay), "attempt {attempt}: {delay:?}");
            }
        }
    }

    #[test]
    fn a_thousand_processes_reconnect_at_different_times() {
        // The server was unavailable for about two seconds.
        let mut tenths = [0; 100];
        for _ in 0..1000 {
            let mut at = Duration::ZERO;
            let mut backoff = Backoff::new(MIN, MAX);
            while at < Duration::from_secs(2) {
                at += backoff.next_delay();
            }
            tenths[at.as_millis() as usize / 100] += 1;
        }
        assert!(tenths.iter().all(|&count| count < 300), "{tenths:?}");
    }

    #[test]
    fn attempts_may_be_counted_elsewhere() {
        for (attempts, bound) in [
            (0, MIN),
            (1, MIN),
            (2, MIN * 2),
            (4, MIN * 8),
            (40, MAX),
            (u32::MAX, MAX),
        ] {
            let delay = Backoff::delay_after(attempts, MIN, MAX);
            assert!((MIN / 2..=bound).contains(&delay), "attempt {attempts}: {delay:?}");
        }
    }

    #[test]
    fn success_resets_the_delay() {
        let mut backoff = Backoff::new(MIN, MAX);
        for _ in 0..20 {
            backoff.next_delay();
        }
        backoff.reset();
        assert!(backoff.next_delay() <= MIN);
    }

    #[test]
    fn limits_hold_from_the_next_delay() {
        let mut backoff = Backoff::new(MIN, MAX);
        backoff.set_limits(MAX, MAX * 4);
        assert_eq!(backoff.bound, MAX);
        for _ in 0..20 {
            backoff.next_delay();
        }
        assert_eq!(backoff.bound, MAX * 4);
        backoff.set_limits(Duration::ZERO, MAX);
        assert_eq!(backoff.bound, MAX);
    }
}
