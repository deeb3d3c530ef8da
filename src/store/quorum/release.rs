//! Releasing a lease: at the other nodes first and at the sequencer last, since it passes the lock
//! on.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::time::timeout;

use super::node::Node;
use super::tally::majority;
use super::{MAJORITY_PAUSE, MAJORITY_PAUSE_MAX, Quorum, outage};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::protocol::{Answer, Release, ReleaseReply};
use crate::store::{LeaseStore, Priority, StoreError, StoreFuture};

/// On which connections the nodes get a release.
struct Route {
    priority: Priority,
    /// The nodes that may still have to execute the claim of the cycle. The release follows it on
    /// its connection, those of the application's tasks: on another it could overtake it.
    behind_claim: Vec<Arc<Node>>,
}

impl Route {
    const fn of(priority: Priority) -> Self {
        Self {
            priority,
            behind_claim: Vec::new(),
        }
    }

    fn is_behind_claim(&self, node: &Arc<Node>) -> bool {
        self.behind_claim.iter().any(|claimed| Arc::ptr_eq(claimed, node))
    }

    fn priority_at(&self, node: &Arc<Node>) -> Priority {
        match self.is_behind_claim(node) {
            true => Priority::Foreground,
            false => self.priority,
        }
    }
}

/// A release that a node must receive. If this is dropped before the node has answered, the release
/// becomes pending.
struct UnansweredRelease {
    quorum: Arc<Quorum>,
    node: Arc<Node>,
    release: Option<Release>,
    /// Whether silence says that the node is down. The release of a guard that is dropped may wait
    /// behind a claim on a connection whose runtime the application blocks.
    proves_outage: bool,
}

impl UnansweredRelease {
    fn new(quorum: &Arc<Quorum>, node: &Arc<Node>, route: &Route, release: Release) -> Self {
        quorum.releasing.fetch_add(1, Ordering::AcqRel);
        Self {
            quorum: Arc::clone(quorum),
            node: Arc::clone(node),
            release: Some(release),
            proves_outage: route.priority_at(node) == route.priority,
        }
    }
}

impl Drop for UnansweredRelease {
    fn drop(&mut self) {
        if let Some(release) = self.release.take() {
            self.node.add_pending_release(release, self.quorum.max_ttl);
        }
        self.quorum.releasing.fetch_sub(1, Ordering::AcqRel);
    }
}

/// What the nodes have answered to a release. Each node counts once: the sequencer may change
/// midway to a node that has already answered.
struct Answers(Vec<(Arc<Node>, Answered)>);

#[derive(Clone, Copy)]
struct Answered {
    /// The lease there was ours.
    held: bool,
    /// The next owner can get the vote of this node.
    is_free: bool,
}

impl Answers {
    fn add(&mut self, node: &Arc<Node>, held: bool) {
        if self.0.iter().any(|(known, _)| Arc::ptr_eq(known, node)) {
            return;
        }
        let is_free = held && node.store.has_vote();
        self.0.push((Arc::clone(node), Answered { held, is_free }));
    }

    fn count(&self) -> usize {
        self.0.len()
    }

    fn free(&self) -> usize {
        self.0.iter().filter(|(_, answered)| answered.is_free).count()
    }

    fn not_ours(&self) -> usize {
        self.0.iter().filter(|(_, answered)| !answered.held).count()
    }
}

/// A release in flight at a node.
struct SentRelease {
    unanswered: UnansweredRelease,
    reply: StoreFuture<Answer<ReleaseReply>>,
}

/// Waits for the reply. A release without an answer becomes pending, and so does one that was
/// refused: a node that is loading, or has no memory left, may execute it later.
async fn await_reply(sent: SentRelease) -> Option<Answer<ReleaseReply>> {
    let SentRelease { mut unanswered, reply } = sent;
    match timeout(unanswered.quorum.node_limit, reply).await {
        Ok(Ok(answer)) => {
            if let Some(release) = unanswered.release.take() {
                let quorum = &unanswered.quorum;
                unanswered
                    .node
                    .released(&release, quorum.newest_cycle(), quorum.max_ttl, Moment::now());
            }
            return Some(answer);
        }
        Ok(Err(error)) => {
            if let Some(why) = outage(&error) {
                unanswered.quorum.report_down(&unanswered.node, why);
            }
        }
        Err(_) if unanswered.proves_outage => unanswered.quorum.report_down(&unanswered.node, "no answer in time"),
        Err(_) => {}
    }
    None
}

/// Tries until a majority has answered, for about half of the caller's time.
pub(super) async fn release(
    quorum: Arc<Quorum>,
    priority: Priority,
    request: Release,
) -> Result<Answer<ReleaseReply>, StoreError> {
    let deadline = Moment::now() + quorum.majority_limit;
    let mut is_repeated = false;
    let mut backoff = Backoff::new(MAJORITY_PAUSE, MAJORITY_PAUSE_MAX);
    loop {
        match attempt(&quorum, priority, request.clone(), deadline).await {
            Err(StoreError::Unavailable(_)) if Moment::now() < deadline => {
                is_repeated = true;
                backoff.wait().await;
            }
            Ok(mut answer) => {
                // An earlier attempt may have released it. Then a missing lease is no loss.
                answer.reply.held |= is_repeated;
                return Ok(answer);
            }
            ended => return ended,
        }
    }
}

async fn attempt(
    quorum: &Arc<Quorum>,
    priority: Priority,
    request: Release,
    deadline: Moment,
) -> Result<Answer<ReleaseReply>, StoreError> {
    let held = quorum.held.lock().remove(&request.cycle);
    let was_held = held.is_some();
    let route = Route {
        priority,
        behind_claim: held.map(|lease| lease.unanswered).unwrap_or_default(),
    };
    if let Some(next) = request.requeue {
        quorum.record_sent(next);
    }
    let slot = quorum.slot(&request.key);
    let sent_at = Moment::now();
    let needed = majority(quorum.nodes.len());
    if quorum.sequencer(slot).is_none() {
        // If this fails, the release is repeated in the background.
        quorum.wait_for_majority(deadline).await?;
    }
    let first_sequencer = quorum.sequencer(slot).map(Arc::clone);
    let plain = Release {
        requeue: None,
        ..request.clone()
    };
    let is_sequencer = |node: &Arc<Node>| {
        first_sequencer
            .as_ref()
            .is_some_and(|sequencer| Arc::ptr_eq(sequencer, node))
    };
    let others = quorum.nodes.iter().filter(|node| !is_sequencer(node));
    // From here on, so that the sequencer gets the release even if this is dropped midway.
    let mut at_sequencer = first_sequencer
        .as_ref()
        .map(|sequencer| UnansweredRelease::new(quorum, sequencer, &route, plain.clone()));
    let mut answers = Answers(Vec::with_capacity(quorum.nodes.len()));
    let mut in_flight: FuturesUnordered<_> = send(quorum, &route, others, &plain)
        .map(|sent| Box::pin(answer_of(sent)))
        .collect();
    // The sequencer's next owner needs a free majority. A node that had another lease, or that has
    // no vote yet, does not count: with the others missing, the next owner would lose its turn.
    let is_enough = |answers: &Answers| {
        let counted = if was_held { answers.free() } else { answers.count() };
        counted + 1 >= needed
    };
    while !is_enough(&answers)
        && let Some((node, answer)) = in_flight.next().await
    {
        if let Some(answer) = answer {
            answers.add(&node, answer.reply.held);
        }
    }
    // Each ends within the limit for a node. They stay on the runtime on which they began; if that
    // ends first, they become pending.
    let mut rest: FuturesUnordered<_> = in_flight.into_iter().map(tokio::spawn).collect();
    while let Some(unanswered) = at_sequencer {
        let node = Arc::clone(&unanswered.node);
        let reply = node.store.release(route.priority_at(&node), request.clone());
        if let Some(Answer { ttl, floor, reply, .. }) = await_reply(SentRelease { unanswered, reply }).await {
            answers.add(&node, reply.held);
            while answers.count() < needed
                && let Some(ended) = rest.next().await
            {
                // A runtime that ends ends its tasks, and leaves a pending release.
                if let Ok((node, Some(answer))) = ended {
                    answers.add(&node, answer.reply.held);
                }
            }
            if answers.count() < needed {
                return Err(quorum.no_majority());
            }
            let reply = ReleaseReply {
                // A node may have missed the claim. The lease was lost only if so many nodes refuse
                // that no majority can have had it.
                held: quorum.nodes.len() - answers.not_ours() >= needed,
                // A grant by the sequencer alone is no lock: the queue asks again, which claims the
                // others.
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
        at_sequencer = quorum
            .sequencer(slot)
            .filter(|next| !Arc::ptr_eq(next, &node))
            .map(|next| UnansweredRelease::new(quorum, next, &route, plain.clone()));
    }
    Err(quorum.no_majority())
}

/// Releases a cycle at every node after it lost its vote, and waits for the nodes that answer. The
/// sequencer comes last, since it passes the key on.
pub(super) async fn release_everywhere(quorum: &Arc<Quorum>, sequencer: &Arc<Node>, release: Release) {
    // From here on, so that the sequencer gets the release even if this is dropped midway.
    let route = Route::of(Priority::Foreground);
    let unanswered = UnansweredRelease::new(quorum, sequencer, &route, release.clone());
    let others = quorum.nodes.iter().filter(|node| !Arc::ptr_eq(node, sequencer));
    let sent = send(quorum, &route, others, &release);
    futures_util::future::join_all(sent.map(await_reply)).await;
    let reply = sequencer.store.release(route.priority, release);
    await_reply(SentRelease { unanswered, reply }).await;
}

/// The same as [`await_reply`], with the node.
async fn answer_of(sent: SentRelease) -> (Arc<Node>, Option<Answer<ReleaseReply>>) {
    (Arc::clone(&sent.unanswered.node), await_reply(sent).await)
}

/// Nodes that are down are not waited for: their releases become pending.
fn send<'a>(
    quorum: &'a Arc<Quorum>,
    route: &'a Route,
    nodes: impl Iterator<Item = &'a Arc<Node>>,
    release: &'a Release,
) -> impl Iterator<Item = SentRelease> {
    nodes.filter_map(move |node| {
        if !node.is_up() {
            node.add_pending_release(release.clone(), quorum.max_ttl);
            return None;
        }
        Some(SentRelease {
            unanswered: UnansweredRelease::new(quorum, node, route, release.clone()),
            reply: node.store.release(route.priority_at(node), release.clone()),
        })
    })
}
