//! Which node owns which slot, as far as this manager knows.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use deadpool_redis::redis::Value;
use parking_lot::RwLock;

use super::super::connection::Cuts;
use super::super::reply::{as_int, as_text};
use crate::key::{SLOTS, Slot};

/// `host:port` of a node.
pub(super) type NodeAddress = Arc<str>;

/// The slot map, shared by all pools and the inbox. It may be wrong at any time; a node that
/// receives a request for a slot it does not own redirects the sender, which then corrects the map.
pub(super) struct Topology {
    owners: RwLock<Box<[Option<NodeAddress>]>>,
    /// How often the whole map was read.
    version: AtomicU64,
    /// For each slot, how often its owner may have forgotten leases: the owner changed, or a
    /// connection to it broke.
    epochs: Box<[AtomicU32]>,
    /// When a command connection to any node was last abandoned.
    pub(super) cuts: Cuts,
}

impl Topology {
    pub(super) fn new() -> Self {
        Self {
            owners: RwLock::new((0..SLOTS).map(|_| None).collect()),
            version: AtomicU64::new(0),
            epochs: (0..SLOTS).map(|_| AtomicU32::new(0)).collect(),
            cuts: Cuts::default(),
        }
    }

    /// See [`LeaseStore::epoch`](crate::store::LeaseStore::epoch).
    pub(super) fn epoch(&self, slot: Slot) -> u32 {
        self.epochs[usize::from(slot.number())].load(Ordering::Acquire)
    }

    /// A connection to this node broke: leases in its slots must be confirmed before they are
    /// passed on.
    pub(super) fn may_have_forgotten(&self, place: &NodeAddress) {
        for (owner, epoch) in self.owners.read().iter().zip(&self.epochs) {
            if owner.as_ref() == Some(place) {
                epoch.fetch_add(1, Ordering::AcqRel);
            }
        }
    }

    pub(super) fn owner(&self, slot: Slot) -> Option<NodeAddress> {
        self.owners.read()[usize::from(slot.number())].clone()
    }

    pub(super) fn version(&self) -> u64 {
        self.version.load(Ordering::Acquire)
    }

    /// A node reported another owner of the slot.
    pub(super) fn moved(&self, slot: Slot, place: NodeAddress) {
        let index = usize::from(slot.number());
        let before = self.owners.write()[index].replace(Arc::clone(&place));
        if before != Some(place) {
            self.epochs[index].fetch_add(1, Ordering::AcqRel);
        }
    }

    /// A node reported the owners of all slots.
    pub(super) fn replace(&self, ranges: &[Range]) {
        let mut owners = self.owners.write();
        let before = owners.clone();
        owners.fill(None);
        for range in ranges {
            owners[usize::from(range.first)..=usize::from(range.last)].fill(Some(Arc::clone(&range.owner)));
        }
        for ((before, after), epoch) in before.iter().zip(&*owners).zip(&self.epochs) {
            if before != after {
                epoch.fetch_add(1, Ordering::AcqRel);
            }
        }
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    /// Each node that owns slots, with its first slot, and the first slot without an owner, if
    /// there is one.
    pub(super) fn parts(&self) -> Vec<(Option<NodeAddress>, Slot)> {
        let mut parts: Vec<(Option<NodeAddress>, Slot)> = Vec::new();
        let owners = self.owners.read();
        for (owner, slot) in owners.iter().zip((0..SLOTS).filter_map(Slot::new)) {
            let is_owners = |(known, _): &(Option<NodeAddress>, Slot)| known == owner;
            // Adjacent slots usually have the same owner.
            if !parts.last().is_some_and(is_owners) && !parts.iter().any(is_owners) {
                parts.push((owner.clone(), slot));
            }
        }
        parts
    }

    /// The nodes that own slots, each once.
    pub(super) fn places(&self) -> Vec<NodeAddress> {
        let mut places: Vec<NodeAddress> = Vec::new();
        for owner in self.owners.read().iter().flatten() {
            if places.last() != Some(owner) && !places.contains(owner) {
                places.push(Arc::clone(owner));
            }
        }
        places
    }
}

/// Adjacent slots with one owner.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Range {
    first: u16,
    last: u16,
    owner: NodeAddress,
}

/// Parses the reply to `CLUSTER SLOTS`. A node that does not know its own host name reports none:
/// it is then the node that was `asked`.
pub(super) fn ranges(reply: &Value, asked: &str) -> Option<Vec<Range>> {
    let Value::Array(ranges) = reply else { return None };
    ranges.iter().map(|range| read_range(range, asked)).collect()
}

fn read_range(range: &Value, asked: &str) -> Option<Range> {
    let Value::Array(parts) = range else { return None };
    let [first, last, Value::Array(primary), ..] = &parts[..] else {
        return None;
    };
    let slot = |value| as_int(value).and_then(|number| u16::try_from(number).ok());
    let (first, last) = (slot(first)?, slot(last)?);
    let port = primary.get(1).and_then(as_int)?;
    let host = primary.first().and_then(as_text).unwrap_or_default();
    (first <= last && last < SLOTS).then(|| Range {
        first,
        last,
        owner: place_of(&host, port, asked),
    })
}

/// An IPv6 address is put in brackets, as in a URL.
fn place_of(host: &str, port: i64, asked: &str) -> NodeAddress {
    let own = asked.rsplit_once(':').map_or(asked, |(host, _)| host);
    match host {
        "" | "?" => format!("{own}:{port}").into(),
        host if host.contains(':') && !host.starts_with('[') => format!("[{host}]:{port}").into(),
        host => format!("{host}:{port}").into(),
    }
}

/// The target of a `MOVED` or `ASK`: `host:port` as the server wrote it, without a host if the
/// server does not know its own.
pub(super) fn redirected(place: &str, asked: &str) -> Option<NodeAddress> {
    let (host, port) = place.rsplit_once(':')?;
    Some(place_of(host, port.parse().ok()?, asked))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(host: &[u8], port: i64) -> Value {
        Value::Array(vec![Value::BulkString(host.to_vec()), Value::Int(port)])
    }

    #[test]
    fn the_epoch_of_a_slot_changes_with_its_owner_and_with_a_connection_to_it() {
        let range = |first, last, owner: &str| Range {
            first,
            last,
            owner: owner.into(),
        };
        let topology = Topology::new();
        let slots = [0, 1, 100].map(|number| Slot::new(number).unwrap());
        let epochs = || slots.map(|slot| topology.epoch(slot));
        topology.replace(&[range(0, 99, "a:1"), range(100, 16383, "b:1")]);
        let [first, second, third] = epochs();
        topology.replace(&[range(0, 0, "a:1"), range(1, 99, "a:1"), range(100, 16383, "b:1")]);
        topology.moved(slots[1], "a:1".into());
        assert_eq!(epochs(), [first, second, third], "no slot has moved");
        topology.moved(slots[1], "b:1".into());
        assert_eq!(epochs(), [first, second + 1, third]);
        topology.may_have_forgotten(&"b:1".into());
        assert_eq!(epochs(), [first, second + 2, third + 1]);
        topology.replace(&[range(0, 16383, "c:1")]);
        assert_eq!(epochs(), [first + 1, second + 3, third + 2]);
    }

    #[test]
    fn slot_ranges_are_parsed_with_missing_or_unknown_hosts() {
        let range = |first, last, primary| Value::Array(vec![Value::Int(first), Value::Int(last), primary]);
        let reply = Value::Array(vec![
            range(0, 99, node(b"10.0.0.1", 1)),
            range(100, 100, node(b"", 2)),
            range(101, 200, node(b"?", 3)),
            range(201, 202, node(b"::1", 4)),
            range(203, 16383, Value::Array(vec![Value::Nil, Value::Int(5)])),
        ]);
        let topology = Topology::new();
        topology.replace(&ranges(&reply, "[::2]:9").unwrap());
        let places: Vec<String> = topology.places().iter().map(ToString::to_string).collect();
        assert_eq!(places, ["10.0.0.1:1", "[::2]:2", "[::2]:3", "[::1]:4", "[::2]:5"]);
        for nonsense in [range(5, 4, node(b"a", 1)), range(0, 16384, node(b"a", 1)), Value::Nil] {
            assert_eq!(ranges(&Value::Array(vec![nonsense]), "a:1"), None);
        }
        assert_eq!(redirected("10.0.0.1:7", "a:1").as_deref(), Some("10.0.0.1:7"));
        assert_eq!(redirected(":7", "a:1").as_deref(), Some("a:7"));
        assert_eq!(redirected("nowhere", "a:1"), None);
    }
}
