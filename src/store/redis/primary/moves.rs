//! Failover events: how the connections of a store learn that they must leave a server.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

/// What is known about where the primary is and is not. Used only with sentinels.
pub(super) struct Moves {
    news: watch::Sender<News>,
    /// Where the inbox is subscribed, or about to be.
    inbox: Mutex<Arc<str>>,
}

#[derive(Clone, Default)]
struct News {
    /// How often a sentinel reported that the primary changed.
    switches: u64,
    /// The primary's address according to the last such report.
    to: Option<Arc<str>>,
    /// An address found not to be the primary's after that report.
    from: Option<Arc<str>>,
}

/// The events as one connection receives them.
pub(super) struct Listener(watch::Receiver<News>);

impl Moves {
    pub(super) fn new() -> Self {
        Self {
            news: watch::Sender::new(News::default()),
            inbox: Mutex::new("".into()),
        }
    }

    /// How often the primary has changed.
    pub(super) fn switches(&self) -> u64 {
        self.news.borrow().switches
    }

    /// A sentinel reported the primary at this address.
    pub(super) fn switched(&self, place: &str) {
        self.news.send_modify(|news| {
            news.switches += 1;
            (news.to, news.from) = (Some(place.into()), None);
        });
    }

    /// The server at this address replied that it is not a primary: all connections must leave it.
    pub(super) fn left(&self, place: &str) {
        // Many requests notice this at once; only the first is an event.
        self.news.send_if_modified(|news| {
            let is_new = news.from.as_deref() != Some(place);
            news.from = Some(place.into());
            is_new
        });
    }

    /// Commands go to this address from now on, so the inbox must move there, too.
    pub(super) fn settled(&self, place: &str) {
        let inbox = Arc::clone(&self.inbox.lock());
        if !inbox.is_empty() && *inbox != *place {
            self.left(&inbox);
        } else {
            // The server is a primary again, so its next demotion is a new event.
            self.news.send_if_modified(|news| {
                news.from.take_if(|from| **from == *place);
                false
            });
        }
    }

    /// Whether the inbox is at another address.
    pub(super) fn is_inbox_elsewhere(&self, place: &str) -> bool {
        let inbox = self.inbox.lock();
        !inbox.is_empty() && **inbox != *place
    }

    /// Call this before the inbox is subscribed there.
    pub(super) fn inbox_goes_to(&self, place: &str) {
        *self.inbox.lock() = place.into();
    }

    /// Receives all events from now on.
    pub(super) fn listen(&self) -> Listener {
        Listener(self.news.subscribe())
    }
}

impl Listener {
    /// Marks all current events as seen.
    pub(super) fn catch_up(&mut self) {
        self.0.mark_unchanged();
    }

    pub(super) fn has_news(&self) -> bool {
        // An error means that the store is gone, so there are no events.
        self.0.has_changed().unwrap_or(false)
    }

    /// Waits for the next event.
    pub(super) async fn news(&mut self) {
        if self.0.changed().await.is_err() {
            // The store is gone.
            std::future::pending().await
        }
    }

    /// Waits for an event which implies that this address is not the primary's.
    pub(super) async fn must_leave(&mut self, place: &str) {
        loop {
            self.news().await;
            let news = self.0.borrow_and_update();
            let is = |known: &Option<Arc<str>>| known.as_deref().map(|known| known == place);
            if is(&news.to) == Some(false) || is(&news.from) == Some(true) {
                return;
            }
        }
    }
}
