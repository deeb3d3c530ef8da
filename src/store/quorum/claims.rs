//! Claims: the votes of the nodes other than the sequencer, and tokens above all that a majority
//! knows.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::node::Node;
use super::tally::{Tally, Vote, VoteState};
use super::tokens::TokenChoice;
use super::{Quorum, outage};
use crate::clock::Moment;
use crate::fence::TokenBlock;
use crate::lease::drift;
use crate::protocol::{Acquire, AcquireKind};
use crate::random;
use crate::store::StoreError;
use crate::store::redis::claim::{Claim, ClaimKind, Claimed};

/// The votes so far, and the nodes that were asked for them.
pub(super) struct Votes {
    pub(super) tally: Tally,
    pub(super) asked: Vec<Arc<Node>>,
}

/// What became of the claims.
pub(super) struct Claims {
    pub(super) tally: Tally,
    /// The nodes that had not answered when the vote was decided. Their claims are dropped, not
    /// cancelled: what was sent arrives before a later release on the same connection, and the rest
    /// is never sent.
    pub(super) unanswered: Vec<Arc<Node>>,
}

/// Claims the nodes that have not voted. If others have issued tokens that reach into the
/// sequencer's `tokens`, or beyond, returns a block above those, which a majority knows before any
/// task sees it.
pub(super) async fn claim_rest(
    quorum: &Quorum,
    request: &Acquire,
    sent_at: Moment,
    votes: Votes,
    tokens: TokenBlock,
) -> (Claims, TokenBlock) {
    let mut choice = TokenChoice::new(request.cycle.mode(), tokens, request.tokens);
    let mut claims = claim(quorum, request, votes, tokens.last()).await;
    while let VoteState::Won(counter) = claims.tally.state()
        && !choice.is_final(counter)
        && !is_late(sent_at, request.ttl)
    {
        let tokens = choice.next(counter, random::number_in);
        let votes = Votes {
            tally: Tally::new(quorum.nodes.len()),
            asked: Vec::new(),
        };
        claims = claim(quorum, request, votes, tokens.last()).await;
    }
    (claims, choice.tokens)
}

/// Returns as soon as the vote is decided.
async fn claim(quorum: &Quorum, request: &Acquire, votes: Votes, at_least: u64) -> Claims {
    let Votes { mut tally, asked } = votes;
    let mut claims = FuturesUnordered::new();
    let mut unanswered = Vec::new();
    for node in &quorum.nodes {
        if asked.iter().any(|asked| Arc::ptr_eq(asked, node)) {
            continue;
        }
        if !node.is_up() || node.has_pending_release(request.cycle) {
            tally.count(Vote::Missing);
            continue;
        }
        node.forget_second_releases(request.cycle);
        let claim = Claim {
            key: request.key.clone(),
            cycle: request.cycle,
            ttl: request.ttl,
            at_least,
            kind: match request.kind {
                AcquireKind::Extend => ClaimKind::Extend,
                AcquireKind::Fast | AcquireKind::Try | AcquireKind::Enqueue => ClaimKind::Take,
            },
        };
        unanswered.push(Arc::clone(node));
        claims.push(async move { (node, timeout(quorum.node_limit, node.store.claim(claim)).await) });
    }
    while tally.state() == VoteState::Open {
        let Some((node, claimed)) = claims.next().await else {
            break;
        };
        unanswered.retain(|asked| !Arc::ptr_eq(asked, node));
        let vote = match claimed {
            // The node has the lease now, but has no vote yet.
            Ok(Ok(_)) if !node.store.has_vote() => Vote::Missing,
            Ok(Ok(Claimed::Ours { counter })) => {
                node.metrics.given.increment(1);
                Vote::Given { counter }
            }
            Ok(Ok(Claimed::Refused)) => {
                node.metrics.refused.increment(1);
                Vote::Refused
            }
            Ok(Err(error)) => {
                if let Some(why) = outage(&error) {
                    quorum.report_down(node, why);
                }
                Vote::Missing
            }
            Err(_) => {
                quorum.report_down(node, "no answer in time");
                Vote::Missing
            }
        };
        tally.count(vote);
    }
    Claims { tally, unanswered }
}

/// Whether nothing is left of a lease of that `ttl`, which the nodes count from the moment they are
/// claimed.
pub(super) fn is_late(sent_at: Moment, ttl: Duration) -> bool {
    Moment::now().since(sent_at) + drift(ttl) >= ttl
}

pub(super) fn too_late(ttl: Duration) -> StoreError {
    StoreError::Unavailable(
        format!("a majority answered only after the ttl ({ttl:?}) had passed; raise the ttl, or check the nodes")
            .into(),
    )
}
