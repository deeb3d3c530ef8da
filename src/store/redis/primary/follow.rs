//! Follows the primary: subscribes to every sentinel. The first one that reports a switch makes all
//! connections leave the old server.
//!
//! # Implementation details
//!
//! A crashed server breaks its connections, and a demoted one replies READONLY. A server that
//! hangs, or whose machine vanished, does neither. After an orderly failover the old primary also
//! accepts writes, which will be lost, for ten seconds until Sentinel demotes it. Only the
//! sentinels' messages make all managers move to the new primary at the same time.
//!
//! If a proxy or firewall forgets a connection, the connection never breaks. A sentinel that has
//! sent nothing for a while is therefore asked whether it still answers. If not, the subscription
//! is renewed and the sentinel is asked for a missed switch.
//!
//! All sentinels are subscribed to, since the one on the primary's machine dies with it. The
//! sentinel that reported the switch first is then asked first: the others learn of it up to two
//! seconds later.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;

use super::Shared;
use super::link::Link;
use super::sentinels::Sentinels;
use super::source::Source;
use crate::backoff::Backoff;
use crate::store::StoreError;
use crate::text::printable;

/// The first and the longest pause before another attempt to subscribe to a sentinel.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// Follows the primary while polled.
pub(super) async fn follow(shared: Arc<Shared>, links: Vec<Arc<Link>>) {
    let Source::Sentinels(sentinels) = &shared.source else {
        return std::future::pending().await;
    };
    let listening = (0..sentinels.count()).map(|index| listen(&shared, &links, sentinels, index));
    futures_util::future::join_all(listening).await;
}

async fn listen(shared: &Shared, links: &[Arc<Link>], sentinels: &Sentinels, index: usize) {
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut is_told = false;
    loop {
        let heard = hear(shared, links, sentinels, index, || backoff.reset()).await;
        match heard {
            Ok(()) => is_told = false,
            // A sentinel may be down for a long time: log it once.
            Err(StoreError::Unavailable(error) | StoreError::Refused(error)) if !is_told => {
                is_told = true;
                let place = sentinels.place(index);
                tracing::warn!(shard = %shared.shard, sentinel = place, error = %printable(&error), "failed to subscribe to a sentinel; retrying");
            }
            Err(_) => {}
        }
        backoff.wait().await;
    }
}

/// Receives switches from one sentinel until the connection breaks.
async fn hear(
    shared: &Shared,
    links: &[Arc<Link>],
    sentinels: &Sentinels,
    index: usize,
    subscribed: impl FnOnce(),
) -> Result<(), StoreError> {
    let (mut asking, mut messages) = sentinels.subscribe(index).await?.split();
    subscribed();
    // A switch may have been missed before the subscription.
    let server = sentinels.ask(index).await?;
    let is_elsewhere = |link: &Arc<Link>| link.is_elsewhere(server.place());
    if links.iter().any(is_elsewhere) || shared.moves.is_inbox_elsewhere(server.place()) {
        go_to(server.place(), shared, links);
    }
    loop {
        let message = tokio::select! {
            message = messages.next() => message,
            () = tokio::time::sleep(sentinels.check_every()) => {
                sentinels.check_answers(&mut asking).await?;
                continue;
            }
        };
        let Some(message) = message else { return Ok(()) };
        let text = String::from_utf8_lossy(message.get_payload_bytes());
        if let Some(place) = sentinels.switched(&text) {
            sentinels.ask_first(index);
            tracing::info!(shard = %shared.shard, sentinel = sentinels.place(index), primary = %printable(&place), "a sentinel reported that the primary changed");
            go_to(&place, shared, links);
        }
    }
}

fn go_to(place: &str, shared: &Shared, links: &[Arc<Link>]) {
    // First, so that a connection that is being opened at this moment is reopened.
    shared.moves.switched(place);
    for link in links {
        link.leave_unless_at(place);
    }
    shared.may_have_forgotten();
}
