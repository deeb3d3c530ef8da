//! Giving a lease back: the others first, the door last, since it passes the lock on.

use std::pin::Pin;
use std::sync::Arc;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use tokio::time::timeout;

use super::node::Node;
use super::tally::majority;
use super::{Quorum, outage};
use crate::clock::Moment;
use crate::protocol::{AcquireReply, Answer, Release, ReleaseReply};
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
        Ok(Err(error)) => {
            if let Some(why) = outage(&error) {
                quorum.down(&node, why);
            }
        }
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
    if quorum.door(slot).is_none() {
        // It is repeated in the background if this is in vain.
        quorum.wait_for_majority().await?;
    }
    let first_door = quorum.door(slot).map(Arc::clone);
    let plain = Release {
        requeue: None,
        ..request.clone()
    };
    let is_door = |node: &Arc<Node>| first_door.as_ref().is_some_and(|door| Arc::ptr_eq(door, node));
    let others = quorum.nodes.iter().filter(|node| !is_door(node));
    let mut others = Others::new(&quorum, send(&quorum, lane, others, &plain));
    // The door's next owner needs a majority that is free.
    while others.answered + 1 < needed && others.next().await {}
    let mut door = first_door.clone();
    while let Some(node) = door {
        let sent = Sent {
            reply: node.store.release(lane, request.clone()),
            node: Arc::clone(&node),
            release: plain.clone(),
        };
        // By the time the door has answered, the slower ones usually have as well.
        let at_door = settle(&quorum, sent);
        tokio::pin!(at_door);
        let answer = loop {
            tokio::select! {
                answer = &mut at_door => break answer,
                true = others.next() => {}
            }
        };
        if let Some(Answer { ttl, floor, reply, .. }) = answer {
            if others.answered + 1 < needed {
                return Err(quorum.no_majority());
            }
            let not_ours = others.not_ours + usize::from(!reply.held);
            let reply = ReleaseReply {
                // A node may have missed the claim; that it was lost is known when so many say no that no majority can have had it.
                held: quorum.nodes.len() - not_ours >= needed,
                // A grant of the door alone is no lock: the queue asks again, which claims the others.
                requeued: reply
                    .requeued
                    .filter(|reply| !matches!(reply, AcquireReply::Granted { .. })),
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

/// The releases at all nodes but the door.
struct Others<'a> {
    quorum: &'a Quorum,
    under_way: FuturesUnordered<Pin<Box<dyn Future<Output = Option<Answer<ReleaseReply>>> + Send + 'a>>>,
    /// Where no answer came yet.
    open: Arc<Mutex<Vec<(Arc<Node>, Release)>>>,
    answered: usize,
    not_ours: usize,
}

impl<'a> Others<'a> {
    fn new(quorum: &'a Quorum, sent: impl Iterator<Item = Sent>) -> Self {
        let (under_way, open) = (FuturesUnordered::new(), Arc::new(Mutex::new(Vec::new())));
        for sent in sent {
            open.lock().push((Arc::clone(&sent.node), sent.release.clone()));
            let open = Arc::clone(&open);
            under_way.push(Box::pin(async move {
                let node = Arc::clone(&sent.node);
                let answer = settle(quorum, sent).await;
                open.lock().retain(|(other, _)| !Arc::ptr_eq(other, &node));
                answer
            }) as Pin<Box<_>>);
        }
        Self {
            quorum,
            under_way,
            open,
            answered: 0,
            not_ours: 0,
        }
    }

    /// Waits for one more; `false` if there is none.
    async fn next(&mut self) -> bool {
        let Some(answer) = self.under_way.next().await else {
            return false;
        };
        if let Some(answer) = answer {
            self.answered += 1;
            self.not_ours += usize::from(!answer.reply.held);
        }
        true
    }
}

/// One that is slow is not waited for: it is sent the same again in the background, until it answers.
impl Drop for Others<'_> {
    fn drop(&mut self) {
        for (node, release) in self.open.lock().drain(..) {
            node.owe(release, self.quorum.max_ttl);
        }
    }
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
