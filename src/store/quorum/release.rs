//! Giving a lease back: the others first, the door last, since it passes the lock on.

use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::node::Node;
use super::tally::majority;
use super::tidy::Tidying;
use super::{Quorum, outage};
use crate::clock::Moment;
use crate::protocol::{Answer, Release, ReleaseReply};
use crate::store::{Lane, LeaseStore, StoreError, StoreFuture};

/// A release under way at a node.
pub(super) struct Sent {
    pub(super) node: Arc<Node>,
    pub(super) release: Release,
    pub(super) reply: StoreFuture<Answer<ReleaseReply>>,
}

/// Waits for it; what stays without an answer is owed.
pub(super) async fn settle(quorum: &Quorum, sent: Sent) -> Option<Answer<ReleaseReply>> {
    let Sent { node, release, reply } = sent;
    match timeout(quorum.node_limit, reply).await {
        Ok(Ok(answer)) => return Some(answer),
        Ok(Err(error)) => match outage(&error) {
            Some(why) => quorum.down(&node, why),
            // It would say no again.
            None => return None,
        },
        Err(_) => quorum.down(&node, "no answer in time"),
    }
    node.owe(release, quorum.max_ttl);
    None
}

pub(super) async fn release(
    quorum: Arc<Quorum>,
    lane: Lane,
    request: Release,
) -> Result<Answer<ReleaseReply>, StoreError> {
    let slot = quorum.slot(&request.key);
    let sent_at = Moment::now();
    let needed = majority(quorum.nodes.len());
    let first_door = quorum.door(slot).map(Arc::clone);
    let plain = Release {
        requeue: None,
        ..request.clone()
    };
    let is_door = |node: &Arc<Node>| first_door.as_ref().is_some_and(|door| Arc::ptr_eq(door, node));
    let others = quorum.nodes.iter().filter(|node| !is_door(node));
    let mut answered = 0;
    let mut held = 0;
    {
        let mut under_way: FuturesUnordered<_> = send(&quorum, lane, others, &plain)
            .map(|sent| {
                let quorum = Arc::clone(&quorum);
                Box::pin(async move { settle(&quorum, sent).await })
            })
            .collect();
        // The door's next owner needs a majority that is free.
        while answered + 1 < needed {
            let Some(answer) = under_way.next().await else { break };
            if let Some(answer) = answer {
                answered += 1;
                held += usize::from(answer.reply.held);
            }
        }
        for rest in under_way {
            // Without a worker the manager is gone, and the lease runs out.
            quorum.tidying.send(Tidying::Await(rest)).ok();
        }
    }
    let mut door = first_door;
    while let Some(node) = door {
        let sent = Sent {
            reply: node.store.release(lane, request.clone()),
            node: Arc::clone(&node),
            release: plain.clone(),
        };
        if let Some(Answer { ttl, floor, reply, .. }) = settle(&quorum, sent).await {
            held += usize::from(reply.held);
            if answered + 1 < needed {
                return Err(quorum.no_majority());
            }
            let reply = ReleaseReply {
                held: held >= needed,
                // A grant of the door alone is no lock: the queue asks again, which claims the others.
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
        door = quorum
            .door(slot)
            .filter(|next| !Arc::ptr_eq(next, &node))
            .map(Arc::clone);
    }
    Err(quorum.no_majority())
}

/// Releases a cycle at every node after it lost, and waits for those that answer.
pub(super) async fn give_up(quorum: &Quorum, release: Release) {
    let sent = send(quorum, Lane::Caller, quorum.nodes.iter(), &release);
    futures_util::future::join_all(sent.map(|sent| settle(quorum, sent))).await;
}

/// Nodes that are down are not waited for: they are owed it.
fn send<'a>(
    quorum: &'a Quorum,
    lane: Lane,
    nodes: impl Iterator<Item = &'a Arc<Node>>,
    release: &'a Release,
) -> impl Iterator<Item = Sent> {
    nodes.filter_map(move |node| {
        if !node.is_up() {
            node.owe(release.clone(), quorum.max_ttl);
            return None;
        }
        Some(Sent {
            node: Arc::clone(node),
            release: release.clone(),
            reply: node.store.release(lane, release.clone()),
        })
    })
}
