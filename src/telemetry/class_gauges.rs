//! Gauges by shard and class. They are set when all keys of a shard are inspected, so a lock costs
//! nothing for them.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

use super::class::OTHER_CLASS;
use super::recorder::{Gauge, gauge};
use super::table::{GUARDS, OLDEST_GUARD, OLDEST_WAITER, PERMITS_IN_USE, PERMITS_LIMIT};
use crate::mode::LockMode;

/// What the keys of a shard show of a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ClassSnapshot {
    /// How long the longest hold and the longest wait have lasted.
    pub(crate) oldest_guard: Duration,
    pub(crate) oldest_waiter: Duration,
    /// The number of guards, by the kind of their mode.
    pub(crate) guards: [usize; LockMode::KINDS],
    /// The permits that these guards have.
    pub(crate) permits: u64,
    /// The limits of the keys of whose permits the class has some or waits for some, in total.
    pub(crate) permits_limit: u64,
}

/// The gauges of all classes of a shard.
#[derive(Debug)]
pub(super) struct ClassGauges {
    shard: Box<str>,
    /// By the number of the class. `None` for a class that has not occurred on this shard. Empty
    /// while the gauges are set.
    classes: Mutex<Vec<Option<Gauges>>>,
}

#[derive(Debug)]
struct Gauges {
    oldest_guard: Gauge,
    oldest_waiter: Gauge,
    /// By the kind of mode. `None` for one that the class has not been seen in.
    guards: [Option<Gauge>; LockMode::KINDS],
    permits: Option<PermitGauges>,
}

#[derive(Debug)]
struct PermitGauges {
    in_use: Gauge,
    limit: Gauge,
}

impl ClassGauges {
    /// Those of the default class and of the class that counts all others exist from the start.
    pub(super) fn new(shard: &str, default_class: &str) -> Self {
        let all_of = |class| {
            let mut gauges = Gauges::new(shard, class);
            LockMode::ONE_OF_EACH
                .into_iter()
                .for_each(|mode| gauges.add(mode, shard, class));
            gauges
        };
        let classes = [
            Some(all_of(default_class)),
            // If the default class has this name, it counts all others, too.
            (default_class != OTHER_CLASS).then(|| all_of(OTHER_CLASS)),
        ];
        Self {
            shard: shard.into(),
            classes: Mutex::new(classes.into()),
        }
    }

    /// Sets all gauges. Both lists are in the order of the classes' numbers.
    pub(super) fn set(&self, seen: &[ClassSnapshot], classes: &[Arc<str>]) {
        // Taken out, because the recorder is foreign code and must not be called under a lock.
        let mut all = std::mem::take(&mut *self.classes.lock());
        all.resize_with(classes.len().max(all.len()), || None);
        for (number, class) in classes.iter().enumerate() {
            let seen = seen.get(number).copied().unwrap_or_default();
            let gauges = &mut all[number];
            if gauges.is_none() && seen != ClassSnapshot::default() {
                *gauges = Some(Gauges::new(&self.shard, class));
            }
            if let Some(gauges) = gauges {
                gauges.set(&seen, &self.shard, class);
            }
        }
        *self.classes.lock() = all;
    }
}

impl Gauges {
    fn new(shard: &str, class: &str) -> Self {
        let (shard_label, class_label) = (|| shard.to_owned(), || class.to_owned());
        let mut gauges = Self {
            oldest_guard: gauge!(OLDEST_GUARD, "shard" => shard_label(), "class" => class_label()),
            oldest_waiter: gauge!(OLDEST_WAITER, "shard" => shard_label(), "class" => class_label()),
            guards: [const { None }; LockMode::KINDS],
            permits: None,
        };
        gauges.add(LockMode::Exclusive, shard, class);
        gauges
    }

    /// Creates the gauges of a kind of mode unless they exist.
    fn add(&mut self, mode: LockMode, shard: &str, class: &str) {
        let (shard, class) = (|| shard.to_owned(), || class.to_owned());
        self.guards[mode.kind()]
            .get_or_insert_with(|| gauge!(GUARDS, "shard" => shard(), "class" => class(), "mode" => mode.as_str()));
        if matches!(mode, LockMode::Permits { .. }) {
            self.permits.get_or_insert_with(|| PermitGauges {
                in_use: gauge!(PERMITS_IN_USE, "shard" => shard(), "class" => class()),
                limit: gauge!(PERMITS_LIMIT, "shard" => shard(), "class" => class()),
            });
        }
    }

    fn set(&mut self, seen: &ClassSnapshot, shard: &str, class: &str) {
        self.oldest_guard.set(seen.oldest_guard.as_secs_f64());
        self.oldest_waiter.set(seen.oldest_waiter.as_secs_f64());
        for mode in LockMode::ONE_OF_EACH {
            let is_waited_for = matches!(mode, LockMode::Permits { .. }) && seen.permits_limit > 0;
            if seen.guards[mode.kind()] > 0 || is_waited_for {
                self.add(mode, shard, class);
            }
        }
        for (gauge, &guards) in self.guards.iter().zip(&seen.guards) {
            if let Some(gauge) = gauge {
                gauge.set(guards as f64);
            }
        }
        if let Some(permits) = &self.permits {
            permits.in_use.set(seen.permits as f64);
            permits.limit.set(seen.permits_limit as f64);
        }
    }
}
