//! One long-lived connection to the primary, replaced when it breaks or when the primary changes.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use deadpool_redis::redis::RedisError;
use deadpool_redis::redis::aio::MultiplexedConnection;
use parking_lot::Mutex;

use super::super::client::Purpose;
use super::super::connection::{Driver, InFlightGuard};
use super::Shared;
use super::dial::{Dialer, Opened};
use super::known_inbox::KnownInbox;
use crate::clock::Moment;
use crate::store::StoreError;
use crate::store::connecting::Connecting;

/// A connection that is opened once and kept: checking one out of a pool would cost a round trip
/// for each request.
pub(super) struct Link {
    dialer: Dialer,
    current: Mutex<Option<Current>>,
    /// How many connections were opened.
    opened: AtomicU64,
    connecting: Connecting<Live>,
}

struct Current {
    live: Live,
    /// `host:port`
    place: String,
    /// The era in which it was opened, see [`Shared::era`].
    era: u64,
    /// Closes the connection, even if requests still wait for replies on it.
    _driver: Driver,
}

/// A connection and its generation.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) connection: MultiplexedConnection,
    pub(super) generation: u64,
    /// How often the primary had changed when the connection was opened. Replies to requests sent
    /// before a later switch come from the old primary and must be discarded.
    pub(super) switches: u64,
    pub(super) known_inbox: Arc<KnownInbox>,
}

/// A request without a reply. If its sender gives up after at least half of its time, the
/// connection is considered broken, and the next request uses another one: a proxy that has
/// forgotten a connection may still acknowledge all data.
#[must_use = "a request that is dropped before its reply says something about the connection"]
pub(super) struct Unanswered<'a> {
    link: &'a Link,
    generation: u64,
    sent_at: Moment,
    is_answered: bool,
}

impl Unanswered<'_> {
    /// There is a reply, or an error that says what is wrong with the connection.
    pub(super) const fn answered(&mut self) {
        self.is_answered = true;
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        if !self.is_answered && Moment::now().since(self.sent_at) >= self.link.dialer.shared.patience() {
            self.link.give_up_generation(self.generation);
        }
    }
}

impl Link {
    pub(super) fn new(shared: &Arc<Shared>, purpose: Purpose) -> Self {
        Self {
            dialer: Dialer::new(shared, purpose),
            current: Mutex::new(None),
            opened: AtomicU64::new(0),
            connecting: Connecting::default(),
        }
    }

    /// Counts a request as in flight until the returned guard is dropped.
    pub(super) fn enter(&self) -> InFlightGuard {
        self.dialer.enter()
    }

    /// A request is about to be sent on this connection.
    pub(super) const fn unanswered(&self, live: &Live, sent_at: Moment) -> Unanswered<'_> {
        Unanswered {
            link: self,
            generation: live.generation,
            sent_at,
            is_answered: false,
        }
    }

    /// Returns the connection, opening one if necessary.
    pub(super) async fn get(self: &Arc<Self>) -> Result<Live, StoreError> {
        match self.live() {
            Some(live) => Ok(live),
            // Boxed: connecting is rare and would make the future of every request ten times as
            // large.
            None => Box::pin(self.connect_apart()).await,
        }
    }

    async fn connect_apart(self: &Arc<Self>) -> Result<Live, StoreError> {
        let connect = || Arc::clone(self).connect();
        self.connecting
            .attempt(Some(&self.dialer.shared.runtimes), connect)
            .await
    }

    /// The connection, if it was opened in the current era.
    pub(super) fn live(&self) -> Option<Live> {
        let era = self.dialer.shared.era.load(Ordering::Acquire);
        let current = self.current.lock();
        let current = current.as_ref().filter(|current| current.era == era);
        current.map(|current| current.live.clone())
    }

    async fn connect(self: Arc<Self>) -> Result<Live, StoreError> {
        match self.live() {
            Some(live) => Ok(live),
            None => self.dialer.connect(&|opened| self.keep(opened)).await,
        }
    }

    /// Makes this connection the current one.
    fn keep(&self, opened: Opened) -> Result<Live, StoreError> {
        let shared = &*self.dialer.shared;
        shared.metrics.connects.increment(1);
        let generation = self.opened.fetch_add(1, Ordering::Relaxed);
        let live = Live {
            connection: opened.connection,
            generation,
            switches: opened.switches,
            known_inbox: Arc::default(),
        };
        let mut current = self.current.lock();
        // Under the mutex: a switch reported after this check finds the new connection here.
        if shared.failovers.switches() != opened.switches {
            return Err(StoreError::Unavailable("the primary has changed".into()));
        }
        if current.is_some() {
            // The old connection is of an earlier era. As in `give_up`.
            shared.cuts.note();
        }
        let place = opened.place;
        let earlier = current.replace(Current {
            live: live.clone(),
            place: place.clone(),
            era: opened.era,
            _driver: opened.driver,
        });
        drop(current);
        drop(earlier);
        // It may lead to another server than the previous connection.
        shared.inbox_check.notify_one();
        if shared.discovery.follows() {
            shared.failovers.on_connected(&place);
        }
        Ok(live)
    }

    /// Abandons this connection, if it is still the current one.
    pub(super) fn broken(&self, broken: &Live) {
        self.give_up_generation(broken.generation);
    }

    fn give_up_generation(&self, generation: u64) -> Option<Current> {
        self.give_up(|current| current.live.generation == generation)
    }

    /// Abandons and closes the current connection if `is_meant` holds for it.
    fn give_up(&self, is_meant: impl FnOnce(&Current) -> bool) -> Option<Current> {
        let mut current = self.current.lock();
        let ended = current.take_if(|current| is_meant(current));
        if ended.is_some() {
            // Under the mutex, so that everything sent on the next connection comes after this.
            self.dialer.shared.cuts.note();
            self.dialer.shared.may_have_forgotten();
        }
        ended
    }

    /// Whether the error means that the connection is unusable: it broke, or leads to a server that
    /// is not a primary. If so, the connection is abandoned.
    pub(super) fn close_if_broken(&self, error: &RedisError, live: &Live) -> bool {
        let shared = &*self.dialer.shared;
        let is_demotion = shared.discovery.is_demotion(error);
        if !is_demotion && !error.is_unrecoverable_error() {
            return false;
        }
        let ended = self.give_up_generation(live.generation);
        if let Some(ended) = ended.filter(|_| is_demotion) {
            shared.leave_server(&ended.place, ended.era);
        }
        true
    }

    /// Abandons the current connection, if there is one.
    pub(super) fn leave(&self) {
        self.give_up(|_| true);
    }

    /// The address of this connection, if it is still the current one.
    pub(super) fn place(&self, live: &Live) -> Option<String> {
        let current = self.current.lock();
        let current = current
            .as_ref()
            .filter(|current| current.live.generation == live.generation);
        current.map(|current| current.place.clone())
    }

    /// Whether there is a connection that leads to another address.
    pub(super) fn is_elsewhere(&self, place: &str) -> bool {
        self.current
            .lock()
            .as_ref()
            .is_some_and(|current| current.place != place)
    }

    /// Leaves any other server, since the primary is at `place` now. Every sentinel reports the
    /// same switch, so a connection that already leads there was opened after it and is kept.
    pub(super) fn leave_unless_at(&self, place: &str) {
        let mut current = self.current.lock();
        let ended = current.take_if(|current| current.place != place);
        if ended.is_some() {
            self.dialer.shared.cuts.note();
        }
        if let Some(current) = &mut *current {
            current.live.switches = self.dialer.shared.failovers.switches();
        }
        drop(current);
        drop(ended);
    }
}
