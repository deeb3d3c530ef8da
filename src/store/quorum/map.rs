//! The shard map at all nodes. A majority of them must have it before anything is acquired.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::tally::majority;
use super::{Quorum, outage};
use crate::store::{LeaseStore, MapState, MapStep, StoreError};

/// Whether a majority has this manager's map, and every node that can be reached has it or another one.
pub(super) fn has_map(quorum: &Quorum) -> bool {
    let set = quorum.nodes.iter().filter(|node| node.store.has_map()).count();
    set >= majority(quorum.nodes.len())
        && quorum
            .nodes
            .iter()
            .all(|node| node.store.has_map() || node.is_foreign() || !node.is_up())
}

/// Carries out one step at all nodes that answer. A node that is away gets the map once it is back.
///
/// # Errors
///
/// There is no majority; or a node has another map, unless all others have this one and are a majority.
pub(super) async fn step(quorum: Arc<Quorum>, step: MapStep) -> Result<MapState, StoreError> {
    let limit = quorum.node_limit;
    let asked = quorum.nodes.iter().filter(|node| node.is_up());
    let asked = asked.map(|node| async move { (node, timeout(limit, node.store.map(step)).await) });
    let (mut states, mut foreign) = (Vec::with_capacity(quorum.nodes.len()), None);
    for (node, state) in join_all(asked).await {
        match state {
            Ok(Ok(state)) => {
                node.set_foreign(false);
                states.push(state);
            }
            Ok(Err(error @ StoreError::MapMismatch { .. })) => {
                node.set_foreign(true);
                foreign = Some(error);
            }
            Ok(Err(error)) => match outage(&error) {
                Some(why) => quorum.down(node, why),
                None => return Err(error),
            },
            Err(_) => quorum.down(node, "no answer in time"),
        }
    }
    let is_ours = states.iter().all(|&state| state == MapState::Ours);
    let is_majority = states.len() >= majority(quorum.nodes.len());
    match foreign {
        Some(error) if !is_ours || !is_majority => Err(error),
        _ if !is_majority => Err(quorum.no_majority()),
        _ if is_ours => Ok(MapState::Ours),
        _ if states.contains(&MapState::None) => Ok(MapState::None),
        _ => Ok(MapState::Reserved),
    }
}
