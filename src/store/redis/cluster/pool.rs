//! The command connections of one pool, and reading the slot map through them.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, cmd};
use futures_util::future::select_ok;
use parking_lot::Mutex;

use super::super::checked_pool::{Lent, discard};
use super::super::client::{Purpose, named};
use super::super::connection::InFlightGuard;
use super::super::reply::to_store_error;
use super::Shared;
use super::checked::{CheckedPools, NodeOpener};
use super::node::{AskError, Live, NodeLink};
use super::topology::{NodeAddress, Range, ranges};
use crate::key::Slot;
use crate::runtime::Runtimes;
use crate::store::StoreError;

/// How many nodes are asked for the map concurrently; the first usable reply counts.
const ASKED_AT_A_TIME: usize = 8;

/// See the module. The connections run on the runtime of the threads that use the pool.
pub(super) struct NodePool {
    pub(super) shared: Arc<Shared>,
    /// How many connections each node gets. A slot always uses the same one, which keeps the order
    /// of its requests.
    per_node: usize,
    purpose: Purpose,
    /// Set if the application's tasks use the pool.
    runtimes: Option<Arc<Runtimes>>,
    nodes: Mutex<HashMap<NodeAddress, Vec<Arc<NodeLink>>>>,
    /// Held while the map is read, so that many tasks that find it wrong read it once. One per
    /// pool: a task on a blocked runtime must not delay renewals.
    reading: tokio::sync::Mutex<()>,
    next_asked: AtomicUsize,
    /// The pool whose connections are used while this one can't open its own.
    substitute: Option<Arc<NodePool>>,
    /// If set, requests borrow connections from these instead of keeping any.
    pub(super) checked: Option<CheckedPools>,
}

/// A connection for one request.
pub(super) enum Sender {
    Kept(Arc<NodeLink>, Live),
    Pooled(Lent<NodeOpener>),
}

impl NodePool {
    pub(super) fn new(
        shared: &Arc<Shared>,
        per_node: usize,
        purpose: Purpose,
        runtimes: Option<Arc<Runtimes>>,
    ) -> Self {
        Self {
            shared: Arc::clone(shared),
            per_node: per_node.max(1),
            purpose,
            runtimes,
            nodes: Mutex::new(HashMap::new()),
            reading: tokio::sync::Mutex::new(()),
            next_asked: AtomicUsize::new(0),
            substitute: None,
            checked: None,
        }
    }

    /// For requests that are not on the path of a lock. The other pool keeps the map correct, and
    /// lends its open connections while a node accepts no more.
    pub(super) fn checked(other: &Arc<Self>, runtimes: &Arc<Runtimes>) -> Self {
        let shared = &other.shared;
        let name = named(&shared.commands.manager, Purpose::Pool);
        let limits = (shared.timeout, shared.patience);
        Self {
            checked: Some(CheckedPools::new(&shared.target, name, limits, runtimes)),
            ..Self::new(shared, 1, Purpose::Pool, None).with_substitute(other)
        }
    }

    /// Adds another pool, whose open connections are used while a node accepts none from this pool.
    pub(super) fn with_substitute(self, substitute: &Arc<Self>) -> Self {
        Self {
            substitute: Some(Arc::clone(substitute)),
            ..self
        }
    }

    /// The substitute's connection for this slot to the node, if one is open.
    pub(super) fn substitute(&self, place: &NodeAddress, slot: Slot) -> Option<(Arc<NodeLink>, Live)> {
        let node = self.substitute.as_ref()?.known_node(place, slot)?;
        let live = node.live()?;
        Some((node, live))
    }

    /// A connection for this slot to the node.
    pub(super) async fn sender(
        &self,
        place: &NodeAddress,
        slot: Slot,
        patience: Duration,
    ) -> Result<Sender, StoreError> {
        if self.checked.is_none()
            && let Some(sender) = self.open_sender(place, slot)
        {
            return Ok(sender);
        }
        // Boxed: connecting is rare and would make the future of every request several times as
        // large.
        Box::pin(self.opened_sender(place, slot, patience)).await
    }

    async fn opened_sender(&self, place: &NodeAddress, slot: Slot, patience: Duration) -> Result<Sender, StoreError> {
        let opening = async {
            match &self.checked {
                Some(checked) => Ok(Sender::Pooled(checked.get(place).await?)),
                None => {
                    let node = self.node(place, slot)?;
                    let live = node.get().await?;
                    Ok(Sender::Kept(node, live))
                }
            }
        };
        let error = match tokio::time::timeout(patience, opening).await {
            Ok(Ok(sender)) => return Ok(sender),
            Ok(Err(error)) => error,
            Err(_) => StoreError::Unavailable(format!("no connection within {patience:?}").into()),
        };
        match self.substitute(place, slot) {
            Some((node, live)) => Ok(Sender::Kept(node, live)),
            None => Err(self.not_connected(error, place)),
        }
    }

    /// The kept connection for this slot to the node, if it is open.
    pub(super) fn open_sender(&self, place: &NodeAddress, slot: Slot) -> Option<Sender> {
        let node = self.known_node(place, slot)?;
        let live = node.live()?;
        Some(Sender::Kept(node, live))
    }

    /// Adds the node to a connection error, and the origin of its address if that is not the URL.
    pub(super) fn not_connected(&self, error: StoreError, place: &NodeAddress) -> StoreError {
        if self.shared.seeds.contains(place) {
            return at_place(error, place);
        }
        let announced = format!(
            "{place}, which is not in the URL but is announced by the cluster's nodes (cluster-announce-ip, \
             cluster-announce-port, cluster-announce-hostname)"
        );
        at_place(error, &announced)
    }

    fn name(&self) -> Cmd {
        named(&self.shared.commands.manager, self.purpose)
    }

    fn known_node(&self, place: &NodeAddress, slot: Slot) -> Option<Arc<NodeLink>> {
        let nodes = self.nodes.lock();
        let nodes = nodes.get(place)?;
        nodes.get(usize::from(slot.number()) % nodes.len()).map(Arc::clone)
    }

    /// Abandons all current connections.
    pub(super) fn leave(&self) {
        let nodes: Vec<Arc<NodeLink>> = self.nodes.lock().values().flatten().map(Arc::clone).collect();
        nodes.iter().for_each(|node| node.leave());
    }

    /// The connection for this slot to the node.
    pub(super) fn node(&self, place: &NodeAddress, slot: Slot) -> Result<Arc<NodeLink>, StoreError> {
        let mut nodes = self.nodes.lock();
        if let Some(nodes) = nodes.get(place) {
            return Ok(Arc::clone(&nodes[usize::from(slot.number()) % nodes.len()]));
        }
        let made: Option<Vec<Arc<NodeLink>>> = (0..self.per_node)
            .map(|_| {
                let shared = &self.shared;
                let node = NodeLink::new(
                    place,
                    &shared.target,
                    shared.patience,
                    None,
                    self.name(),
                    &shared.metrics,
                    &shared.topology,
                );
                node.map(|node| Arc::new(node.on_app_runtime(self.runtimes.clone())))
            })
            .collect();
        let made = made.ok_or_else(|| StoreError::Refused(format!("{place:?} is not a valid node address").into()))?;
        let node = Arc::clone(&made[usize::from(slot.number()) % made.len()]);
        nodes.insert(Arc::clone(place), made);
        Ok(node)
    }

    /// Reads the map again, unless its version has changed since `version`.
    ///
    /// # Errors
    ///
    /// No node returned a map.
    pub(super) async fn refresh(&self, version: u64) -> Result<(), StoreError> {
        match &self.substitute {
            Some(other) if self.checked.is_some() => Box::pin(other.refresh(version)).await,
            _ => Box::pin(self.read_slots(version)).await,
        }
    }

    async fn read_slots(&self, version: u64) -> Result<(), StoreError> {
        let _only_one = self.reading.lock().await;
        let topology = &self.shared.topology;
        if topology.version() != version {
            return Ok(());
        }
        let mut places = topology.places();
        for seed in &self.shared.seeds {
            if !places.contains(seed) {
                places.push(Arc::clone(seed));
            }
        }
        // In a different order each time: the node that answers first may be the one that knows
        // least.
        let first = self.next_asked.fetch_add(1, Ordering::Relaxed) % places.len().max(1);
        places.rotate_left(first);
        let mut failed: Option<StoreError> = None;
        for some in places.chunks(ASKED_AT_A_TIME) {
            let asking = some.iter().map(|place| Box::pin(self.ask_for_slots(place)));
            match select_ok(asking).await {
                Ok((ranges, _)) => {
                    topology.replace(&ranges);
                    let owners = topology.places();
                    let is_gone = |place: &NodeAddress| !owners.contains(place) && !self.shared.seeds.contains(place);
                    let gone: Vec<_> = self.nodes.lock().extract_if(|place, _| is_gone(place)).collect();
                    // Not under the mutex: ending a connection wakes its driver.
                    drop(gone);
                    return Ok(());
                }
                // A node's refusal is more informative than a failed connection.
                Err(error) if matches!(error, StoreError::Refused(_)) || failed.is_none() => failed = Some(error),
                Err(_) => {}
            }
        }
        Err(failed.unwrap_or_else(|| StoreError::Unavailable("no node is known".into())))
    }

    async fn ask_for_slots(&self, place: &NodeAddress) -> Result<Vec<Range>, StoreError> {
        let node = self.node(place, Slot::of(b""))?;
        match node.ask(cmd("CLUSTER").arg("SLOTS"), self.shared.patience).await {
            Ok(Ok(reply)) => match ranges(&reply, place) {
                Some(ranges) if !ranges.is_empty() => Ok(ranges),
                Some(_) => Err(StoreError::Unavailable(
                    format!("{place} reports no slot that has an owner").into(),
                )),
                None => Err(StoreError::Refused(
                    format!("unexpected reply from {place} to CLUSTER SLOTS: {reply:?}").into(),
                )),
            },
            Ok(Err(error)) if error.to_string().contains("cluster support disabled") => Err(StoreError::Refused(
                format!("{place} is not a node of a Redis Cluster; use redis:// for a single server").into(),
            )),
            Ok(Err(error)) => Err(at_place(to_store_error(&error), place)),
            Err(AskError::NotConnected(error)) => Err(self.not_connected(error, place)),
            Err(AskError::Silent) => Err(StoreError::Unavailable(
                format!("{place} gave no answer within {:?}", self.shared.patience).into(),
            )),
        }
    }
}

impl Sender {
    pub(super) fn connection(&self) -> MultiplexedConnection {
        match self {
            Self::Kept(_, live) => live.connection.clone(),
            Self::Pooled(lent) => lent.connection.clone(),
        }
    }

    /// The generation of the connection, unless it is pooled.
    pub(super) fn generation(&self) -> Option<u64> {
        match self {
            Self::Kept(_, live) => Some(live.generation()),
            Self::Pooled(_) => None,
        }
    }

    /// Counts a request as in flight until the returned guard is dropped.
    pub(super) fn enter(&self) -> Option<InFlightGuard> {
        match self {
            Self::Kept(node, _) => Some(node.enter()),
            Self::Pooled(_) => None,
        }
    }

    /// Abandons the connection.
    pub(super) fn broken(self) {
        match self {
            Self::Kept(node, live) => node.broken(live.generation()),
            Self::Pooled(lent) => discard(lent),
        }
    }
}

/// Adds the node's address to an error.
pub(super) fn at_place(error: StoreError, place: &str) -> StoreError {
    error.map_reason(|reason| format!("{place}: {reason}"))
}
