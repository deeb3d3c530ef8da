//! Rates, from the differences between two samples of a source.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::top::source::{Locks, Sample};

/// Samples closer together than this give no reliable rate.
const INTERVAL_MIN: Duration = Duration::from_millis(20);

/// Rates per second.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(in crate::top) struct LockRates {
    pub(in crate::top) acquired: f64,
    pub(in crate::top) local: f64,
    pub(in crate::top) remote: f64,
}

impl LockRates {
    pub(super) fn add(&mut self, other: Self) {
        self.acquired += other.acquired;
        self.local += other.local;
        self.remote += other.remote;
    }
}

/// The shard and the key.
pub(super) type ShardKey = (String, String);

/// The rates of one source. Their number is bounded by its last sample.
#[derive(Debug, Default)]
pub(super) struct Rates {
    contended: HashMap<ShardKey, f64>,
    locks: HashMap<String, LockRates>,
}

impl Rates {
    /// Updates the rates with a new sample. A process that has restarted has none until its second
    /// sample.
    pub(super) fn update(&mut self, before: Option<(&Sample, Instant)>, now: (&Sample, Instant)) {
        let (sample, at) = now;
        let Some((previous, seconds)) = before
            .filter(|(previous, _)| previous.manager == sample.manager)
            .map(|(previous, previous_at)| (previous, at.saturating_duration_since(previous_at)))
            .filter(|(_, between)| *between >= INTERVAL_MIN)
            .map(|(previous, between)| (previous, between.as_secs_f64()))
        else {
            *self = Self::default();
            return;
        };
        self.contended = self.contended(previous, sample, seconds);
        let counted: HashMap<&str, Locks> = previous
            .shards
            .iter()
            .filter_map(|shard| Some((shard.name.as_str(), shard.locks?)))
            .collect();
        let shards = sample.shards.iter().filter_map(|shard| {
            let (locks, previous) = (shard.locks?, counted.get(shard.name.as_str())?);
            let rate = |now: u64, previous: u64| now.saturating_sub(previous) as f64 / seconds;
            let rates = LockRates {
                acquired: rate(locks.acquired, previous.acquired),
                local: rate(locks.local, previous.local),
                remote: rate(locks.remote, previous.remote),
            };
            Some((shard.name.clone(), rates))
        });
        self.locks = shards.collect();
    }

    fn contended(&self, previous: &Sample, sample: &Sample, seconds: f64) -> HashMap<ShardKey, f64> {
        let counted: HashMap<(&str, &str), u64> = previous
            .hot
            .iter()
            .filter_map(|hot| Some(((hot.shard.as_str(), hot.key.as_str()), hot.contended?)))
            .collect();
        let rates = sample.hot.iter().filter_map(|hot| {
            let previous = *counted.get(&(hot.shard.as_str(), hot.key.as_str()))?;
            let shard_key = (hot.shard.clone(), hot.key.clone());
            let rate = match hot.contended?.checked_sub(previous) {
                Some(more) => more as f64 / seconds,
                // The counters are halved now and then; the last rate known before that is the
                // closest.
                None => *self.contended.get(&shard_key)?,
            };
            Some((shard_key, rate))
        });
        rates.collect()
    }

    pub(super) fn contended_of(&self, shard_key: &ShardKey) -> Option<f64> {
        self.contended.get(shard_key).copied()
    }

    pub(super) fn locks_of(&self, shard: &str) -> Option<LockRates> {
        self.locks.get(shard).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::source::{HotKey, Shard};

    fn sample(manager: &str, contended: u64, acquired: u64) -> Sample {
        let hot = HotKey {
            key: "k".to_owned(),
            shard: "s".to_owned(),
            contended: Some(contended),
            ..HotKey::default()
        };
        let locks = Locks {
            acquired,
            local: acquired / 2,
            remote: 0,
        };
        let shard = Shard {
            name: "s".to_owned(),
            locks: Some(locks),
            ..Shard::default()
        };
        Sample {
            manager: Some(manager.to_owned()),
            hot: vec![hot],
            shards: vec![shard],
            ..Sample::default()
        }
    }

    fn known(rates: &Rates) -> (Option<f64>, Option<f64>) {
        let shard_key = ("s".to_owned(), "k".to_owned());
        (
            rates.contended_of(&shard_key),
            rates.locks_of("s").map(|rates| rates.acquired),
        )
    }

    #[test]
    fn a_rate_is_the_difference_by_the_time_between() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let (first, second) = (sample("m", 10, 100), sample("m", 30, 500));
        rates.update(None, (&first, start));
        assert_eq!(known(&rates), (None, None));
        rates.update(Some((&first, start)), (&second, start + Duration::from_secs(2)));
        assert_eq!(known(&rates), (Some(10.0), Some(200.0)));
        assert_eq!(rates.locks_of("s").map(|rates| rates.local), Some(100.0));
    }

    #[test]
    fn a_count_that_fades_leaves_the_rate_as_it_was() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let samples = [sample("m", 10, 0), sample("m", 30, 0), sample("m", 16, 0)];
        for pair in samples.windows(2).enumerate() {
            let (number, [before, after]) = pair else {
                panic!("{pair:?}")
            };
            let at = start + Duration::from_secs(number as u64);
            rates.update(Some((before, at)), (after, at + Duration::from_secs(1)));
        }
        assert_eq!(known(&rates).0, Some(20.0));
    }

    #[test]
    fn another_process_at_the_same_address_has_no_rates_yet() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let later = start + Duration::from_secs(1);
        rates.update(Some((&sample("m", 10, 100), start)), (&sample("n", 5000, 9000), later));
        assert_eq!(known(&rates), (None, None));
    }
}
