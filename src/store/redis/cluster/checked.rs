//! Connections for requests that are not on the path of a lock: one pool for each node.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Cmd, RedisResult, Value, cmd};
use parking_lot::Mutex;

use super::super::checked_pool::{CheckedPool, ConnectionOrigin, Lent, Opener, PooledConnection};
use super::super::client::{Target, with_reason};
use super::super::connection::{self, InFlight};
use super::node::{at, set_name};
use super::topology::NodeAddress;
use crate::runtime::Runtimes;
use crate::store::StoreError;

/// See the module.
pub(super) struct CheckedPools {
    /// Login and encryption, the same for every node.
    target: Target,
    /// The command that names a connection.
    name: Cmd,
    /// The time limit of a request, and that for connecting.
    timeout: Duration,
    patience: Duration,
    runtimes: Arc<Runtimes>,
    pools: Mutex<HashMap<NodeAddress, Arc<CheckedPool<NodeOpener>>>>,
}

/// Opens connections to one node.
pub(super) struct NodeOpener {
    place: NodeAddress,
    target: Target,
    name: Cmd,
    patience: Duration,
}

impl CheckedPools {
    pub(super) fn new(
        target: &Target,
        name: Cmd,
        (timeout, patience): (Duration, Duration),
        runtimes: &Arc<Runtimes>,
    ) -> Self {
        Self {
            target: target.clone(),
            name,
            timeout,
            patience,
            runtimes: Arc::clone(runtimes),
            pools: Mutex::new(HashMap::new()),
        }
    }

    /// Lends a connection to the node that has just answered.
    pub(super) async fn get(&self, place: &NodeAddress) -> Result<Lent<NodeOpener>, StoreError> {
        self.pool(place)?.get().await
    }

    fn pool(&self, place: &NodeAddress) -> Result<Arc<CheckedPool<NodeOpener>>, StoreError> {
        let mut pools = self.pools.lock();
        if let Some(pool) = pools.get(place) {
            return Ok(Arc::clone(pool));
        }
        let info = at(place, self.target.info(), false);
        let info = info.ok_or_else(|| StoreError::Refused(format!("{place:?} is not a valid node address").into()))?;
        let opener = NodeOpener {
            place: Arc::clone(place),
            target: self.target.with_info(info),
            name: self.name.clone(),
            patience: self.patience,
        };
        let pool = Arc::new(CheckedPool::new(opener, &self.runtimes, self.timeout));
        pools.insert(Arc::clone(place), Arc::clone(&pool));
        Ok(pool)
    }

    /// Closes idle connections, and forgets nodes without any, which may have left the cluster.
    pub(super) fn close_idle(&self) {
        let all: Vec<(NodeAddress, Arc<CheckedPool<NodeOpener>>)> = {
            let pools = self.pools.lock();
            pools
                .iter()
                .map(|(place, pool)| (Arc::clone(place), Arc::clone(pool)))
                .collect()
        };
        // Not under the mutex: closing a connection wakes its driver.
        for (place, pool) in all {
            if pool.close_idle() {
                self.pools.lock().remove(&place);
            }
        }
    }
}

impl Opener for NodeOpener {
    async fn open(&self) -> Result<PooledConnection, StoreError> {
        let in_flight = InFlight::default();
        let opening = connection::open(&self.target, None, connection::settings(), self.patience, &in_flight);
        let (mut connection, driver) = with_reason(self.target.info(), self.patience, opening).await?;
        set_name(&mut connection, &self.name, self.patience).await;
        let origin = ConnectionOrigin {
            place: Arc::clone(&self.place),
            switches: 0,
            era: 0,
        };
        Ok(PooledConnection::new(connection, driver, origin))
    }

    /// A node that no longer owns a slot redirects its requests.
    fn is_current(&self, _: &ConnectionOrigin) -> bool {
        true
    }

    fn check(&self) -> Cmd {
        cmd("TIME")
    }

    fn is_usable(&self, reply: RedisResult<Value>) -> bool {
        reply.is_ok()
    }
}
