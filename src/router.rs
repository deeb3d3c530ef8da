//! Which shard a key belongs to.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::endpoint::is_name_byte;
use crate::key::{SLOTS, Slot};

/// The version of the keys, scripts and messages that managers share through a store. Managers of different versions
/// refuse one another rather than misunderstand one another.
pub(crate) const LAYOUT_VERSION: u32 = 2;

/// The named shards and their even, contiguous ranges of the 16384 slots, in the order in which they were given.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardMap {
    names: Vec<String>,
}

impl ShardMap {
    pub(crate) fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self {
            names: names.into_iter().collect(),
        }
    }

    /// How many shards there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// The place of a slot's shard in the order of shards.
    #[must_use]
    pub fn index(&self, slot: Slot) -> usize {
        shard_index(slot, self.len())
    }

    /// The name of a slot's shard.
    #[must_use]
    pub fn name(&self, slot: Slot) -> &str {
        &self.names[self.index(slot)]
    }

    /// The slots of the shard at that place.
    #[must_use]
    pub fn slots(&self, index: usize) -> RangeInclusive<u16> {
        let first = |index: usize| (index * usize::from(SLOTS)).div_ceil(self.len().max(1)) as u16;
        first(index)..=(first(index + 1) - 1)
    }

    /// What the shard at that place must have stored: the whole map, and which part of it the shard is. Two managers with
    /// different maps would lock one key in two places.
    pub(crate) fn fingerprint(&self, index: usize) -> String {
        format!("v{LAYOUT_VERSION} {self} here={}", self.names[index])
    }

    /// The fingerprint of one node of a quorum, which also says which node it is and what all managers must agree on besides.
    pub(crate) fn of_node(fingerprint: &str, number: usize, count: usize, longest_ttl: Duration) -> String {
        format!("{fingerprint}; node {number} of {count}; redlock_max_ttl {longest_ttl:?}")
    }

    /// Whether two stored fingerprints ([`Config::fingerprints`](crate::Config::fingerprints)) lead every key to the same place: the version of
    /// the layout, the slots of each shard, and which of the shards it is that stores them. The names of shards are for people and do not
    /// count.
    #[must_use]
    pub fn agree(one: &str, other: &str) -> bool {
        let parse = |text| Fingerprint::parse(text);
        one == other || parse(one).is_some_and(|one| Some(one) == parse(other))
    }
}

/// The parts of a stored fingerprint that decide where a key lives.
#[derive(Debug, PartialEq, Eq)]
struct Fingerprint<'a> {
    version: &'a str,
    /// The slots of each shard, as they are written.
    slots: Vec<&'a str>,
    here: usize,
    /// What follows a semicolon, such as which node of a quorum it is.
    rest: Option<&'a str>,
}

impl<'a> Fingerprint<'a> {
    /// Reads `v2 a:0-8191,b:8192-16383 here=b; more`. `None` for anything else.
    fn parse(text: &'a str) -> Option<Self> {
        let (version, rest) = text.split_once(' ')?;
        let (map, rest) = rest.split_once(" here=")?;
        let (here, rest) = match rest.split_once(';') {
            Some((here, rest)) => (here, Some(rest)),
            None => (rest, None),
        };
        let shards: Vec<_> = map
            .split(',')
            .map(|shard| shard.rsplit_once(':').filter(|(name, _)| is_name(name)))
            .collect::<Option<_>>()?;
        let mut named = shards.iter().enumerate().filter(|(_, (name, _))| *name == here);
        let (here, _) = named.next()?;
        // A name that two shards have names neither.
        if named.next().is_some() {
            return None;
        }
        Some(Self {
            version,
            slots: shards.into_iter().map(|(_, slots)| slots).collect(),
            here,
            rest,
        })
    }
}

/// The longest name of a shard, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 32;

/// Whether a shard can have that name, wherever it was checked.
fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_name_byte)
}

/// The place of a slot's shard among so many.
pub(crate) const fn shard_index(slot: Slot, shards: usize) -> usize {
    slot.number() as usize * shards / SLOTS as usize
}

impl fmt::Display for ShardMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.names.iter().enumerate() {
            let slots = self.slots(index);
            let comma = if index == 0 { "" } else { "," };
            write!(f, "{comma}{name}:{}-{}", slots.start(), slots.end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(count: usize) -> ShardMap {
        ShardMap::new((0..count).map(|index| format!("shard-{index}")))
    }

    #[test]
    fn three_shards_split_the_slots_like_a_cluster() {
        assert_eq!(
            map(3).to_string(),
            "shard-0:0-5461,shard-1:5462-10922,shard-2:10923-16383"
        );
        assert_eq!(
            map(3).fingerprint(1),
            "v2 shard-0:0-5461,shard-1:5462-10922,shard-2:10923-16383 here=shard-1"
        );
    }

    #[test]
    fn fingerprints_agree_whatever_the_shards_are_called() {
        const OURS: &str = "v2 a:0-8191,b:8192-16383 here=b";
        for same in [
            "v2 x:0-8191,y:8192-16383 here=y",
            "v2 b:0-8191,a:8192-16383 here=a",
            OURS,
        ] {
            assert!(ShardMap::agree(OURS, same), "{same}");
        }
        for other in [
            "v3 a:0-8191,b:8192-16383 here=b",
            "v2 a:0-8191,b:8192-16383 here=a",
            "v2 a:0-8192,b:8193-16383 here=b",
            "v2 b:0-16383 here=b",
            "v2 b:0-8191,b:8192-16383 here=b",
            "v2 a:0-8191,b:8192-16383 here=b; node 1 of 3",
            "v2 a:0-8191,b:8192-16383",
            "v2 a:0-8191,b:8192-16383 here=",
            "v2 :0-8191,b b:8192-16383 here=b b",
            "v2 a:0-8191,:8192-16383 here=",
            "",
        ] {
            assert!(!ShardMap::agree(OURS, other), "{other}");
            assert!(!ShardMap::agree(other, OURS), "{other}");
        }
        let node = |name: &str, number: u8| format!("v2 {name}:0-16383 here={name}; node {number} of 3");
        assert!(ShardMap::agree(&node("a", 1), &node("b", 1)));
        assert!(!ShardMap::agree(&node("a", 1), &node("a", 2)));
        assert!(ShardMap::agree("of another program", "of another program"));
    }

    proptest! {
        #[test]
        fn every_slot_has_the_one_shard_whose_range_it_is_in(count in 1usize..=1024, key in ".{1,8}") {
            let (map, slot) = (map(count), Slot::of(key.as_bytes()));
            let containing: Vec<usize> = (0..count).filter(|&index| map.slots(index).contains(&slot.number())).collect();
            prop_assert_eq!(containing, [map.index(slot)]);
        }

        #[test]
        fn ranges_are_even(count in 1usize..=1024) {
            let map = map(count);
            let sizes: Vec<usize> = (0..count).map(|index| map.slots(index).len()).collect();
            prop_assert_eq!(sizes.iter().sum::<usize>(), usize::from(SLOTS));
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
        }
    }
}
