//! Properties that must hold for the addresses that nodes report. See [`crate::fuzzing`].

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use deadpool_redis::redis::{IntoConnectionInfo, Value, parse_redis_value};

use super::node;
use super::topology::{NodeAddress, Topology, ranges, redirected};
use crate::fuzzing::text;
use crate::key::{SLOTS, Slot};

/// Replies to `CLUSTER SLOTS`, and redirections.
pub(in crate::store::redis) fn places(data: &[u8]) {
    for asked in ["10.0.0.1:6379", "[::1]:7000"] {
        if let Some(place) = redirected(&text(data), asked) {
            used(&place);
        }
        let Ok(value) = parse_redis_value(data) else { continue };
        if let Err(error) = value.clone().extract_error()
            && let Some((place, slot)) = error.redirect_node()
        {
            if let Some(place) = redirected(place, asked) {
                used(&place);
            }
            assert!(Slot::new(slot).is_none_or(|slot| slot.number() < SLOTS));
        }
        mapped(&value, asked);
    }
}

fn mapped(reply: &Value, asked: &str) {
    let Some(ranges) = ranges(reply, asked) else { return };
    let topology = Topology::new();
    topology.replace(&ranges);
    let places = topology.places();
    assert!(places.len() <= ranges.len());
    for place in &places {
        used(place);
    }
    for slot in (0..SLOTS).step_by(97).filter_map(Slot::new) {
        assert!(topology.owner(slot).is_none_or(|owner| places.contains(&owner)));
    }
    // Applying the same map again changes nothing.
    let epochs: Vec<u32> = (0..SLOTS)
        .filter_map(Slot::new)
        .map(|slot| topology.epoch(slot))
        .collect();
    topology.replace(&ranges);
    let slots = (0..SLOTS).filter_map(Slot::new);
    assert!(slots.zip(epochs).all(|(slot, epoch)| topology.epoch(slot) == epoch));
}

/// Connecting to a node at this address uses the login of the URL and no other.
fn used(place: &NodeAddress) {
    let like = "redis://u:p@h:1/0".into_connection_info().unwrap();
    let Some(info) = node::at(place, &like, true) else {
        return;
    };
    assert_eq!(info.redis_settings().username(), Some("u"));
    assert_eq!(info.redis_settings().password(), Some("p"));
    assert_eq!(info.redis_settings().db(), 0);
    let port = place.rsplit_once(':').unwrap().1;
    assert!(port.parse::<u16>().is_ok(), "{place} can be connected to");
}
