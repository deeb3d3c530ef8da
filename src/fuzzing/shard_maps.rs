use std::time::Duration;

use super::{lines, text};
use crate::endpoint::is_name_byte;
use crate::router::{NAME_BYTES_MAX, ShardMap};
use crate::store::map::{MapState, StoredMap};

/// The shard map stored on a server, which decides whether managers agree on the shard of each key.
/// The lines are two stored texts and the names of a manager's shards.
pub fn shard_maps(data: &[u8]) {
    let text = text(data);
    let [one, other, names] = lines(&text);
    assert!(ShardMap::agree(one, one));
    assert_eq!(ShardMap::agree(one, other), ShardMap::agree(other, one));
    let names: Vec<String> = names
        .split(',')
        .take(8)
        .map(str::to_owned)
        .filter(|name| is_legal(name))
        .collect();
    let mut distinct = names.clone();
    distinct.sort();
    distinct.dedup();
    if distinct.len() < names.len() || names.is_empty() {
        return;
    }
    let map = ShardMap::new(names.iter().cloned());
    let renamed = ShardMap::new((0..names.len()).map(|index| format!("{index}")));
    for here in 0..names.len() {
        let ours = map.fingerprint(here);
        let of_node = |number| ShardMap::of_node(&ours, number, 3, Duration::from_millis(1_500));
        for index in 0..names.len() {
            assert_eq!(ShardMap::agree(&ours, &renamed.fingerprint(index)), index == here);
        }
        assert!(ShardMap::agree(&of_node(1), &of_node(1)));
        assert!(!ShardMap::agree(&of_node(1), &of_node(2)) && !ShardMap::agree(&of_node(1), &ours));
        for ours in [ours.clone(), of_node(2)] {
            for stored in [one, other] {
                checked(&ours, stored);
            }
            let stored = StoredMap::new(ours.clone(), "lock:%map".to_owned());
            assert_eq!(stored.check(Some(&stored.reservation())).unwrap(), MapState::Reserved);
            assert!(!stored.is_set());
            assert_eq!(stored.check(Some(&ours)).unwrap(), MapState::Ours);
            assert!(stored.is_set());
        }
    }
}

fn checked(ours: &str, theirs: &str) {
    let map = StoredMap::new(ours.to_owned(), "lock:%map".to_owned());
    let state = map.check(Some(theirs));
    assert_eq!(map.is_set(), matches!(state, Ok(MapState::Ours)));
    match state {
        Ok(MapState::Ours) => {
            assert!(ShardMap::agree(ours, theirs));
            assert_eq!(with_our_names(theirs, ours), ours, "{theirs:?} can be stored");
        }
        Ok(MapState::Reserved) => {
            let map = theirs.strip_suffix("; reserved").unwrap();
            assert_eq!(with_our_names(map, ours), ours, "{theirs:?} can be stored");
        }
        Ok(MapState::None) => panic!("{theirs:?} is a map"),
        Err(error) => {
            assert!(!ShardMap::agree(ours, theirs));
            assert!(!error.to_string().contains(crate::text::must_be_escaped), "{error}");
        }
    }
}

/// The other map with its names replaced by ours; its names must be valid.
fn with_our_names(theirs: &str, ours: &str) -> String {
    let parts = |text: &str| {
        let (map, rest) = text.split_once(" here=").unwrap();
        let (version, map) = map.split_once(' ').unwrap();
        let shards = map.split(',').map(|shard| shard.rsplit_once(':').unwrap());
        let shards: Vec<(String, String)> = shards.map(|(name, slots)| (name.into(), slots.into())).collect();
        let (here, rest) = rest.split_at(rest.find(';').unwrap_or(rest.len()));
        (version.to_owned(), shards, here.to_owned(), rest.to_owned())
    };
    let (version, shards, here, rest) = parts(theirs);
    let (_, ours, ..) = parts(ours);
    assert!(
        shards.iter().all(|(name, _)| is_legal(name)),
        "{theirs:?} has names that no shard can have"
    );
    let index = shards.iter().position(|(name, _)| *name == here).unwrap();
    let shards: Vec<String> = shards
        .iter()
        .zip(&ours)
        .map(|((_, slots), (name, _))| format!("{name}:{slots}"))
        .collect();
    format!("{version} {} here={}{rest}", shards.join(","), ours[index].0)
}

fn is_legal(name: &str) -> bool {
    (1..=NAME_BYTES_MAX).contains(&name.len()) && name.bytes().all(is_name_byte)
}
