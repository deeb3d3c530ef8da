//! A quorum of independent primaries as a lease store (Redlock), with order and growing tokens.
//!
//! # Implementation details
//!
//! The *door* of a key is the first usable node in the order of the URL, which starts at `slot % nodes` so that load spreads. Its queue
//! gives the order; a cycle that is granted there claims the others in parallel (`acquire`). It holds the key once a majority of nodes with a
//! vote is its own, so managers may disagree about the door for a while: two majorities share a node, and that node has one owner.
//!
//! Why tokens grow: a claim tells the counter as it was before and raises it to the door's largest token. Any two majorities share a node, so
//! a later winner sees a counter that is at least the largest token of every earlier winner; where that reaches into its own block of
//! tokens, it takes a block above, and writes that to a majority before it counts as the holder, like the write-back of an ABD register.
//! A node whose counter was lost (it is below the floor that its manager knows) raises it to its time first. A
//! node that restarted has no vote for as long as a lease may live, since it may have forgotten one.
//!
//! Nobody waits for a node that is marked down, which one time-out or broken connection is enough for. The tidy worker, which runs in
//! `listen`, asks such nodes again and again, and repeats there what was released without an answer. A node is owed a release from before
//! it is sent until it is answered, so that a request which is dropped midway leaves nothing; at most 10,000 per node, and what is beyond
//! runs out by its TTL. What a node says of a cycle that it is owed does not count.
//!
//! A claim that nobody waited for any more may be executed after the release of its cycle was answered, if the connection that it was sent on was given up in
//! between. Such a release is repeated at that node when nothing can arrive late any more (`node`).
//!
//! A cycle that holds its lease (`held`) is never given up by a request that asks for more: until its holder knows of a loss, nobody else
//! may have it. An extension counts only where a majority has had the lease all the time (`extend`). A renewal restores it at nodes that
//! lack it.
//!
//! Time limits live on the runtime on which a request began: what is left of a release goes on there as a task, and is owed if that ends.

mod acquire;
mod claims;
mod extend;
mod map;
mod node;
mod release;
mod renew;
mod tally;
#[cfg(test)]
mod tests;
mod tidy;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use crate::clock::Moment;
use crate::endpoint::ServerUrl;
use crate::error::Invalid;
use crate::key::{LockKey, Slot};
use crate::protocol::{Acquire, AcquireReply, Answer, Cycle, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::router::ShardMap;
use crate::store::redis::primary::RedisStore;
use crate::store::{Inspection, Lane, LeaseStore, Look, MapState, MapStep, StoreError, StoreFuture, StoreOptions};
use crate::telemetry::{NodeMetrics, ShardMetrics};
use node::Node;
use tally::majority;

/// See the module.
pub(crate) struct QuorumStore {
    quorum: Arc<Quorum>,
}

/// What the requests of a store share.
struct Quorum {
    nodes: Vec<Arc<Node>>,
    max_ttl: Duration,
    /// The longest that a request waits for one node.
    node_limit: Duration,
    connect_limit: Duration,
    /// How long a request waits for a majority of nodes to be back.
    majority_limit: Duration,
    /// Told to the tidy worker: a node went down, and those who wait in its queue have to ask at the next door.
    door_lost: Notify,
    /// The cycles that hold a lease, as far as this manager knows, and when a majority last said so: no lease of any other is claimed
    /// again. Those that were lost without a release are forgotten when their leases have run out.
    held: parking_lot::Mutex<HashMap<Cycle, Moment>>,
    /// The largest number of a cycle of which something was sent.
    newest: AtomicU64,
    /// How many releases are on their way.
    releasing: AtomicUsize,
    metrics: Arc<ShardMetrics>,
}

/// At each multiple of so many leases, those that have run out are looked for.
const HELD_BETWEEN_LOOKS: usize = 1024;

/// How often a request that waits for a majority looks at what is known of the nodes. Nothing is sent for it.
const MAJORITY_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause before a request that found no majority is sent again.
const MAJORITY_PAUSE_MAX: Duration = Duration::from_millis(100);

/// A node that says nothing for so long is down.
const NODE_LIMIT_MAX: Duration = Duration::from_millis(250);

impl QuorumStore {
    pub(crate) fn new(servers: &[ServerUrl], options: &StoreOptions) -> Result<Self, Invalid> {
        let count = servers.len();
        let node = |(index, server): (usize, &ServerUrl)| {
            let number = index + 1;
            let own = StoreOptions {
                map: ShardMap::of_node(&options.map, number, count, options.redlock_max_ttl),
                ..options.clone()
            };
            let metrics = NodeMetrics::new(&options.shard, number);
            Ok(Arc::new(Node::new(
                RedisStore::node(server, own)?,
                server.place(),
                metrics,
            )))
        };
        Ok(Self {
            quorum: Arc::new(Quorum {
                nodes: servers.iter().enumerate().map(node).collect::<Result<_, Invalid>>()?,
                max_ttl: options.redlock_max_ttl,
                node_limit: (options.timeout / 8).min(NODE_LIMIT_MAX),
                connect_limit: options.timeout / 2,
                majority_limit: options.timeout * 2 / 5,
                door_lost: Notify::new(),
                held: parking_lot::Mutex::new(HashMap::new()),
                newest: AtomicU64::new(0),
                releasing: AtomicUsize::new(0),
                metrics: Arc::clone(&options.metrics),
            }),
        })
    }
}

impl Quorum {
    fn slot(&self, key: &LockKey) -> Slot {
        self.nodes
            .first()
            .map_or_else(|| key.slot(), |node| node.store.slot_of(key))
    }

    /// All nodes, in the order in which they are the door of that slot.
    fn order(&self, slot: Slot) -> impl Iterator<Item = &Arc<Node>> {
        let start = usize::from(slot.number()) % self.nodes.len().max(1);
        self.nodes.iter().cycle().skip(start).take(self.nodes.len())
    }

    /// The first node of that order that is usable.
    fn door(&self, slot: Slot) -> Option<&Arc<Node>> {
        self.order(slot).find(|node| node.is_usable())
    }

    /// Whether enough nodes could vote for somebody to win.
    fn can_win(&self) -> bool {
        self.nodes.iter().filter(|node| node.is_usable()).count() >= majority(self.nodes.len())
    }

    /// Waits until enough nodes could vote: most outages are short, and whoever asked has time.
    async fn wait_for_majority(&self, deadline: Moment) -> Result<(), StoreError> {
        while !self.can_win() {
            if Moment::now() >= deadline {
                return Err(self.no_majority());
            }
            tokio::time::sleep(MAJORITY_PAUSE).await;
        }
        Ok(())
    }

    /// Nobody can win now, for these reasons.
    fn no_majority(&self) -> StoreError {
        let troubles: Vec<String> = self.nodes.iter().filter_map(|node| node.trouble()).collect();
        let needed = majority(self.nodes.len());
        StoreError::Unavailable(
            format!(
                "no majority: {needed} of {} nodes are needed; {}",
                self.nodes.len(),
                troubles.join("; ")
            )
            .into(),
        )
    }

    fn check_ttl(&self, ttl: Duration) -> Result<(), StoreError> {
        if ttl <= self.max_ttl {
            return Ok(());
        }
        Err(StoreError::Refused(
            format!(
                "ttl {ttl:?} is above redlock_max_ttl {:?}: a node that restarted might vote before such a lease ends; set a shorter ttl, or a longer redlock_max_ttl for all managers",
                self.max_ttl
            )
            .into(),
        ))
    }

    /// Something of that cycle is about to be sent.
    fn opened(&self, cycle: Cycle) {
        self.newest.fetch_max(cycle.number(), Ordering::AcqRel);
    }

    /// The largest number of a cycle of which something was sent.
    fn newest(&self) -> u64 {
        self.newest.load(Ordering::Acquire)
    }

    /// Whether that cycle holds a lease, as far as it is known here.
    fn holds(&self, cycle: Cycle) -> bool {
        self.held.lock().contains_key(&cycle)
    }

    /// A majority has said that the cycle holds its lease.
    fn confirm(&self, cycle: Cycle) {
        let now = Moment::now();
        let mut held = self.held.lock();
        held.insert(cycle, now);
        if held.len().is_multiple_of(HELD_BETWEEN_LOOKS) {
            held.retain(|_, confirmed| now.since(*confirmed) <= self.max_ttl);
        }
    }

    /// The same for a renewal, which may be answered after its cycle was released.
    fn reconfirm(&self, cycle: Cycle) {
        if let Some(confirmed) = self.held.lock().get_mut(&cycle) {
            *confirmed = Moment::now();
        }
    }

    /// A node did not answer, or its connection broke: whatever waits at its queue looks for another door.
    fn down(&self, node: &Node, why: &str) {
        node.metrics.unanswered.increment(1);
        if node.mark_down(why) {
            tracing::warn!(node = %node.place, why, "a node of the quorum is down");
            self.door_lost.notify_one();
        }
    }
}

/// What went wrong, in words for the state of a node; `None` if the node is well and only says no.
fn outage(error: &StoreError) -> Option<&str> {
    match error {
        StoreError::Unavailable(why) => Some(why),
        StoreError::Refused(_) | StoreError::MapMismatch { .. } => None,
    }
}

/// The error of one node, for an error that is about all of them.
fn at_node(place: &str, error: StoreError) -> StoreError {
    match error {
        StoreError::Unavailable(why) => StoreError::Unavailable(format!("{place}: {why}").into()),
        StoreError::Refused(why) => StoreError::Refused(format!("{place}: {why}").into()),
        mismatch @ StoreError::MapMismatch { .. } => mismatch,
    }
}

impl LeaseStore for QuorumStore {
    fn connect(&self) -> StoreFuture<()> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            let connects = quorum.nodes.iter().map(|node| {
                let (limit, downs) = (quorum.connect_limit, node.downs());
                async move { (node, downs, tokio::time::timeout(limit, node.store.connect()).await) }
            });
            for (node, downs, connected) in futures_util::future::join_all(connects).await {
                match connected {
                    Ok(Ok(())) => node.mark_up(downs),
                    Ok(Err(error @ StoreError::MapMismatch { .. })) => return Err(error),
                    Ok(Err(StoreError::Unavailable(why) | StoreError::Refused(why))) => quorum.down(node, &why),
                    Err(_) => quorum.down(node, "no answer while connecting"),
                }
            }
            // Nodes without a vote get it in time, so they are no reason not to start.
            let up = quorum.nodes.iter().filter(|node| node.is_up()).count();
            match up >= majority(quorum.nodes.len()) {
                true => Ok(()),
                false => Err(quorum.no_majority()),
            }
        })
    }

    fn connect_background(&self) -> StoreFuture<()> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            let connects = quorum.nodes.iter().filter(|node| node.is_up()).map(|node| {
                let limit = quorum.connect_limit;
                async move { (node, tokio::time::timeout(limit, node.store.connect_background()).await) }
            });
            for (node, connected) in futures_util::future::join_all(connects).await {
                match connected {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => {
                        tracing::warn!(node = %node.place, ?error, "no connection for renewals to a node; those of the requests are used until there is one")
                    }
                    Err(_) => quorum.down(node, "no answer while connecting"),
                }
            }
            Ok(())
        })
    }

    fn has_map(&self) -> bool {
        map::has_map(&self.quorum)
    }

    fn has_one_map(&self) -> bool {
        false
    }

    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        Box::pin(map::step(Arc::clone(&self.quorum), step))
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        Box::pin(acquire::acquire(Arc::clone(&self.quorum), request))
    }

    fn release(&self, lane: Lane, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        Box::pin(release::release(Arc::clone(&self.quorum), lane, request))
    }

    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        Box::pin(renew::renew(Arc::clone(&self.quorum), batch, limit))
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<Inspection> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            let slot = quorum.slot(&key);
            quorum.wait_for_majority(Moment::now() + quorum.majority_limit).await?;
            loop {
                if !quorum.can_win() {
                    return Err(quorum.no_majority());
                }
                let Some(door) = quorum.door(slot) else {
                    return Err(quorum.no_majority());
                };
                match tokio::time::timeout(quorum.node_limit, door.store.inspect(key.clone())).await {
                    Ok(Err(StoreError::Unavailable(why))) => quorum.down(door, &why),
                    Ok(seen) => return seen,
                    Err(_) => quorum.down(door, "no answer in time"),
                }
            }
        })
    }

    fn erase(&self) -> StoreFuture<u64> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            let nodes = quorum.nodes.iter().map(|node| async move {
                match node.is_up() {
                    true => node.store.erase().await,
                    false => Err(StoreError::Unavailable("it is down".into())),
                }
                .map_err(|error| (node, error))
            });
            let mut count = 0;
            for erased in futures_util::future::join_all(nodes).await {
                count += erased.map_err(|(node, error)| at_node(&node.place, error))?;
            }
            Ok(count)
        })
    }

    fn look(&self) -> Pin<Box<dyn Future<Output = Look> + Send>> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            // The nodes are asked all the time by the tidy worker, which knows who is up; a node that does not answer in time tells no time.
            let up: Vec<_> = quorum.nodes.iter().filter(|node| node.is_up()).collect();
            let asking = up
                .iter()
                .map(|node| tokio::time::timeout(quorum.node_limit, node.store.look()));
            let deadline = Moment::now() + quorum.majority_limit;
            let (looks, mut reached) = tokio::join!(
                futures_util::future::join_all(asking),
                quorum.wait_for_majority(deadline)
            );
            let (mut times, mut foreign, mut taking, mut refusal) = (Vec::new(), 0, 0, None);
            for (node, look) in up.into_iter().zip(looks) {
                // A node that gave no answer in time is found out by those who probe it.
                let Ok(look) = look else { continue };
                times.extend(look.times);
                match look.reached {
                    Ok(()) => taking += 1,
                    Err(error @ StoreError::MapMismatch { .. }) => {
                        foreign += 1;
                        if foreign > quorum.nodes.len() - majority(quorum.nodes.len()) {
                            reached = Err(error);
                        }
                    }
                    Err(error @ StoreError::Refused(_)) => refusal = Some(at_node(&node.place, error)),
                    Err(StoreError::Unavailable(_)) => {}
                }
            }
            if let (Ok(()), Some(refusal)) = (&reached, refusal)
                && taking < majority(quorum.nodes.len())
            {
                reached = Err(refusal);
            }
            Look { reached, times }
        })
    }

    fn slot_of(&self, key: &LockKey) -> Slot {
        self.quorum.slot(key)
    }

    fn settle(&self) -> StoreFuture<()> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            tidy::settle(&quorum).await;
            Ok(())
        })
    }

    fn listen(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tidy::listen(Arc::clone(&self.quorum), pushes))
    }

    fn leave_home(&self) {
        self.quorum.nodes.iter().for_each(|node| node.store.leave_home());
    }
}
