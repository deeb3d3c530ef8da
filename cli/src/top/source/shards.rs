//! Reads the shards directly if no process has an endpoint: who holds the known keys, and how many
//! processes wait for them.
//!
//! # Implementation details
//!
//! The cost of a sample is bounded: one request per known key, at most [`CONCURRENT_READS_MAX`] at
//! a time and [`KEYS_MAX`] in all. The servers are searched for keys only at the start and on
//! request.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use shardlock::config::{Builder, Config, Endpoint};
use shardlock::error::LockErrorKind;
use shardlock::introspect::KeyState;
use shardlock::{LockError, LockKey, LockManager};

use super::{Age, HeldLock, HeldMode, Holder, HotKey, Quantiles, SEVERAL, Sample, Shard, process_of};
use crate::servers::lease_scan::{self, Cursors, Search, SearchLimits};

/// The maximum number of known keys.
const KEYS_MAX: usize = 1000;
/// How many keys are read concurrently.
const CONCURRENT_READS_MAX: usize = 64;
/// The time limit of a search, per server.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(2);
/// A key found by a search is dropped if it is not held or waited for during this time.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Which keys to show.
#[derive(Debug, Clone)]
pub(in crate::top) struct KeySelection {
    pub(in crate::top) named: Vec<LockKey>,
    /// How many keys of a server a search scans; zero to not search.
    pub(in crate::top) budget: u64,
}

#[derive(Debug)]
pub(in crate::top) struct Shards {
    config: Config,
    locks: LockManager,
    budget: u64,
    keys: BTreeMap<LockKey, KnownKey>,
    cursors: Cursors,
    /// The message of the last search.
    search_note: Option<String>,
}

#[derive(Debug)]
struct KnownKey {
    /// Given by `--key`, and so never dropped.
    named: bool,
    used_at: Instant,
    /// The current owner, or [`TOGETHER`], and when it was first seen.
    owner: Option<(String, Instant)>,
}

impl Shards {
    /// Connects, and searches for keys unless some are named.
    ///
    /// # Errors
    ///
    /// The errors of connecting.
    pub(in crate::top) async fn connect(config: Config, selection: KeySelection) -> Result<Self, LockError> {
        let locks = Builder::new().config(config.clone()).connect().await?;
        let now = Instant::now();
        let is_anything_named = !selection.named.is_empty();
        let named = selection.named.into_iter().map(|key| {
            let known = KnownKey {
                named: true,
                used_at: now,
                owner: None,
            };
            (key, known)
        });
        let mut shards = Self {
            keys: named.collect(),
            config,
            locks,
            budget: selection.budget,
            cursors: Cursors::default(),
            search_note: None,
        };
        if !is_anything_named {
            shards.search().await;
        }
        Ok(shards)
    }

    pub(super) fn label(&self) -> String {
        match &self.config.shards[..] {
            [shard] => format!("shard {}", shard.name),
            shards => format!("{} shards", shards.len()),
        }
    }

    /// Searches the servers for more leases.
    pub(super) async fn search(&mut self) {
        let before = self.keys.len();
        let (mut more, mut errors) = (false, BTreeSet::new());
        if self.budget == 0 {
            errors.insert("--scan is 0, so the servers are not searched for keys".to_owned());
        } else {
            let search = Search {
                config: &self.config,
                prefix: "",
                limits: SearchLimits {
                    scanned_max: self.budget,
                    time_max: SEARCH_TIME_MAX,
                    found_max: usize::MAX,
                },
            };
            for shard in &self.config.shards {
                // The manager has already parsed it.
                let Ok(endpoint) = Endpoint::parse(&shard.url) else {
                    continue;
                };
                match lease_scan::search(&shard.name, &endpoint, search, &mut self.cursors).await {
                    Ok(found) => {
                        more |= found.more;
                        errors.extend(found.failures);
                        let map = self.locks.shard_map();
                        let here = found
                            .keys
                            .into_keys()
                            .filter(|key| map.name(key.slot()) == Some(&*shard.name));
                        more |= !add_keys(&mut self.keys, here, Instant::now());
                    }
                    Err(error) => {
                        errors.insert(error);
                    }
                }
            }
        }
        let new = self.keys.len() - before;
        self.search_note = match errors.into_iter().next() {
            Some(error) => Some(error),
            None if more => Some(format!(
                "found {new} more; not all keys were searched, press n to continue"
            )),
            None => None,
        };
    }

    pub(super) async fn sample(&mut self) -> Sample {
        let keys: Vec<LockKey> = self.keys.keys().cloned().collect();
        let now = Instant::now();
        let locks = &self.locks;
        let states: Vec<_> = stream::iter(keys)
            .map(|key| async move {
                let state = locks.inspect(&key).await;
                (key, state)
            })
            .buffer_unordered(CONCURRENT_READS_MAX)
            .collect()
            .await;
        let mut sample = Sample::default();
        let mut failure = None;
        let mut per_shard: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (key, state) in states {
            let state = match state {
                Ok(state) => state,
                // A key found by a search that is not a lease.
                Err(error)
                    if error.kind() == LockErrorKind::Refused
                        && self.keys.get(&key).is_some_and(|known| !known.named) =>
                {
                    self.keys.remove(&key);
                    continue;
                }
                Err(error) => {
                    failure.get_or_insert_with(|| error.to_string());
                    continue;
                }
            };
            // A connected manager has shards.
            let shard = self.locks.shard_map().name(key.slot()).unwrap_or_default().to_owned();
            let (leases, waiters) = per_shard.entry(shard.clone()).or_default();
            *leases += usize::from(state.holder.is_some()) + state.holder_count as usize;
            *waiters += state.queue_length as usize;
            let Some(known) = self.keys.get_mut(&key) else { continue };
            known.update(&state, now);
            add_rows(&mut sample, &key, shard, &state, known, now);
        }
        self.keys
            .retain(|_, known| known.named || now.duration_since(known.used_at) < IDLE_MAX);
        sample.held_total = sample.held.len();
        sample.held.sort_by_key(|held| std::cmp::Reverse(held.age));
        sample.shards = self.shards(&per_shard);
        sample.note = failure.or_else(|| self.search_note.clone());
        sample
    }

    fn shards(&self, per_shard: &BTreeMap<String, (usize, usize)>) -> Vec<Shard> {
        let shards = self.locks.shard_states().into_iter().map(|shard| {
            let (leases, waiters) = per_shard.get(&shard.name).copied().unwrap_or_default();
            Shard {
                kind: shard.kind,
                up: shard.is_up,
                leases,
                waiters,
                locks: None,
                round_trips: Quantiles {
                    p50: shard.round_trips.p50,
                    p99: shard.round_trips.p99,
                },
                name: shard.name,
            }
        });
        shards.collect()
    }
}

/// Adds the found keys while there is room. Returns whether all of them fit.
fn add_keys(keys: &mut BTreeMap<LockKey, KnownKey>, found: impl Iterator<Item = LockKey>, now: Instant) -> bool {
    for key in found {
        if keys.len() >= KEYS_MAX && !keys.contains_key(&key) {
            return false;
        }
        keys.entry(key).or_insert(KnownKey {
            named: false,
            used_at: now,
            owner: None,
        });
    }
    true
}

impl KnownKey {
    fn update(&mut self, state: &KeyState, now: Instant) {
        let holder = state.holder.as_ref().map(|holder| holder.owner.as_str());
        let holder = holder.or((state.holder_count > 0).then_some(TOGETHER));
        if holder.is_some() || state.queue_length > 0 {
            self.used_at = now;
        }
        self.owner = holder.map(|holder| match self.owner.take() {
            Some((owner, since)) if owner == holder => (owner, since),
            _ => (holder.to_owned(), now),
        });
    }
}

/// In place of the owner of a key that is held together: it stays held while its holders change.
const TOGETHER: &str = "~together";

/// The process that holds the key, if it is only one.
fn process_in(state: &KeyState, owner: &str) -> String {
    let mut processes = state.holders.iter().map(|holder| process_of(&holder.owner));
    match processes.next() {
        None => process_of(owner).to_owned(),
        Some(first) if processes.all(|process| process == first) => first.to_owned(),
        Some(_) => SEVERAL.to_owned(),
    }
}

fn add_rows(sample: &mut Sample, key: &LockKey, shard: String, state: &KeyState, known: &KnownKey, now: Instant) {
    let waiters = state.queue_length as usize;
    let holder = known.owner.as_ref().map(|(owner, since)| Holder {
        process: process_in(state, owner),
        age: Age {
            time: now.duration_since(*since),
            at_least: true,
        },
    });
    if let Some(holder) = &holder {
        sample.held.push(HeldLock {
            key: key.to_string(),
            shard: shard.clone(),
            holder: holder.process.clone(),
            mode: HeldMode::of_state(state),
            age: holder.age,
            // Shared holders are listed by their ends: the key is free after the last of them.
            remaining: state
                .holder
                .as_ref()
                .or(state.holders.last())
                .and_then(|holder| holder.remaining),
            waiters,
            // The slot's latest token may belong to another lock.
            token: None,
            caller: None,
        });
    }
    if waiters > 0 || known.named {
        sample.hot.push(HotKey {
            key: key.to_string(),
            shard,
            contended: None,
            waiters,
            holder,
            waits: None,
        });
    }
}
