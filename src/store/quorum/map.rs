//! The shard map at all nodes. A majority of them must have it before anything is acquired.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::tally::majority;
use super::{Quorum, outage};
use crate::clock::Moment;
use crate::store::{LeaseStore, MapState, MapStep, StoreError};

/// Whether a majority has this manager's map. A node that lacks it gets it with the next connection
/// or renewal.
pub(super) fn has_map(quorum: &Quorum) -> bool {
    let set = quorum.nodes.iter().filter(|node| node.store.has_map()).count();
    set >= majority(quorum.nodes.len())
}

/// Performs one step, again if nodes stop answering meanwhile.
///
/// # Errors
///
/// There is no majority; or a node has a different map, unless all others have this one and are a
/// majority.
pub(super) async fn step(quorum: Arc<Quorum>, step: MapStep) -> Result<MapState, StoreError> {
    let deadline = Moment::now() + quorum.majority_limit;
    loop {
        quorum.wait_for_majority(deadline).await?;
        if let Some(state) = step_once(&quorum, step).await? {
            return Ok(state);
        }
        if Moment::now() >= deadline {
            return Err(quorum.no_majority());
        }
    }
}

/// Performs one step at all nodes that answer. `None` if they are no majority.
async fn step_once(quorum: &Quorum, step: MapStep) -> Result<Option<MapState>, StoreError> {
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
                Some(why) => quorum.report_down(node, why),
                None => return Err(error),
            },
            Err(_) => quorum.report_down(node, "no answer in time"),
        }
    }
    let is_ours = states.iter().all(|&state| state == MapState::Ours);
    let is_majority = states.len() >= majority(quorum.nodes.len());
    match foreign {
        Some(error) if !is_ours || !is_majority => Err(error),
        _ if !is_majority => Ok(None),
        _ if is_ours => {
            // A node that is away stores it once it is back.
            let others = quorum.nodes.iter().filter(|node| !node.is_foreign());
            others.for_each(|node| node.store.expect_map());
            Ok(Some(MapState::Ours))
        }
        _ if states.contains(&MapState::None) => Ok(Some(MapState::None)),
        _ => Ok(Some(MapState::Reserved)),
    }
}
