//! One long-lived connection to one node, replaced when it breaks.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{
    Cmd, ConnectionAddr, ConnectionInfo, ProtocolVersion, PushInfo, RedisError, RedisResult, Value,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::super::client::{Target, with_reason};
use super::super::connection::{self, Driver, InFlight, InFlightGuard};
use super::topology::{NodeAddress, Topology};
use crate::clock::Moment;
use crate::runtime::Runtimes;
use crate::store::StoreError;
use crate::store::connecting::Connecting;
use crate::telemetry::ShardMetrics;
use crate::time_limit::within;

/// See the module.
pub(super) struct NodeLink {
    pub(super) place: NodeAddress,
    target: Target,
    /// The command that names the connection.
    name: Cmd,
    /// The time limit for connecting.
    timeout: Duration,
    /// Receives pushes. If set, the connection carries only subscriptions, otherwise only commands.
    pushes: Option<mpsc::UnboundedSender<ReceivedPush>>,
    metrics: Arc<ShardMetrics>,
    /// Notified when a connection ends: the node may have forgotten leases.
    topology: Arc<Topology>,
    /// Set if the application's tasks use the connection: its driver then runs on their runtime.
    /// Otherwise it runs where the connection is opened.
    runtimes: Option<Arc<Runtimes>>,
    current: Mutex<Option<Current>>,
    in_flight: InFlight,
    connecting: Connecting<Live>,
}

/// Why a command had no reply, not even an error.
#[derive(Debug)]
pub(super) enum AskError {
    NotConnected(StoreError),
    /// The reply did not arrive in time.
    Silent,
}

struct Current {
    live: Live,
    /// Closes the connection, even if requests still wait for replies on it.
    _driver: Driver,
}

/// A connection and its generation.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) connection: MultiplexedConnection,
    generation: u64,
}

/// A push, with the connection on which it arrived.
#[derive(Debug)]
pub(super) struct ReceivedPush {
    pub(super) place: NodeAddress,
    pub(super) generation: u64,
    pub(super) push: PushInfo,
}

impl NodeLink {
    /// Sends nothing yet. `like` provides login and encryption. `None` if `place` is not an
    /// address.
    pub(super) fn new(
        place: &NodeAddress,
        like: &Target,
        timeout: Duration,
        pushes: Option<mpsc::UnboundedSender<ReceivedPush>>,
        name: Cmd,
        metrics: &Arc<ShardMetrics>,
        topology: &Arc<Topology>,
    ) -> Option<Self> {
        Some(Self {
            place: Arc::clone(place),
            target: like.with_info(at(place, like.info(), pushes.is_some())?),
            name,
            timeout,
            pushes,
            metrics: Arc::clone(metrics),
            topology: Arc::clone(topology),
            runtimes: None,
            current: Mutex::new(None),
            in_flight: InFlight::default(),
            connecting: Connecting::default(),
        })
    }

    /// The same for the application's tasks: the driver runs on their runtime.
    pub(super) fn on_app_runtime(mut self, runtimes: Option<Arc<Runtimes>>) -> Self {
        self.runtimes = runtimes;
        self
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

    /// Counts a request as in flight until the returned guard is dropped.
    pub(super) fn enter(&self) -> InFlightGuard {
        self.in_flight.enter()
    }

    /// The connection, if there is one.
    pub(super) fn live(&self) -> Option<Live> {
        self.current.lock().as_ref().map(|current| current.live.clone())
    }

    async fn connect_apart(self: &Arc<Self>) -> Result<Live, StoreError> {
        let connect = || Arc::clone(self).connect();
        self.connecting.attempt(self.runtimes.as_deref(), connect).await
    }

    async fn connect(self: Arc<Self>) -> Result<Live, StoreError> {
        if let Some(live) = self.live() {
            return Ok(live);
        }
        // Never reused, even if a node is removed and found again.
        static GENERATIONS: AtomicU64 = AtomicU64::new(0);
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        let mut settings = connection::settings();
        if let Some(pushes) = self.pushes.clone() {
            let place = Arc::clone(&self.place);
            settings = settings.set_push_sender(move |push: PushInfo| {
                pushes.send(ReceivedPush {
                    place: Arc::clone(&place),
                    generation,
                    push,
                })
            });
        }
        let open = || {
            let (target, settings, timeout, in_flight) = (
                self.target.clone(),
                settings.clone(),
                self.timeout,
                self.in_flight.clone(),
            );
            async move { connection::open(&target, None, settings, timeout, &in_flight).await }
        };
        let connecting = async {
            match &self.runtimes {
                Some(runtimes) => runtimes.open(self.timeout / 2, open).await,
                None => open().await,
            }
        };
        let (mut connection, driver) = with_reason(self.target.info(), self.timeout, connecting).await?;
        set_name(&mut connection, &self.name, self.timeout).await;
        match self.pushes {
            Some(_) => self.metrics.subscriptions.increment(1),
            None => self.metrics.connects.increment(1),
        }
        let live = Live { connection, generation };
        let earlier = self.current.lock().replace(Current {
            live: live.clone(),
            _driver: driver,
        });
        drop(earlier);
        Ok(live)
    }

    /// Sends a command and waits for its reply. `patience` includes connecting. A connection that
    /// breaks or does not answer in time is replaced.
    pub(super) async fn ask(
        self: &Arc<Self>,
        command: &Cmd,
        patience: Duration,
    ) -> Result<RedisResult<Value>, AskError> {
        let until = tokio::time::Instant::now() + patience;
        let mut live = match tokio::time::timeout_at(until, self.get()).await {
            Ok(Ok(live)) => live,
            Ok(Err(error)) => return Err(AskError::NotConnected(error)),
            Err(_) => return Err(AskError::Silent),
        };
        let asking = live.connection.send_packed_command(command);
        let answer = tokio::time::timeout_at(until, asking).await;
        let answer = answer.map(|answer| answer.and_then(Value::extract_error));
        let is_ended = match &answer {
            Ok(answer) => answer.as_ref().is_err_and(RedisError::is_unrecoverable_error),
            Err(_) => true,
        };
        if is_ended {
            self.broken(live.generation);
        }
        answer.map_err(|_| AskError::Silent)
    }

    /// The generation of the connection, if there is one.
    pub(super) fn generation(&self) -> Option<u64> {
        self.current.lock().as_ref().map(|current| current.live.generation)
    }

    /// Abandons the current connection, if there is one.
    pub(super) fn leave(&self) {
        self.give_up(|_| true);
    }

    /// Abandons this connection, if it is still the current one.
    pub(super) fn broken(&self, generation: u64) {
        self.give_up(|live| live.generation == generation);
    }

    /// Abandons and closes the current connection if `is_meant` holds for it.
    fn give_up(&self, is_meant: impl FnOnce(&Live) -> bool) {
        let mut current = self.current.lock();
        let ended = current.take_if(|current| is_meant(&current.live));
        if ended.is_some() && self.pushes.is_none() {
            // Under the mutex, so that everything sent on the next connection comes after this.
            self.topology.cuts.note();
        }
        drop(current);
        if ended.is_some() {
            self.topology.may_have_forgotten(&self.place);
        }
        // Not under the mutex: ending a connection wakes the tasks that wait for replies.
        drop(ended);
    }
}

impl Drop for NodeLink {
    fn drop(&mut self) {
        self.give_up(|_| true);
    }
}

impl Live {
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }
}

/// Names a connection. Errors are ignored: not every user may set a name, and the first request
/// detects a broken connection or a server that hangs.
pub(super) async fn set_name(connection: &mut MultiplexedConnection, name: &Cmd, limit: Duration) {
    let naming = connection.send_packed_command(name);
    drop(within(Moment::now(), limit, pin!(naming)).await);
}

/// The same login and encryption at another address.
pub(super) fn at(place: &str, like: &ConnectionInfo, subscribes: bool) -> Option<ConnectionInfo> {
    let (host, port) = place.rsplit_once(':')?;
    let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = port.parse().ok()?;
    let addr = match like.addr() {
        ConnectionAddr::TcpTls {
            insecure, tls_params, ..
        } => ConnectionAddr::TcpTls {
            host,
            port,
            insecure: *insecure,
            tls_params: tls_params.clone(),
        },
        _ => ConnectionAddr::Tcp(host, port),
    };
    let mut settings = like.redis_settings().clone();
    if subscribes {
        settings = settings.set_protocol(ProtocolVersion::RESP3);
    }
    Some(like.clone().set_addr(addr).set_redis_settings(settings))
}
