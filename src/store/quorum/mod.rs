//! A quorum of independent primaries as a lease store (Redlock), with order and growing tokens.
//!
//! # Implementation details
//!
//! Each key has a *sequencer*: the first usable node in the order of the URL,
//! which starts at `slot % nodes` so that load spreads. Its queue gives the order. A cycle that the
//! sequencer grants then claims the other nodes in parallel (`acquire`). It holds the key once it
//! owns the lease at a majority of the nodes; only nodes with a vote count. So managers may
//! disagree about the sequencer for a while: two majorities share a node, and that node has one
//! owner.
//!
//! Why tokens grow: a claim returns the counter as it was before and raises it to the sequencer's
//! largest token. Any two majorities share a node, so a later winner sees a counter that is at
//! least the largest token of every earlier winner. If that counter reaches into the winner's own
//! block of tokens, the winner takes a block above, and writes that to a majority before it counts
//! as the holder, like the write-back of an ABD register. A node whose counter was lost (it is
//! below the floor that its manager knows) first raises it to its time. A node that restarted has
//! no vote for as long as a lease may live, since it may have forgotten one.
//!
//! No request waits for a node that is marked down, and one timeout or broken connection is enough
//! to mark it. The repair worker (`repair`), which runs in `run_subscriber`, keeps probing such
//! nodes, and repeats releases that they did not answer. Each release is recorded as pending before
//! it is sent and removed once the node answers, so a cancelled request leaves nothing behind. At
//! most 10,000 are kept per node; the oldest beyond that expire with their TTL. What a node replies
//! about a cycle with a pending release does not count.
//!
//! A claim that no task waits for any more may execute after the release of its cycle was answered,
//! if the claim's connection was abandoned in between. Such a release is repeated at that node when
//! nothing can arrive late any more (`node`). If the connection is alive, the release follows the
//! claim on it (`release`).
//!
//! If a cycle holds its lease (`held`), a request for more time or tokens never gives it up: until
//! the holder knows of a loss, no other cycle may have it. An extension counts only if a majority
//! has had the lease the whole time (`extend`). A renewal restores it at nodes that lack it.
//!
//! Shared leases take the same path. A node has any number of them, but none beside an exclusive
//! one, so a majority of readers and one of a writer cannot exist at the same time. All modes wait
//! in the sequencer's queue, so readers pass no writer there. Unlike writers, readers acquire at
//! the same time, so they need more care to get different tokens (`tokens`). Permits are refused:
//! nodes that each admit at most *n* holders may together admit more.
//!
//! Timeouts run on the runtime on which a request began: the rest of a release continues there as a
//! task, and becomes pending if that runtime ends.

mod acquire;
mod claims;
mod extend;
mod map;
mod node;
mod release;
mod renew;
mod repair;
mod tally;
#[cfg(test)]
mod tests;
mod tokens;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};

use crate::clock::Moment;
use crate::endpoint::ServerUrl;
use crate::error::InvalidSetting;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireReply, Answer, Cycle, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::router::ShardMap;
use crate::store::redis::primary::RedisStore;
use crate::store::{Health, KeyState, LeaseStore, MapState, MapStep, Priority, StoreError, StoreFuture, StoreOptions};
use crate::telemetry::{NodeMetrics, ShardMetrics};
use node::Node;
use tally::{is_majority_without, majority};

/// See the module documentation.
pub(crate) struct QuorumStore {
    quorum: Arc<Quorum>,
}

/// The state that a store's requests share.
struct Quorum {
    nodes: Vec<Arc<Node>>,
    max_ttl: Duration,
    /// The longest time that a request waits for one node.
    node_limit: Duration,
    connect_limit: Duration,
    /// How long a request waits for a majority of nodes to be usable.
    majority_limit: Duration,
    /// How long a cycle that has its turn claims nodes again that still have another lease.
    claim_again_for: Duration,
    /// Notifies the repair worker that a node went down: the waiters in its queue must ask the next
    /// sequencer.
    sequencer_lost: Notify,
    /// The cycles that hold a lease, as far as this manager knows. Only their leases are restored
    /// at nodes that lack them. Cycles that were lost without a release are removed when their
    /// leases have run out.
    held: parking_lot::Mutex<HashMap<Cycle, Held>>,
    /// The largest number of a cycle for which something was sent.
    newest_cycle: AtomicU64,
    /// How many releases are in flight.
    releasing: AtomicUsize,
    metrics: Arc<ShardMetrics>,
}

/// A lease that a cycle holds.
struct Held {
    /// When a majority last confirmed it.
    confirmed: Moment,
    /// The nodes whose answers to the claim were not awaited: it may still be on its way.
    unanswered: Vec<Arc<Node>>,
}

/// Leases that have run out are looked for whenever the number of entries is a multiple of this.
const HELD_BETWEEN_SWEEPS: usize = 1024;

/// How often a request that waits for a majority checks what is known of the nodes. Nothing is sent
/// for it.
const MAJORITY_PAUSE: Duration = Duration::from_millis(10);
/// The longest pause before a request that found no majority is sent again.
const MAJORITY_PAUSE_MAX: Duration = Duration::from_millis(100);

/// Why a quorum has no permits.
const NO_PERMITS: &str = "a quorum can't bound the number of holders: with three nodes that admit \
                          two holders each, three holders have a majority";

/// The longest time for which a cycle that has its turn claims nodes again. Two cycles that have
/// their turns at different nodes block each other for as long.
const CLAIM_AGAIN_FOR_MAX: Duration = Duration::from_millis(50);

/// The longest time after which a silent node is down.
const NODE_LIMIT_MAX: Duration = Duration::from_millis(250);

impl QuorumStore {
    pub(crate) fn new(servers: &[ServerUrl], options: &StoreOptions) -> Result<Self, InvalidSetting> {
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
                nodes: servers
                    .iter()
                    .enumerate()
                    .map(node)
                    .collect::<Result<_, InvalidSetting>>()?,
                max_ttl: options.redlock_max_ttl,
                node_limit: (options.timeout / 8).min(NODE_LIMIT_MAX),
                connect_limit: options.timeout / 2,
                majority_limit: options.timeout * 2 / 5,
                claim_again_for: (options.timeout / 32).min(CLAIM_AGAIN_FOR_MAX),
                sequencer_lost: Notify::new(),
                held: parking_lot::Mutex::new(HashMap::new()),
                newest_cycle: AtomicU64::new(0),
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

    /// All nodes, in the order in which they become the slot's sequencer.
    fn order(&self, slot: Slot) -> impl Iterator<Item = &Arc<Node>> {
        let start = usize::from(slot.number()) % self.nodes.len().max(1);
        let (before, from) = self.nodes.split_at(start);
        from.iter().chain(before)
    }

    /// The slot's sequencer: the first usable node in that order.
    fn sequencer(&self, slot: Slot) -> Option<&Arc<Node>> {
        self.order(slot).find(|node| node.is_usable())
    }

    /// Whether enough nodes can vote for a cycle to win.
    fn can_win(&self) -> bool {
        self.nodes.iter().filter(|node| node.is_usable()).count() >= majority(self.nodes.len())
    }

    /// Waits until enough nodes can vote: most outages are short, and the caller has time.
    async fn wait_for_majority(&self, deadline: Moment) -> Result<(), StoreError> {
        while !self.can_win() {
            if Moment::now() >= deadline {
                return Err(self.no_majority());
            }
            tokio::time::sleep(MAJORITY_PAUSE).await;
        }
        Ok(())
    }

    /// The error that no cycle can win now, with the reasons.
    fn no_majority(&self) -> StoreError {
        let statuses: Vec<String> = self.nodes.iter().filter_map(|node| node.status()).collect();
        let needed = majority(self.nodes.len());
        StoreError::Unavailable(
            format!(
                "no majority: {needed} of {} nodes are needed; {}",
                self.nodes.len(),
                statuses.join("; ")
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
                "ttl {ttl:?} is above redlock_max_ttl {:?}: a node that restarted might vote before such a lease ends; set a shorter ttl and min_hold, or a longer redlock_max_ttl for all managers",
                self.max_ttl
            )
            .into(),
        ))
    }

    /// Records that something is about to be sent for the cycle.
    fn record_sent(&self, cycle: Cycle) {
        self.newest_cycle.fetch_max(cycle.number(), Ordering::AcqRel);
    }

    /// The largest number of a cycle for which something was sent.
    fn newest_cycle(&self) -> u64 {
        self.newest_cycle.load(Ordering::Acquire)
    }

    /// Whether the cycle holds a lease, as far as this manager knows.
    fn holds(&self, cycle: Cycle) -> bool {
        self.held.lock().contains_key(&cycle)
    }

    /// Records that a majority has confirmed the cycle's lease.
    fn confirm(&self, cycle: Cycle, unanswered: Vec<Arc<Node>>, now: Moment) {
        let mut held = self.held.lock();
        let confirmed = now;
        held.insert(cycle, Held { confirmed, unanswered });
        if held.len().is_multiple_of(HELD_BETWEEN_SWEEPS) {
            held.retain(|_, lease| now.since(lease.confirmed) <= self.max_ttl);
        }
    }

    /// Like [`confirm`](Self::confirm), for a reply that may arrive after its cycle was released.
    fn reconfirm(&self, cycle: Cycle, now: Moment) {
        if let Some(lease) = self.held.lock().get_mut(&cycle) {
            lease.confirmed = now;
        }
    }

    /// Asks the sequencer; `checked` on a pooled connection first.
    async fn inspect(&self, key: LockKey, checked: bool) -> Result<KeyState, StoreError> {
        let slot = self.slot(&key);
        self.wait_for_majority(Moment::now() + self.majority_limit).await?;
        loop {
            if !self.can_win() {
                return Err(self.no_majority());
            }
            let Some(sequencer) = self.sequencer(slot) else {
                return Err(self.no_majority());
            };
            if checked {
                match tokio::time::timeout(self.node_limit, sequencer.store.inspect(key.clone())).await {
                    // The pool may be busy, or the node may accept no more connections: locks are
                    // not affected, so only a kept connection decides whether the node is down.
                    Ok(Err(StoreError::Unavailable(_))) | Err(_) => {}
                    Ok(seen) => return seen,
                }
            }
            match tokio::time::timeout(self.node_limit, sequencer.store.inspect_again(key.clone())).await {
                Ok(Err(StoreError::Unavailable(why))) => self.report_down(sequencer, &why),
                Ok(seen) => return seen,
                Err(_) => self.report_down(sequencer, "no answer in time"),
            }
        }
    }

    /// A node did not answer, or its connection broke. The waiters in its queue must find another
    /// sequencer.
    fn report_down(&self, node: &Node, why: &str) {
        if self.note_down(node, why) {
            log_down(node, why);
        }
    }

    /// Does the same without a line in the log. Returns whether the node was up.
    fn note_down(&self, node: &Node, why: &str) -> bool {
        node.metrics.unanswered.increment(1);
        let was_up = node.mark_down(why);
        if was_up {
            self.sequencer_lost.notify_one();
        }
        was_up
    }
}

fn log_down(node: &Node, why: &str) {
    crate::log::warn!(node = %node.place, why, "a node of the quorum is down");
}

/// The reason for a node's outage; `None` if the node is well and only refused.
fn outage(error: &StoreError) -> Option<&str> {
    match error {
        StoreError::Unavailable(why) => Some(why),
        StoreError::Refused(_) | StoreError::MapMismatch { .. } => None,
    }
}

/// Adds the node to an error that is about all of them.
fn at_node(place: &str, error: StoreError) -> StoreError {
    error.map_reason(|why| format!("{place}: {why}"))
}

impl LeaseStore for QuorumStore {
    fn connect(&self) -> StoreFuture<()> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            let connects = quorum.nodes.iter().map(|node| {
                let (limit, downs) = (quorum.connect_limit, node.downs());
                async move { (node, downs, tokio::time::timeout(limit, node.store.connect()).await) }
            });
            let mut down = Vec::new();
            for (node, downs, connected) in futures_util::future::join_all(connects).await {
                let why = match connected {
                    Ok(Ok(())) => {
                        node.mark_up(downs);
                        continue;
                    }
                    Ok(Err(error @ StoreError::MapMismatch { .. })) => return Err(error),
                    Ok(Err(StoreError::Unavailable(why) | StoreError::Refused(why))) => why,
                    Err(_) => "no answer while connecting".into(),
                };
                if quorum.note_down(node, &why) {
                    down.push((node, why));
                }
            }
            // Nodes without a vote get it in time, so they do not prevent a start.
            let up = quorum.nodes.iter().filter(|node| node.is_up()).count();
            if up < majority(quorum.nodes.len()) {
                // The error names the nodes. The caller may retry for long.
                return Err(quorum.no_majority());
            }
            for (node, why) in down {
                log_down(node, &why);
            }
            Ok(())
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
                        crate::log::warn!(node = %node.place, ?error, "failed to open a renewal connection to a node; using its request connections until one is open")
                    }
                    Err(_) => quorum.report_down(node, "no answer while connecting"),
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

    fn release(&self, priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        Box::pin(release::release(Arc::clone(&self.quorum), priority, request))
    }

    fn break_lease(&self, _key: LockKey, _owner: String, _tokens: u32) -> StoreFuture<bool> {
        let reason = "the leases of a quorum can't be ended from outside: a node that misses the release has to get it \
                      later, and only the holder's process, which keeps running, can see to that; end that process, \
                      or wait until its lease ends";
        Box::pin(std::future::ready(Err(StoreError::Refused(reason.into()))))
    }

    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        Box::pin(renew::renew(Arc::clone(&self.quorum), batch, limit))
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<KeyState> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move { quorum.inspect(key, true).await })
    }

    fn inspect_again(&self, key: LockKey) -> StoreFuture<KeyState> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move { quorum.inspect(key, false).await })
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

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            // The repair worker probes the nodes all the time and knows which are up. A node that
            // does not answer in time reports no time.
            let up: Vec<_> = quorum.nodes.iter().filter(|node| node.is_up()).collect();
            let asking = up
                .iter()
                .map(|node| tokio::time::timeout(quorum.node_limit, node.store.probe()));
            let deadline = Moment::now() + quorum.majority_limit;
            let (probed, mut reached) = tokio::join!(
                futures_util::future::join_all(asking),
                quorum.wait_for_majority(deadline)
            );
            let (mut times, mut foreign, mut taking, mut refusal) = (Vec::new(), 0, 0, None);
            for (node, health) in up.into_iter().zip(probed) {
                // The repair worker's probes deal with a node that gave no answer in time.
                let Ok(health) = health else { continue };
                times.extend(health.times);
                match health.reached {
                    Ok(()) => taking += 1,
                    Err(error @ StoreError::MapMismatch { .. }) => {
                        foreign += 1;
                        if !is_majority_without(foreign, quorum.nodes.len()) {
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
            Health { reached, times }
        })
    }

    fn slot_of(&self, key: &LockKey) -> Slot {
        self.quorum.slot(key)
    }

    fn lacks(&self, mode: LockMode) -> Option<&'static str> {
        match mode {
            LockMode::Exclusive | LockMode::Shared => None,
            LockMode::Permits { .. } => Some(NO_PERMITS),
        }
    }

    fn check_ttl(&self, ttl: Duration) -> Result<(), StoreError> {
        self.quorum.check_ttl(ttl)
    }

    fn drain(&self) -> StoreFuture<()> {
        let quorum = Arc::clone(&self.quorum);
        Box::pin(async move {
            repair::drain(&quorum).await;
            Ok(())
        })
    }

    fn run_subscriber(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(repair::run(Arc::clone(&self.quorum), pushes))
    }

    fn leave_app_runtime(&self) {
        self.quorum.nodes.iter().for_each(|node| node.store.leave_app_runtime());
    }
}
