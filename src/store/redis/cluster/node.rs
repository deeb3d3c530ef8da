//! One kept connection to one node, replaced when it breaks.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ConnectionInfo, ProtocolVersion, PushInfo, RedisError,
    RedisResult, Value,
};
use parking_lot::Mutex;
use tokio::sync::mpsc;

use super::super::client::with_reason;
use super::super::cut::{Cut, Ending};
use super::super::reply::error_in_words;
use super::topology::{Place, Topology};
use crate::clock::Moment;
use crate::program::Runtimes;
use crate::store::StoreError;
use crate::store::connecting::Connecting;
use crate::telemetry::ShardMetrics;
use crate::time_limit::within;

/// How many requests may wait to be written before senders wait.
const PIPELINE_BUFFER: usize = 1024;

/// See the module.
pub(super) struct Node {
    pub(super) place: Place,
    info: ConnectionInfo,
    /// Gives the connection its name.
    name: Cmd,
    /// The longest time that connecting may take.
    timeout: Duration,
    /// Who hears what is pushed. Then the connection carries subscriptions alone, otherwise commands alone.
    listener: Option<mpsc::UnboundedSender<Heard>>,
    metrics: Arc<ShardMetrics>,
    /// Who is told when a connection ends: the node may have forgotten leases.
    topology: Arc<Topology>,
    /// The runtimes, if the program's tasks use it: then its driver belongs at home. Otherwise it belongs where it is opened.
    runtimes: Option<Arc<Runtimes>>,
    current: Mutex<Option<Current>>,
    connecting: Connecting<Live>,
}

/// Why there is no answer, not even an error.
#[derive(Debug)]
pub(super) enum Unasked {
    NotConnected(StoreError),
    /// It did not come in time.
    Silent,
}

struct Current {
    live: Live,
    /// Closes the connection, whatever still waits for a reply on it.
    _ending: Ending,
}

/// A connection and which one it is.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) connection: MultiplexedConnection,
    generation: u64,
    /// What ends requests on it.
    pub(super) cut: Cut,
}

/// What a node pushed, and through which connection.
#[derive(Debug)]
pub(super) struct Heard {
    pub(super) place: Place,
    pub(super) generation: u64,
    pub(super) push: PushInfo,
}

impl Node {
    /// Nothing is sent yet. `like` says how to log in and whether to encrypt. Nothing for a place that is none.
    pub(super) fn new(
        place: &Place,
        like: &ConnectionInfo,
        timeout: Duration,
        listener: Option<mpsc::UnboundedSender<Heard>>,
        name: Cmd,
        metrics: &Arc<ShardMetrics>,
        topology: &Arc<Topology>,
    ) -> Option<Self> {
        Some(Self {
            place: Arc::clone(place),
            info: at(place, like, listener.is_some())?,
            name,
            timeout,
            listener,
            metrics: Arc::clone(metrics),
            topology: Arc::clone(topology),
            runtimes: None,
            current: Mutex::new(None),
            connecting: Connecting::default(),
        })
    }

    /// The same for the program's tasks: its driver belongs at home.
    pub(super) fn at_home(mut self, runtimes: Option<Arc<Runtimes>>) -> Self {
        self.runtimes = runtimes;
        self
    }

    /// The connection; a new one, if there is none.
    pub(super) async fn get(self: &Arc<Self>) -> Result<Live, StoreError> {
        match self.live() {
            Some(live) => Ok(live),
            // On the heap: connecting is rare and would make the future of every request ten times as large.
            None => Box::pin(self.connect_apart()).await,
        }
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
        // Never used twice, also where a node is forgotten and found again.
        static GENERATIONS: AtomicU64 = AtomicU64::new(0);
        let generation = GENERATIONS.fetch_add(1, Ordering::Relaxed);
        // No response timeout: each request is sent with one of its own.
        let mut config = AsyncConnectionConfig::new()
            .set_response_timeout(None)
            .set_connection_timeout(Some(self.timeout))
            .set_pipeline_buffer_size(PIPELINE_BUFFER);
        if let Some(listener) = self.listener.clone() {
            let place = Arc::clone(&self.place);
            config = config.set_push_sender(move |push: PushInfo| {
                listener.send(Heard {
                    place: Arc::clone(&place),
                    generation,
                    push,
                })
            });
        }
        let client = Client::open(self.info.clone()).map_err(|error| error_in_words(&error))?;
        let open = || {
            let (client, config) = (client.clone(), config.clone());
            async move { client.get_multiplexed_async_connection_with_config(&config).await }
        };
        let connecting = async {
            match &self.runtimes {
                Some(runtimes) => runtimes.open(self.timeout / 2, open).await,
                None => open().await,
            }
        };
        let mut connection = with_reason(&self.info, self.timeout, connecting).await?;
        // Not every user may; and a connection that broke meanwhile is found out by the first request, as is a server that hangs.
        let naming = connection.send_packed_command(&self.name);
        drop(within(Moment::now(), self.timeout, pin!(naming)).await);
        match self.listener {
            Some(_) => self.metrics.subscriptions.increment(1),
            None => self.metrics.connects.increment(1),
        }
        let cut = Cut::default();
        let live = Live {
            connection,
            generation,
            cut: cut.clone(),
        };
        let earlier = self.current.lock().replace(Current {
            live: live.clone(),
            _ending: Ending::Requests(cut),
        });
        drop(earlier);
        Ok(live)
    }

    /// Sends a command and waits for its answer, connecting included. A connection that breaks or gives no answer in that time is replaced.
    pub(super) async fn ask(
        self: &Arc<Self>,
        command: &Cmd,
        patience: Duration,
    ) -> Result<RedisResult<Value>, Unasked> {
        let until = tokio::time::Instant::now() + patience;
        let mut live = match tokio::time::timeout_at(until, self.get()).await {
            Ok(Ok(live)) => live,
            Ok(Err(error)) => return Err(Unasked::NotConnected(error)),
            Err(_) => return Err(Unasked::Silent),
        };
        let (cut, connection) = (live.cut.clone(), &mut live.connection);
        let asking = pin!(connection.send_packed_command(command));
        let answer = tokio::time::timeout_at(until, cut.or(asking)).await;
        let answer = answer.map(|answer| answer.and_then(Value::extract_error));
        let is_ended = match &answer {
            Ok(answer) => answer.as_ref().is_err_and(RedisError::is_unrecoverable_error),
            Err(_) => true,
        };
        if is_ended {
            self.broken(live.generation);
        }
        answer.map_err(|_| Unasked::Silent)
    }

    /// Which connection there is, if there is one.
    pub(super) fn generation(&self) -> Option<u64> {
        self.current.lock().as_ref().map(|current| current.live.generation)
    }

    /// Whatever connection there is, it is not used any more.
    pub(super) fn leave(&self) {
        self.give_up(|_| true);
    }

    /// That connection is of no more use.
    pub(super) fn broken(&self, generation: u64) {
        self.give_up(|live| live.generation == generation);
    }

    /// Gives up the connection, if that is true of it, and closes it.
    fn give_up(&self, is_meant: impl FnOnce(&Live) -> bool) {
        let mut current = self.current.lock();
        let ended = current.take_if(|current| is_meant(&current.live));
        if ended.is_some() && self.listener.is_none() {
            // Under the mutex: what is sent on the next connection comes after it.
            self.topology.cuts.note();
        }
        drop(current);
        if ended.is_some() {
            self.topology.may_have_forgotten(&self.place);
        }
        // Not under the mutex: the end of a connection wakes those who wait for replies.
        drop(ended);
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.give_up(|_| true);
    }
}

impl Live {
    pub(super) fn generation(&self) -> u64 {
        self.generation
    }
}

/// The same login and encryption at another place.
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
