//! The manager's inbox: a connection for one subscription only.
//!
//! # Implementation details
//!
//! Neither a proxy that has forgotten a connection nor a server whose machine vanished breaks it:
//! the proxy still acknowledges what is sent. A healthy inbox may receive nothing for hours. So it
//! is checked every few seconds by subscribing again to the channel that is already subscribed.
//! This needs no further permission, and any answer counts. An inbox that does not answer is
//! replaced.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::aio::{PubSub, PubSubSink};
use deadpool_redis::redis::cmd;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::super::client::{Target, with_reason};
use super::super::connection::{self, InFlight};
use super::super::reply::role;
use super::super::subscriber;
use super::Shared;
use super::link::Link;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::protocol::Push;
use crate::store::StoreError;

/// The first and the longest pause before another attempt to subscribe.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// How long the inbox must be without a subscription before this is logged, if the shard is up
/// otherwise.
const LOGGED_AFTER: Duration = Duration::from_secs(5);
/// How often the inbox must answer.
const CHECK_EVERY: Duration = Duration::from_secs(2);
/// The number of parts into which the wait for an answer is split. After a runtime was blocked for
/// longer than a part, that part has timed out before the answer that already arrived was read; the
/// next part reads it.
const CHECK_PARTS: u32 = 4;

/// Runs the subscriber until the receiver is closed. Every successful subscription starts with
/// `Resubscribed`, because earlier pushes may have been lost.
///
/// One address can lead to several servers: a name or a service whose target changes, a proxy, or a
/// balancer over a primary and its replicas. An inbox that is subscribed on another server than the
/// one that executes the commands never receives a grant. The server that executes commands is
/// therefore asked whether it knows the subscription: after each subscription, after each new
/// command connection, and when a reply reports that a waiter can't be reached.
pub(super) async fn run(shared: Arc<Shared>, commands: Arc<Link>, pushes: mpsc::UnboundedSender<Push>) {
    let channel = shared.commands.names.inbox(&shared.commands.manager);
    let mut is_elsewhere_reported = false;
    let mut events = shared.failovers.subscribe();
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut failed = Failed::default();
    while !pushes.is_closed() {
        events.mark_seen();
        match tokio::time::timeout(shared.timeout, subscribe(&shared, &channel)).await {
            Ok(Ok((inbox, place))) => {
                failed = Failed::default();
                shared.metrics.subscriptions.increment(1);
                let subscribed = shared.inbox_state.subscribed();
                if pushes.send(Push::Resubscribed { slot: None }).is_err() {
                    return;
                }
                let (sink, mut messages) = inbox.split();
                let silent = silence(sink, &channel, shared.timeout);
                tokio::pin!(silent);
                shared.inbox_check.notify_one();
                loop {
                    let message = tokio::select! {
                        message = messages.next() => message,
                        () = events.until_left(&place) => None,
                        () = &mut silent => None,
                        () = shared.inbox_check.notified() => {
                            match is_known(&shared, &commands, &channel).await {
                                Some(true) => {
                                    backoff.reset();
                                    is_elsewhere_reported = false;
                                    continue;
                                }
                                // Unknown: the next command connection triggers another check.
                                None => continue,
                                Some(false) => {
                                    if !std::mem::replace(&mut is_elsewhere_reported, true) {
                                        report_elsewhere(&shared, &place);
                                    }
                                    None
                                }
                            }
                        }
                        () = pushes.closed() => return,
                    };
                    let Some(message) = message else { break };
                    let text = String::from_utf8_lossy(message.get_payload_bytes());
                    let push = subscriber::read(&text, &shared.shard, shared.replica_ack.as_ref());
                    if let Some(push) = push
                        && pushes.send(push).is_err()
                    {
                        return;
                    }
                }
                drop(subscribed);
                // If no request is in flight, nothing else detects that the server is gone.
                shared.may_have_forgotten();
                if pushes.send(Push::Disconnected).is_err() {
                    return;
                }
            }
            Ok(Err(error)) => {
                shared.discovery.report_unreachable();
                match error {
                    StoreError::Refused(reason) => {
                        if pushes
                            .send(Push::Refused {
                                reason: (*reason).into(),
                            })
                            .is_err()
                        {
                            return;
                        }
                    }
                    error => failed.note(&shared, &error.to_string()),
                }
            }
            Err(_) => {
                failed.note(&shared, &format!("no answer within {:?}", shared.timeout));
                shared.discovery.report_unreachable();
            }
        }
        tokio::select! {
            () = backoff.wait() => {}
            // The address of the primary is known now.
            () = events.changed() => {}
            () = pushes.closed() => return,
        }
    }
}

/// Consecutive failed attempts to subscribe.
#[derive(Default)]
struct Failed {
    since: Option<Moment>,
    is_logged: bool,
}

impl Failed {
    /// A shard's outage is logged elsewhere. A missing inbox on a shard that is up is logged here,
    /// once it has lasted for a while.
    fn note(&mut self, shared: &Shared, reason: &str) {
        let now = Moment::now();
        let since = *self.since.get_or_insert(now);
        if !self.is_logged && shared.metrics.is_up() && now.since(since) >= LOGGED_AFTER {
            self.is_logged = true;
            crate::log::warn!(shard = %shared.shard, reason, "failed to subscribe to the inbox, so hand-offs are delayed; retrying");
        } else {
            crate::log::debug!(shard = %shared.shard, reason, "failed to subscribe to the inbox");
        }
    }
}

/// Returns once the inbox no longer answers.
async fn silence(mut sink: PubSubSink, channel: &str, patience: Duration) {
    loop {
        tokio::time::sleep(CHECK_EVERY).await;
        let answer = sink.subscribe(channel);
        tokio::pin!(answer);
        let mut answered = false;
        for _ in 0..CHECK_PARTS {
            match tokio::time::timeout(patience / CHECK_PARTS, &mut answer).await {
                Ok(Ok(())) => {
                    answered = true;
                    break;
                }
                // The connection broke.
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
        if !answered {
            return;
        }
    }
}

/// Whether the server that executes commands knows the subscription. `None` if it does not answer.
async fn is_known(shared: &Shared, commands: &Arc<Link>, channel: &str) -> Option<bool> {
    let ask = async {
        let mut live = commands.get().await.ok()?;
        let mut count = cmd("PUBSUB");
        count.arg("NUMSUB").arg(channel);
        let (_, subscribers): (String, u64) = count.query_async(&mut live.connection).await.ok()?;
        Some(subscribers > 0)
    };
    tokio::time::timeout(shared.timeout, ask).await.ok().flatten()
}

fn report_elsewhere(shared: &Shared, place: &str) {
    crate::log::warn!(
        shard = %shared.shard,
        address = place,
        "connections to this address lead to different servers: the server that executes commands does not know the \
         subscription of this manager's inbox; resubscribing, and until then the manager's waiters poll every 250 ms"
    );
}

/// Subscribes on the primary. Returns the connection and the primary's address.
async fn subscribe(shared: &Shared, channel: &str) -> Result<(PubSub, String), StoreError> {
    let server = shared.discovery.locate().await?;
    shared.failovers.set_subscriber_place(server.place());
    let in_words = |error| {
        shared
            .discovery
            .to_store_error(&shared.commands.permissions.of_subscription(error))
    };
    let target = Target::new(&server, &shared.tls).map_err(|error| StoreError::Refused(error.to_string().into()))?;
    let target = target.with_login(&shared.login);
    let address = *shared.address.lock();
    let opening = connection::subscriber(&target, address);
    let mut inbox = with_reason(target.info(), shared.timeout, opening).await?;
    inbox.subscribe(channel).await.map_err(in_words)?;
    if shared.check_role && shared.discovery.follows() {
        // A demoted primary still delivers what is published on the new one, but its subscribers do
        // not count as reached there: other waiters would always be preferred. A subscribed
        // connection can't be asked for its role, so another one is. The sentinels report a later
        // demotion.
        let in_flight = InFlight::default();
        let opening = connection::open(&target, address, connection::settings(), shared.timeout, &in_flight);
        let (mut asking, _driver) = opening.await.map_err(in_words)?;
        let answer = cmd("ROLE").query_async(&mut asking).await.map_err(in_words)?;
        shared.discovery.check_role(&role(&answer)?, server.place())?;
    }
    Ok((inbox, server.place().to_owned()))
}
