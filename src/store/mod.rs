//! Lease stores: where leases, queues and tokens live.

#[cfg(test)]
mod conformance;
mod connecting;
#[cfg(feature = "etcd")]
pub(crate) mod etcd;
pub(crate) mod login;
pub(crate) mod map;
pub(crate) mod memory;
pub(crate) mod quorum;
pub(crate) mod redis;
#[cfg(feature = "tls")]
mod tls;

use std::borrow::Cow;
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::clock::Moment;
use crate::endpoint::{Endpoint, EndpointKind};
use crate::error::{Failure, LockError, Reason};
use crate::fence::FencingToken;
use crate::identity::ManagerId;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireReply, Answer, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::runtime::Runtimes;
use crate::telemetry::ShardMetrics;
use login::Login;
pub(crate) use map::{MapState, MapStep};

/// A request in flight. Dropping it does not cancel it: the server may still execute it.
pub(crate) type StoreFuture<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

/// The lease store of one shard, as one manager sees it: leases, queues and tokens.
///
/// Requests have no timeout of their own; the caller applies one. Every request that may take a
/// lease or a place in a queue travels on [`Priority::Foreground`], where the store keeps the order
/// of requests per key. So the release of an abandoned cycle cannot overtake its acquire.
pub(crate) trait LeaseStore: Send + Sync + 'static {
    /// Opens the connections of [`Priority::Foreground`] on the caller's runtime. A store that
    /// could not be reached connects on first use, if it can by then.
    ///
    /// Fails if the shard has a different shard map. Writes nothing: a shard without a map stays
    /// without one.
    fn connect(&self) -> StoreFuture<()>;

    /// Opens the connections of [`Priority::Background`] on the calling thread, which is the
    /// watchdog's. Runs before any lock is granted: otherwise a server that accepts no further
    /// connections would only be noticed at the first renewal.
    fn connect_background(&self) -> StoreFuture<()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Whether the shard's map is known to be this manager's. Nothing may be acquired until it is.
    fn has_map(&self) -> bool {
        true
    }

    /// Whether the map is stored in a single place, so that it is stored at once or not at all.
    fn has_one_map(&self) -> bool {
        true
    }

    /// Performs one step towards a stored shard map; see [`map`].
    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        let _ = step;
        Box::pin(std::future::ready(Ok(MapState::Ours)))
    }

    /// Requests a lease. Repeating the request for the same cycle is harmless.
    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>>;

    /// Releases a lease or leaves the queue. Repeating the request is harmless.
    fn release(&self, priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>>;

    /// Ends the lease of `owner`, which may be another manager or a client of another library, and
    /// passes the key on like a release, with `tokens` for the next owner. Returns whether `owner`
    /// had the lease; if not, no lease was ended. The caller must know that `owner` does not wait
    /// for the key: a cycle that waits would leave the queue.
    fn break_lease(&self, key: LockKey, owner: String, tokens: u32) -> StoreFuture<bool> {
        let _ = (key, owner, tokens);
        let reason = "this kind of shard can't end the lease of another process";
        Box::pin(std::future::ready(Err(StoreError::Refused(reason.into()))))
    }

    /// Extends those leases of `batch` that are still ours, in one call. Returns one reply per
    /// renewal, in the same order; `None` means that there was no answer. The caller waits no
    /// longer than `limit`, so a store that asks several servers must return the replies it has by
    /// then.
    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>>;

    /// Reads the state of a key without changing anything.
    fn inspect(&self, key: LockKey) -> StoreFuture<KeyState>;

    /// The same for the checks that a manager makes by itself, every few seconds while a task
    /// waits. Uses a connection that is open anyway, so that waiting costs none.
    fn inspect_again(&self, key: LockKey) -> StoreFuture<KeyState> {
        self.inspect(key)
    }

    /// Deletes all keys of the namespace, including those of other managers, and returns how many
    /// there were.
    fn erase(&self) -> StoreFuture<u64>;

    /// Checks whether locks could be acquired even if no task requests one (a replica, or a server
    /// that is out of memory, refuses), and reads the servers' clocks. Cheap, and changes nothing.
    /// Called every few seconds on the background thread, which waits for it no longer than for a
    /// request.
    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>>;

    /// How many times a broken connection or an announced failover showed that the keys of `slot`
    /// may be on another server by now, or on one that was restarted, so that leases may be lost.
    /// Read on every event of a key, so it must cost no more than a load or two. It changes after
    /// the connections concerned were abandoned: the reply to a request that is sent later comes
    /// from the server that is in use now.
    fn epoch(&self, slot: Slot) -> u32 {
        let _ = slot;
        0
    }

    /// The slot of a key inside the store, for [`Push::Resubscribed`] and [`epoch`](Self::epoch).
    fn slot_of(&self, key: &LockKey) -> Slot {
        key.slot()
    }

    /// Why the store cannot hold a key in this mode, if it cannot.
    fn lacks(&self, mode: LockMode) -> Option<&'static str> {
        (mode != LockMode::Exclusive).then_some("this kind of shard has exclusive locks only")
    }

    /// Refuses a TTL that is too long for a lease in this store. Checked before a task waits, as it
    /// may be served from a lease of its process, without a request.
    fn check_ttl(&self, _ttl: Duration) -> Result<(), StoreError> {
        Ok(())
    }

    /// When a connection that carries requests was last abandoned. Requests sent on it may still
    /// execute until [`LATE_MAX`] has passed. Until then, a release that was answered on another
    /// connection does not prove that nothing of its cycle is left.
    fn last_cut(&self) -> Option<Moment> {
        None
    }

    /// Waits for the cleanup that follows answered releases. Called at each shutdown, and before
    /// the background thread ends.
    fn drain(&self) -> StoreFuture<()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Receives pushes and forwards them until the receiver is dropped. Reconnects by itself.
    /// Polled on the background thread, and drives the store's other background work there. The
    /// inbox itself may be read on the application's runtime while that runs, close to the tasks
    /// that wait for pushes.
    fn run_subscriber(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>>;

    /// The application's runtime, which drives the caller's connections, is blocked or gone.
    /// Abandons those connections; new ones are opened on the runtime that `StoreOptions::runtimes`
    /// selects by then.
    fn leave_app_runtime(&self) {}
}

/// Warns about an inbox message that can't be parsed. It may contain a key, so its text is logged
/// at debug level only.
pub(crate) fn warn_malformed(shard: &str, message: &str) {
    crate::log::warn!(%shard, "an inbox message is not in this version's format; log at debug level to see it");
    crate::log::debug!(%shard, message, "the inbox message that is not in this version's format");
}

/// What a store needs besides its address.
#[derive(Debug, Clone)]
pub(crate) struct StoreOptions {
    pub(crate) namespace: String,
    pub(crate) manager: ManagerId,
    /// The name of the shard, for logs.
    pub(crate) shard: Arc<str>,
    /// This shard's part of the map that all managers must share.
    pub(crate) map: String,
    pub(crate) connections: usize,
    /// How long connecting may take at most.
    pub(crate) timeout: Duration,
    /// How many replicas must acknowledge a lease before it counts.
    pub(crate) min_replicas_acked: u32,
    /// The longest TTL of a lease in a quorum. A restarted node regains its vote after this time.
    pub(crate) redlock_max_ttl: Duration,
    /// Whether servers are asked for their role.
    pub(crate) check_role: bool,
    pub(crate) tls: TlsFiles,
    pub(crate) login: Login,
    pub(crate) metrics: Arc<ShardMetrics>,
    /// The runtimes for the work that serves the application's tasks.
    pub(crate) runtimes: Arc<Runtimes>,
}

/// The files for TLS connections.
// Unused without the `tls` feature.
#[cfg_attr(not(feature = "tls"), allow(dead_code))]
#[derive(Debug, Clone, Default)]
pub(crate) struct TlsFiles {
    /// The CA certificates to trust; those of the system if `None`.
    pub(crate) ca: Option<PathBuf>,
    /// The client certificate and its private key.
    pub(crate) client: Option<(PathBuf, PathBuf)>,
}

/// Advice for a server that answers without encryption.
const NOT_ENCRYPTED: &str =
    "the port does not speak TLS; use the server's TLS port, or a URL without TLS (such as redis://)";

/// Creates the store for a shard. Nothing is sent yet.
pub(crate) fn open(endpoint: &Endpoint, options: StoreOptions) -> Result<Arc<dyn LeaseStore>, LockError> {
    Ok(match endpoint.kind() {
        EndpointKind::Redis(server) => Arc::new(redis::primary::RedisStore::new(server, options)?),
        EndpointKind::Memory { name } => Arc::new(memory::MemoryStore::open(name, options)),
        EndpointKind::Redlock { nodes } => Arc::new(quorum::QuorumStore::new(nodes, &options)?),
        EndpointKind::Sentinel {
            sentinels,
            primary,
            access,
        } => Arc::new(redis::primary::RedisStore::watched(
            sentinels, primary, access, options,
        )?),
        #[cfg(feature = "etcd")]
        EndpointKind::Etcd { hosts, login, tls } => {
            Arc::new(etcd::EtcdStore::new(hosts, login.as_ref(), *tls, options)?)
        }
        // Such a URL is rejected when it is parsed.
        #[cfg(not(feature = "etcd"))]
        EndpointKind::Etcd { .. } => {
            return Err(crate::error::InvalidSetting::new(
                "url",
                endpoint.to_string(),
                "a kind of shard that this build supports (enable the feature `etcd`)",
            )
            .into());
        }
        EndpointKind::Cluster { seeds } => Arc::new(redis::cluster::ClusterStore::new(seeds, options)?),
    })
}

/// How long a request may still be executed after its connection was abandoned. The operating
/// system discards unsent data, because such a connection is reset. But a proxy in between, or the
/// machine it runs on, delivers what it has accepted for about as long as TCP retransmits
/// unacknowledged data.
pub(crate) const LATE_MAX: Duration = Duration::from_secs(20);

/// The class of connection that a request travels on: which runtime drives its I/O.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Priority {
    /// The connections of the application's tasks. Their I/O runs on the application's runtime
    /// while that runs.
    Foreground,
    /// The connection of the background thread, which works even if the application's runtime is
    /// blocked. While it can't be opened, an open connection of [`Foreground`](Self::Foreground)
    /// is used.
    Background,
}

/// The result of a health probe.
#[derive(Debug)]
pub(crate) struct Health {
    /// Whether a request for any key of the shard could be answered.
    pub(crate) reached: Result<(), StoreError>,
    /// The clocks of those reached servers that report one.
    pub(crate) times: Vec<ServerTime>,
}

/// A reading of a server's clock. No lock decision uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerTime {
    /// The server, as `host:port`.
    pub(crate) server: Arc<str>,
    /// The connection that the reply arrived on. Behind another connection there may be another
    /// machine.
    pub(crate) connection: u64,
    pub(crate) since_epoch: Duration,
    /// When the request was sent, and when its reply had arrived.
    pub(crate) sent_at: Moment,
    pub(crate) received_at: Moment,
}

/// Why a store request failed.
#[derive(Debug, Clone)]
pub(crate) enum StoreError {
    /// There was no connection, or it broke. Whether the request was executed is unknown.
    Unavailable(Reason),
    /// The server refused the request.
    Refused(Reason),
    /// The server has a different shard map from this manager's.
    MapMismatch {
        /// The shard concerned, if the request was for another one.
        shard: Option<Arc<str>>,
        ours: String,
        theirs: String,
        map_key: String,
    },
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(reason) | Self::Refused(reason) => f.write_str(reason),
            Self::MapMismatch {
                ours, theirs, map_key, ..
            } => {
                let theirs = crate::text::printable(theirs);
                write!(
                    f,
                    "the key {map_key:?} has the shard map `{theirs}`, this manager has `{ours}`"
                )
            }
        }
    }
}

impl StoreError {
    pub(crate) fn no_answer(within: Duration) -> Self {
        Self::Unavailable(format!("no answer within {within:?}").into())
    }

    pub(crate) fn no_answer_within_store_timeout(limit: Duration) -> Self {
        Self::Unavailable(format!("no answer within store_timeout ({limit:?})").into())
    }

    /// Names the shard of a map mismatch, if it is not the one that the request was for.
    pub(crate) fn at_shard(self, name: &Arc<str>) -> Self {
        match self {
            Self::MapMismatch {
                ours, theirs, map_key, ..
            } => Self::MapMismatch {
                shard: Some(Arc::clone(name)),
                ours,
                theirs,
                map_key,
            },
            other => other,
        }
    }

    /// Changes the reason, such as to name a server. A map mismatch stays as it is.
    pub(crate) fn map_reason(self, change: impl FnOnce(&str) -> String) -> Self {
        match self {
            Self::Unavailable(reason) => Self::Unavailable(reason.map(change)),
            Self::Refused(reason) => Self::Refused(reason.map(change)),
            mismatch @ Self::MapMismatch { .. } => mismatch,
        }
    }

    /// Keeps the I/O error among this error and its causes, if there is one.
    pub(crate) fn caused_by(self, error: &(dyn std::error::Error + 'static)) -> Self {
        match self {
            Self::Unavailable(reason) => Self::Unavailable(reason.caused_by(error)),
            Self::Refused(reason) => Self::Refused(reason.caused_by(error)),
            mismatch @ Self::MapMismatch { .. } => mismatch,
        }
    }

    /// A short reason, without the operation that failed.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Unavailable(reason) | Self::Refused(reason) => reason.clone(),
            Self::MapMismatch { .. } => "it has another shard map".into(),
        }
    }

    /// The error for the user: with the shard, the step and the key.
    pub(crate) fn with_context(
        self,
        shard: &str,
        step: &'static str,
        key: Option<&LockKey>,
        waited: Duration,
    ) -> LockError {
        let (shard, key) = (shard.to_owned(), key.map(ToString::to_string));
        // A server's text becomes part of a message here, so it is made printable.
        let printable = |reason: Reason| match crate::text::printable(&reason) {
            Cow::Borrowed(_) => reason,
            Cow::Owned(_) => reason.map(|text| crate::text::printable(text).into_owned()),
        };
        let failure = match self {
            Self::Unavailable(reason) => Failure::Unavailable {
                shard,
                step,
                key,
                waited,
                reason: printable(reason),
            },
            Self::Refused(reason) => Failure::Refused {
                shard,
                step,
                key,
                reason: printable(reason),
            },
            Self::MapMismatch {
                shard: other,
                ours,
                theirs,
                map_key,
            } => Failure::ShardMapMismatch {
                shard: other.map_or(shard, |other| other.to_string()),
                ours,
                theirs: crate::text::printable(&theirs).into_owned(),
                map_key,
            },
        };
        failure.into()
    }
}

/// The state of a key in its store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct KeyState {
    /// The exclusive holder, if there is one.
    pub holder: Option<Holder>,
    /// The shared holders and those of permits, at most 100, by the time at which they expire.
    /// Etcd reports the 100 that came first.
    pub holders: Vec<Holder>,
    /// The number of shared holders and holders of permits.
    pub holder_count: u64,
    /// The number of permits in use.
    pub permits_in_use: u32,
    /// The number of cycles in the store's queue, of this manager and of others.
    pub queue_length: u64,
    /// The first members of the queue, in order, as `manager:cycle`; at most 100.
    pub queue: Vec<String>,
    /// The largest token issued in the key's slot, or `None` if there was none yet. Etcd reports
    /// only those of holders. A quorum reports the largest that one node knows, which may have
    /// missed some while it was down.
    pub last_token: Option<FencingToken>,
}

/// The holder of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Holder {
    /// `manager:cycle` of a shardlock manager, or the value that another library has stored.
    pub owner: String,
    /// Whether the holder is a shardlock manager.
    pub is_manager: bool,
    /// The mode in which it holds the key.
    #[cfg_attr(feature = "serde", serde(skip_serializing_if = "LockMode::is_usual"))]
    pub mode: LockMode,
    /// The remaining time of the lease, or `None` if it never ends.
    #[cfg_attr(
        feature = "serde",
        serde(rename = "remaining_ms", serialize_with = "crate::millis::serialize_whole")
    )]
    pub remaining: Option<Duration>,
}

/// The most members of the queue, and the most holders, that a [`KeyState`] lists.
pub(crate) const INSPECTED_MAX: usize = 100;

#[cfg(test)]
impl StoreOptions {
    /// Options for a store that is used on its own.
    pub(crate) fn for_tests(manager: ManagerId) -> Self {
        Self {
            namespace: "lock:".to_owned(),
            manager,
            shard: "test".into(),
            map: "a map".to_owned(),
            connections: 1,
            timeout: Duration::from_secs(1),
            min_replicas_acked: 0,
            redlock_max_ttl: Duration::from_secs(10),
            check_role: true,
            tls: TlsFiles::default(),
            login: Login::default(),
            metrics: Arc::new(ShardMetrics::new("test", "default")),
            runtimes: Runtimes::here(),
        }
    }
}
