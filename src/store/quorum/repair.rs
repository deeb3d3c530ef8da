//! The repair worker in the background: forwards the pushes of all nodes, probes the nodes, and
//! finishes what earlier requests left.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::stream::{self, FuturesUnordered};
use futures_util::{StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Quorum;
use super::node::Node;
use super::tally::{is_majority_without, majority};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::protocol::{Push, Release};
use crate::store::{LeaseStore, Priority, StoreError};
use crate::text::printable;

/// The longest pause between two probes of all nodes; the shortest is half of it.
const PROBE_PAUSE: Duration = Duration::from_millis(130);
/// How many pending releases of a node are sent at a time. A node that was away may have thousands,
/// and is not used before they are done.
const RELEASES_AT_A_TIME: usize = 64;
/// The pause between two checks for releases in flight while the manager shuts down.
const DRAIN_PAUSE: Duration = Duration::from_millis(2);

/// Runs until the receiver of pushes is gone.
pub(super) async fn run(quorum: Arc<Quorum>, pushes: mpsc::UnboundedSender<Push>) {
    let (sender, mut inboxes) = mpsc::unbounded_channel();
    let mut subscribers = FuturesUnordered::new();
    for (index, node) in quorum.nodes.iter().enumerate() {
        let (own, mut received) = mpsc::unbounded_channel();
        let sender = sender.clone();
        let subscribing = node.store.run_subscriber(own);
        subscribers.push(async move {
            let forward = async move {
                while let Some(push) = received.recv().await {
                    if sender.send((index, push)).is_err() {
                        return;
                    }
                }
            };
            tokio::join!(subscribing, forward);
        });
    }
    let probes = probe_nodes(&quorum);
    tokio::pin!(probes);
    let mut subscribed = vec![false; quorum.nodes.len()];
    let mut cut_off = vec![false; quorum.nodes.len()];
    let mut refusing = vec![false; quorum.nodes.len()];
    let mut started = false;
    loop {
        let push = tokio::select! {
            () = pushes.closed() => return,
            () = &mut probes => return,
            Some(()) = subscribers.next() => continue,
            () = quorum.sequencer_lost.notified() => match started {
                true => Push::Resubscribed { slot: None },
                // Before the start there are no waiters.
                false => continue,
            },
            Some((index, push)) = inboxes.recv() => match push {
                // The sequencer is one node of many: only the reply to a request makes an owner.
                Push::Granted { key, grant } => Push::YourTurn { key, cycle: grant.cycle },
                Push::Resubscribed { slot } => {
                    (subscribed[index], refusing[index]) = (true, false);
                    if std::mem::take(&mut cut_off[index]) {
                        quorum.metrics.reconnects.increment(1);
                    }
                    let count = subscribed.iter().filter(|&&subscribed| subscribed).count();
                    if !started && count < majority(quorum.nodes.len()) {
                        continue;
                    }
                    started = true;
                    Push::Resubscribed { slot }
                }
                // The inbox alone may be cut off: ask again at once, and when it is back.
                Push::Disconnected => {
                    subscribed[index] = false;
                    cut_off[index] = true;
                    Push::Resubscribed { slot: None }
                }
                // A majority of the inboxes is enough: a node that is set up differently, as while
                // passwords are changed, refuses no manager.
                Push::Refused { reason } => {
                    let is_new = !std::mem::replace(&mut refusing[index], true);
                    let count = refusing.iter().filter(|&&refusing| refusing).count();
                    if is_majority_without(count, quorum.nodes.len()) {
                        if is_new {
                            let node = &quorum.nodes[index].place;
                            crate::log::warn!(node, reason = %printable(&reason), "a node of the quorum refuses the inbox");
                        }
                        continue;
                    }
                    Push::Refused { reason }
                }
                other => other,
            },
        };
        if pushes.send(push).is_err() {
            return;
        }
    }
}

/// Probes all nodes again and again.
async fn probe_nodes(quorum: &Arc<Quorum>) {
    let mut backoff = Backoff::new(PROBE_PAUSE, PROBE_PAUSE);
    loop {
        join_all(quorum.nodes.iter().map(|node| probe_node(quorum, node))).await;
        backoff.wait().await;
    }
}

/// Probes a node, and uses it again once it answers and has got its pending releases.
pub(super) async fn probe_node(quorum: &Quorum, node: &Node) {
    let downs = node.downs();
    match timeout(quorum.node_limit, node.store.ping()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            return quorum.report_down(node, super::outage(&error).unwrap_or("the node refused the probe"));
        }
        Err(_) => {
            // The connection may be dead without notice: the next probe takes another.
            node.store.leave_background();
            return quorum.report_down(node, "no answer to a probe in time");
        }
    }
    if !node.is_up() && timeout(quorum.node_limit, node.store.ping_callers()).await.is_err() {
        // The server is well, but the connections of the application's tasks are not.
        node.store.leave_callers();
        return;
    }
    if finish_pending_releases(quorum, node).await {
        node.mark_up(downs);
    }
}

/// The node did not answer a release.
struct NoAnswer;

/// Repeats the pending releases. Returns whether the node answered.
pub(super) async fn finish_pending_releases(quorum: &Quorum, node: &Node) -> bool {
    send_second_releases(quorum, node, Moment::now()).await;
    let pending = stream::iter(node.pending_releases().into_iter().map(Ok));
    let finished = pending.try_for_each_concurrent(RELEASES_AT_A_TIME, async |(end, release)| {
        finish_release(quorum, node, end, &release).await
    });
    finished.await.is_ok()
}

/// Repeats a pending release, unless its lease has run out, at `end`.
async fn finish_release(quorum: &Quorum, node: &Node, end: Moment, release: &Release) -> Result<(), NoAnswer> {
    if Moment::now() <= end {
        // The caller's connection carried what was sent for the cycle before; the background's
        // works even if the application's runtime is gone.
        let is_done = match send_again(quorum, node, Priority::Foreground, release).await {
            Err(NoAnswer) => send_again(quorum, node, Priority::Background, release).await?,
            Ok(is_done) => is_done,
        };
        if !is_done {
            // Tried again until the lease has run out.
            return Ok(());
        }
        node.released(release, quorum.newest_cycle(), quorum.max_ttl, Moment::now());
    }
    node.remove_pending_release(release);
    Ok(())
}

/// Returns whether the node executed the release; `false` if it refused it.
async fn send_again(quorum: &Quorum, node: &Node, priority: Priority, release: &Release) -> Result<bool, NoAnswer> {
    match timeout(quorum.node_limit, node.store.release(priority, release.clone())).await {
        Ok(Ok(_)) => Ok(true),
        Ok(Err(StoreError::Refused(_) | StoreError::MapMismatch { .. })) => Ok(false),
        Ok(Err(StoreError::Unavailable(_))) | Err(_) => Err(NoAnswer),
    }
}

/// Repeats the releases after which a claim may have arrived. One that the node did not execute is
/// tried again with the next probe, until its lease has run out.
pub(super) async fn send_second_releases(quorum: &Quorum, node: &Node, now: Moment) {
    while let Some(second) = node.due_second_release(now) {
        let sent = send_again(quorum, node, Priority::Background, &second.release).await;
        if !matches!(sent, Ok(true)) && now < second.end {
            break;
        }
        node.second_release_done(&second, now);
    }
}

/// Waits until no release is in flight, and none is pending for a node that is up.
pub(super) async fn drain(quorum: &Quorum) {
    loop {
        let up = || quorum.nodes.iter().filter(|node| node.is_up());
        join_all(up().map(|node| finish_pending_releases(quorum, node))).await;
        if quorum.releasing.load(Ordering::Acquire) == 0 && up().all(|node| node.has_no_pending_releases()) {
            return;
        }
        tokio::time::sleep(DRAIN_PAUSE).await;
    }
}
