//! The worker in the background: pushes of all nodes, probes of those that are down, and what is left of earlier requests.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::join_all;
use futures_util::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::Quorum;
use super::node::Node;
use super::tally::majority;
use crate::clock::Moment;
use crate::protocol::{Push, Release, Renewal};
use crate::store::redis::primary::{Claim, Claimed};
use crate::store::{Lane, LeaseStore};

/// A node went down; those who wait in its queue have to ask at the next door.
pub(super) struct DoorLost;

/// The pause between two looks at all nodes.
const PROBE_PAUSE: Duration = Duration::from_millis(100);
/// How many releases that are owed to a node are sent at a time.
const RELEASES_AT_ONCE: usize = 128;
/// How many leases are claimed again at a time.
const HEALED_AT_ONCE: usize = 128;

/// Runs until nobody receives the pushes.
pub(super) async fn listen(quorum: Arc<Quorum>, pushes: mpsc::UnboundedSender<Push>) {
    let Some(mut lost) = quorum.lost_doors.lock().take() else {
        tracing::error!("a quorum is listened to twice; please report this");
        return;
    };
    let (sender, mut inboxes) = mpsc::unbounded_channel();
    let mut listeners = FuturesUnordered::new();
    for (index, node) in quorum.nodes.iter().enumerate() {
        let (own, mut received) = mpsc::unbounded_channel();
        let sender = sender.clone();
        let listening = node.store.listen(own);
        listeners.push(async move {
            let forward = async move {
                while let Some(push) = received.recv().await {
                    if sender.send((index, push)).is_err() {
                        return;
                    }
                }
            };
            tokio::join!(listening, forward);
        });
    }
    let probes = probe(&quorum);
    let heals = heal(&quorum);
    tokio::pin!(probes, heals);
    let mut subscribed = vec![false; quorum.nodes.len()];
    let mut started = false;
    loop {
        let push = tokio::select! {
            () = pushes.closed() => return,
            () = &mut probes => return,
            () = &mut heals => return,
            Some(()) = listeners.next() => continue,
            Some(DoorLost) = lost.recv() => {
                if !started {
                    // Nothing waits yet.
                    continue;
                }
                Push::Resubscribed { slot: None }
            }
            Some((index, push)) = inboxes.recv() => match push {
                // The door is one node of many: only a reply to a request makes an owner.
                Push::Granted { key, grant } => Push::Turn { key, cycle: grant.cycle },
                Push::Resubscribed { slot } => {
                    subscribed[index] = true;
                    let count = subscribed.iter().filter(|&&subscribed| subscribed).count();
                    if !started && count < majority(quorum.nodes.len()) {
                        continue;
                    }
                    started = true;
                    Push::Resubscribed { slot }
                }
                // The inbox alone may be cut off: look again at once, and when it is back.
                Push::Disconnected => {
                    subscribed[index] = false;
                    Push::Resubscribed { slot: None }
                }
                other => other,
            },
        };
        if pushes.send(push).is_err() {
            return;
        }
    }
}

/// Looks at all nodes again and again.
async fn probe(quorum: &Arc<Quorum>) {
    loop {
        join_all(quorum.nodes.iter().map(|node| look(quorum, node))).await;
        tokio::time::sleep(PROBE_PAUSE).await;
    }
}

/// Claims leases at nodes that lack them although a majority has them, so that a lock that is held for long survives one restart
/// after another.
///
/// A claim may be executed after a release that was sent meanwhile, and so leave a lease that nobody has. It is one of a minority, and short: if it is still
/// wanted, the next renewal gives it the rest of its TTL.
async fn heal(quorum: &Quorum) {
    let Some(mut missing) = quorum.missing.lock().take() else {
        return std::future::pending().await;
    };
    let mut some = Vec::new();
    while missing.recv_many(&mut some, HEALED_AT_ONCE).await > 0 {
        let claims = some.drain(..).map(|(node, renewal): (Arc<Node>, Renewal)| async move {
            if !node.is_usable() || node.owes(&renewal.key, renewal.cycle) {
                return;
            }
            let claim = Claim {
                key: renewal.key,
                cycle: renewal.cycle,
                ttl: renewal.ttl / 2,
                at_least: 0,
            };
            match timeout(quorum.node_limit, node.store.claim(claim)).await {
                Ok(Ok(Claimed::Ours { .. })) => node.metrics.given.increment(1),
                Ok(Ok(Claimed::Refused)) => node.metrics.refused.increment(1),
                Ok(Err(error)) => {
                    if let Some(why) = super::outage(&error) {
                        quorum.down(&node, why);
                    }
                }
                Err(_) => quorum.down(&node, "no answer in time"),
            }
        });
        join_all(claims).await;
    }
}

async fn look(quorum: &Quorum, node: &Node) {
    let down_since = node.down_since();
    for lane in [Lane::Background, Lane::Caller] {
        match timeout(quorum.node_limit, node.store.ping(lane)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return quorum.down(node, super::outage(&error).unwrap_or("it refuses to be a node")),
            Err(_) => {
                // The other machine may be gone without a word: the next look is through a new connection. The caller's is left to the system's own
                // probes, since what was sent through it must come before what is sent later.
                if lane == Lane::Background {
                    node.store.hang_up(lane);
                }
                return quorum.down(node, "no answer to a probe in time");
            }
        }
    }
    let owed = node.owed();
    for some in owed.chunks(RELEASES_AT_ONCE) {
        let paid = join_all(some.iter().map(|(end, release)| pay(quorum, node, *end, release))).await;
        if !paid.into_iter().all(|paid| paid) {
            return;
        }
    }
    node.mark_up(down_since);
}

/// Sends a release that is owed. Whether it needs no more sending.
async fn pay(quorum: &Quorum, node: &Node, end: Moment, release: &Release) -> bool {
    // The caller's connection has what was sent of the cycle before; the other one works if the program's runtime is gone.
    let mut done = Moment::now() > end;
    for lane in [Lane::Caller, Lane::Background] {
        if !done {
            let reply = timeout(quorum.node_limit, node.store.release(lane, release.clone())).await;
            done = matches!(reply, Ok(Ok(_)));
        }
    }
    if done {
        node.paid(release);
    }
    done
}
