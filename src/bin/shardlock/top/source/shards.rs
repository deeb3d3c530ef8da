//! The shards themselves, where no process has an endpoint: who holds the keys that are known, and how many processes wait for them.
//!
//! # Implementation details
//!
//! What a look costs is bounded: one question for each known key, so many at a time, and there are at most [`KEYS_MAX`]. Which keys there are is
//! searched only at the start and when it is asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream};
use shardlock::{Builder, Config, Endpoint, Inspection, LockError, LockKey, LockManager};

use super::scan::{self, Cursors};
use super::{Age, HeldLock, Holder, HotKey, Look, Quantiles, Shard, process_of};

/// How many keys are known at a time.
const KEYS_MAX: usize = 1000;
/// How many keys are looked at at the same time.
const AT_ONCE: usize = 64;
/// A key that was found is forgotten if nobody held it or waited for it for so long.
const IDLE_MAX: Duration = Duration::from_secs(60);

/// Which keys are looked at.
#[derive(Debug, Clone)]
pub(in crate::top) struct Wanted {
    pub(in crate::top) named: Vec<LockKey>,
    /// How many of a server's keys a search looks at; zero for none.
    pub(in crate::top) budget: u64,
}

#[derive(Debug)]
pub(in crate::top) struct Shards {
    config: Config,
    locks: LockManager,
    budget: u64,
    keys: BTreeMap<LockKey, Known>,
    cursors: Cursors,
    /// What the last search has to say.
    found: Option<String>,
}

/// A key that is looked at.
#[derive(Debug)]
struct Known {
    /// It stays, whether anybody uses it or not.
    named: bool,
    used_at: Instant,
    /// Who has it, and since when that was seen.
    owner: Option<(String, Instant)>,
}

impl Shards {
    /// Connects, and searches for keys unless some are named.
    ///
    /// # Errors
    ///
    /// Those of connecting.
    pub(in crate::top) async fn connect(config: Config, wanted: Wanted) -> Result<Self, LockError> {
        let locks = Builder::new().config(config.clone()).connect().await?;
        let now = Instant::now();
        let is_anything_named = !wanted.named.is_empty();
        let named = wanted.named.into_iter().map(|key| {
            let known = Known {
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
            budget: wanted.budget,
            cursors: Cursors::default(),
            found: None,
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

    /// Looks for more leases at the servers.
    pub(super) async fn search(&mut self) {
        let before = self.keys.len();
        let (mut more, mut troubles) = (false, BTreeSet::new());
        if self.budget == 0 {
            troubles.insert("--scan is 0, so no keys are searched".to_owned());
        } else {
            for shard in &self.config.shards {
                // The manager has parsed it before.
                let Ok(endpoint) = Endpoint::parse(&shard.url) else {
                    continue;
                };
                match scan::search(&shard.name, &endpoint, &self.config, &mut self.cursors, self.budget).await {
                    Ok(found) => {
                        more |= found.more;
                        let map = self.locks.shard_map();
                        let here = found.keys.into_iter().filter(|key| map.name(key.slot()) == shard.name);
                        more |= !take(&mut self.keys, here, Instant::now());
                    }
                    Err(trouble) => {
                        troubles.insert(trouble);
                    }
                }
            }
        }
        let new = self.keys.len() - before;
        self.found = match troubles.into_iter().next() {
            Some(trouble) => Some(trouble),
            None if more => Some(format!("found {new} more; not all keys were looked at, n goes on")),
            None => None,
        };
    }

    pub(super) async fn look(&mut self) -> Look {
        let questions: Vec<LockKey> = self.keys.keys().cloned().collect();
        let now = Instant::now();
        let locks = &self.locks;
        let answers: Vec<_> = stream::iter(questions)
            .map(|key| async move {
                let seen = locks.inspect(&key).await;
                (key, seen)
            })
            .buffer_unordered(AT_ONCE)
            .collect()
            .await;
        let mut look = Look::default();
        let mut failure = None;
        let mut per_shard: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for (key, seen) in answers {
            let seen = match seen {
                Ok(seen) => seen,
                // It was found, but is no lease.
                Err(LockError::Refused { .. }) if self.keys.get(&key).is_some_and(|known| !known.named) => {
                    self.keys.remove(&key);
                    continue;
                }
                Err(error) => {
                    failure.get_or_insert_with(|| error.to_string());
                    continue;
                }
            };
            let shard = self.locks.shard_map().name(key.slot()).to_owned();
            let (leases, waiters) = per_shard.entry(shard.clone()).or_default();
            *leases += usize::from(seen.holder.is_some());
            *waiters += seen.queue_length as usize;
            let Some(known) = self.keys.get_mut(&key) else { continue };
            known.see(&seen, now);
            show(&mut look, &key, shard, &seen, known, now);
        }
        self.keys
            .retain(|_, known| known.named || now.duration_since(known.used_at) < IDLE_MAX);
        look.held_total = look.held.len();
        look.held.sort_by_key(|held| std::cmp::Reverse(held.age));
        look.shards = self.shards(&per_shard);
        look.note = failure.or_else(|| self.found.clone());
        look
    }

    fn shards(&self, per_shard: &BTreeMap<String, (usize, usize)>) -> Vec<Shard> {
        let shards = self.locks.shards().into_iter().map(|shard| {
            let (leases, waiters) = per_shard.get(&shard.name).copied().unwrap_or_default();
            Shard {
                kind: shard.kind,
                up: shard.is_up,
                leases,
                waiters,
                locks: None,
                round_trips: Quantiles {
                    p50: shard.round_trip_p50,
                    p99: shard.round_trip_p99,
                },
                name: shard.name,
            }
        });
        shards.collect()
    }
}

/// Adds what was found, as long as there is room. Returns whether there was.
fn take(keys: &mut BTreeMap<LockKey, Known>, found: impl Iterator<Item = LockKey>, now: Instant) -> bool {
    for key in found {
        if keys.len() >= KEYS_MAX && !keys.contains_key(&key) {
            return false;
        }
        keys.entry(key).or_insert(Known {
            named: false,
            used_at: now,
            owner: None,
        });
    }
    true
}

impl Known {
    fn see(&mut self, seen: &Inspection, now: Instant) {
        if seen.holder.is_some() || seen.queue_length > 0 {
            self.used_at = now;
        }
        self.owner = seen.holder.as_ref().map(|holder| match self.owner.take() {
            Some((owner, since)) if owner == holder.owner => (owner, since),
            _ => (holder.owner.clone(), now),
        });
    }
}

fn show(look: &mut Look, key: &LockKey, shard: String, seen: &Inspection, known: &Known, now: Instant) {
    let waiters = seen.queue_length as usize;
    let holder = known.owner.as_ref().map(|(owner, since)| Holder {
        who: process_of(owner).to_owned(),
        age: Age {
            time: now.duration_since(*since),
            at_least: true,
        },
    });
    if let Some(holder) = &holder {
        look.held.push(HeldLock {
            key: key.to_string(),
            shard: shard.clone(),
            who: holder.who.clone(),
            age: holder.age,
            remaining: seen.holder.as_ref().and_then(|holder| holder.remaining),
            waiters,
            // The last one that was issued in the slot may be another lock's.
            token: None,
            caller: None,
        });
    }
    if waiters > 0 || known.named {
        look.hot.push(HotKey {
            key: key.to_string(),
            shard,
            contended: None,
            waiters,
            holder,
            waits: None,
        });
    }
}
