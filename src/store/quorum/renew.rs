//! Extending leases at all nodes at once.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::Quorum;
use super::node::Node;
use super::tally::{Tally, Vote, VoteState, is_majority_without};
use crate::clock::Moment;
use crate::protocol::{Release, RenewReply, Renewal};
use crate::store::redis::claim::{Claim, ClaimKind};
use crate::store::{LeaseStore, StoreError};

/// The votes about one lease.
struct LeaseVotes {
    tally: Tally,
    has_waiters: bool,
    /// The nodes that lack it.
    lacking: Vec<Arc<Node>>,
}

pub(super) async fn renew(
    quorum: Arc<Quorum>,
    batch: Vec<Renewal>,
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    let count = quorum.nodes.len();
    let mut leases: Vec<LeaseVotes> = batch
        .iter()
        .map(|_| LeaseVotes {
            tally: Tally::new(count),
            has_waiters: false,
            lacking: Vec::new(),
        })
        .collect();
    let limit = limit.min(quorum.node_limit.max(limit / 2));
    let mut asked = FuturesUnordered::new();
    // Includes nodes that are marked down: the application's tasks may have marked them because
    // their own runtime was blocked.
    for node in &quorum.nodes {
        let reply = node.store.renew(batch.clone(), limit);
        // A release that executes after the renewal may no longer be pending when the renewal's
        // reply is processed.
        let pending: Vec<bool> = batch
            .iter()
            .map(|renewal| node.has_pending_release(renewal.cycle))
            .collect();
        asked.push(async move { (node, pending, timeout(limit, reply).await) });
    }
    let mut foreign = Vec::new();
    // Once all votes are decided, the other nodes have a moment to report which leases they lack.
    let mut patience = limit;
    loop {
        if leases.iter().all(|lease| lease.tally.state() != VoteState::Open) {
            patience = patience.min(limit / 4);
        }
        let Ok(Some((node, pending, replies))) = timeout(patience, asked.next()).await else {
            break;
        };
        let replies = match replies {
            Ok(Ok(replies)) => replies,
            Ok(Err(error @ StoreError::MapMismatch { .. })) => {
                // A node with another map does not exclude the managers of that map, whatever
                // leases it has.
                node.set_foreign(true);
                foreign.push(error);
                for lease in &mut leases {
                    lease.tally.count(Vote::Refused);
                }
                continue;
            }
            Ok(Err(_)) | Err(_) => Vec::new(),
        };
        let has_vote = node.store.has_vote();
        let replies = replies.into_iter().chain(std::iter::repeat(None)).zip(pending);
        for ((lease, renewal), (reply, was_pending)) in leases.iter_mut().zip(&batch).zip(replies) {
            let reply = reply.filter(|_| !was_pending && !node.has_pending_release(renewal.cycle));
            if reply == Some(RenewReply::NotOurs) {
                lease.lacking.push(Arc::clone(node));
            }
            // A node without a vote is not counted, but it is given the lease.
            let reply = reply.filter(|_| has_vote);
            lease.tally.count(match reply {
                Some(RenewReply::Extended { has_waiters }) => {
                    lease.has_waiters |= has_waiters;
                    Vote::Given { counter: 0 }
                }
                Some(RenewReply::NotOurs) => Vote::Refused,
                None => Vote::Missing,
            });
        }
    }
    if !is_majority_without(foreign.len(), count)
        && let Some(error) = foreign.pop()
    {
        return Err(error);
    }
    for (lease, renewal) in leases.iter().zip(&batch) {
        match lease.tally.state() {
            VoteState::Won(_) => {
                quorum.reconfirm(renewal.cycle, Moment::now());
                lease.lacking.iter().for_each(|node| restore(&quorum, node, renewal));
            }
            VoteState::Lost { .. } if lease.tally.is_refused() => drop(quorum.held.lock().remove(&renewal.cycle)),
            VoteState::Lost { .. } | VoteState::Open => {}
        }
    }
    let reply = |lease: &LeaseVotes| match lease.tally.state() {
        VoteState::Won(_) => Some(RenewReply::Extended {
            has_waiters: lease.has_waiters,
        }),
        // Only nodes that reported that it is not ours prove that it is lost.
        VoteState::Lost { .. } if lease.tally.is_refused() => Some(RenewReply::NotOurs),
        VoteState::Lost { .. } | VoteState::Open => None,
    };
    Ok(leases.iter().map(reply).collect())
}

/// Claims a lease that a majority has at a node that lacks it, because the node restarted or missed
/// the claim. Otherwise a lease that lives through one restart after another would lose its
/// majority.
///
/// The claim may race with the release of the same cycle. A release that came before is known by
/// then. A release that comes while the claim is in flight may execute before it. So another
/// release becomes pending, which follows the claim on the same connection.
fn restore(quorum: &Arc<Quorum>, node: &Arc<Node>, renewal: &Renewal) {
    let (quorum, node, renewal) = (Arc::clone(quorum), Arc::clone(node), renewal.clone());
    drop(tokio::spawn(async move {
        if !quorum.holds(renewal.cycle) || node.has_pending_release(renewal.cycle) {
            return;
        }
        node.forget_second_releases(renewal.cycle);
        let claim = Claim {
            key: renewal.key.clone(),
            cycle: renewal.cycle,
            ttl: renewal.ttl,
            // The floor is above all tokens that were seen.
            at_least: 0,
            kind: ClaimKind::Take,
        };
        if let Ok(Err(error)) = timeout(quorum.node_limit, node.store.claim(claim)).await {
            crate::log::debug!(node = %node.place, key = %renewal.key, ?error, "could not restore a lease; the next renewal tries again");
        }
        if !quorum.holds(renewal.cycle) {
            let release = Release {
                key: renewal.key,
                cycle: renewal.cycle,
                requeue: None,
                nobody_waits: false,
                tokens: 1,
                retire_until: None,
            };
            node.add_pending_release(release, quorum.max_ttl);
        }
    }));
}
