//! Who must leave which server: the connections of a store tell one another that the primary is elsewhere.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

/// What is known of where the primary is, and is not. Only where sentinels are asked.
pub(super) struct Moves {
    news: watch::Sender<News>,
    /// Where the inbox is subscribed, or just about to be.
    inbox: Mutex<Arc<str>>,
}

#[derive(Clone, Default)]
struct News {
    /// How often a sentinel told that the primary is another server.
    switches: u64,
    /// Where it is, by the last of them.
    to: Option<Arc<str>>,
    /// The place that turned out not to be the primary's, after that.
    from: Option<Arc<str>>,
}

/// The news as one connection receives them.
pub(super) struct Listener(watch::Receiver<News>);

impl Moves {
    pub(super) fn new() -> Self {
        Self {
            news: watch::Sender::new(News::default()),
            inbox: Mutex::new("".into()),
        }
    }

    /// How often the primary has become another server.
    pub(super) fn switches(&self) -> u64 {
        self.news.borrow().switches
    }

    /// A sentinel says that the primary is there from now on.
    pub(super) fn switched(&self, place: &str) {
        self.news.send_modify(|news| {
            news.switches += 1;
            (news.to, news.from) = (Some(place.into()), None);
        });
    }

    /// The server at that place says that it is no primary: nobody stays there.
    pub(super) fn left(&self, place: &str) {
        // Many requests find out at once; it is news only once.
        self.news.send_if_modified(|news| {
            let is_new = news.from.as_deref() != Some(place);
            news.from = Some(place.into());
            is_new
        });
    }

    /// Commands go to that place from now on, so the inbox has to be there, too.
    pub(super) fn settled(&self, place: &str) {
        let inbox = Arc::clone(&self.inbox.lock());
        if !inbox.is_empty() && *inbox != *place {
            self.left(&inbox);
        } else {
            // The server has become a primary again: should it say no once more, that is news.
            self.news.send_if_modified(|news| {
                news.from.take_if(|from| **from == *place);
                false
            });
        }
    }

    /// Whether the inbox is at another place.
    pub(super) fn is_inbox_elsewhere(&self, place: &str) -> bool {
        let inbox = self.inbox.lock();
        !inbox.is_empty() && **inbox != *place
    }

    /// Before the inbox is subscribed there.
    pub(super) fn inbox_goes_to(&self, place: &str) {
        *self.inbox.lock() = place.into();
    }

    /// Everything from now on.
    pub(super) fn listen(&self) -> Listener {
        Listener(self.news.subscribe())
    }
}

impl Listener {
    /// Takes what is known by now for known.
    pub(super) fn catch_up(&mut self) {
        self.0.mark_unchanged();
    }

    pub(super) fn has_news(&self) -> bool {
        // An error means that the store is gone, which is none.
        self.0.has_changed().unwrap_or(false)
    }

    /// Waits for any news.
    pub(super) async fn news(&mut self) {
        if self.0.changed().await.is_err() {
            // The store is gone.
            std::future::pending().await
        }
    }

    /// Waits for news by which that place is not the primary's.
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
