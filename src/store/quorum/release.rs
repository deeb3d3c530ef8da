//! Releasing a lease: at the other nodes first and at the sequencer last, since it passes the lock
//! on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::node::Node;
use super::tally::majority;
use super::{MAJORITY_PAUSE, MAJORITY_PAUSE_MAX, Quorum, outage};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::protocol::{Answer, Release, ReleaseReply};
use crate::store::{LeaseStore, Priority, StoreError, StoreFuture};

/// A release that a node must receive. If this is dropped before the node has answered, the release
/// becomes pending.
struct Debt {
    quorum: Arc<Quorum>,
    node: Arc<Node>,
    release: Option<Release>,
}

impl Debt {
    fn new(quorum: &Arc<Quorum>, node: &Arc<Node>, release: Release) -> Self {
        quorum.releasing.fetch_add(1, Ordering::AcqRel);
        Self {
            quorum: Arc::clone(quorum),
            node: Arc::clone(node),
            release: Some(release),
        }
    }
}

impl Drop for Debt {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            self.node.owe(release, self.quorum.max_ttl);
        }
        self.quorum.releasing.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A release in flight at a node.
struct Sent {
    debt: Debt,
    reply: StoreFuture<Answer<ReleaseReply>>,
}

/// Waits for the reply. A release without an answer becomes pending, and so does one that was
/// refused: a node that is loading, or has no memory left, may execute it later.
async fn settle(sent: Sent) -> Option<Answer<ReleaseReply>> {
    let Sent { mut debt, reply } = sent;
    match timeout(debt.quorum.node_limit, reply).await {
        Ok(Ok(answer)) => {
            if let Some(release) = debt.release.take() {
                let quorum = &debt.quorum;
                debt.node.released(&release, quorum.newest(), quorum.max_ttl);
            }
            return Some(answer);
        }
        Ok(Err(error)) => {
            if let Some(why) = outage(&error) {
                debt.quorum.down(&debt.node, why);
            }
        }
        Err(_) => debt.quorum.down(&debt.node, "no answer in time"),
    }
    None
}

/// Tries until a majority has answered, for about half of the caller's time.
pub(super) async fn release(
    quorum: Arc<Quorum>,
    priority: Priority,
    request: Release,
) -> Result<Answer<ReleaseReply>, StoreError> {
    let deadline = Moment::now() + quorum.majority_limit;
    let mut is_repeated = false;
    let mut backoff = Backoff::new(MAJORITY_PAUSE, MAJORITY_PAUSE_MAX);
    loop {
        match attempt(&quorum, priority, request.clone(), deadline).await {
            Err(StoreError::Unavailable(_)) if Moment::now() < deadline => {
                is_repeated = true;
                backoff.wait().await;
            }
            Ok(mut answer) => {
                // An earlier attempt may have released it. Then a missing lease is no loss.
                answer.reply.held |= is_repeated;
                return Ok(answer);
            }
            ended => return ended,
        }
    }
}

async fn attempt(
    quorum: &Arc<Quorum>,
    priority: Priority,
    request: Release,
    deadline: Moment,
) -> Result<Answer<ReleaseReply>, StoreError> {
    quorum.held.lock().remove(&request.cycle);
    if let Some(next) = request.requeue {
        quorum.opened(next);
    }
    let slot = quorum.slot(&request.key);
    let sent_at = Moment::now();
    let needed = majority(quorum.nodes.len());
    if quorum.door(slot).is_none() {
        // If this fails, the release is repeated in the background.
        quorum.wait_for_majority(deadline).await?;
    }
    let first_door = quorum.door(slot).map(Arc::clone);
    let plain = Release {
        requeue: None,
        ..request.clone()
    };
    let is_door = |node: &Arc<Node>| first_door.as_ref().is_some_and(|door| Arc::ptr_eq(door, node));
    let others = quorum.nodes.iter().filter(|node| !is_door(node));
    // From here on, so that the sequencer gets the release even if this is dropped midway.
    let mut at_door = first_door.as_ref().map(|door| Debt::new(quorum, door, plain.clone()));
    let mut answered = 0;
    let mut not_ours = 0;
    {
        let mut under_way: FuturesUnordered<_> = send(quorum, priority, others, &plain)
            .map(|sent| Box::pin(settle(sent)))
            .collect();
        // The sequencer's next owner needs a free majority.
        while answered + 1 < needed {
            let Some(answer) = under_way.next().await else { break };
            if let Some(answer) = answer {
                answered += 1;
                not_ours += usize::from(!answer.reply.held);
            }
        }
        // Each ends within the limit for a node. They stay on the runtime on which they began; if
        // that ends first, they become pending.
        for rest in under_way {
            drop(tokio::spawn(rest));
        }
    }
    while let Some(debt) = at_door {
        let node = Arc::clone(&debt.node);
        let reply = node.store.release(priority, request.clone());
        if let Some(Answer { ttl, floor, reply, .. }) = settle(Sent { debt, reply }).await {
            not_ours += usize::from(!reply.held);
            if answered + 1 < needed {
                return Err(quorum.no_majority());
            }
            let reply = ReleaseReply {
                // A node may have missed the claim. The lease was lost only if so many nodes refuse
                // that no majority can have had it.
                held: quorum.nodes.len() - not_ours >= needed,
                // A grant by the sequencer alone is no lock: the queue asks again, which claims the
                // others.
                requeued: reply
                    .requeued
                    .filter(|reply| !matches!(reply, crate::protocol::AcquireReply::Granted { .. })),
            };
            return Ok(Answer {
                sent_at,
                ttl,
                floor,
                reply,
            });
        }
        at_door = quorum
            .door(slot)
            .filter(|next| !Arc::ptr_eq(next, &node))
            .map(|next| Debt::new(quorum, next, plain.clone()));
    }
    Err(quorum.no_majority())
}

/// Releases a cycle at every node after it lost its vote, and waits for the nodes that answer.
pub(super) async fn give_up(quorum: &Arc<Quorum>, release: Release) {
    let sent = send(quorum, Priority::Foreground, quorum.nodes.iter(), &release);
    futures_util::future::join_all(sent.map(settle)).await;
}

/// Nodes that are down are not waited for: their releases become pending.
fn send<'a>(
    quorum: &'a Arc<Quorum>,
    priority: Priority,
    nodes: impl Iterator<Item = &'a Arc<Node>>,
    release: &'a Release,
) -> impl Iterator<Item = Sent> {
    nodes.filter_map(move |node| {
        if !node.is_up() {
            node.owe(release.clone(), quorum.max_ttl);
            return None;
        }
        Some(Sent {
            debt: Debt::new(quorum, node, release.clone()),
            reply: node.store.release(priority, release.clone()),
        })
    })
}
