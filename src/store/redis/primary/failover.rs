//! Failovers: how the connections of a store learn that they must leave a server.
//!
//! If sentinels watch the primary, every one of them is subscribed to. The first one that reports a
//! switch makes all connections leave the old server.
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
use parking_lot::Mutex;
use tokio::sync::watch;

use super::Shared;
use super::discovery::Discovery;
use super::link::Link;
use super::sentinels::Sentinels;
use crate::backoff::Backoff;
use crate::store::StoreError;
use crate::text::printable;

/// The first and the longest pause before another attempt to subscribe to a sentinel.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// What is known about where the primary is and is not. Used only with sentinels.
pub(super) struct FailoverEvents {
    latest: watch::Sender<Latest>,
    /// Where the inbox is subscribed, or about to be.
    inbox: Mutex<Arc<str>>,
}

#[derive(Clone, Default)]
struct Latest {
    /// How often a sentinel reported that the primary changed.
    switches: u64,
    /// The primary's address according to the last such report.
    to: Option<Arc<str>>,
    /// An address found not to be the primary's after that report.
    from: Option<Arc<str>>,
}

/// The events as one connection receives them.
pub(super) struct FailoverListener(watch::Receiver<Latest>);

impl FailoverEvents {
    pub(super) fn new() -> Self {
        Self {
            latest: watch::Sender::new(Latest::default()),
            inbox: Mutex::new("".into()),
        }
    }

    /// How often the primary has changed.
    pub(super) fn switches(&self) -> u64 {
        self.latest.borrow().switches
    }

    /// A sentinel reported the primary at this address.
    pub(super) fn on_switch(&self, place: &str) {
        self.latest.send_modify(|latest| {
            latest.switches += 1;
            (latest.to, latest.from) = (Some(place.into()), None);
        });
    }

    /// The server at this address replied that it is not a primary: all connections must leave it.
    pub(super) fn on_demotion(&self, place: &str) {
        // Many requests notice this at once; only the first is an event.
        self.latest.send_if_modified(|latest| {
            let is_new = latest.from.as_deref() != Some(place);
            latest.from = Some(place.into());
            is_new
        });
    }

    /// Commands go to this address from now on, so the inbox must move there, too.
    pub(super) fn on_connected(&self, place: &str) {
        let inbox = Arc::clone(&self.inbox.lock());
        if !inbox.is_empty() && *inbox != *place {
            self.on_demotion(&inbox);
        } else {
            // The server is a primary again, so its next demotion is a new event.
            self.latest.send_if_modified(|latest| {
                latest.from.take_if(|from| **from == *place);
                false
            });
        }
    }

    /// Whether the inbox is at another address.
    pub(super) fn is_subscriber_elsewhere(&self, place: &str) -> bool {
        let inbox = self.inbox.lock();
        !inbox.is_empty() && **inbox != *place
    }

    /// Call this before the inbox is subscribed there.
    pub(super) fn set_subscriber_place(&self, place: &str) {
        *self.inbox.lock() = place.into();
    }

    /// Receives all events from now on.
    pub(super) fn subscribe(&self) -> FailoverListener {
        FailoverListener(self.latest.subscribe())
    }
}

impl FailoverListener {
    /// Marks all current events as seen.
    pub(super) fn mark_seen(&mut self) {
        self.0.mark_unchanged();
    }

    pub(super) fn has_changed(&self) -> bool {
        // An error means that the store is gone, so there are no events.
        self.0.has_changed().unwrap_or(false)
    }

    /// Waits for the next event.
    pub(super) async fn changed(&mut self) {
        if self.0.changed().await.is_err() {
            // The store is gone.
            std::future::pending().await
        }
    }

    /// Waits for an event which implies that this address is not the primary's.
    pub(super) async fn until_left(&mut self, place: &str) {
        loop {
            self.changed().await;
            let latest = self.0.borrow_and_update();
            let is = |known: &Option<Arc<str>>| known.as_deref().map(|known| known == place);
            if is(&latest.to) == Some(false) || is(&latest.from) == Some(true) {
                return;
            }
        }
    }
}

/// Follows the primary while polled.
pub(super) async fn run(shared: Arc<Shared>, links: Vec<Arc<Link>>) {
    let Discovery::Sentinels(sentinels) = &shared.discovery else {
        return std::future::pending().await;
    };
    let subscriptions = (0..sentinels.count()).map(|index| follow(&shared, &links, sentinels, index));
    futures_util::future::join_all(subscriptions).await;
}

async fn follow(shared: &Shared, links: &[Arc<Link>], sentinels: &Sentinels, index: usize) {
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut is_logged = false;
    loop {
        let received = receive(shared, links, sentinels, index, || backoff.reset()).await;
        match received {
            Ok(()) => is_logged = false,
            // A sentinel may be down for a long time: log it once.
            Err(StoreError::Unavailable(error) | StoreError::Refused(error)) if !is_logged => {
                is_logged = true;
                let place = sentinels.place(index);
                crate::log::warn!(shard = %shared.shard, sentinel = place, error = %printable(&error), "failed to subscribe to a sentinel; retrying");
            }
            Err(_) => {}
        }
        backoff.wait().await;
    }
}

/// Receives switches from one sentinel until the connection breaks.
async fn receive(
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
    if links.iter().any(is_elsewhere) || shared.failovers.is_subscriber_elsewhere(server.place()) {
        move_to(server.place(), shared, links);
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
            crate::log::info!(shard = %shared.shard, sentinel = sentinels.place(index), primary = %printable(&place), "a sentinel reported that the primary changed");
            move_to(&place, shared, links);
        }
    }
}

fn move_to(place: &str, shared: &Shared, links: &[Arc<Link>]) {
    // First, so that a connection that is being opened at this moment is reopened.
    shared.failovers.on_switch(place);
    for link in links {
        link.leave_unless_at(place);
    }
    shared.may_have_forgotten();
}
