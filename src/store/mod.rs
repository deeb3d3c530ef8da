//! Lease stores: where leases, queues and tokens live.

#[cfg(test)]
mod conformance;
mod connecting;
#[cfg(feature = "etcd")]
pub(crate) mod etcd;
pub(crate) mod map;
pub(crate) mod memory;
pub(crate) mod quorum;
pub(crate) mod redis;
#[cfg(test)]
#[path = "../../tests/support/mod.rs"]
mod support;
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
use crate::error::LockError;
use crate::fence::FencingToken;
use crate::identity::ManagerId;
use crate::key::{LockKey, Slot};
use crate::program::Runtimes;
use crate::protocol::{Acquire, AcquireReply, Answer, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::telemetry::ShardMetrics;
pub(crate) use map::{MapState, MapStep};

/// A request under way. Dropping it does not recall it: it may still be executed.
pub(crate) type StoreFuture<T> = Pin<Box<dyn Future<Output = Result<T, StoreError>> + Send>>;

/// One shard's place for leases, queues and tokens, as one manager sees it.
///
/// Requests have no time limit of their own; whoever sends one sets it. All requests that take something travel on
/// [`Lane::Caller`], in which the store keeps their order per key, so that the release of a cycle that was given up can't overtake
/// its acquire.
pub(crate) trait LeaseStore: Send + Sync + 'static {
    /// Opens the connections of the caller's lane on the runtime of the caller. A store that could not be reached connects when it is first
    /// used, if it can by then.
    ///
    /// It fails if the shard has another shard map. Nothing is written: a shard without a map stays without one.
    fn connect(&self) -> StoreFuture<()>;

    /// Opens the connections of the background's lane, on the thread of the caller, which is the watchdog's. No lock is granted before: a server that
    /// takes no further connection would otherwise be found out at the first renewal.
    fn connect_background(&self) -> StoreFuture<()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Whether the shard's map was seen to be this manager's, without which nothing is to be acquired.
    fn has_map(&self) -> bool {
        true
    }

    /// Whether the map stands at one place, so that it is stored there at once or not at all.
    fn has_one_map(&self) -> bool {
        true
    }

    /// One step on the way to a stored shard map ([`map`]).
    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        let _ = step;
        Box::pin(std::future::ready(Ok(MapState::Ours)))
    }

    /// Asks for a lease. Repeating it for the same cycle does no harm.
    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>>;

    /// Gives a lease or a place in the queue back. Repeating it does no harm.
    fn release(&self, lane: Lane, request: Release) -> StoreFuture<Answer<ReleaseReply>>;

    /// Extends what is still ours, in one go. One reply for each renewal, in their order; `None` for one that had no answer. Whoever asks
    /// waits no longer than `limit`, so a store whose servers answer separately says by then what it knows.
    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>>;

    /// Looks at a key without changing anything.
    fn inspect(&self, key: LockKey) -> StoreFuture<Inspection>;

    /// Removes all keys of the namespace, those of others as well, and says how many there were.
    fn erase(&self) -> StoreFuture<u64>;

    /// Looks whether locks can be had though nobody asks for one, which a server that is out of memory or a replica refuses, and what time it is on
    /// the servers. Takes next to nothing from them, changes nothing, and is done every few seconds on the watchdog's thread, which waits no longer than for a request.
    fn look(&self) -> Pin<Box<dyn Future<Output = Look> + Send>>;

    /// How often it was seen that the keys of that slot may be on another server by now, or on one that was started anew, so that leases may be
    /// forgotten: a connection broke, or a failover was announced. Read at every event of a key, so it costs a load or two. It changes after the
    /// connections that it is about were left: a reply to a request that was made later is from whoever is asked now.
    fn epoch(&self, slot: Slot) -> u32 {
        let _ = slot;
        0
    }

    /// Where a key belongs inside of the store, for [`Push::Resubscribed`] and [`epoch`](Self::epoch).
    fn slot_of(&self, key: &LockKey) -> Slot {
        key.slot()
    }

    /// When one of the connections that requests travel on was last given up. What was sent on it may still be executed, until
    /// [`LATE_MAX`] has passed; then a release that was answered on another connection is no proof that nothing of its cycle is left.
    fn last_cut(&self) -> Option<Moment> {
        None
    }

    /// Waits until what is tidied up after releases that were answered is done. Asked once, before the background thread ends.
    fn settle(&self) -> StoreFuture<()> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Receives pushes and hands them on until the receiver is gone. Reconnects by itself. Polled on the watchdog's thread, where it also does what else
    /// must go on; with a handle, the inbox itself may be heard on that runtime, where whoever waits for a push is, for as long as there is one.
    fn listen(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>>;

    /// The program's runtime, on which the drivers of connections are, runs nothing: those connections are not used any more. Further ones
    /// are opened where `StoreOptions::runtimes` leads by then.
    fn leave_home(&self) {}
}

/// Says in the log that something is in the inbox which can't be read. It may name a key, so what it is stands there at the level of debug.
pub(crate) fn tell_unreadable(shard: &str, message: &str) {
    tracing::warn!(%shard, "a message in the inbox is not of this version's form; the level of debug shows it");
    tracing::debug!(%shard, message, "the message that is not of this version's form");
}

/// What a store is given besides its address.
#[derive(Debug, Clone)]
pub(crate) struct StoreOptions {
    pub(crate) namespace: String,
    pub(crate) manager: ManagerId,
    /// The name of the shard, for logs.
    pub(crate) shard: Arc<str>,
    /// This shard's part of the map that all managers must share.
    pub(crate) map: String,
    pub(crate) connections: usize,
    /// The longest time that connecting may take.
    pub(crate) timeout: Duration,
    /// How many replicas must have a lease before it counts.
    pub(crate) min_replicas_acked: u32,
    /// The longest TTL of a lease in a quorum, after which a node that restarted has a vote again.
    pub(crate) redlock_max_ttl: Duration,
    /// Whether servers are asked what they are.
    pub(crate) check_role: bool,
    pub(crate) tls: TlsFiles,
    pub(crate) metrics: Arc<ShardMetrics>,
    /// Where what serves the program's tasks runs.
    pub(crate) runtimes: Arc<Runtimes>,
}

/// The files for encrypted connections.
// Without TLS nobody reads them.
#[cfg_attr(not(feature = "tls"), allow(dead_code))]
#[derive(Debug, Clone, Default)]
pub(crate) struct TlsFiles {
    /// Who is trusted to sign certificates of servers; the system's authorities if there is none.
    pub(crate) ca: Option<PathBuf>,
    /// The certificate to show to servers, and its key.
    pub(crate) client: Option<(PathBuf, PathBuf)>,
}

/// What to do where a server answers without encryption.
const NOT_ENCRYPTED: &str =
    "the port does not speak TLS; use the server's TLS port, or a URL without TLS (redis:// and its like)";

/// Makes the store for a shard. Nothing is sent yet.
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
        // Parsing refuses it.
        #[cfg(not(feature = "etcd"))]
        EndpointKind::Etcd { .. } => {
            return Err(crate::error::Invalid::new(
                "url",
                endpoint.to_string(),
                "of a kind that was built in (feature `etcd`)",
            )
            .into());
        }
        EndpointKind::Cluster { seeds } => Arc::new(redis::cluster::ClusterStore::new(seeds, options)?),
    })
}

/// How long after a connection was given up a request that was sent on it may still be executed. The system discards what it has not sent, since it resets
/// such a connection; but a proxy in between, or a machine that it runs on, delivers what it has accepted for about as long as a system repeats what was not
/// acknowledged.
pub(crate) const LATE_MAX: Duration = Duration::from_secs(20);

/// Which connection a request travels on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lane {
    /// The connections that the tasks of the program use; their I/O runs on the program's runtime, while that runs.
    Caller,
    /// The connection of the watchdog's thread, which works even if the program's runtime is blocked. While it can't be opened, an open one of the
    /// callers' is used.
    Background,
}

/// What a look at a store has shown.
#[derive(Debug)]
pub(crate) struct Look {
    /// Whether a request for any key of the shard could be answered.
    pub(crate) reached: Result<(), StoreError>,
    /// The times of those servers that were reached, if they tell.
    pub(crate) times: Vec<ServerTime>,
}

/// What time it is on a server. No lock decision uses it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServerTime {
    /// Where it is: `host:port`.
    pub(crate) server: Arc<str>,
    /// Which connection to it that came by: behind another one may be another machine.
    pub(crate) connection: u64,
    pub(crate) since_epoch: Duration,
    /// When it was asked and when it had answered.
    pub(crate) sent_at: Moment,
    pub(crate) received_at: Moment,
}

/// Why a request had no answer, or one that helps nobody.
#[derive(Debug, Clone)]
pub(crate) enum StoreError {
    /// No connection, or it broke. What the request did is unknown.
    Unavailable(Arc<str>),
    /// The server said no.
    Refused(Arc<str>),
    /// The server has another shard map than this manager.
    MapMismatch {
        /// Which shard it is, where another one was asked for something.
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
    /// The same of another shard than the one that was asked for something.
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

    /// In a few words, without what was being done.
    pub(crate) fn reason(&self) -> Arc<str> {
        match self {
            Self::Unavailable(reason) | Self::Refused(reason) => Arc::clone(reason),
            Self::MapMismatch { .. } => "it has another shard map".into(),
        }
    }

    /// The error for the user: on which shard, doing what, for which key.
    pub(crate) fn with_context(
        self,
        shard: &str,
        step: &'static str,
        key: Option<&LockKey>,
        waited: Duration,
    ) -> LockError {
        let (shard, key) = (shard.to_owned(), key.map(ToString::to_string));
        // Here is where the words of a server become part of messages.
        let printable = |text: Arc<str>| match crate::text::printable(&text) {
            Cow::Borrowed(_) => text,
            Cow::Owned(escaped) => escaped.into(),
        };
        match self {
            Self::Unavailable(reason) => LockError::Unavailable {
                shard,
                step,
                key,
                waited,
                reason: printable(reason),
            },
            Self::Refused(reason) => LockError::Refused {
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
            } => LockError::ShardMapMismatch {
                shard: other.map_or(shard, |other| other.to_string()),
                ours,
                theirs: crate::text::printable(&theirs).into_owned(),
                map_key,
            },
        }
    }
}

/// What a store knows of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inspection {
    /// Who holds it, if anybody does.
    pub holder: Option<Holder>,
    /// How many cycles of other managers, or of this one, wait in the store's queue.
    pub queue_length: u64,
    /// The first of those who wait, in order, as `manager:cycle`; at most 100.
    pub queue: Vec<String>,
    /// The largest token that was issued in the key's slot, or `None` if there was none yet. Etcd tells it of the holder only.
    pub last_token: Option<FencingToken>,
}

/// Who holds a key.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Holder {
    /// `manager:cycle` of a shardlock manager, or whatever value another library has stored.
    pub owner: String,
    /// Whether it is a manager of shardlock.
    pub is_manager: bool,
    /// What is left of the lease, or `None` if it never ends.
    pub remaining: Option<Duration>,
}

/// The most members of a queue that an inspection names.
pub(crate) const INSPECTED_QUEUE_MAX: usize = 100;

#[cfg(test)]
impl StoreOptions {
    /// Options of a store that is alone.
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
            metrics: Arc::new(ShardMetrics::new("test")),
            runtimes: Runtimes::here(),
        }
    }
}
