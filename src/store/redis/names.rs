//! The Redis keys and channels of a lock.

use std::borrow::Cow;
use std::fmt;
use std::io::Write;

use deadpool_redis::redis::RedisWrite;

use crate::identity::ManagerId;
use crate::key::{LockKey, Slot, hash_tag};

/// Names of keys and channels in one namespace. All keys of a lock share a slot of a Redis Cluster.
///
/// | what | name |
/// |---|---|
/// | lease | `lock:K` |
/// | queue | `{lock:K}:q`, or `lock:%q:K` if K has a hash tag of its own |
/// | shared and permit holders | `{lock:K}:h`, or `lock:%h:K` |
/// | counter | `lock:%fence:{tag}`, one per slot; the tag hashes to that slot |
/// | shard map | `lock:%map` |
/// | scratch | `lock:%scratch:{tag}`, which never exists |
/// | inbox | channel `lock:in:<manager>`; in a cluster one per slot, `lock:in:{tag}:<manager>` |
///
/// A `%` in K is percent-encoded, and so are braces that form no valid hash tag. No lease can
/// therefore have the name of a queue, a counter or the map, whatever keys users choose.
#[derive(Debug, Clone)]
pub(crate) struct Names {
    namespace: String,
}

/// The keys of one lock. They are written straight into a command, so a request does not copy them.
#[derive(Debug)]
pub(crate) struct LockNames<'a> {
    namespace: &'a str,
    /// The key, encoded if necessary.
    name: Cow<'a, str>,
    /// Whether the key has a hash tag of its own.
    tagged: bool,
}

impl LockNames<'_> {
    pub(crate) fn lease(&self) -> Name<'_> {
        Name(["", self.namespace, &self.name, ""], None)
    }

    pub(crate) fn queue(&self) -> Name<'_> {
        match self.tagged {
            true => Name([self.namespace, "%q:", &self.name, ""], None),
            false => Name(["{", self.namespace, &self.name, "}:q"], None),
        }
    }

    /// The holders of shared leases and of permits.
    pub(crate) fn holders(&self) -> Name<'_> {
        match self.tagged {
            true => Name([self.namespace, "%h:", &self.name, ""], None),
            false => Name(["{", self.namespace, &self.name, "}:h"], None),
        }
    }

    pub(crate) fn counter(&self) -> Name<'_> {
        counter(self.namespace, self.slot())
    }

    /// The slot of all keys of the lock.
    pub(crate) fn slot(&self) -> Slot {
        match self.tagged {
            // A percent sign inside the tag is encoded in the name, too.
            true => Slot::of(self.name.as_bytes()),
            false => Slot::of_parts(self.namespace.as_bytes(), self.name.as_bytes()),
        }
    }
}

fn counter(namespace: &str, slot: Slot) -> Name<'_> {
    Name([namespace, "%fence:{", "", "}"], Some(slot_tags::tag(slot)))
}

/// A key's name in parts, with an optional number before the last part.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Name<'a>([&'a str; 4], Option<u32>);

impl Name<'_> {
    /// Appends the name as the next argument. Several times as fast as formatting it; a lock needs
    /// seven of these.
    pub(crate) fn write(&self, command: &mut impl RedisWrite) {
        let Self([first, second, third, last], number) = self;
        let mut writer = command.writer_for_next_arg();
        let mut write = || {
            for part in [first, second, third] {
                writer.write_all(part.as_bytes())?;
            }
            if let Some(number) = number {
                write!(writer, "{number}")?;
            }
            writer.write_all(last.as_bytes())
        };
        // Writing to a buffer in memory can't fail.
        write().ok();
    }
}

impl fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self([first, second, third, last], number) = self;
        write!(f, "{first}{second}{third}")?;
        number.map_or(Ok(()), |number| number.fmt(f))?;
        f.write_str(last)
    }
}

impl Names {
    pub(crate) fn new(namespace: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
        }
    }

    pub(crate) fn of<'a>(&'a self, key: &'a LockKey) -> LockNames<'a> {
        let namespace = &self.namespace;
        let name = key.as_str();
        // Like `hash_tag`, this is fastest without an early end.
        let has_special = name
            .bytes()
            .fold(false, |found, byte| found | matches!(byte, b'%' | b'{' | b'}'));
        if !has_special {
            return LockNames {
                namespace,
                name: name.into(),
                tagged: false,
            };
        }
        let tagged = hash_tag(name.as_bytes()).is_some();
        LockNames {
            namespace,
            name: encode(name, tagged).into(),
            tagged,
        }
    }

    /// The counter of a slot, shared by all its locks.
    pub(crate) fn counter_of(&self, slot: Slot) -> Name<'_> {
        counter(&self.namespace, slot)
    }

    /// A key in this slot that never exists, used to test whether the server accepts writes.
    pub(crate) fn scratch_in(&self, slot: Slot) -> Name<'_> {
        Name([&self.namespace, "%scratch:{", "", "}"], Some(slot_tags::tag(slot)))
    }

    /// The key whose lease has this name, or `None` if it is not a lease of this namespace.
    pub(crate) fn key_of_lease(&self, lease: &str) -> Option<LockKey> {
        let name = lease.strip_prefix(&self.namespace)?;
        let decoded = percent_encoding::percent_decode_str(name).decode_utf8().ok()?;
        let key = LockKey::new(&decoded).ok()?;
        // The name of a queue, a counter or the map decodes to a key whose lease has another name.
        let is_its_lease = self.of(&key).name == name;
        is_its_lease.then_some(key)
    }

    pub(crate) fn map(&self) -> String {
        format!("{}%map", self.namespace)
    }

    /// A pattern that matches all keys of the namespace, and possibly a few others: see
    /// [`is_ours`](Self::is_ours). The leading `*` covers queues, whose names begin with a brace.
    pub(crate) fn pattern(&self) -> String {
        let mut pattern = "*".to_owned();
        for char in self.namespace.chars() {
            if matches!(char, '*' | '?' | '[' | ']' | '^' | '\\') {
                pattern.push('\\');
            }
            pattern.push(char);
        }
        pattern.push('*');
        pattern
    }

    /// Whether a key that matches the pattern belongs to the namespace.
    pub(crate) fn is_ours(&self, key: &[u8]) -> bool {
        key.strip_prefix(b"{")
            .unwrap_or(key)
            .starts_with(self.namespace.as_bytes())
    }

    /// The prefix of an inbox's name, followed by the manager.
    pub(crate) fn inbox_prefix(&self) -> String {
        format!("{}in:", self.namespace)
    }

    /// The same in a cluster, where each slot has its own inbox.
    pub(crate) fn inbox_prefix_in(&self, slot: Slot) -> Name<'_> {
        Name([&self.namespace, "in:{", "", "}:"], Some(slot_tags::tag(slot)))
    }

    pub(crate) fn inbox_in(&self, slot: Slot, manager: &ManagerId) -> String {
        format!("{}{manager}", self.inbox_prefix_in(slot))
    }

    pub(crate) fn inbox(&self, manager: &ManagerId) -> String {
        format!("{}{manager}", self.inbox_prefix())
    }
}

fn encode(key: &str, tagged: bool) -> String {
    let mut name = String::with_capacity(key.len() + 8);
    for char in key.chars() {
        match char {
            '%' => name.push_str("%25"),
            '{' if !tagged => name.push_str("%7B"),
            '}' if !tagged => name.push_str("%7D"),
            _ => name.push(char),
        }
    }
    name
}

/// For each slot, a short text that hashes to it, so that a slot's counter lives in that slot.
mod slot_tags {
    use std::sync::OnceLock;

    use crate::key::{SLOTS, Slot};

    pub(super) fn tag(slot: Slot) -> u32 {
        static TAGS: OnceLock<Vec<u32>> = OnceLock::new();
        let tags = TAGS.get_or_init(|| {
            let mut tags = vec![u32::MAX; usize::from(SLOTS)];
            let mut missing = usize::from(SLOTS);
            for number in 0.. {
                let place = &mut tags[usize::from(Slot::of(number.to_string().as_bytes()).number())];
                if *place == u32::MAX {
                    *place = number;
                    missing -= 1;
                }
                if missing == 0 {
                    break;
                }
            }
            tags
        });
        tags[usize::from(slot.number())]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    struct Texts {
        lease: String,
        queue: String,
        holders: String,
        counter: String,
        slot: Slot,
    }

    fn names(key: &str) -> Texts {
        let (names, key) = (Names::new("lock:"), LockKey::new(key).unwrap());
        let names = names.of(&key);
        Texts {
            lease: names.lease().to_string(),
            queue: names.queue().to_string(),
            holders: names.holders().to_string(),
            counter: names.counter().to_string(),
            slot: names.slot(),
        }
    }

    fn all_in_one_slot(names: &Texts) -> bool {
        [&names.lease, &names.queue, &names.holders, &names.counter]
            .iter()
            .all(|name| Slot::of(name.as_bytes()) == names.slot)
    }

    #[test]
    fn a_plain_key_keeps_its_plain_name() {
        let names = names("coupon:123");
        assert_eq!(names.lease, "lock:coupon:123");
        assert_eq!(names.queue, "{lock:coupon:123}:q");
        assert_eq!(names.holders, "{lock:coupon:123}:h");
        assert!(all_in_one_slot(&names));
    }

    #[test]
    fn a_hash_tag_is_kept_and_other_braces_are_encoded() {
        assert_eq!(names("{user}cart").lease, "lock:{user}cart");
        assert_eq!(names("{user}cart").queue, "lock:%q:{user}cart");
        assert_eq!(names("{user}cart").holders, "lock:%h:{user}cart");
        assert_eq!(names("a}b").lease, "lock:a%7Db");
        assert_eq!(names("foo{}{bar}").lease, "lock:foo%7B%7D%7Bbar%7D");
        assert_eq!(names("100%").lease, "lock:100%25");
    }

    proptest! {
        #[test]
        fn an_inbox_of_a_slot_is_in_the_slot(slot in 0..crate::key::SLOTS) {
            let name = format!("x{slot}");
            let slot = Slot::of(name.as_bytes());
            let inbox = Names::new("lock:").inbox_in(slot, &ManagerId::of("h", 1, 2));
            prop_assert_eq!(Slot::of(inbox.as_bytes()), slot);
        }

        #[test]
        fn all_keys_of_a_lock_share_a_slot(key in "[a-b{}%: é\\\\]{1,10}") {
            prop_assert!(all_in_one_slot(&names(&key)));
        }

        #[test]
        fn key_is_found_from_its_lease_name_and_from_no_other_name(key in "[a-b{}%: é2357BDmaphqfence]{1,12}") {
            let (all, own) = (names(&key), Names::new("lock:"));
            let found = own.key_of_lease(&all.lease);
            prop_assert_eq!(found.as_ref().map(LockKey::as_str), Some(key.as_str()));
            for other in [&all.queue, &all.holders, &all.counter, &own.map(), &key] {
                prop_assert!(own.key_of_lease(other).is_none_or(|found| names(found.as_str()).lease == *other));
            }
            for other in [&all.queue, &all.holders, &all.counter, &own.map()] {
                prop_assert_eq!(own.key_of_lease(other), None);
            }
        }

        /// Names of different locks never collide, whatever their kind.
        #[test]
        fn no_two_locks_share_a_name(one in "[qha:{}%]{1,8}", other in "[qha:{}%]{1,8}") {
            prop_assume!(one != other);
            let (one, other) = (names(&one), names(&other));
            for left in [&one.lease, &one.queue, &one.holders] {
                for right in [&other.lease, &other.queue, &other.holders] {
                    prop_assert_ne!(left, right);
                }
            }
        }
    }
}
