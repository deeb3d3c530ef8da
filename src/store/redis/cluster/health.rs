//! The health probe: whether every part of the cluster answers and accepts locks, and the time on
//! its primaries.

use deadpool_redis::redis::RedisError;
use futures_util::future::join_all;

use super::super::server_time;
use super::pool::NodePool;
use super::topology::NodeAddress;
use crate::key::Slot;
use crate::store::{Health, ServerTime};

/// Sends each primary a write that changes nothing, as a lock request would write; it follows
/// redirections.
pub(super) async fn probe(pool: &NodePool) -> Health {
    let topology = &pool.shared.topology;
    if topology.version() == 0
        && let Err(error) = pool.refresh(0).await
    {
        return Health {
            reached: Err(error),
            times: Vec::new(),
        };
    }
    let parts = topology.parts().into_iter().map(|(owner, slot)| async move {
        let write = pool.shared.commands.write_nothing(slot);
        let time = async {
            match &owner {
                Some(owner) => time_of(pool, owner, slot).await,
                None => None,
            }
        };
        let (written, time) = tokio::join!(pool.single(slot, &write), time);
        (written.map(drop), time)
    });
    let (reached, times): (Vec<_>, Vec<_>) = join_all(parts).await.into_iter().unzip();
    Health {
        reached: reached.into_iter().collect(),
        times: times.into_iter().flatten().collect(),
    }
}

/// If the node does not answer, the concurrent write reports why.
async fn time_of(pool: &NodePool, place: &NodeAddress, slot: Slot) -> Option<ServerTime> {
    let node = pool.node(place, slot).ok()?;
    let asked = async {
        let mut live = node.get().await.ok()?;
        let generation = live.generation();
        let time = server_time::read(&mut live.connection, place.clone(), generation).await;
        if time.as_ref().is_err_and(RedisError::is_unrecoverable_error) {
            node.broken(generation);
        }
        time.ok()?.ok()
    };
    tokio::time::timeout(pool.shared.patience, asked).await.ok()?
}
