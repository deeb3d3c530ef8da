//! Merges the samples of all processes into rows: one per key and one per shard.
//!
//! Counts are summed. Quantiles can't be, so the largest is shown, that of the slowest process.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use super::process::Process;
use super::rates::LockRates;
use crate::top::source::{Age, Quantiles};

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
    pub(in crate::top) who: String,
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
pub(in crate::top) const NOT_HERE: &str = "not here";

pub(super) fn hot(processes: &[Process]) -> Vec<HotRow> {
    let mut rows: BTreeMap<(&str, &str), HotRow> = BTreeMap::new();
    for process in processes {
        wanted(process, &mut rows);
        for hot in process.look().into_iter().flat_map(|look| &look.hot) {
            let row = rows.entry((&hot.shard, &hot.key)).or_default();
            row.key.clone_from(&hot.key);
            row.shard.clone_from(&hot.shard);
            row.waiters += hot.waiters;
            row.contended += hot.contended.unwrap_or_default();
            row.stale |= process.is_stale();
            row.waits = larger(row.waits, hot.waits);
            if let Some(rate) = process.rates.contended_of(&(hot.shard.clone(), hot.key.clone())) {
                row.rate = Some(row.rate.unwrap_or_default() + rate);
            }
            // Processes are sampled at different moments, so two may report the same lock. The one
            // that has held it for the shorter time got it from the other.
            if let Some(holder) = &hot.holder
                && row.age.is_none_or(|age| holder.age < age)
            {
                row.holder = Some(holder.who.clone());
                row.age = Some(holder.age);
            }
        }
    }
    let mut rows: Vec<_> = rows.into_values().collect();
    for row in rows.iter_mut().filter(|row| row.holder.is_none() && row.waiters > 0) {
        row.holder = Some(NOT_HERE.to_owned());
    }
    rows
}

/// Adds keys that are held and waited for but not hot yet. A process counts a waiter only when its
/// wait ends, so a key that is held for long may be missing from the hot keys although it matters
/// most.
fn wanted<'a>(process: &'a Process, rows: &mut BTreeMap<(&'a str, &'a str), HotRow>) {
    let Some(look) = process.look() else { return };
    let known: HashSet<(&str, &str)> = look
        .hot
        .iter()
        .map(|hot| (hot.shard.as_str(), hot.key.as_str()))
        .collect();
    for held in look.held.iter().filter(|held| held.waiters > 0) {
        let place = (held.shard.as_str(), held.key.as_str());
        if known.contains(&place) {
            continue;
        }
        let row = rows.entry(place).or_default();
        row.key.clone_from(&held.key);
        row.shard.clone_from(&held.shard);
        row.waiters += held.waiters;
        row.stale |= process.is_stale();
        if row.age.is_none_or(|age| held.age < age) {
            row.holder = Some(held.who.clone());
            row.age = Some(held.age);
        }
    }
}

pub(super) fn held(processes: &[Process]) -> Vec<HeldRow> {
    let mut rows: BTreeMap<(&str, &str), HeldRow> = BTreeMap::new();
    for process in processes {
        for held in process.look().into_iter().flat_map(|look| &look.held) {
            let row = HeldRow {
                key: held.key.clone(),
                shard: held.shard.clone(),
                who: held.who.clone(),
                age: held.age,
                remaining: held.remaining,
                waiters: held.waiters,
                token: held.token,
                caller: held.caller.clone(),
                stale: process.is_stale(),
            };
            let place = (held.shard.as_str(), held.key.as_str());
            match rows.get_mut(&place) {
                // The larger token belongs to the later holder.
                Some(known) if known.token >= row.token => known.waiters += row.waiters,
                Some(known) => {
                    let waiters = known.waiters + row.waiters;
                    *known = HeldRow { waiters, ..row };
                }
                None => {
                    rows.insert(place, row);
                }
            }
        }
    }
    // Waiters in processes other than the holder's are known only for hot keys.
    for process in processes {
        let Some(look) = process.look() else { continue };
        for hot in look.hot.iter().filter(|hot| hot.holder.is_none()) {
            if let Some(row) = rows.get_mut(&(hot.shard.as_str(), hot.key.as_str())) {
                row.waiters += hot.waiters;
            }
        }
    }
    rows.into_values().collect()
}

pub(super) fn shards(processes: &[Process]) -> Vec<ShardRow> {
    let mut rows: BTreeMap<&str, ShardRow> = BTreeMap::new();
    for process in processes {
        for shard in process.look().into_iter().flat_map(|look| &look.shards) {
            let row = rows.entry(&shard.name).or_default();
            row.name.clone_from(&shard.name);
            row.kind.clone_from(&shard.kind);
            row.up += usize::from(shard.up);
            row.of += 1;
            row.leases += shard.leases;
            row.waiters += shard.waiters;
            row.stale |= process.is_stale();
            row.round_trips = larger(Some(row.round_trips), Some(shard.round_trips)).unwrap_or_default();
            if let Some(rates) = process.rates.locks_of(&shard.name) {
                row.rates.get_or_insert_default().add(rates);
            }
        }
    }
    rows.into_values().collect()
}

fn larger(one: Option<Quantiles>, other: Option<Quantiles>) -> Option<Quantiles> {
    match (one, other) {
        (Some(one), Some(other)) => Some(Quantiles {
            p50: one.p50.max(other.p50),
            p99: one.p99.max(other.p99),
        }),
        (one, other) => one.or(other),
    }
}
