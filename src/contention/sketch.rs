//! Finds the most contended keys in memory that does not grow with the number of keys.
//!
//! # Implementation details
//!
//! This is the *space-saving* algorithm with weights (A. Metwally, D. Agrawal, A. El Abbadi:
//! Efficient Computation of Frequent and Top-k Elements in Data Streams, ICDT 2005). Kept keys are
//! counted. A key that is not kept replaces the key with the smallest count. It starts from that
//! count, which is also recorded as the bound of its overcount. So a count is never too small, and
//! too large by at most that bound. No bound exceeds the sum of all weights divided by the number
//! of counters. Every key whose true count is larger than that quotient is kept.
//!
//! Counters are in a heap ordered by smallest count, so updating it takes O(log n) moves.

use std::collections::HashMap;
use std::hash::Hash;

use foldhash::fast::RandomState;

/// See the module documentation. `V` is what has been recorded for a key since it entered.
#[derive(Debug)]
pub(super) struct Sketch<K, V> {
    capacity: usize,
    counters: Vec<Counter<K, V>>,
    /// A heap of indexes into `counters`: no count is smaller than that of its parent.
    heap: Vec<usize>,
    index: HashMap<K, usize, RandomState>,
}

#[derive(Debug)]
struct Counter<K, V> {
    key: K,
    count: u64,
    overcount_max: u64,
    /// The position in the heap.
    at: usize,
    value: V,
}

/// A key that is kept.
#[derive(Debug)]
pub(super) struct Kept<'a, K, V> {
    pub(super) key: &'a K,
    /// An upper bound on how often the key was seen. Too large by at most `overcount_max`.
    pub(super) count: u64,
    pub(super) overcount_max: u64,
    pub(super) value: &'a V,
}

impl<K: Clone + Eq + Hash, V: Default> Sketch<K, V> {
    pub(super) fn new(capacity: usize) -> Self {
        Self {
            capacity: capacity.max(1),
            counters: Vec::new(),
            heap: Vec::new(),
            index: HashMap::default(),
        }
    }

    /// Adds `weight` to the count of the key. Returns its value.
    pub(super) fn add(&mut self, key: &K, weight: u64) -> &mut V {
        let counter = match self.index.get(key) {
            Some(&counter) => counter,
            None if self.counters.len() < self.capacity => self.insert(key),
            None => self.replace_smallest(key),
        };
        self.counters[counter].count = self.counters[counter].count.saturating_add(weight);
        self.sink(self.counters[counter].at);
        &mut self.counters[counter].value
    }

    fn insert(&mut self, key: &K) -> usize {
        let counter = self.counters.len();
        self.counters.push(Counter {
            key: key.clone(),
            count: 0,
            overcount_max: 0,
            at: self.heap.len(),
            value: V::default(),
        });
        self.heap.push(counter);
        self.index.insert(key.clone(), counter);
        self.rise(self.heap.len() - 1);
        counter
    }

    fn replace_smallest(&mut self, key: &K) -> usize {
        let counter = self.heap[0];
        let smallest = &mut self.counters[counter];
        let old = std::mem::replace(&mut smallest.key, key.clone());
        smallest.overcount_max = smallest.count;
        smallest.value = V::default();
        self.index.remove(&old);
        self.index.insert(key.clone(), counter);
        counter
    }

    /// Halves every count, so that old contention carries little weight. The order is preserved. So
    /// are the bounds, relative to halved true counts. Bounds are rounded up, so they are never too
    /// small. Only a count of 1 is forgotten, and so is its key: it would stay for ever.
    pub(super) fn halve(&mut self, mut each: impl FnMut(&mut V)) {
        for counter in &mut self.counters {
            if counter.count <= 1 {
                (counter.count, counter.overcount_max) = (0, 0);
                counter.value = V::default();
                continue;
            }
            counter.count = counter.count.div_ceil(2);
            counter.overcount_max = counter.overcount_max.div_ceil(2);
            each(&mut counter.value);
        }
    }

    /// All kept keys in no particular order.
    pub(super) fn kept(&self) -> impl Iterator<Item = Kept<'_, K, V>> {
        self.counters
            .iter()
            .filter(|counter| counter.count > 0)
            .map(|counter| Kept {
                key: &counter.key,
                count: counter.count,
                overcount_max: counter.overcount_max,
                value: &counter.value,
            })
    }

    fn count_at(&self, at: usize) -> u64 {
        self.counters[self.heap[at]].count
    }

    fn swap(&mut self, one: usize, other: usize) {
        self.heap.swap(one, other);
        self.counters[self.heap[one]].at = one;
        self.counters[self.heap[other]].at = other;
    }

    /// Restores the heap after a count has grown.
    fn sink(&mut self, mut at: usize) {
        loop {
            let children = [2 * at + 1, 2 * at + 2]
                .into_iter()
                .filter(|&child| child < self.heap.len());
            let Some(smaller) = children.min_by_key(|&child| self.count_at(child)) else {
                return;
            };
            if self.count_at(at) <= self.count_at(smaller) {
                return;
            }
            self.swap(at, smaller);
            at = smaller;
        }
    }

    /// Restores the heap after a counter was added at the end.
    fn rise(&mut self, mut at: usize) {
        while at > 0 && self.count_at(at) < self.count_at((at - 1) / 2) {
            self.swap(at, (at - 1) / 2);
            at = (at - 1) / 2;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_bounds_of_the_paper_hold(
            capacity in 1_usize..12,
            stream in proptest::collection::vec((0_u32..40, 1_u64..9), 0..400),
        ) {
            let mut sketch: Sketch<u32, u64> = Sketch::new(capacity);
            let mut exact: HashMap<u32, u64> = HashMap::new();
            let mut sum = 0;
            for &(key, weight) in &stream {
                *sketch.add(&key, weight) += weight;
                *exact.entry(key).or_default() += weight;
                sum += weight;
            }
            let kept: HashMap<_, _> = sketch.kept().map(|kept| (*kept.key, (kept.count, kept.overcount_max, *kept.value))).collect();
            prop_assert_eq!(kept.len(), exact.len().min(capacity));
            // The sum of all counts equals the sum of all weights.
            prop_assert_eq!(kept.values().map(|&(count, ..)| count).sum::<u64>(), sum);
            let bound = sum / capacity as u64;
            for (key, &(count, overcount_max, since)) in &kept {
                let truth = exact[key];
                prop_assert!(truth <= count, "{} is below {}", count, truth);
                prop_assert!(count - overcount_max <= truth, "{} - {} is above {}", count, overcount_max, truth);
                prop_assert!(overcount_max <= bound, "{} is above {}", overcount_max, bound);
                // The value covers the time since the key entered.
                prop_assert_eq!(since, count - overcount_max);
            }
            for (key, &truth) in &exact {
                prop_assert!(truth <= bound || kept.contains_key(key), "{} with {} of {} is not kept", key, truth, sum);
            }
        }

        #[test]
        fn hot_keys_are_found_among_many(seed in 0_u64..1000) {
            let mut sketch: Sketch<u64, ()> = Sketch::new(8);
            let mut state = seed;
            for turn in 0..20_000_u64 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // Three keys have a fifth each. The rest is spread over a thousand keys.
                let key = if turn % 5 < 3 { turn % 5 } else { 10 + (state >> 33) % 1000 };
                sketch.add(&key, 1);
            }
            let mut kept: Vec<_> = sketch.kept().map(|kept| (kept.count, *kept.key)).collect();
            kept.sort_unstable();
            let mut hottest: Vec<_> = kept.iter().rev().take(3).map(|&(_, key)| key).collect();
            hottest.sort_unstable();
            prop_assert_eq!(hottest, [0, 1, 2]);
        }

        #[test]
        fn key_that_is_not_seen_any_more_is_forgotten(count in 1_u64..1_000_000) {
            let mut sketch: Sketch<u32, u64> = Sketch::new(5);
            *sketch.add(&1, count) += count;
            for _ in 0..=count.ilog2() + 1 {
                prop_assert_eq!(sketch.kept().count(), 1);
                sketch.halve(|value| *value /= 2);
                if sketch.kept().count() == 0 {
                    break;
                }
            }
            prop_assert_eq!(sketch.kept().count(), 0);
            prop_assert_eq!(*sketch.add(&1, 1), 0);
        }

        #[test]
        fn halving_keeps_order_and_bounds(stream in proptest::collection::vec(0_u32..20, 0..300)) {
            let mut sketch: Sketch<u32, ()> = Sketch::new(5);
            for key in &stream {
                sketch.add(key, 1);
            }
            let before: HashMap<_, _> = sketch.kept().map(|kept| (*kept.key, kept.count)).collect();
            sketch.halve(|()| {});
            for kept in sketch.kept() {
                prop_assert_eq!(kept.count, before[kept.key].div_ceil(2));
                prop_assert!(kept.overcount_max <= kept.count);
            }
            sketch.add(&99, 1);
            prop_assert!(sketch.kept().any(|kept| *kept.key == 99));
        }
    }
}
