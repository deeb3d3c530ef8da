//! A connection to one of etcd's servers, replaced by one to the next when it is no longer usable.

use std::future::Future;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions};
use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore};

use super::error::{EtcdError, classify, is_of_login};
use super::map;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::credentials::Credentials;
use crate::random;
use crate::runtime::Runtimes;
use crate::store::connecting::Connecting;
use crate::store::login::Login;
use crate::store::map::StoredMap;
use crate::store::{MapState, MapStep, StoreError};
use crate::telemetry::ShardMetrics;

/// The servers of one etcd, and how to connect to them.
pub(super) struct Servers {
    /// As URLs.
    pub(super) endpoints: Vec<String>,
    /// As `host:port`, for errors.
    pub(super) addresses: Vec<String>,
    pub(super) options: ConnectOptions,
    pub(super) login: Login,
    /// Whether connections are encrypted without a client certificate.
    pub(super) shows_no_certificate: bool,
    pub(super) namespace: String,
    pub(super) map: StoredMap,
    /// The timeout of a request, which its sender applies.
    pub(super) timeout: Duration,
    pub(super) metrics: Arc<ShardMetrics>,
    /// The largest revision in any reply.
    pub(super) revision: AtomicU64,
}

/// See the module documentation. All servers give the same answers, so one connection at a time is
/// enough: HTTP/2 carries any number of concurrent requests.
pub(super) struct Link {
    pub(super) servers: Arc<Servers>,
    /// Set if the application's tasks use the connection: then its driver runs on the application's
    /// runtime. Otherwise it runs where the connection is opened.
    runtimes: Option<Arc<Runtimes>>,
    /// For the connecting task.
    me: Weak<Self>,
    current: Mutex<Option<Live>>,
    /// The server to try next.
    next: AtomicUsize,
    /// How many connections were opened.
    opened: AtomicU64,
    /// Notified when a connection is abandoned.
    given_up: Notify,
    connecting: Connecting<Live>,
    /// A permit for each request that may be in flight.
    pub(super) request_slots: Semaphore,
}

/// A connection, identified by its generation.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) client: Client,
    generation: u64,
    opened_at: Moment,
    /// The index of its server.
    index: usize,
}

/// How many requests may be in flight on a connection. Each takes 40 KB of memory until it is
/// answered, and etcd does not answer faster if there are more.
pub(super) const IN_FLIGHT_MAX: usize = 1_000;
/// The first and the longest pause before a request is sent again.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);

impl Servers {
    pub(super) fn observe_revision(&self, revision: i64) {
        self.revision
            .fetch_max(u64::try_from(revision).unwrap_or(0), Ordering::AcqRel);
    }

    /// Advice for a failure to connect whose message gives none. A server that misses a client
    /// certificate may simply close the connection.
    fn hint(&self, failed: &str) -> &'static str {
        if failed.contains("CaUsedAsEndEntity") {
            return "; etcd presents a CA certificate (CA:TRUE) as its own: have the authority sign a separate certificate for etcd";
        }
        if failed.contains("UnsupportedCertVersion") {
            return "; etcd's certificate is X.509 version 1: create it again with extensions, which need version 3";
        }
        if failed.contains("UnknownIssuer") {
            return "; set tls_ca to the file with the certificate of the authority that signed etcd's";
        }
        let is_told_no = [
            "connection closed",
            "stream closed",
            "broken pipe",
            "reset by peer",
            "fatal alert",
        ]
        .iter()
        .any(|words| failed.contains(words));
        if self.shows_no_certificate && is_told_no {
            return "; if etcd requires client certificates, set tls_cert and tls_key";
        }
        ""
    }

    /// How long one connection is waited for before another is tried: the sender has time for two.
    /// Applies to a single address, too, since only the connection may hang, or one of several
    /// members behind the address.
    fn attempt_max(&self) -> Duration {
        self.timeout.mul_f64(0.4)
    }

    pub(super) fn classify(&self, error: &etcd_client::Error) -> EtcdError {
        classify(error, &self.namespace)
    }
}

impl Link {
    pub(super) fn new(servers: &Arc<Servers>, runtimes: Option<Arc<Runtimes>>) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            // Start at a random server, so that managers share the load out.
            next: AtomicUsize::new(random::number() as usize),
            servers: Arc::clone(servers),
            runtimes,
            current: Mutex::new(None),
            opened: AtomicU64::new(0),
            given_up: Notify::new(),
            connecting: Connecting::default(),
            request_slots: Semaphore::new(IN_FLIGHT_MAX),
        })
    }

    /// The connection. Opens one if there is none.
    pub(super) async fn get(&self) -> Result<Live, StoreError> {
        let live = self.current.lock().clone();
        match live {
            Some(live) => Ok(live),
            None => Box::pin(self.connect_apart()).await,
        }
    }

    async fn connect_apart(&self) -> Result<Live, StoreError> {
        let Some(link) = self.me.upgrade() else {
            return Err(StoreError::Unavailable("the manager has ended".into()));
        };
        self.connecting
            .attempt(self.runtimes.as_deref(), || link.connect())
            .await
    }

    /// Tries one server after another.
    async fn connect(self: Arc<Self>) -> Result<Live, StoreError> {
        if let Some(live) = self.current.lock().clone() {
            return Ok(live);
        }
        let servers = &*self.servers;
        let count = servers.endpoints.len();
        // All attempts together must fit into a request's time.
        let each = servers.timeout.mul_f64(0.9) / u32::try_from(count).unwrap_or(1);
        let mut reasons = Vec::new();
        for _ in 0..count {
            let index = self.next.load(Ordering::Relaxed) % count;
            let failed = match tokio::time::timeout(each, self.open(index)).await {
                Ok(Ok(client)) => {
                    servers.metrics.connects.increment(1);
                    let generation = self.opened.fetch_add(1, Ordering::Relaxed);
                    let live = Live {
                        client,
                        generation,
                        opened_at: Moment::now(),
                        index,
                    };
                    let earlier = self.current.lock().replace(live.clone());
                    drop(earlier);
                    return Ok(live);
                }
                Ok(Err(StoreError::Unavailable(reason))) => reason.to_string(),
                // Another server would answer the same.
                Ok(Err(error)) => return Err(error),
                Err(_) => format!("no answer within {each:?}"),
            };
            let hint = servers.hint(&failed);
            reasons.push(format!("{}: {failed}{hint}", servers.addresses[index]));
            self.next.fetch_add(1, Ordering::Relaxed);
        }
        Err(StoreError::Unavailable(reasons.join("; ").into()))
    }

    /// Opens a connection and checks the shard map over it. That read also shows whether the server
    /// has a majority behind it.
    async fn open(&self, index: usize) -> Result<Client, StoreError> {
        let servers = &*self.servers;
        let failed = |error: &etcd_client::Error| servers.classify(error).into_store_error();
        let credentials = servers.login.credentials(&servers.addresses[index]).await;
        let credentials = credentials.map_err(|error| StoreError::Unavailable(error.to_string().into()))?;
        let options = match credentials {
            Some(Credentials { username, password }) => {
                let options = servers.options.clone();
                options.with_user(username.unwrap_or_default(), password.expose())
            }
            None => servers.options.clone(),
        };
        let open = || {
            let (endpoint, options) = (servers.endpoints[index].clone(), options.clone());
            async move { Client::connect([endpoint], Some(options)).await }
        };
        let connected = match &self.runtimes {
            Some(runtimes) => runtimes.open(servers.timeout / 4, open).await,
            None => open().await,
        };
        let mut client = connected.map_err(|error| failed(&error))?;
        let reply = client
            .get(servers.map.key(), None)
            .await
            .map_err(|error| failed(&error))?;
        let was_set = servers.map.is_set();
        if map::check(&servers.map, reply.kvs().first())? != MapState::Ours && was_set {
            // The map was deleted, while this manager may hold leases there.
            map::step(servers, &client, MapStep::Confirm).await?;
        }
        servers.observe_revision(reply.header().map_or(0, etcd_client::ResponseHeader::revision));
        Ok(client)
    }

    /// The connection is unusable. The next one goes to another server.
    pub(super) fn broken(&self, broken: &Live) {
        let ended = self.current.lock().take_if(|live| live.generation == broken.generation);
        if ended.is_some() {
            self.next.fetch_add(1, Ordering::Relaxed);
            self.given_up.notify_waiters();
        }
        // Not under the mutex: dropping a connection wakes the task that drives it.
        drop(ended);
    }

    /// Waits until the connection is abandoned. Whatever still uses it must then move elsewhere.
    pub(super) async fn abandoned(&self, live: &Live) {
        loop {
            let given_up = self.given_up.notified();
            let current = self.current.lock().as_ref().map(|live| live.generation);
            if current != Some(live.generation) {
                return;
            }
            given_up.await;
        }
    }

    /// Abandons the current connection, if there is one.
    pub(super) fn leave(&self) {
        let ended = self.current.lock().take();
        if ended.is_some() {
            self.given_up.notify_waiters();
        }
        drop(ended);
    }

    /// Nothing was answered since that moment: the connection is unusable, unless it is newer.
    pub(super) fn give_up_since(&self, since: Moment) {
        let live = self.current.lock().clone();
        if let Some(live) = live.filter(|live| live.opened_at <= since) {
            self.broken(&live);
        }
    }

    /// Sends a request, and sends it again to another server if one gives no answer or fails
    /// temporarily. The request must be harmless when it is executed twice. Also returns whether it
    /// was sent more than once.
    pub(super) async fn request<T, F>(&self, send: impl Fn(Client) -> F) -> Result<(T, bool), EtcdError>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let started = Moment::now();
        let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
        let (mut repeated, mut has_new_login) = (false, false);
        loop {
            let error = match self.get().await {
                Ok(live) => {
                    let mut pending = Pending {
                        link: self,
                        live: &live,
                        since: Moment::now(),
                        is_unanswered: false,
                    };
                    let reply = tokio::time::timeout(self.servers.attempt_max(), async {
                        // The semaphore is never closed.
                        let _slot = self.request_slots.acquire().await;
                        pending.is_unanswered = true;
                        // On the heap, and only now, because it is large.
                        Box::pin(send(live.client.clone())).await
                    });
                    let reply = reply.await;
                    let was_sent = std::mem::take(&mut pending.is_unanswered);
                    match reply {
                        Err(_) => {
                            let address = &self.servers.addresses[live.index];
                            let why = if was_sent {
                                repeated = true;
                                self.broken(&live);
                                format!("{address}: no answer")
                            } else {
                                format!("{address}: {IN_FLIGHT_MAX} requests are in flight, which is the limit")
                            };
                            EtcdError::Other(StoreError::Unavailable(why.into()))
                        }
                        Ok(Ok(reply)) => return Ok((reply, repeated)),
                        Ok(Err(error)) => {
                            if is_of_login(&error) && self.servers.login.can_change() && !has_new_login {
                                // The password was replaced since this connection was opened.
                                has_new_login = true;
                                self.broken(&live);
                                continue;
                            }
                            let error = self.servers.classify(&error);
                            if error.is_passing() {
                                repeated = true;
                                self.broken(&live);
                            }
                            error
                        }
                    }
                }
                Err(error) => EtcdError::Other(error),
            };
            let pause = backoff.next_delay();
            // The rest of the sender's time is for the answer.
            if !error.is_passing() || (Moment::now().since(started) + pause) * 2 > self.servers.timeout {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }
}

/// A request. If its sender gives up after at least half of its time, and the request was sent, the
/// server hangs or is cut off: the next request goes to another.
struct Pending<'a> {
    link: &'a Link,
    live: &'a Live,
    since: Moment,
    is_unanswered: bool,
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if self.is_unanswered && Moment::now().since(self.since) * 2 >= self.link.servers.timeout {
            self.link.broken(self.live);
        }
    }
}
