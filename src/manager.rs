//! The lock manager: the way in.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};

use crate::clock::Moment;
use crate::config::{Builder, Config, ShardConfig};
use crate::endpoint::Endpoint;
use crate::error::LockError;
use crate::guard::LockGuard;
use crate::heat::HotKeys;
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::notice::Notices;
use crate::program::Runtimes;
use crate::protocol::Cycles;
use crate::queue::{Linger, Rules};
use crate::request::{LockRequest, TryLockRequest};
use crate::router::ShardMap;
use crate::shard::{Background, Job, Limits, Load, Maps, Parts, Shard, Unheard};
use crate::store::{self, Inspection, LeaseStore, StoreError, StoreOptions, TlsFiles};
use crate::telemetry::{self, ClassMetrics, Classes, ManagerMetrics, ShardMetrics};
use crate::time_limit::within;
use crate::view::{self, HeldLock, HotKey, ShardState};

/// Locks, spread over shards. Cheap to clone; make one per process and share it.
///
/// Fairness: tasks of one process get a key in the order in which they asked. Processes take turns in the order in which they asked, each
/// for at most `max_burst` guards or `max_slice` of time while others wait. See [`LockRequest`] for what awaiting a lock does, and
/// [`LockGuard`] for what holding one means.
///
/// When *not* to use it: inside one process `tokio::sync::Mutex` is faster and can't be lost; where the data lies in one SQL
/// database, a row lock or an advisory lock there is simpler and safer.
///
/// ```
/// # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), shardlock::LockError> {
/// let locks = shardlock::LockManager::connect("memory://doc-manager").await?;
/// let guard = locks.lock("coupon:123").await?;
/// println!("token {}", guard.token());
/// guard.release().await?;
/// locks.shutdown().await;
/// # Ok(()) }
/// ```
///
/// # At the end of the program
///
/// Await [`shutdown`](Self::shutdown) as the last thing that a program does with its manager. Dropping the last handle does not wait, so a
/// process that ends right after it may leave locks that were just dropped, or leases that linger, to run out with their TTL.
#[derive(Clone)]
pub struct LockManager {
    pub(crate) inner: Arc<Inner>,
}

/// What all handles of a manager share.
pub(crate) struct Inner {
    pub(crate) config: Config,
    /// Of requests that do not say otherwise.
    pub(crate) linger: Linger,
    pub(crate) metrics: Arc<ManagerMetrics>,
    pub(crate) hot: Arc<HotKeys>,
    pub(crate) notices: Arc<Notices>,
    pub(crate) shards: Vec<Arc<Shard>>,
    id: ManagerId,
    map: ShardMap,
    connected_at: Moment,
    jobs: mpsc::UnboundedSender<Job>,
}

impl LockManager {
    /// Connects to one shard with the default configuration. [`builder`](Self::builder) takes more.
    ///
    /// `redis://[[user]:password@]host[:port][/db]` is a Redis or Valkey primary, `rediss://` the same through TLS; `memory://[name]` lives inside
    /// this process, and without a name it is this manager's alone. [`Endpoint`] lists them all.
    ///
    /// In tests with tokio's paused clock (`#[tokio::test(start_paused = true)]`) use `memory://`. Leases run on the clock of the
    /// machine all the same, and so do the time limits of requests to a store; only `timeout` of a request follows the paused clock.
    ///
    /// Connect on the runtime whose tasks will lock: its connections are driven there and hand-offs from other processes arrive there, so that one wakes
    /// no other thread. Should that runtime end, or run nothing while tasks of another one wait, a thread of the manager does both from then on: after a
    /// third of a second if it has no threads of its own and nobody is inside its `block_on`, after a second if all its threads are blocked.
    ///
    /// # Errors
    ///
    /// [`LockError::Invalid`] for a URL that is none, [`LockError::Unavailable`] if the shard can't be reached within `store_timeout`,
    /// [`LockError::Refused`] if it says no, [`LockError::ShardMapMismatch`] if other managers use it with other shards.
    pub async fn connect(url: &str) -> Result<Self, LockError> {
        Self::builder().shard(url).connect().await
    }

    /// A builder, to set what differs from the defaults.
    pub fn builder() -> Builder {
        Builder::default()
    }

    pub(crate) async fn with_config(config: Config) -> Result<Self, LockError> {
        config.validate()?;
        telemetry::describe();
        let id = ManagerId::new();
        let map = config.shard_map();
        let runtimes = Runtimes::here();
        let opening = config
            .shards
            .iter()
            .enumerate()
            .map(|(index, shard)| open(shard, &config, &id, map.fingerprint(index), &runtimes));
        let opened = reachable(futures_util::future::try_join_all(opening).await?)?;
        let connected: Vec<bool> = opened.iter().map(|opened| opened.unavailable.is_none()).collect();

        let metrics = Arc::new(ManagerMetrics::new(Classes::new(&config.class, config.max_classes)));
        let hot = Arc::new(HotKeys::new(config.hot_keys));
        let notices = Arc::new(Notices::new(config.slow_wait, config.long_hold, config.log_keys));
        let manager_metrics = &metrics;
        let (jobs, receiver) = mpsc::unbounded_channel();
        let shard_metrics = opened.iter().map(|opened| Arc::clone(&opened.metrics)).collect();
        let (cycles, load) = (
            Arc::new(Cycles::with_secret(rand::random())),
            Arc::new(Load::new(shard_metrics)),
        );
        let rules = Rules {
            max_burst: config.max_burst,
            max_slice: config.max_slice,
            renew_fraction: config.renew_fraction,
            #[cfg(test)]
            flaw: None,
        };
        let limits = Limits {
            waiters_per_key: config.max_waiters_per_key,
            waiters: config.max_waiters,
            keys: config.max_keys,
        };
        let stores = opened.iter().zip(&config.shards);
        let stores = stores.map(|(opened, shard)| (shard.name.as_str().into(), Arc::clone(&opened.store)));
        let maps = Arc::new(Maps::new(stores.collect(), config.store_timeout));
        let shards: Vec<Arc<Shard>> = opened
            .into_iter()
            .zip(&config.shards)
            .map(|(opened, shard)| {
                let Opened {
                    store, metrics, kind, ..
                } = opened;
                Shard::new(Parts {
                    name: shard.name.as_str().into(),
                    kind,
                    store,
                    maps: Arc::clone(&maps),
                    id: id.clone(),
                    rules: rules.clone(),
                    cycles: Arc::clone(&cycles),
                    limits,
                    timeout: config.store_timeout,
                    late_max: crate::store::LATE_MAX,
                    default_ttl: config.ttl,
                    metrics,
                    class: Arc::clone(manager_metrics.classes.default_class()),
                    load: Arc::clone(&load),
                    manager: Arc::clone(manager_metrics),
                    hot: Arc::clone(&hot),
                    notices: Arc::clone(&notices),
                    runtimes: Arc::clone(&runtimes),
                    jobs: jobs.clone(),
                })
            })
            .collect();
        let background = Background::start(shards.clone(), &connected, receiver);
        // From here on, dropping it ends the background thread.
        let manager = Self {
            inner: Arc::new(Inner {
                linger: Linger::new(config.linger),
                config,
                metrics,
                hot,
                notices,
                shards,
                id,
                map,
                connected_at: Moment::now(),
                jobs,
            }),
        };
        manager.listening(background).await?;
        Ok(manager)
    }

    /// Waits until the connections for renewals are open and every inbox is subscribed: a lock that is waited for before that could be handed over
    /// unheard.
    async fn listening(&self, background: std::io::Result<Background>) -> Result<(), LockError> {
        let started = Moment::now();
        let shard = &self.inner.shards[0];
        let failed = |reason: String| shard.error(StoreError::Unavailable(reason.into()), "subscribe", None, started);
        let background = background.map_err(|error| failed(format!("no background thread: {error}")))?;
        match within(started, self.inner.config.store_timeout, pin!(background.listening)).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(Unheard { shard, step, error }))) => Err(shard.error(error, step, None, started)),
            Ok(Err(_)) => Err(failed("the background thread could not start its runtime".to_owned())),
            Err(_) => Err(failed(format!(
                "the inbox could not be subscribed within store_timeout ({:?})",
                self.inner.config.store_timeout
            ))),
        }
    }

    /// Asks for a lock and waits for it: see [`LockRequest`], which can be given a TTL, a time limit and more before it is awaited.
    #[inline]
    #[track_caller]
    pub fn lock(&self, key: impl AsRef<str>) -> LockRequest {
        LockRequest::new(Arc::clone(&self.inner), key.as_ref())
    }

    /// Asks for a lock and comes back at once, with `None` where it is held or somebody waits for it. A try never joins a queue and never passes anybody in
    /// it. A lease that another process keeps without a guard ([`Config::linger`](crate::Config::linger)) counts as held, and a try does not make
    /// that process give it back.
    #[track_caller]
    pub fn try_lock(&self, key: impl AsRef<str>) -> TryLockRequest {
        TryLockRequest::new(self.lock(key))
    }

    /// Runs `body` under the lock: see [`LockRequest::with`].
    ///
    /// # Errors
    ///
    /// See [`LockRequest::with`].
    #[track_caller]
    pub fn with_lock<T>(
        &self,
        key: impl AsRef<str>,
        body: impl AsyncFnOnce(&LockGuard) -> T,
    ) -> impl Future<Output = Result<T, LockError>> {
        // No async function, since those do not know who called them.
        self.lock(key).with(body)
    }

    /// Looks at who holds a key and who waits for it, without changing the lock.
    ///
    /// # Errors
    ///
    /// [`LockError::Invalid`] for a key outside its bounds, [`LockError::Unavailable`] or [`LockError::Refused`] if the shard gives no answer.
    pub async fn inspect(&self, key: impl AsRef<str>) -> Result<Inspection, LockError> {
        let key = LockKey::new(key.as_ref())?;
        self.inner.shard(&key).inspect(&key).await
    }

    /// The keys with the most contention in this process, the hottest first: at most as many as the setting `hot_keys` says. Locks that are had without contention
    /// are not counted.
    ///
    /// It goes through all keys that are in use, so ask once a second rather than once a lock.
    #[must_use]
    pub fn hot_keys(&self) -> Vec<HotKey> {
        view::hot_keys(&self.inner)
    }

    /// All guards of this manager that are out, the oldest first. Leases that linger have none and are not among them. It goes through all keys that
    /// are in use.
    #[must_use]
    pub fn held(&self) -> Vec<HeldLock> {
        view::held(&self.inner, usize::MAX).1
    }

    /// The shards in their order, and how they are.
    #[must_use]
    pub fn shards(&self) -> Vec<ShardState> {
        view::shards(&self.inner)
    }

    /// For how long this manager has been connected.
    #[must_use]
    pub fn uptime(&self) -> Duration {
        self.inner.uptime()
    }

    /// Which shard owns which keys.
    #[must_use]
    pub fn shard_map(&self) -> &ShardMap {
        &self.inner.map
    }

    /// The name under which this manager holds leases: `host-pid-random`.
    #[must_use]
    pub fn id(&self) -> &str {
        self.inner.id()
    }

    /// Removes everything that the namespace has in its shards, and says how many keys there were: leases, queues, counters and the shard
    /// map, those of other managers as well. For a namespace that nobody uses any more; whoever still does loses its locks. Tokens that are
    /// issued in it later are larger all the same.
    ///
    /// # Errors
    ///
    /// [`LockError::Unavailable`] or [`LockError::Refused`] if a shard gives no answer or refuses to remove a key. Everything else has been removed
    /// then, on the other shards as well.
    ///
    /// # Cancel safety
    ///
    /// A part may have been removed if it is dropped.
    pub async fn erase_namespace(&self) -> Result<u64, LockError> {
        let (mut count, mut failed) = (0, None);
        for shard in &self.inner.shards {
            match shard.erase().await {
                Ok(erased) => count += erased,
                // The other shards are erased even so.
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        failed.map_or(Ok(count), Err)
    }

    /// Gives everything back: guards that are out are lost, leases that linger are given back at once, waiters and all later requests get [`LockError::Closed`]. Returns when the
    /// servers have said that it is done, for guards that were dropped before as well, or after twice the `store_timeout`, when what is left runs out by itself. Other
    /// handles of this manager are shut down with it.
    ///
    /// # Cancel safety
    ///
    /// It goes on in the background if it is dropped.
    pub async fn shutdown(&self) {
        let (done, told) = oneshot::channel();
        if self.inner.jobs.send(Job::Close { done }).is_ok() {
            let limit = self
                .inner
                .config
                .store_timeout
                .saturating_mul(2)
                .max(Duration::from_millis(100));
            if within(Moment::now(), limit, pin!(told)).await.is_err() {
                tracing::warn!(
                    ?limit,
                    "not everything could be given back in time; it is left to run out"
                );
            }
        }
    }
}

impl Builder {
    /// Checks the configuration, connects to all shards and starts the background thread.
    ///
    /// Where some of several shards can't be reached, a warning is logged and the others work; it is an error if none can
    /// be reached, or if one says no.
    ///
    /// # Errors
    ///
    /// See [`LockManager::connect`].
    pub async fn connect(self) -> Result<LockManager, LockError> {
        LockManager::with_config(self.config).await
    }
}

/// A shard's store, connected or not.
struct Opened {
    store: Arc<dyn LeaseStore>,
    metrics: Arc<ShardMetrics>,
    kind: Arc<str>,
    /// Why it is not connected. It connects when it is first used, if it can by then.
    unavailable: Option<LockError>,
}

/// A shard that is down must not keep the process from using the others; with none there is nothing to use.
fn reachable(opened: Vec<Opened>) -> Result<Vec<Opened>, LockError> {
    let unavailable = opened.iter().filter_map(|opened| opened.unavailable.as_ref());
    for error in unavailable.clone() {
        tracing::warn!(%error, "a shard can't be reached; its keys can't be locked until it can");
    }
    match unavailable.clone().next() {
        Some(error) if unavailable.count() == opened.len() => Err(error.clone()),
        _ => Ok(opened),
    }
}

/// Opens the store of a shard.
async fn open(
    shard: &ShardConfig,
    config: &Config,
    id: &ManagerId,
    map: String,
    runtimes: &Arc<Runtimes>,
) -> Result<Opened, LockError> {
    let metrics = Arc::new(ShardMetrics::new(&shard.name));
    let started = Moment::now();
    let endpoint = Endpoint::parse(&shard.url)?;
    let in_words = |error: StoreError| {
        let error = match error {
            StoreError::Unavailable(reason) => StoreError::Unavailable(format!("{endpoint}: {reason}").into()),
            StoreError::Refused(reason) => StoreError::Refused(format!("{endpoint}: {reason}").into()),
            other => other,
        };
        error.with_context(&shard.name, "connect", None, Moment::now().since(started))
    };
    let limit = config.store_timeout;
    let options = StoreOptions {
        namespace: config.namespace.clone(),
        manager: id.clone(),
        shard: shard.name.as_str().into(),
        map,
        connections: config.connections,
        timeout: limit,
        min_replicas_acked: config.min_replicas_acked,
        redlock_max_ttl: config.redlock_max_ttl,
        check_role: config.check_role,
        tls: TlsFiles {
            ca: config.tls_ca.clone(),
            client: config.tls_cert.clone().zip(config.tls_key.clone()),
        },
        metrics: Arc::clone(&metrics),
        runtimes: Arc::clone(runtimes),
    };
    let store = store::open(&endpoint, options)?;
    let no_answer = || StoreError::Unavailable(format!("no answer within store_timeout ({limit:?})").into());
    let connected = within(started, limit, store.connect().as_mut()).await;
    let unavailable = match connected.unwrap_or_else(|_| Err(no_answer())) {
        Ok(()) => None,
        Err(error @ StoreError::Unavailable(_)) => Some(in_words(error)),
        Err(error) => return Err(in_words(error)),
    };
    metrics.set_up(unavailable.is_none());
    Ok(Opened {
        store,
        metrics,
        kind: endpoint.scheme().into(),
        unavailable,
    })
}

impl Inner {
    /// Tells the recorder what was counted since it was told the last time.
    #[cfg(feature = "admin")]
    pub(crate) fn tell_metrics(&self) {
        crate::shard::pulse::tell(&self.shards, &self.metrics);
    }

    /// Whether it was shut down.
    #[cfg(feature = "admin")]
    pub(crate) fn is_closed(&self) -> bool {
        let shard = self.shards.first();
        shard.is_some_and(|shard| shard.load.closed.load(std::sync::atomic::Ordering::Relaxed))
    }

    pub(crate) fn id(&self) -> &str {
        self.id.as_str()
    }

    pub(crate) fn uptime(&self) -> Duration {
        Moment::now().since(self.connected_at)
    }

    /// The metrics of requests that name no class; those of every shard are the same.
    pub(crate) fn default_class(&self) -> &Arc<ClassMetrics> {
        self.metrics.classes.default_class()
    }

    pub(crate) fn shard(&self, key: &LockKey) -> &Arc<Shard> {
        match &self.shards[..] {
            [only] => only,
            shards => &shards[self.map.index(key.slot())],
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Where the background thread is gone already, there is nothing left to end.
        self.jobs.send(Job::Leave).ok();
    }
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LockManager")
            .field("id", &self.id)
            .field("shards", &self.map)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for LockManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.inner.fmt(f)
    }
}
