//! A shard's copy of the shard map: what is stored, what must be, and how it is stored for the first time.
//!
//! # Implementation details
//!
//! Connecting only reads the map. The first lock of a manager on a shard without one stores it, in steps over all shards: all are read, and none
//! may have another map; then each one without a map is *reserved*, with the map and a mark, for a few seconds; then each reservation becomes
//! the map. So a start that is refused, also by another manager that starts with another map in the same moment, leaves nothing that lasts. A
//! reservation is no map: only what was confirmed lets a manager lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::router::ShardMap;
use crate::store::StoreError;

/// For how long a shard is reserved: the time that a slow start may need for its last step. Whole seconds, as etcd counts.
pub(crate) const RESERVED_FOR: Duration = Duration::from_secs(3);

/// How often a step looks again if another manager changed the map between its look and its write.
pub(crate) const MAP_ATTEMPTS: usize = 4;

/// What follows the map of a shard that is reserved.
const MARK: &str = "; reserved";

/// One step on the way to a stored map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapStep {
    Read,
    /// Reserve a shard that has none.
    Reserve,
    /// Store it for good where there is none, or a reservation of the same map.
    Confirm,
}

/// What a shard has stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapState {
    /// The map of this manager.
    Ours,
    /// None, but it is reserved for the same map.
    Reserved,
    None,
}

/// The map that one server of a shard must have.
#[derive(Debug)]
pub(crate) struct StoredMap {
    ours: String,
    key: String,
    /// Whether it was seen there. A server that lost it since, with all its data or by hand, gets it again at once, since this manager may hold
    /// leases there.
    is_set: AtomicBool,
}

impl StoredMap {
    pub(crate) fn new(ours: String, key: String) -> Self {
        Self {
            ours,
            key,
            is_set: AtomicBool::new(false),
        }
    }

    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    pub(crate) fn ours(&self) -> &str {
        &self.ours
    }

    /// What a shard that is reserved for this map has stored.
    pub(crate) fn reservation(&self) -> String {
        format!("{}{MARK}", self.ours)
    }

    pub(crate) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// It is to be there: if it is not when the server is next connected to, it is stored.
    pub(crate) fn expect(&self) {
        self.is_set.store(true, Ordering::Release);
    }

    /// It was erased, or nothing is known of it any more.
    pub(crate) fn forget(&self) {
        self.is_set.store(false, Ordering::Release);
    }

    /// Compares what is stored.
    ///
    /// # Errors
    ///
    /// It is another map.
    pub(crate) fn check(&self, stored: Option<&str>) -> Result<MapState, StoreError> {
        let Some(theirs) = stored else {
            return Ok(MapState::None);
        };
        if ShardMap::agree(&self.ours, theirs) {
            self.is_set.store(true, Ordering::Release);
            return Ok(MapState::Ours);
        }
        if theirs
            .strip_suffix(MARK)
            .is_some_and(|map| ShardMap::agree(&self.ours, map))
        {
            return Ok(MapState::Reserved);
        }
        self.forget();
        Err(StoreError::MapMismatch {
            shard: None,
            ours: self.ours.clone(),
            theirs: theirs.to_owned(),
            map_key: self.key.clone(),
        })
    }

    /// The same for one who holds nothing and only looks: where none is stored any more, the next lock stores it again, after a look at all
    /// shards.
    ///
    /// # Errors
    ///
    /// It is another map.
    pub(crate) fn look(&self, stored: Option<&str>) -> Result<(), StoreError> {
        if self.check(stored)? != MapState::Ours {
            self.forget();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reservation_of_the_same_map_is_no_map_and_no_mismatch() {
        let map = StoredMap::new("v2 a:0-16383 here=a".to_owned(), "lock:%map".to_owned());
        assert_eq!(map.check(None).unwrap(), MapState::None);
        assert_eq!(
            map.check(Some("v2 b:0-16383 here=b; reserved")).unwrap(),
            MapState::Reserved
        );
        assert_eq!(map.check(Some(&map.reservation())).unwrap(), MapState::Reserved);
        assert!(!map.is_set());
        assert_eq!(map.check(Some("v2 b:0-16383 here=b")).unwrap(), MapState::Ours);
        assert!(map.is_set());
        for other in [
            "v2 a:0-8191,b:8192-16383 here=a",
            "v2 a:0-8191,b:8192-16383 here=a; reserved",
            "",
        ] {
            let error = map.check(Some(other)).unwrap_err();
            assert!(matches!(error, StoreError::MapMismatch { .. }), "{other}");
            assert!(!map.is_set());
        }
    }
}
