//! Invariants that hold whatever etcd contains. See [`crate::fuzzing`].

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use super::error::missing_permission;
use super::names::{Names, member};
use super::queue::{floor_of, tokens_of};
use crate::cycle::Cycle;
use crate::fuzzing::{head, text};
use crate::identity::{ManagerId, parse_owner_tag};
use crate::key::LockKey;

/// Names of etcd keys, parsed as queue members and notes; revisions, turned into tokens; reasons of
/// refusals.
pub fn etcd(data: &[u8]) {
    let names = Names::new("lock:", ManagerId::of("h", 1, 1));
    if let Some((key, cycle)) = names.read_note(data) {
        let note = names.note(names.manager().as_str(), cycle, &key, cycle);
        assert_eq!(names.read_note(note.as_bytes()), Some((key, cycle)));
        assert!(data.starts_with(names.inbox().as_bytes()));
    }
    member("lock:a/", data);
    missing_permission(&text(data), "lock:");
    let (numbers, rest) = head::<24>(data);
    let part = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
    tokens(part(0) as i64, part(8) as u32);
    let Ok(key) = LockKey::new(&text(rest)) else { return };
    let cycle = Cycle::parse(&format!("{}-{}-{:08x}", part(0), part(8) as u32, part(16) as u32)).unwrap();
    let rival = Names::new("lock:", ManagerId::of("h", 2, part(16)));
    let note = rival.note(names.manager().as_str(), cycle, &key, cycle);
    assert_eq!(names.read_note(note.as_bytes()), Some((key.clone(), cycle)));
    let prefix = rival.prefix(&key);
    let name = rival.cycle(&key, cycle);
    let owner_tag = member(&prefix, name.as_bytes());
    assert_eq!(parse_owner_tag(&owner_tag), Some((rival.manager().as_str(), cycle)));
    assert!(!prefix.starts_with(&rival.inbox()) && !rival.map().starts_with(&prefix));
}

fn tokens(revision: i64, count: u32) {
    let Ok(tokens) = tokens_of(revision, count) else { return };
    let revision = u64::try_from(revision).unwrap();
    assert_eq!(tokens.remaining(), u64::from(count.clamp(1, 1 << 16)));
    assert!(tokens.last() <= floor_of(revision), "later tokens are larger");
    assert!(
        tokens.first() > revision.checked_sub(1).map_or(0, floor_of),
        "earlier tokens are smaller"
    );
}
