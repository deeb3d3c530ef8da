//! Extending a held lease, with more tokens.
//!
//! An extension counts only if a majority has had the lease the whole time; otherwise another cycle
//! may have held the lock in between. So a node that lost the lease does not get it back here, or
//! the next attempt would take it for one that kept it; the next renewal restores it (`renew`).
//! Only nodes that report that the lease is not ours prove a loss. A node that does not answer
//! proves nothing: the lease stays as it is, and the request fails.

use std::sync::Arc;

use tokio::time::timeout;

use super::claims::{Claims, Votes, claim_rest, is_late, too_late};
use super::node::Node;
use super::tally::{Tally, Vote, VoteState};
use super::{Quorum, outage};
use crate::clock::Moment;
use crate::fence::TokenBlock;
use crate::protocol::{Acquire, AcquireReply, Answer};
use crate::store::{LeaseStore, StoreError};

/// Extends the lease at the first usable node that has it, which is its sequencer, then at the
/// others. Replies `Busy` if the lease is lost.
pub(super) async fn extend(quorum: &Arc<Quorum>, request: &Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    let ttl = request.ttl;
    let slot = quorum.slot(&request.key);
    let sent_at = Moment::now();
    let with = |floor, reply| Answer {
        sent_at,
        ttl,
        floor,
        reply,
    };
    let mut votes = Votes {
        tally: Tally::new(quorum.nodes.len()),
        asked: Vec::new(),
    };
    let mut refusal = None;
    for node in quorum.order(slot) {
        if !node.is_usable() || node.has_pending_release(request.cycle) {
            continue;
        }
        votes.asked.push(Arc::clone(node));
        match extend_at(quorum, node, request).await {
            Ok(Some(Extension { tokens, queued, floor })) => {
                votes.tally.count(Vote::Given { counter: 0 });
                // A claim that only extends finds nothing to extend after the release.
                let (Claims { tally, .. }, tokens) = claim_rest(quorum, request, sent_at, votes, tokens).await;
                return match tally.state() {
                    VoteState::Won(_) if is_late(sent_at, ttl) => Err(too_late(ttl)),
                    VoteState::Won(_) => {
                        quorum
                            .nodes
                            .iter()
                            .for_each(|node| node.store.saw_token(slot, tokens.last()));
                        quorum.reconfirm(request.cycle, Moment::now());
                        let reply = AcquireReply::Granted {
                            tokens,
                            queued,
                            extended: true,
                        };
                        Ok(with(floor, reply))
                    }
                    _ if tally.is_refused() => Ok(with(floor, AcquireReply::Busy)),
                    VoteState::Lost { .. } | VoteState::Open => Err(quorum.no_majority()),
                };
            }
            Ok(None) => votes.tally.count(Vote::Refused),
            Err(error) => {
                if outage(&error).is_none() {
                    // Only this node may have the problem.
                    refusal = Some(error);
                }
                votes.tally.count(Vote::Missing)
            }
        };
        if votes.tally.is_refused() {
            return Ok(with(0, AcquireReply::Busy));
        }
    }
    Err(refusal.unwrap_or_else(|| quorum.no_majority()))
}

/// The reply of the sequencer.
struct Extension {
    tokens: TokenBlock,
    queued: u64,
    floor: u64,
}

/// Asks one node. Returns `None` if the lease is not ours there.
async fn extend_at(quorum: &Quorum, node: &Node, request: &Acquire) -> Result<Option<Extension>, StoreError> {
    let answer = match timeout(quorum.node_limit, node.store.acquire(request.clone())).await {
        Ok(Ok(answer)) => answer,
        Ok(Err(error)) => {
            if let Some(why) = outage(&error) {
                quorum.report_down(node, why);
            }
            return Err(error);
        }
        Err(_) => {
            quorum.report_down(node, "no answer in time");
            return Err(quorum.no_majority());
        }
    };
    if !node.store.has_vote() {
        // It restarted meanwhile.
        return Err(quorum.no_majority());
    }
    match answer.reply {
        AcquireReply::Granted {
            tokens,
            queued,
            extended: true,
        } => {
            node.metrics.given.increment(1);
            Ok(Some(Extension {
                tokens,
                queued,
                floor: answer.floor,
            }))
        }
        _ => {
            node.metrics.refused.increment(1);
            Ok(None)
        }
    }
}
