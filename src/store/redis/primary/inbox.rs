//! The manager's inbox: a connection that does nothing but listen.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::Client;
use futures_util::StreamExt;
use tokio::sync::mpsc;

use super::super::reply::{error_in_words, push};
use super::Shared;
use crate::protocol::Push;
use crate::store::StoreError;

/// The first and the longest pause before another attempt to subscribe.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Listens until nobody receives. After every successful subscription `Resubscribed` comes first: what was pushed before
/// it may be lost.
pub(super) async fn listen(client: Client, shared: Arc<Shared>, pushes: mpsc::UnboundedSender<Push>) {
    let channel = shared.commands.names.inbox(&shared.commands.manager);
    let mut pause = PAUSE_MIN;
    while !pushes.is_closed() {
        let subscribed = tokio::time::timeout(shared.timeout, async {
            let mut inbox = client.get_async_pubsub().await?;
            inbox.subscribe(&channel).await?;
            Ok::<_, deadpool_redis::redis::RedisError>(inbox)
        });
        match subscribed.await {
            Ok(Ok(inbox)) => {
                pause = PAUSE_MIN;
                shared.metrics.subscriptions.increment(1);
                if pushes.send(Push::Resubscribed { slot: None }).is_err() {
                    return;
                }
                let mut messages = inbox.into_on_message();
                loop {
                    let message = tokio::select! {
                        message = messages.next() => message,
                        () = pushes.closed() => return,
                    };
                    let Some(message) = message else { break };
                    let text = String::from_utf8_lossy(message.get_payload_bytes());
                    match push(&text) {
                        Some(push) => {
                            if pushes.send(push).is_err() {
                                return;
                            }
                        }
                        None => {
                            tracing::warn!(%channel, message = %text, "a message in the inbox is not of this version's form")
                        }
                    }
                }
                if pushes.send(Push::Disconnected).is_err() {
                    return;
                }
            }
            Ok(Err(error)) => match error_in_words(&shared.commands.permissions.of_subscription(error)) {
                StoreError::Refused(reason) => {
                    if pushes.send(Push::Refused { reason }).is_err() {
                        return;
                    }
                }
                error => tracing::warn!(shard = %shared.shard, %channel, ?error, "could not subscribe to the inbox"),
            },
            Err(_) => {
                tracing::warn!(shard = %shared.shard, %channel, timeout = ?shared.timeout, "subscribing to the inbox took too long")
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = pushes.closed() => return,
        }
        pause = (pause * 2).min(PAUSE_MAX);
    }
}
