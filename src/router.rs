//! The map from keys to shards.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use crate::endpoint::is_name_byte;
use crate::key::{SLOTS, Slot};

/// The version of the keys, scripts and messages that managers share through a store. Managers of
/// different versions refuse to work together, since they would misread each other.
pub(crate) const LAYOUT_VERSION: u32 = 2;

/// The shards by name, and the even, contiguous range of the 16384 slots that each owns, in the
/// order in which they were given.
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

    /// Returns the number of shards.
    #[must_use]
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Returns whether there are no shards.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Returns the index of the shard that owns a slot.
    #[must_use]
    pub fn index(&self, slot: Slot) -> usize {
        shard_index(slot, self.len())
    }

    /// Returns the name of the shard that owns a slot, or `None` if there are no shards.
    #[must_use]
    pub fn name(&self, slot: Slot) -> Option<&str> {
        self.names.get(self.index(slot)).map(String::as_str)
    }

    /// Returns the slots of the shard with this index, or `None` if there is no such shard.
    #[must_use]
    pub fn slots(&self, index: usize) -> Option<RangeInclusive<u16>> {
        (index < self.len()).then(|| self.slots_of(index))
    }

    /// The same, for a shard that exists.
    fn slots_of(&self, index: usize) -> RangeInclusive<u16> {
        let first = |index: usize| (index * usize::from(SLOTS)).div_ceil(self.len().max(1)) as u16;
        first(index)..=(first(index + 1) - 1)
    }

    /// What the shard with this index must have stored: the whole map, and which part of it the
    /// shard is. Two managers with different maps could lock the same key on two shards.
    pub(crate) fn fingerprint(&self, index: usize) -> String {
        format!("v{LAYOUT_VERSION} {self} here={}", self.names[index])
    }

    /// The fingerprint of one node of a quorum. It also contains the number of the node and the
    /// other settings on which all managers must agree.
    pub(crate) fn of_node(fingerprint: &str, number: usize, count: usize, longest_ttl: Duration) -> String {
        format!("{fingerprint}; node {number} of {count}; redlock_max_ttl {longest_ttl:?}")
    }

    /// Whether two stored fingerprints map every key to the same shard. Compared are the version of
    /// the layout, the slots of each shard, and which of the shards stores the fingerprint. The
    /// names of the shards are not compared.
    pub(crate) fn agree(one: &str, other: &str) -> bool {
        let parse = |text| Fingerprint::parse(text);
        one == other || parse(one).is_some_and(|one| Some(one) == parse(other))
    }
}

/// The parts of a stored fingerprint that decide the shard of a key.
#[derive(Debug, PartialEq, Eq)]
struct Fingerprint<'a> {
    version: &'a str,
    /// The slots of each shard, as written.
    slots: Vec<&'a str>,
    here: usize,
    /// The text after a semicolon, such as the number of the node in a quorum.
    rest: Option<&'a str>,
}

impl<'a> Fingerprint<'a> {
    /// Parses `v2 a:0-8191,b:8192-16383 here=b; more`. Returns `None` for anything else.
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
        // A name that two shards have identifies neither.
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

/// The maximum length of a shard's name, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 32;

/// Whether this is a valid name of a shard, independent of the configuration that checked it.
fn is_name(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_name_byte)
}

/// The index of the shard that owns a slot.
pub(crate) const fn shard_index(slot: Slot, shards: usize) -> usize {
    slot.number() as usize * shards / SLOTS as usize
}

impl fmt::Display for ShardMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, name) in self.names.iter().enumerate() {
            let slots = self.slots_of(index);
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

    #[test]
    fn no_shard_owns_a_slot_of_an_empty_map() {
        let slot = Slot::of(b"k");
        assert_eq!(map(0).name(slot), None);
        assert_eq!(map(1).name(slot), Some("shard-0"));
    }

    proptest! {
        #[test]
        fn every_slot_has_the_one_shard_whose_range_it_is_in(count in 1usize..=1024, key in ".{1,8}") {
            let (map, slot) = (map(count), Slot::of(key.as_bytes()));
            let containing: Vec<usize> = (0..count).filter(|&index| map.slots_of(index).contains(&slot.number())).collect();
            prop_assert_eq!(containing, [map.index(slot)]);
            prop_assert!(map.slots(count - 1).is_some() && map.slots(count).is_none());
        }

        #[test]
        fn ranges_are_even(count in 1usize..=1024) {
            let map = map(count);
            let sizes: Vec<usize> = (0..count).map(|index| map.slots_of(index).len()).collect();
            prop_assert_eq!(sizes.iter().sum::<usize>(), usize::from(SLOTS));
            prop_assert!(sizes.iter().max().unwrap() - sizes.iter().min().unwrap() <= 1);
        }
    }
}
