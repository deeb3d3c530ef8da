//! Merges the samples of all sources into rows: one per key and one per shard.
//!
//! Counts are summed. Quantiles can't be, so the largest is shown, that of the slowest process.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use super::rates::LockRates;
use super::source_state::SourceState;
use crate::top::source::{Age, HeldMode, Quantiles, SEVERAL};

#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::top) struct HotRow {
    pub(in crate::top) key: String,
    pub(in crate::top) shard: String,
    pub(in crate::top) holder: Option<String>,
    pub(in crate::top) age: Option<Age>,
    pub(in crate::top) waiters: usize,
    pub(in crate::top) waits: Option<Quantiles>,
    /// How many requests per second found it held or waited for.
    pub(in crate::top) rate: Option<f64>,
    pub(in crate::top) contended: u64,
    pub(in crate::top) stale: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub(in crate::top) struct HeldRow {
    pub(in crate::top) key: String,
    pub(in crate::top) shard: String,
    pub(in crate::top) holder: String,
    pub(in crate::top) mode: HeldMode,
    pub(in crate::top) age: Age,
    pub(in crate::top) remaining: Option<Duration>,
    pub(in crate::top) waiters: usize,
    pub(in crate::top) token: Option<u64>,
    pub(in crate::top) caller: Option<String>,
    pub(in crate::top) stale: bool,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(in crate::top) struct ShardRow {
    pub(in crate::top) name: String,
    pub(in crate::top) kind: String,
    /// How many processes see it up, and how many know it.
    pub(in crate::top) up: usize,
    pub(in crate::top) of: usize,
    pub(in crate::top) leases: usize,
    pub(in crate::top) waiters: usize,
    pub(in crate::top) rates: Option<LockRates>,
    pub(in crate::top) round_trips: Quantiles,
    pub(in crate::top) stale: bool,
}

/// Tasks wait, but none of the processes shown has a guard: another process holds the lock, or a
/// hand-off is in progress.
pub(in crate::top) const HELD_ELSEWHERE: &str = "not here";

pub(super) fn hot(sources: &[SourceState]) -> Vec<HotRow> {
    let mut rows: BTreeMap<(&str, &str), HotRow> = BTreeMap::new();
    for source in sources {
        add_long_held(source, &mut rows);
        for hot in source.sample().into_iter().flat_map(|sample| &sample.hot) {
            let row = rows.entry((&hot.shard, &hot.key)).or_default();
            row.key.clone_from(&hot.key);
            row.shard.clone_from(&hot.shard);
            row.waiters += hot.waiters;
            row.contended += hot.contended.unwrap_or_default();
            row.stale |= source.is_stale();
            row.waits = max_quantiles(row.waits, hot.waits);
            if let Some(rate) = source.rates.contended_of(&(hot.shard.clone(), hot.key.clone())) {
                row.rate = Some(row.rate.unwrap_or_default() + rate);
            }
            // Processes are sampled at different moments, so two may report the same lock. The one
            // that has held it for the shorter time got it from the other.
            if let Some(holder) = &hot.holder
                && row.age.is_none_or(|age| holder.age < age)
            {
                row.holder = Some(holder.process.clone());
                row.age = Some(holder.age);
            }
        }
    }
    let mut rows: Vec<_> = rows.into_values().collect();
    let together: Vec<HeldRow> = held(sources)
        .into_iter()
        .filter(|held| !held.mode.is_exclusive())
        .collect();
    for row in &mut rows {
        let is_same = |held: &&HeldRow| (&held.shard, &held.key) == (&row.shard, &row.key);
        if let Some(held) = together.iter().find(is_same) {
            (row.holder, row.age) = (Some(held.mode.describe_holders()), Some(held.age));
        } else if row.holder.is_none() && row.waiters > 0 {
            row.holder = Some(HELD_ELSEWHERE.to_owned());
        }
    }
    rows
}

/// Adds keys that are held and waited for but not hot yet. A process counts a waiter only when its
/// wait ends, so a key that is held for long may be missing from the hot keys although it matters
/// most.
fn add_long_held<'a>(source: &'a SourceState, rows: &mut BTreeMap<(&'a str, &'a str), HotRow>) {
    let Some(sample) = source.sample() else { return };
    let known: HashSet<(&str, &str)> = sample
        .hot
        .iter()
        .map(|hot| (hot.shard.as_str(), hot.key.as_str()))
        .collect();
    let held = held_by(source).into_iter();
    for (shard_key, held) in held.filter(|(_, held)| held.waiters > 0) {
        if known.contains(&shard_key) {
            continue;
        }
        let row = rows.entry(shard_key).or_default();
        row.key = held.key;
        row.shard = held.shard;
        row.waiters += held.waiters;
        row.stale |= source.is_stale();
        if row.age.is_none_or(|age| held.age < age) {
            row.holder = Some(held.holder);
            row.age = Some(held.age);
        }
    }
}

impl HeldRow {
    /// Adds what is known of the same key from elsewhere, but for the waiters.
    fn merge(&mut self, other: Self) {
        let waiters = self.waiters;
        if self.mode.is_exclusive() || other.mode.is_exclusive() {
            // The larger token belongs to the later holder.
            if self.token < other.token {
                *self = Self { waiters, ..other };
            }
            return;
        }
        if self.holder != other.holder {
            SEVERAL.clone_into(&mut self.holder);
        }
        if self.age < other.age {
            (self.age, self.caller) = (other.age, other.caller);
        }
        self.mode = self.mode.with(other.mode);
        self.token = self.token.max(other.token);
        self.stale |= other.stale;
        // A lease without a TTL never ends.
        self.remaining = self.remaining.zip(other.remaining).map(|(one, other)| one.max(other));
    }
}

/// The keys that one process or the shards hold, each once.
fn held_by(source: &SourceState) -> BTreeMap<(&str, &str), HeldRow> {
    let mut rows: BTreeMap<(&str, &str), HeldRow> = BTreeMap::new();
    for held in source.sample().into_iter().flat_map(|sample| &sample.held) {
        let row = HeldRow {
            key: held.key.clone(),
            shard: held.shard.clone(),
            holder: held.holder.clone(),
            mode: held.mode,
            age: held.age,
            remaining: held.remaining,
            waiters: held.waiters,
            token: held.token,
            caller: held.caller.clone(),
            stale: source.is_stale(),
        };
        match rows.get_mut(&(held.shard.as_str(), held.key.as_str())) {
            Some(known) => {
                // Each guard of a key reports the same tasks.
                known.waiters = known.waiters.max(row.waiters);
                known.merge(row);
            }
            None => {
                rows.insert((&held.shard, &held.key), row);
            }
        }
    }
    rows
}

pub(super) fn held(sources: &[SourceState]) -> Vec<HeldRow> {
    let mut rows: BTreeMap<(&str, &str), HeldRow> = BTreeMap::new();
    for source in sources {
        for (shard_key, row) in held_by(source) {
            match rows.get_mut(&shard_key) {
                Some(known) => {
                    known.waiters += row.waiters;
                    known.merge(row);
                }
                None => {
                    rows.insert(shard_key, row);
                }
            }
        }
    }
    // Waiters in processes other than the holder's are known only for hot keys.
    for source in sources {
        let Some(sample) = source.sample() else { continue };
        for hot in sample.hot.iter().filter(|hot| hot.holder.is_none()) {
            if let Some(row) = rows.get_mut(&(hot.shard.as_str(), hot.key.as_str())) {
                row.waiters += hot.waiters;
            }
        }
    }
    rows.into_values().collect()
}

pub(super) fn shards(sources: &[SourceState]) -> Vec<ShardRow> {
    let mut rows: BTreeMap<&str, ShardRow> = BTreeMap::new();
    for source in sources {
        for shard in source.sample().into_iter().flat_map(|sample| &sample.shards) {
            let row = rows.entry(&shard.name).or_default();
            row.name.clone_from(&shard.name);
            row.kind.clone_from(&shard.kind);
            row.up += usize::from(shard.up);
            row.of += 1;
            row.leases += shard.leases;
            row.waiters += shard.waiters;
            row.stale |= source.is_stale();
            row.round_trips = max_quantiles(Some(row.round_trips), Some(shard.round_trips)).unwrap_or_default();
            if let Some(rates) = source.rates.locks_of(&shard.name) {
                row.rates.get_or_insert_default().add(rates);
            }
        }
    }
    rows.into_values().collect()
}

fn max_quantiles(one: Option<Quantiles>, other: Option<Quantiles>) -> Option<Quantiles> {
    match (one, other) {
        (Some(one), Some(other)) => Some(Quantiles {
            p50: one.p50.max(other.p50),
            p99: one.p99.max(other.p99),
        }),
        (one, other) => one.or(other),
    }
}
