//! Getting a lease: at the door first, then the others.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::node::Node;
use super::release::give_up;
use super::tally::{Standing, Tally, Vote};
use super::{MAJORITY_PAUSE, MAJORITY_PAUSE_MAX, Quorum, outage};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::fence::TokenBlock;
use crate::protocol::{Acquire, AcquireReply, Answer, Ask, Place, Release};
use crate::store::redis::primary::{Claim, Claimed};
use crate::store::{LeaseStore, StoreError};

/// How long one who lost a split vote stays away, in milliseconds.
const BACK_OFF_MILLIS: std::ops::RangeInclusive<u64> = 5..=100;

/// What a node may have of a cycle that is got elsewhere: unless it holds the lease, the node is owed a release, also where the request
/// is dropped. A cycle that holds it may well have it there.
struct LeftBehind {
    quorum: Arc<Quorum>,
    nodes: Vec<Arc<Node>>,
    /// Nothing where the lease is held already.
    back: Option<Release>,
}

impl LeftBehind {
    fn has(&self, node: &Arc<Node>) -> bool {
        self.nodes.iter().any(|left| Arc::ptr_eq(left, node))
    }

    /// From now on, what those nodes say of the cycle does not count.
    fn settle(&mut self) {
        for node in self.nodes.drain(..) {
            if let Some(back) = &self.back {
                node.owe(back.clone(), self.quorum.max_ttl);
            }
        }
    }
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        self.settle();
    }
}

/// Tries until a majority has answered, for about half of the time that whoever asks has: most outages are short.
pub(super) async fn acquire(quorum: Arc<Quorum>, request: Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    let deadline = Moment::now() + quorum.majority_limit;
    let mut backoff = Backoff::new(MAJORITY_PAUSE, MAJORITY_PAUSE_MAX);
    loop {
        quorum.wait_for_majority(deadline).await?;
        match attempt(&quorum, &request).await {
            Err(StoreError::Unavailable(_)) if Moment::now() < deadline => backoff.wait().await,
            ended => return ended,
        }
    }
}

async fn attempt(quorum: &Arc<Quorum>, request: &Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    let &Acquire { ttl, tokens, .. } = request;
    if ttl > quorum.max_ttl {
        return Err(StoreError::Refused(
            format!(
                "ttl {ttl:?} is above redlock_max_ttl {:?}: a node that restarted might vote before such a lease ends; set a shorter ttl, or a longer redlock_max_ttl for all managers",
                quorum.max_ttl
            )
            .into(),
        ));
    }
    quorum.opened(request.cycle);
    let slot = quorum.slot(&request.key);
    let sent_at = Moment::now();
    let free = request.ask == Ask::Free;
    let at_door = Acquire {
        ask: match request.ask {
            Ask::Free | Ask::Try => Ask::Try,
            // A node that has lost the lease gets it again. Whether a majority kept it is what counts.
            Ask::Join | Ask::Extend => Ask::Join,
        },
        ..request.clone()
    };
    // Whoever holds the lease must not lose it by asking for more of it: then nothing is given back here, whatever comes of it.
    let extends = quorum.holds(request.cycle);
    let mut left_behind = LeftBehind {
        quorum: Arc::clone(quorum),
        nodes: Vec::new(),
        back: (!extends).then(|| back(request)),
    };
    let mut refusal = None;
    let (door, answer) = loop {
        let is_fit = |node: &&Arc<Node>| node.is_usable() && !left_behind.has(node) && !node.owes(request.cycle);
        let Some(door) = quorum.order(slot).find(is_fit).filter(|_| quorum.can_win()) else {
            return Err(refusal.unwrap_or_else(|| quorum.no_majority()));
        };
        // Before it is asked: the request may be dropped at any time.
        left_behind.nodes.push(Arc::clone(door));
        let why = match timeout(quorum.node_limit, door.store.acquire(at_door.clone())).await {
            // It may have restarted under way, and not be a door any more.
            Ok(Ok(answer)) if door.store.has_vote() => {
                left_behind.nodes.pop();
                break (Arc::clone(door), answer);
            }
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => match outage(&error) {
                Some(why) => why.to_owned(),
                // It may be this node's trouble alone.
                None => {
                    refusal = Some(error);
                    continue;
                }
            },
            Err(_) => "no answer in time".to_owned(),
        };
        quorum.down(door, &why);
    };
    left_behind.settle();
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
    let extends = extends && extended;
    let (mut standing, kept) = claim_others(quorum, &door, request, last, extends).await;
    if let Standing::Won(counter) = standing
        && counter >= block.first()
    {
        // Others have given out what this block holds, or more: a block above, known to a majority before anybody sees it.
        last = counter.saturating_add(u64::from(tokens));
        standing = claim(quorum, None, request, last, Tally::new(quorum.nodes.len()), false)
            .await
            .0;
    }
    let late = Moment::now().since(sent_at) + ttl / 100 + Duration::from_millis(2) >= ttl;
    if matches!(standing, Standing::Won(_)) && !late {
        quorum.nodes.iter().for_each(|node| node.store.saw_token(slot, last));
        quorum.confirm(request.cycle);
        return Ok(with(AcquireReply::Granted {
            tokens: TokenBlock::ending_at(last, tokens),
            queued,
            // That the door had it all the time is not enough: others may have had a majority without it.
            extended: kept,
        }));
    }
    if left_behind.back.is_some() {
        give_up(quorum, back(request)).await;
    }
    match (standing, request.ask) {
        (Standing::Lost { refused: true }, Ask::Free) => Ok(with(AcquireReply::Taken)),
        (Standing::Lost { refused: true }, Ask::Try) => Ok(with(AcquireReply::Busy)),
        (Standing::Lost { refused: true }, Ask::Join | Ask::Extend) => Ok(with(AcquireReply::Queued(Place {
            mark: last,
            owner_ttl: Some(Duration::from_millis(rand::random_range(BACK_OFF_MILLIS))),
            owner_foreign: true,
            ahead: 0,
            // Another attempt is due soon anyway.
            is_reached: true,
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
        tokens: request.tokens,
    }
}

/// Claims all but the door, whose vote is given. Says as well whether a majority had the lease before, which is waited for only where it
/// `extends` one.
async fn claim_others(
    quorum: &Quorum,
    door: &Arc<Node>,
    request: &Acquire,
    least: u64,
    extends: bool,
) -> (Standing, bool) {
    let mut tally = Tally::new(quorum.nodes.len());
    tally.count(Vote::Given {
        counter: 0,
        kept: extends,
    });
    claim(quorum, Some(door), request, least, tally, extends).await
}

/// Returns as soon as it is decided. The claims that are under way then are dropped, not recalled: what was sent comes before a later
/// release on the same connection, and what was not sent never is.
async fn claim(
    quorum: &Quorum,
    door: Option<&Arc<Node>>,
    request: &Acquire,
    at_least: u64,
    mut tally: Tally,
    extends: bool,
) -> (Standing, bool) {
    let mut claims = FuturesUnordered::new();
    for node in &quorum.nodes {
        if door.is_some_and(|door| Arc::ptr_eq(door, node)) {
            continue;
        }
        if !node.is_up() || node.owes(request.cycle) {
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
    while tally.standing() == Standing::Open || (extends && tally.may_be_kept()) {
        let Some((node, claimed)) = claims.next().await else {
            break;
        };
        let vote = match claimed {
            // It is kept right for later, but does not count.
            Ok(Ok(_)) if !node.store.has_vote() => Vote::Missing,
            Ok(Ok(Claimed::Ours { counter, kept })) => {
                node.metrics.given.increment(1);
                Vote::Given { counter, kept }
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
    (tally.standing(), extends && tally.is_kept())
}
