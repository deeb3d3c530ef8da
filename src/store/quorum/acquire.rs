//! Getting a lease: at the door first, then the others.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::node::Node;
use super::release::give_up;
use super::tally::{Standing, Tally, Vote};
use super::{Quorum, outage};
use crate::clock::Moment;
use crate::fence::TokenBlock;
use crate::protocol::{Acquire, AcquireReply, Answer, Ask, Place, Release};
use crate::store::redis::primary::{Claim, Claimed};
use crate::store::{LeaseStore, StoreError};

/// How long one who lost a split vote stays away, in milliseconds.
const BACK_OFF_MILLIS: std::ops::RangeInclusive<u64> = 5..=100;

pub(super) async fn acquire(quorum: Arc<Quorum>, request: Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    let Acquire { ttl, tokens, .. } = request;
    if ttl > quorum.max_ttl {
        return Err(StoreError::Refused(
            format!(
                "ttl {ttl:?} is above redlock_max_ttl {:?}: a node that restarted might forget the lease and vote again",
                quorum.max_ttl
            )
            .into(),
        ));
    }
    let slot = quorum.slot(&request.key);
    quorum.wait_for_majority().await?;
    let sent_at = Moment::now();
    let free = request.ask == Ask::Free;
    let at_door = Acquire {
        ask: if free { Ask::Try } else { request.ask },
        ..request.clone()
    };
    // A node that was asked and did not answer may have the cycle: it is marked down, so this ends.
    let mut left_behind: Vec<Arc<Node>> = Vec::new();
    let mut refusal = None;
    let (door, answer) = loop {
        let is_fit = |node: &&Arc<Node>| {
            let was_asked = left_behind.iter().any(|asked| Arc::ptr_eq(asked, node));
            node.is_usable() && !was_asked && !node.owes(&request.key, request.cycle)
        };
        let Some(door) = quorum.order(slot).find(is_fit).filter(|_| quorum.can_win()) else {
            leave(&quorum, &left_behind, &request);
            return Err(refusal.unwrap_or_else(|| quorum.no_majority()));
        };
        let why = match timeout(quorum.node_limit, door.store.acquire(at_door.clone())).await {
            // It may have restarted under way, and not be a door any more.
            Ok(Ok(answer)) if door.store.has_vote() => break (Arc::clone(door), answer),
            Ok(Ok(_)) => {
                left_behind.push(Arc::clone(door));
                continue;
            }
            Ok(Err(error)) => match outage(&error) {
                Some(why) => why.to_owned(),
                // It may be this node's trouble alone.
                None => {
                    left_behind.push(Arc::clone(door));
                    refusal = Some(error);
                    continue;
                }
            },
            Err(_) => "no answer in time".to_owned(),
        };
        quorum.down(door, &why);
        left_behind.push(Arc::clone(door));
    };
    leave(&quorum, &left_behind, &request);
    let with = |reply| Answer {
        sent_at,
        ttl,
        floor: answer.floor,
        reply,
    };
    let AcquireReply::Granted {
        tokens: block,
        queued,
        extended,
    } = answer.reply
    else {
        let busy = free && answer.reply == AcquireReply::Busy;
        return Ok(with(if busy { AcquireReply::Taken } else { answer.reply }));
    };
    door.metrics.given.increment(1);
    let mut last = block.last();
    let mut standing = claim_others(&quorum, &door, &request, last).await;
    if let Standing::Won(counter) = standing
        && counter >= block.first()
    {
        // Others have given out what this block holds, or more: a block above, known to a majority before anybody sees it.
        last = counter + u64::from(tokens);
        standing = claim_all(&quorum, &request, last).await;
    }
    let late = Moment::now().since(sent_at) + ttl / 100 + Duration::from_millis(2) >= ttl;
    if matches!(standing, Standing::Won(_)) && !late {
        quorum.nodes.iter().for_each(|node| node.store.saw_token(slot, last));
        return Ok(with(AcquireReply::Granted {
            tokens: TokenBlock::ending_at(last, tokens),
            queued,
            extended,
        }));
    }
    give_up(&quorum, back(&request)).await;
    match (standing, request.ask) {
        (Standing::Lost { refused: true }, Ask::Free) => Ok(with(AcquireReply::Taken)),
        (Standing::Lost { refused: true }, Ask::Try) => Ok(with(AcquireReply::Busy)),
        (Standing::Lost { refused: true }, Ask::Join) => Ok(with(AcquireReply::Queued(Place {
            mark: last,
            owner_ttl: Some(Duration::from_millis(rand::random_range(BACK_OFF_MILLIS))),
            owner_foreign: true,
            ahead: 0,
        }))),
        (Standing::Lost { .. } | Standing::Open, _) => Err(quorum.no_majority()),
        (Standing::Won(_), _) => Err(StoreError::Unavailable(
            format!(
                "a majority took {:?}, which leaves nothing of the ttl {ttl:?}",
                Moment::now().since(sent_at)
            )
            .into(),
        )),
    }
}

fn back(request: &Acquire) -> Release {
    Release {
        key: request.key.clone(),
        cycle: request.cycle,
        requeue: None,
        nobody_waits: false,
        ttl: request.ttl,
        tokens: request.tokens,
    }
}

/// Those nodes may have the cycle, as its owner or in a queue.
fn leave(quorum: &Quorum, nodes: &[Arc<Node>], request: &Acquire) {
    for node in nodes {
        node.owe(back(request), quorum.max_ttl);
    }
}

/// Claims all but the door, whose vote is given.
async fn claim_others(quorum: &Quorum, door: &Arc<Node>, request: &Acquire, least: u64) -> Standing {
    let mut tally = Tally::new(quorum.nodes.len());
    tally.count(Vote::Given(0));
    claim(quorum, Some(door), request, least, tally).await
}

/// Claims all. A counter above `least` does not matter: tokens of this key are given out by its owner only.
async fn claim_all(quorum: &Quorum, request: &Acquire, least: u64) -> Standing {
    claim(quorum, None, request, least, Tally::new(quorum.nodes.len())).await
}

/// Returns as soon as it is decided. The claims that are under way then are dropped, not recalled: what was sent comes before a later
/// release on the same connection, and what was not sent never is.
async fn claim(
    quorum: &Quorum,
    door: Option<&Arc<Node>>,
    request: &Acquire,
    at_least: u64,
    mut tally: Tally,
) -> Standing {
    let mut claims = FuturesUnordered::new();
    for node in &quorum.nodes {
        if door.is_some_and(|door| Arc::ptr_eq(door, node)) {
            continue;
        }
        if !node.is_up() || node.owes(&request.key, request.cycle) {
            tally.count(Vote::Missing);
            continue;
        }
        let claim = Claim {
            key: request.key.clone(),
            cycle: request.cycle,
            ttl: request.ttl,
            at_least,
        };
        claims.push(async move { (node, timeout(quorum.node_limit, node.store.claim(claim)).await) });
    }
    while tally.standing() == Standing::Open {
        let Some((node, claimed)) = claims.next().await else {
            break;
        };
        let vote = match claimed {
            // It is kept right for later, but does not count.
            Ok(Ok(_)) if !node.store.has_vote() => Vote::Missing,
            Ok(Ok(Claimed::Ours { counter })) => {
                node.metrics.given.increment(1);
                Vote::Given(counter)
            }
            Ok(Ok(Claimed::Refused)) => {
                node.metrics.refused.increment(1);
                Vote::Refused
            }
            Ok(Err(error)) => {
                if let Some(why) = outage(&error) {
                    quorum.down(node, why);
                }
                Vote::Missing
            }
            Err(_) => {
                quorum.down(node, "no answer in time");
                Vote::Missing
            }
        };
        tally.count(vote);
    }
    tally.standing()
}
