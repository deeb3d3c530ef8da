//! A shard's copy of the shard map: what is stored, what must be stored, and how it is first
//! stored.
//!
//! # Implementation details
//!
//! Connecting only reads the map. A manager's first lock on a shard without a map stores it, in
//! steps that each cover all shards. First all shards are read, and none may have a different map.
//! Then each shard without a map is *reserved* for a few seconds: it stores the map with a mark.
//! Finally each reservation becomes the map. So a start that is refused leaves nothing permanent,
//! even if another manager starts with a different map at the same moment. A reservation is not a
//! map: a manager may lock only after the map was confirmed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::router::ShardMap;
use crate::store::StoreError;

/// How long a shard stays reserved: enough for the last step of a slow start. In whole seconds, as
/// etcd requires.
pub(crate) const RESERVED_FOR: Duration = Duration::from_secs(3);

/// How many times a step reads the map before it gives up. It reads it again if another manager
/// changed the map between its read and its write.
pub(crate) const MAP_ATTEMPTS: usize = 4;

/// The suffix that marks a reservation.
const RESERVED_SUFFIX: &str = "; reserved";

/// One step towards a stored map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapStep {
    Read,
    /// Reserve a shard that has no map.
    Reserve,
    /// Store the map permanently if there is none, or a reservation of the same map.
    Confirm,
}

/// What a shard has stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum MapState {
    /// The map of this manager.
    Ours,
    /// No map, but a reservation of the same map.
    Reserved,
    None,
}

/// The map that one server of a shard must have.
#[derive(Debug)]
pub(crate) struct StoredMap {
    ours: String,
    key: String,
    /// Whether the map was seen there. If the server has lost it since, with all its data or by
    /// hand, it is stored again at once, because this manager may hold leases there.
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

    /// The value stored in a shard that is reserved for this map.
    pub(crate) fn reservation(&self) -> String {
        format!("{}{RESERVED_SUFFIX}", self.ours)
    }

    pub(crate) fn is_set(&self) -> bool {
        self.is_set.load(Ordering::Acquire)
    }

    /// Records that the map must be there: if the next connection does not find it, it is stored.
    pub(crate) fn expect(&self) {
        self.is_set.store(true, Ordering::Release);
    }

    /// Records that the map was erased, or that its state is unknown.
    pub(crate) fn forget(&self) {
        self.is_set.store(false, Ordering::Release);
    }

    /// Compares the stored map with this manager's.
    ///
    /// # Errors
    ///
    /// The shard has a different map.
    pub(crate) fn check(&self, stored: Option<&str>) -> Result<MapState, StoreError> {
        let Some(theirs) = stored else {
            return Ok(MapState::None);
        };
        if ShardMap::agree(&self.ours, theirs) {
            self.is_set.store(true, Ordering::Release);
            return Ok(MapState::Ours);
        }
        if theirs
            .strip_suffix(RESERVED_SUFFIX)
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

    /// Like [`check`](Self::check), for a caller that holds nothing and only probes. If the map is
    /// gone, the next lock stores it again, after reading all shards.
    ///
    /// # Errors
    ///
    /// The shard has a different map.
    pub(crate) fn check_or_forget(&self, stored: Option<&str>) -> Result<(), StoreError> {
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
