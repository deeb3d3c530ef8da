//! Rates, from the differences between two samples of a process.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::top::source::{Locks, Look};

/// Samples closer together than this give no reliable rate.
const BETWEEN_LEAST: Duration = Duration::from_millis(20);

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
pub(super) type Place = (String, String);

/// The rates of one process. Their number is bounded by its last sample.
#[derive(Debug, Default)]
pub(super) struct Rates {
    contended: HashMap<Place, f64>,
    locks: HashMap<String, LockRates>,
}

impl Rates {
    /// Updates the rates with a new sample. A process that has restarted has none until its second
    /// sample.
    pub(super) fn follow(&mut self, before: Option<(&Look, Instant)>, now: (&Look, Instant)) {
        let (look, at) = now;
        let Some((was, seconds)) = before
            .filter(|(was, _)| was.manager == look.manager)
            .map(|(was, was_at)| (was, at.saturating_duration_since(was_at)))
            .filter(|(_, between)| *between >= BETWEEN_LEAST)
            .map(|(was, between)| (was, between.as_secs_f64()))
        else {
            *self = Self::default();
            return;
        };
        self.contended = self.contended(was, look, seconds);
        let counted: HashMap<&str, Locks> = was
            .shards
            .iter()
            .filter_map(|shard| Some((shard.name.as_str(), shard.locks?)))
            .collect();
        let shards = look.shards.iter().filter_map(|shard| {
            let (locks, was) = (shard.locks?, counted.get(shard.name.as_str())?);
            let rate = |now: u64, was: u64| now.saturating_sub(was) as f64 / seconds;
            let rates = LockRates {
                acquired: rate(locks.acquired, was.acquired),
                local: rate(locks.local, was.local),
                remote: rate(locks.remote, was.remote),
            };
            Some((shard.name.clone(), rates))
        });
        self.locks = shards.collect();
    }

    fn contended(&self, was: &Look, look: &Look, seconds: f64) -> HashMap<Place, f64> {
        let counted: HashMap<(&str, &str), u64> = was
            .hot
            .iter()
            .filter_map(|hot| Some(((hot.shard.as_str(), hot.key.as_str()), hot.contended?)))
            .collect();
        let rates = look.hot.iter().filter_map(|hot| {
            let was = *counted.get(&(hot.shard.as_str(), hot.key.as_str()))?;
            let place = (hot.shard.clone(), hot.key.clone());
            let rate = match hot.contended?.checked_sub(was) {
                Some(more) => more as f64 / seconds,
                // The counters are halved now and then; the last rate known before that is the
                // closest.
                None => *self.contended.get(&place)?,
            };
            Some((place, rate))
        });
        rates.collect()
    }

    pub(super) fn contended_of(&self, place: &Place) -> Option<f64> {
        self.contended.get(place).copied()
    }

    pub(super) fn locks_of(&self, shard: &str) -> Option<LockRates> {
        self.locks.get(shard).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::top::source::{HotKey, Shard};

    fn look(manager: &str, contended: u64, acquired: u64) -> Look {
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
        Look {
            manager: Some(manager.to_owned()),
            hot: vec![hot],
            shards: vec![shard],
            ..Look::default()
        }
    }

    fn known(rates: &Rates) -> (Option<f64>, Option<f64>) {
        let place = ("s".to_owned(), "k".to_owned());
        (
            rates.contended_of(&place),
            rates.locks_of("s").map(|rates| rates.acquired),
        )
    }

    #[test]
    fn a_rate_is_the_difference_by_the_time_between() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let (first, second) = (look("m", 10, 100), look("m", 30, 500));
        rates.follow(None, (&first, start));
        assert_eq!(known(&rates), (None, None));
        rates.follow(Some((&first, start)), (&second, start + Duration::from_secs(2)));
        assert_eq!(known(&rates), (Some(10.0), Some(200.0)));
        assert_eq!(rates.locks_of("s").map(|rates| rates.local), Some(100.0));
    }

    #[test]
    fn a_count_that_fades_leaves_the_rate_as_it_was() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let looks = [look("m", 10, 0), look("m", 30, 0), look("m", 16, 0)];
        for pair in looks.windows(2).enumerate() {
            let (number, [before, after]) = pair else {
                panic!("{pair:?}")
            };
            let at = start + Duration::from_secs(number as u64);
            rates.follow(Some((before, at)), (after, at + Duration::from_secs(1)));
        }
        assert_eq!(known(&rates).0, Some(20.0));
    }

    #[test]
    fn another_process_at_the_same_address_has_no_rates_yet() {
        let (mut rates, start) = (Rates::default(), Instant::now());
        let later = start + Duration::from_secs(1);
        rates.follow(Some((&look("m", 10, 100), start)), (&look("n", 5000, 9000), later));
        assert_eq!(known(&rates), (None, None));
    }
}
