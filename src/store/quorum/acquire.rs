//! Acquiring a lease: at the sequencer first, then at the other nodes.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::claims::{Votes, claim_rest, is_late, too_late};
use super::extend::extend;
use super::node::Node;
use super::release::give_up;
use super::tally::{Standing, Tally, Vote};
use super::{MAJORITY_PAUSE, MAJORITY_PAUSE_MAX, Quorum, outage};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::protocol::{Acquire, AcquireMode, AcquireReply, Answer, QueuePosition, Release};
use crate::store::{LeaseStore, StoreError};

/// How long a cycle that lost a split vote backs off, in milliseconds.
const BACK_OFF_MILLIS: std::ops::RangeInclusive<u64> = 5..=100;

/// The nodes that may have something of a cycle that is acquired elsewhere. Unless the cycle holds
/// the lease, each of them gets a pending release, even if the request is dropped. A cycle that
/// holds the lease may rightly have it there.
struct LeftBehind {
    quorum: Arc<Quorum>,
    nodes: Vec<Arc<Node>>,
    /// `None` if the lease is already held.
    back: Option<Release>,
}

impl LeftBehind {
    fn has(&self, node: &Arc<Node>) -> bool {
        self.nodes.iter().any(|left| Arc::ptr_eq(left, node))
    }

    /// From now on, what those nodes reply about the cycle does not count.
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

/// Tries until a majority has answered, for about half of the caller's time: most outages are
/// short.
pub(super) async fn acquire(quorum: Arc<Quorum>, request: Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    quorum.check_ttl(request.ttl)?;
    quorum.opened(request.cycle);
    let deadline = Moment::now() + quorum.majority_limit;
    let mut backoff = Backoff::new(MAJORITY_PAUSE, MAJORITY_PAUSE_MAX);
    loop {
        quorum.wait_for_majority(deadline).await?;
        let attempted = match request.mode {
            AcquireMode::Extend => extend(&quorum, &request).await,
            AcquireMode::Fast | AcquireMode::Try | AcquireMode::Enqueue => attempt(&quorum, &request).await,
        };
        match attempted {
            Err(StoreError::Unavailable(_)) if Moment::now() < deadline => backoff.wait().await,
            ended => return ended,
        }
    }
}

async fn attempt(quorum: &Arc<Quorum>, request: &Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    let ttl = request.ttl;
    let slot = quorum.slot(&request.key);
    let sent_at = Moment::now();
    let free = request.mode == AcquireMode::Fast;
    let at_door = Acquire {
        mode: match request.mode {
            AcquireMode::Fast => AcquireMode::Try,
            other => other,
        },
        ..request.clone()
    };
    // If the cycle already holds the lease, a failed request must not release it.
    let is_held = quorum.holds(request.cycle);
    let mut left_behind = LeftBehind {
        quorum: Arc::clone(quorum),
        nodes: Vec::new(),
        back: (!is_held).then(|| back(request)),
    };
    let mut refusal = None;
    let (door, answer) = loop {
        let is_fit = |node: &&Arc<Node>| node.is_usable() && !left_behind.has(node) && !node.owes(request.cycle);
        let Some(door) = quorum.order(slot).find(is_fit).filter(|_| quorum.can_win()) else {
            return Err(refusal.unwrap_or_else(|| quorum.no_majority()));
        };
        // Recorded before the node is asked: the request may be dropped at any time.
        left_behind.nodes.push(Arc::clone(door));
        let why = match timeout(quorum.node_limit, door.store.acquire(at_door.clone())).await {
            // The node may have restarted meanwhile, and not be a sequencer any more.
            Ok(Ok(answer)) if door.store.has_vote() => {
                left_behind.nodes.pop();
                break (Arc::clone(door), answer);
            }
            Ok(Ok(_)) => continue,
            Ok(Err(error)) => match outage(&error) {
                Some(why) => why.to_owned(),
                // Only this node may have the problem.
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
    let AcquireReply::Granted { tokens, queued, .. } = answer.reply else {
        let busy = free && answer.reply == AcquireReply::Busy;
        return Ok(with(if busy { AcquireReply::Taken } else { answer.reply }));
    };
    door.metrics.given.increment(1);
    let mut tally = Tally::new(quorum.nodes.len());
    tally.count(Vote::Given { counter: 0 });
    let votes = Votes {
        tally,
        asked: vec![Arc::clone(&door)],
    };
    let (tally, tokens) = claim_rest(quorum, request, votes, tokens).await;
    let standing = tally.standing();
    let is_late = is_late(sent_at, ttl);
    if matches!(standing, Standing::Won(_)) && !is_late {
        quorum
            .nodes
            .iter()
            .for_each(|node| node.store.saw_token(slot, tokens.last()));
        quorum.confirm(request.cycle);
        return Ok(with(AcquireReply::Granted {
            tokens,
            queued,
            extended: false,
        }));
    }
    if left_behind.back.is_some() {
        give_up(quorum, back(request)).await;
    }
    match (standing, request.mode) {
        (Standing::Lost { refused: true }, AcquireMode::Fast) => Ok(with(AcquireReply::Taken)),
        (Standing::Lost { refused: true }, AcquireMode::Try) => Ok(with(AcquireReply::Busy)),
        (Standing::Lost { refused: true }, AcquireMode::Enqueue | AcquireMode::Extend) => {
            Ok(with(AcquireReply::Queued(QueuePosition {
                enqueue_token: tokens.last(),
                owner_ttl: Some(Duration::from_millis(rand::random_range(BACK_OFF_MILLIS))),
                owner_foreign: true,
                ahead: 0,
                // Another attempt is due soon anyway.
                is_subscribed: true,
            })))
        }
        (Standing::Lost { .. } | Standing::Open, _) => Err(quorum.no_majority()),
        (Standing::Won(_), _) => Err(too_late(sent_at, ttl)),
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
