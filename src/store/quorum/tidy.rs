//! The worker in the background: pushes of all nodes, probes of those that are down, and what is left of earlier requests.

use std::pin::Pin;
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
use crate::protocol::{Answer, Push, ReleaseReply};
use crate::store::{Lane, LeaseStore};

/// A release whose answer nobody waits for.
type Settling = Pin<Box<dyn Future<Output = Option<Answer<ReleaseReply>>> + Send>>;

/// What the worker is told.
pub(super) enum Tidying {
    Await(Settling),
    /// A node went down; those who wait in its queue have to ask at the next door.
    DoorLost,
}

/// The pause between two looks at all nodes.
const PROBE_PAUSE: Duration = Duration::from_millis(100);

/// Runs until nobody receives the pushes.
pub(super) async fn listen(quorum: Arc<Quorum>, pushes: mpsc::UnboundedSender<Push>) {
    let Some(mut to_tidy) = quorum.to_tidy.lock().take() else {
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
    tokio::pin!(probes);
    let mut settling: FuturesUnordered<Settling> = FuturesUnordered::new();
    let mut subscribed = vec![false; quorum.nodes.len()];
    let mut started = false;
    loop {
        let push = tokio::select! {
            () = pushes.closed() => return,
            () = &mut probes => return,
            Some(()) = listeners.next() => continue,
            Some(_) = settling.next() => continue,
            Some(tidying) = to_tidy.recv() => match tidying {
                Tidying::Await(settle) => {
                    settling.push(settle);
                    continue;
                }
                // Before the start nothing waits.
                Tidying::DoorLost if !started => continue,
                Tidying::DoorLost => Push::Resubscribed { slot: None },
            },
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

async fn look(quorum: &Quorum, node: &Node) {
    match timeout(quorum.node_limit, node.store.ping()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return quorum.down(node, super::outage(&error).unwrap_or("it refuses to be a node")),
        Err(_) => return quorum.down(node, "no answer to a probe in time"),
    }
    for (end, release) in node.owed() {
        // The caller's connection has what was sent of the cycle before; the other one works if the program's runtime is gone.
        let mut done = Moment::now() > end;
        for lane in [Lane::Caller, Lane::Background] {
            if !done {
                let reply = timeout(quorum.node_limit, node.store.release(lane, release.clone())).await;
                done = matches!(reply, Ok(Ok(_)));
            }
        }
        if !done {
            return;
        }
        node.paid(&release);
    }
    node.mark_up();
}
