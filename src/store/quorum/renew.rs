//! Extending leases at all nodes at once.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::Quorum;
use super::node::Node;
use super::tally::{Standing, Tally, Vote};
use crate::protocol::{RenewReply, Renewal};
use crate::store::{LeaseStore, StoreError};

/// The votes about one lease.
struct Lease {
    tally: Tally,
    wanted: bool,
    /// Nodes with a vote at which it is not.
    missing_at: Vec<Arc<Node>>,
}

pub(super) async fn renew(
    quorum: Arc<Quorum>,
    batch: Vec<Renewal>,
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    let count = quorum.nodes.len();
    let mut leases: Vec<Lease> = batch
        .iter()
        .map(|_| Lease {
            tally: Tally::new(count),
            wanted: false,
            missing_at: Vec::new(),
        })
        .collect();
    let limit = limit.min(quorum.node_limit.max(limit / 2));
    let mut asked = FuturesUnordered::new();
    // Also those that are marked down: that is how the program's tasks find them, whose runtime may be what stands still.
    for node in &quorum.nodes {
        let reply = node.store.renew(batch.clone(), limit);
        asked.push(async move { (node, timeout(limit, reply).await) });
    }
    // Once all is decided, the others have a moment to say at which of them a lease is missing.
    let mut patience = limit;
    loop {
        if leases.iter().all(|lease| lease.tally.standing() != Standing::Open) {
            patience = patience.min(limit / 4);
        }
        let Ok(Some((node, replies))) = timeout(patience, asked.next()).await else {
            break;
        };
        let replies = match replies {
            Ok(Ok(replies)) if node.store.has_vote() => replies,
            Ok(Ok(_)) => Vec::new(),
            Ok(Err(_)) | Err(_) => Vec::new(),
        };
        let replies = replies.into_iter().chain(std::iter::repeat(None));
        for ((lease, renewal), reply) in leases.iter_mut().zip(&batch).zip(replies) {
            let reply = reply.filter(|_| !node.owes(&renewal.key, renewal.cycle));
            lease.tally.count(match reply {
                Some(RenewReply::Extended { wanted }) => {
                    lease.wanted |= wanted;
                    Vote::Given(0)
                }
                Some(RenewReply::NotOurs) => {
                    lease.missing_at.push(Arc::clone(node));
                    Vote::Refused
                }
                None => Vote::Missing,
            });
        }
    }
    let reply = |lease: &Lease| match lease.tally.standing() {
        Standing::Won(_) => Some(RenewReply::Extended { wanted: lease.wanted }),
        // Only those who said that it is not ours prove that it is lost.
        Standing::Lost { .. } if lease.tally.is_refused() => Some(RenewReply::NotOurs),
        Standing::Lost { .. } | Standing::Open => None,
    };
    let replies = leases.iter().map(reply).collect();
    for (lease, renewal) in leases.into_iter().zip(batch) {
        if matches!(lease.tally.standing(), Standing::Won(_)) {
            for node in lease.missing_at {
                // Where there is no room, the next renewal finds the same.
                quorum.heal.try_send((node, renewal.clone())).ok();
            }
        }
    }
    Ok(replies)
}
