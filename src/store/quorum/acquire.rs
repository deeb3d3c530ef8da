//! Acquiring a lease: at the sequencer first, then at the other nodes.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use super::claims::{Claims, Votes, claim_rest, is_late, too_late};
use super::extend::extend;
use super::node::Node;
use super::release::release_everywhere;
use super::tally::{Tally, Vote, VoteState};
use super::{MAJORITY_PAUSE, MAJORITY_PAUSE_MAX, Quorum, outage};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Answer, QueuePosition, Release};
use crate::random;
use crate::store::{LeaseStore, StoreError};

/// How long a cycle that lost a split vote backs off.
const BACK_OFF: RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_millis(100);

/// The pause before a cycle that has its turn claims the other nodes again.
const CLAIM_AGAIN_AFTER: Duration = Duration::from_millis(2);

/// The nodes that may have something of a cycle that is acquired elsewhere. Unless the cycle holds
/// the lease, each of them gets a pending release, even if the request is dropped. A cycle that
/// holds the lease may rightly have it there.
struct PartialClaims {
    quorum: Arc<Quorum>,
    nodes: Vec<Arc<Node>>,
    /// `None` if the lease is already held.
    release: Option<Release>,
}

impl PartialClaims {
    fn has(&self, node: &Arc<Node>) -> bool {
        self.nodes.iter().any(|left| Arc::ptr_eq(left, node))
    }

    /// From now on, what those nodes reply about the cycle does not count.
    fn make_pending(&mut self) {
        for node in self.nodes.drain(..) {
            if let Some(release) = &self.release {
                node.add_pending_release(release.clone(), self.quorum.max_ttl);
            }
        }
    }
}

impl Drop for PartialClaims {
    fn drop(&mut self) {
        self.make_pending();
    }
}

/// Tries until a majority has answered, for about half of the caller's time: most outages are
/// short.
pub(super) async fn acquire(quorum: Arc<Quorum>, request: Acquire) -> Result<Answer<AcquireReply>, StoreError> {
    quorum.check_ttl(request.ttl)?;
    quorum.record_sent(request.cycle);
    let deadline = Moment::now() + quorum.majority_limit;
    let mut backoff = Backoff::new(MAJORITY_PAUSE, MAJORITY_PAUSE_MAX);
    loop {
        quorum.wait_for_majority(deadline).await?;
        let attempted = match request.kind {
            AcquireKind::Extend => extend(&quorum, &request).await,
            AcquireKind::Fast | AcquireKind::Try | AcquireKind::Enqueue => attempt(&quorum, &request).await,
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
    let free = request.kind == AcquireKind::Fast;
    let at_sequencer = Acquire {
        kind: match request.kind {
            AcquireKind::Fast => AcquireKind::Try,
            other => other,
        },
        ..request.clone()
    };
    // If the cycle already holds the lease, a failed request must not release it.
    let is_held = quorum.holds(request.cycle);
    let mut partial_claims = PartialClaims {
        quorum: Arc::clone(quorum),
        nodes: Vec::new(),
        release: (!is_held).then(|| release_of(request)),
    };
    let mut refusal = None;
    let (sequencer, answer) = loop {
        let is_fit = |node: &&Arc<Node>| {
            node.is_usable() && !partial_claims.has(node) && !node.has_pending_release(request.cycle)
        };
        let Some(sequencer) = quorum.order(slot).find(is_fit).filter(|_| quorum.can_win()) else {
            return Err(refusal.unwrap_or_else(|| quorum.no_majority()));
        };
        // Recorded before the node is asked: the request may be dropped at any time.
        partial_claims.nodes.push(Arc::clone(sequencer));
        sequencer.forget_second_releases(request.cycle);
        let why = match timeout(quorum.node_limit, sequencer.store.acquire(at_sequencer.clone())).await {
            // The node may have restarted meanwhile, and not be a sequencer any more.
            Ok(Ok(answer)) if sequencer.store.has_vote() => {
                partial_claims.nodes.pop();
                break (Arc::clone(sequencer), answer);
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
        quorum.report_down(sequencer, &why);
    };
    partial_claims.make_pending();
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
    sequencer.metrics.given.increment(1);
    let claim_again_for = quorum.claim_again_for.min(ttl / 4);
    let mut pause = Backoff::new(CLAIM_AGAIN_AFTER, claim_again_for);
    let (state, unanswered, tokens) = loop {
        let mut tally = Tally::new(quorum.nodes.len());
        tally.count(Vote::Given { counter: 0 });
        let votes = Votes {
            tally,
            asked: vec![Arc::clone(&sequencer)],
        };
        let (Claims { tally, unanswered }, tokens) = claim_rest(quorum, request, sent_at, votes, tokens).await;
        let state = tally.state();
        // The other nodes may still have the lease of the owner before. This cycle keeps its turn
        // while they get the release. Every vote but that of the sequencer is counted anew.
        let delay = pause.next_delay();
        let may_be_won = request.kind == AcquireKind::Enqueue
            && !is_held
            && matches!(state, VoteState::Lost { refused: true })
            && Moment::now().since(sent_at) + delay < claim_again_for
            && sequencer.store.has_vote();
        if !may_be_won {
            break (state, unanswered, tokens);
        }
        tokio::time::sleep(delay).await;
    };
    let is_late = is_late(sent_at, ttl);
    if matches!(state, VoteState::Won(_)) && !is_late {
        quorum
            .nodes
            .iter()
            .for_each(|node| node.store.saw_token(slot, tokens.last()));
        quorum.confirm(request.cycle, unanswered, Moment::now());
        return Ok(with(AcquireReply::Granted {
            tokens,
            queued,
            extended: false,
        }));
    }
    if partial_claims.release.is_some() {
        release_everywhere(quorum, &sequencer, release_of(request)).await;
    }
    match (state, request.kind) {
        (VoteState::Lost { refused: true }, AcquireKind::Fast) => Ok(with(AcquireReply::Taken)),
        (VoteState::Lost { refused: true }, AcquireKind::Try) => Ok(with(AcquireReply::Busy)),
        (VoteState::Lost { refused: true }, AcquireKind::Enqueue | AcquireKind::Extend) => {
            Ok(with(AcquireReply::Queued(QueuePosition {
                enqueue_token: tokens.last(),
                owner_ttl: Some(random::time_in(BACK_OFF)),
                owner_foreign: true,
                ahead: 0,
                // Another attempt is due soon anyway.
                is_subscribed: true,
            })))
        }
        (VoteState::Lost { .. } | VoteState::Open, _) => Err(quorum.no_majority()),
        (VoteState::Won(_), _) => Err(too_late(ttl)),
    }
}

fn release_of(request: &Acquire) -> Release {
    Release {
        key: request.key.clone(),
        cycle: request.cycle,
        requeue: None,
        nobody_waits: false,
        tokens: request.tokens,
        // The cycle never had the lock.
        retire_until: None,
    }
}
