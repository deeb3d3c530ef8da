//! The etcd keys of a lock.

use percent_encoding::{AsciiSet, CONTROLS, percent_decode, utf8_percent_encode};

use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::protocol::Cycle;

/// The names of one namespace's keys, for one manager.
///
/// | what | name |
/// |---|---|
/// | a cycle that holds K or waits for it | `lock:K/<manager>:<cycle>` |
/// | a note that another cycle waits for a cycle's key | `lock:%in/<manager>/<cycle>/K/<waiter>` |
/// | shard map | `lock:%map` |
///
/// In K, slashes, percent signs and everything that is not printable ASCII are percent-encoded. So
/// no key's prefix is the beginning of another's, and no key is named like a note or the map.
#[derive(Debug, Clone)]
pub(super) struct Names {
    namespace: String,
    manager: ManagerId,
}

const ENCODED: &AsciiSet = &CONTROLS.add(b'/').add(b'%');

impl Names {
    pub(super) fn new(namespace: &str, manager: ManagerId) -> Self {
        Self {
            namespace: namespace.to_owned(),
            manager,
        }
    }

    /// The common prefix of all keys.
    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    pub(super) fn manager(&self) -> &ManagerId {
        &self.manager
    }

    /// The common prefix of all cycles of a key.
    pub(super) fn prefix(&self, key: &LockKey) -> String {
        format!("{}{}/", self.namespace, utf8_percent_encode(key.as_str(), ENCODED))
    }

    /// The etcd key of one of this manager's cycles.
    pub(super) fn cycle(&self, key: &LockKey, cycle: Cycle) -> String {
        let mut name = self.prefix(key);
        name.push_str(&self.manager.owner_tag(cycle).to_string());
        name
    }

    pub(super) fn map(&self) -> String {
        format!("{}%map", self.namespace)
    }

    /// The common prefix of all notes for this manager.
    pub(super) fn inbox(&self) -> String {
        format!("{}%in/{}/", self.namespace, self.manager)
    }

    /// The note by which a waiting cycle of this manager notifies an owner.
    pub(super) fn note(&self, owner: &str, owned: Cycle, key: &LockKey, waiting: Cycle) -> String {
        format!(
            "{}%in/{owner}/{owned}/{}/{}",
            self.namespace,
            utf8_percent_encode(key.as_str(), ENCODED),
            self.manager.owner_tag(waiting)
        )
    }

    /// The key and the cycle of a note in this manager's inbox, or `None` if the name is malformed.
    pub(super) fn read_note(&self, name: &[u8]) -> Option<(LockKey, Cycle)> {
        let note = std::str::from_utf8(name).ok()?.strip_prefix(&self.inbox())?;
        let mut parts = note.splitn(3, '/');
        let (cycle, key) = (parts.next()?, parts.next()?);
        parts.next()?;
        let key = percent_decode(key.as_bytes()).decode_utf8().ok()?;
        Some((LockKey::new(&key).ok()?, Cycle::parse(cycle)?))
    }
}

/// The key of a cycle's entry, or `None` if the name is not that of a cycle in this namespace.
pub(crate) fn key_of_entry(namespace: &str, name: &[u8]) -> Option<LockKey> {
    let name = std::str::from_utf8(name).ok()?.strip_prefix(namespace)?;
    let (encoded, _) = name.split_once('/')?;
    let key = percent_decode(encoded.as_bytes()).decode_utf8().ok()?;
    // A note's first part is not what any key is encoded as.
    let is_encoded = utf8_percent_encode(&key, ENCODED).to_string() == encoded;
    LockKey::new(&key).ok().filter(|_| is_encoded)
}

/// The `manager:cycle` part of a name that begins with a key's prefix.
pub(super) fn member(prefix: &str, name: &[u8]) -> String {
    String::from_utf8_lossy(name.get(prefix.len()..).unwrap_or_default()).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(random: u64) -> Names {
        Names::new("lock:", ManagerId::of("h", 1, random))
    }

    fn key(text: &str) -> LockKey {
        LockKey::new(text).unwrap()
    }

    #[test]
    fn no_key_has_a_prefix_that_anothers_begins_with() {
        let names = names(0);
        let keys = ["a", "a/", "a/b", "a%", "%in", "%map", "a\u{0}", "ä", "a b", "{a}"];
        for one in keys {
            for other in keys.into_iter().filter(|&other| other != one) {
                let (one, other) = (names.prefix(&key(one)), names.prefix(&key(other)));
                assert!(!one.starts_with(&other), "{one} {other}");
            }
            assert!(!names.map().starts_with(&names.prefix(&key(one))));
            assert!(!names.inbox().starts_with(&names.prefix(&key(one))));
            assert!(!names.prefix(&key(one)).starts_with(&names.inbox()));
        }
        assert_eq!(names.prefix(&key("a/b%")), "lock:a%2Fb%25/");
    }

    #[test]
    fn a_key_is_found_in_the_entries_of_its_cycles_only() {
        let names = names(1);
        for text in ["k", "a/b %2F", "ä\n", "%in", "{a}"] {
            let entry = names.cycle(&key(text), Cycle::of(4));
            assert_eq!(key_of_entry("lock:", entry.as_bytes()), Some(key(text)));
            assert_eq!(key_of_entry("other:", entry.as_bytes()), None);
        }
        let note = names.note("h-1-0000000000000001", Cycle::of(4), &key("k"), Cycle::of(7));
        for other in [note, names.map(), names.inbox(), "lock:k".to_owned()] {
            assert_eq!(key_of_entry("lock:", other.as_bytes()), None, "{other}");
        }
    }

    #[test]
    fn a_note_is_read_as_it_was_written() {
        let (owner, rival) = (names(1), names(2));
        for text in ["k", "a/b %2F", "ä\n"] {
            let note = rival.note(owner.manager().as_str(), Cycle::of(4), &key(text), Cycle::of(7));
            assert_eq!(owner.read_note(note.as_bytes()), Some((key(text), Cycle::of(4))));
            assert_eq!(rival.read_note(note.as_bytes()), None);
        }
        for other in [
            "lock:%in/",
            "lock:%in/h-1-0000000000000001/x/k/s",
            "lock:%in/h-1-0000000000000001/4/k",
        ] {
            assert_eq!(owner.read_note(other.as_bytes()), None, "{other}");
        }
    }
}
