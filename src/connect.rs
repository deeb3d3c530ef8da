//! Connecting a manager: opening the stores of its shards, starting its background thread, and
//! waiting until every inbox is subscribed.

use std::pin::pin;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::clock::Moment;
use crate::config::{Builder, Config, ShardConfig};
use crate::contention::HotKeys;
use crate::credentials::{Credentials, CredentialsCallback};
use crate::driver::{BackgroundThread, ManagerContext, Maps, Shard, SubscribeError, Usage};
use crate::endpoint::Endpoint;
use crate::engine::admission::Limits;
use crate::engine::min_holds::MinHolds;
use crate::engine::{Linger, MinHold, Rules};
use crate::error::{InvalidSetting, LockError};
use crate::identity::ManagerId;
use crate::manager::LockManager;
use crate::manager_inner::ManagerInner;
use crate::protocol::Cycles;
use crate::random;
use crate::runtime::Runtimes;
use crate::slow_log::SlowLog;
use crate::store::login::{Login, LoginSource};
use crate::store::{self, LeaseStore, StoreError, StoreOptions, TlsFiles};
use crate::telemetry::{self, Classes, ManagerMetrics, ShardMetrics};
use crate::time_limit::within;

impl Builder {
    /// Checks the configuration, connects to all shards and starts the background thread.
    ///
    /// If only some of several shards can't be reached, a warning is logged and the others can be
    /// used. It is an error if none can be reached, or if any of them refuses.
    ///
    /// # Errors
    ///
    /// See [`LockManager::connect`].
    pub async fn connect(self) -> Result<LockManager, LockError> {
        LockManager::with_config(self.config, self.credentials).await
    }
}

impl LockManager {
    async fn with_config(config: Config, credentials: Option<CredentialsCallback>) -> Result<Self, LockError> {
        config.validate()?;
        if credentials.is_some() {
            check_callback(&config)?;
        }
        telemetry::describe(telemetry::METRICS);
        let id = ManagerId::new();
        let map = config.shard_map();
        let runtimes = Runtimes::here();
        let opening = config.shards.iter().enumerate().map(|(index, shard)| {
            // The other half of the time is for the connection.
            let source = login_source(&config, credentials.as_ref());
            let login = Login::new(source, &shard.name, config.store_timeout / 2);
            open(shard, &config, &id, map.fingerprint(index), login, &runtimes)
        });
        let opened = reachable(futures_util::future::try_join_all(opening).await?)?;
        let connected: Vec<bool> = opened.iter().map(|opened| opened.unavailable.is_none()).collect();

        let metrics = Arc::new(ManagerMetrics::new(Classes::new(&config.class, config.max_classes)));
        let (jobs, receiver) = mpsc::unbounded_channel();
        let shard_metrics = opened.iter().map(|opened| Arc::clone(&opened.metrics)).collect();
        let context = Arc::new(ManagerContext {
            id,
            rules: Rules {
                max_burst: config.max_burst.unwrap_or(u32::MAX),
                max_slice: config.max_slice,
                renew_fraction: config.renew_fraction,
                #[cfg(test)]
                flaw: None,
            },
            cycles: Cycles::with_secret([random::number(), random::number()]),
            min_holds: MinHolds::default(),
            limits: Limits {
                waiters_per_key: config.max_waiters_per_key,
                waiters: config.max_waiters,
                keys: config.max_keys,
            },
            timeout: config.store_timeout,
            late_max: store::LATE_MAX,
            default_ttl: config.ttl,
            usage: Arc::new(Usage::new(shard_metrics)),
            metrics,
            hot: HotKeys::new(config.hot_keys),
            slow_log: SlowLog::new(config.slow_wait, config.long_hold, config.log_keys),
            runtimes,
            jobs,
        });
        let stores = opened.iter().zip(&config.shards);
        let stores = stores.map(|(opened, shard)| (shard.name.as_str().into(), Arc::clone(&opened.store)));
        let maps = Arc::new(Maps::new(stores.collect(), config.store_timeout));
        let shards: Vec<Arc<Shard>> = opened
            .into_iter()
            .zip(&config.shards)
            .map(|(opened, shard)| {
                let name = shard.name.as_str().into();
                Shard::new(&context, name, opened.kind, opened.store, &maps, opened.metrics)
            })
            .collect();
        let background = BackgroundThread::start(Arc::clone(&context), shards.clone(), &connected, receiver);
        // From here on, dropping the manager ends the background thread.
        let manager = Self {
            inner: Arc::new(ManagerInner {
                linger: Linger::new(config.linger),
                min_hold: MinHold::new(config.min_hold),
                config,
                context,
                shards,
                map,
                #[cfg(feature = "admin")]
                connected_at: Moment::now(),
            }),
        };
        manager.wait_until_subscribed(background).await?;
        Ok(manager)
    }

    /// Waits until the connections for renewals are open and every inbox is subscribed. A grant
    /// sent to an inbox that is not subscribed would be missed.
    async fn wait_until_subscribed(&self, background: std::io::Result<BackgroundThread>) -> Result<(), LockError> {
        let started = Moment::now();
        let shard = &self.inner.shards[0];
        let failed = |reason: String| shard.error(StoreError::Unavailable(reason.into()), "subscribe", None, started);
        let background = background.map_err(|error| failed(format!("no background thread: {error}")))?;
        match within(started, self.inner.config.store_timeout, pin!(background.listening)).await {
            Ok(Ok(Ok(()))) => Ok(()),
            Ok(Ok(Err(SubscribeError { shard, step, error }))) => Err(shard.error(error, step, None, started)),
            Ok(Err(_)) => Err(failed("the background thread could not start its runtime".to_owned())),
            Err(_) => Err(failed(format!(
                "the inbox could not be subscribed within store_timeout ({:?})",
                self.inner.config.store_timeout
            ))),
        }
    }
}

/// Checks that a callback for credentials is used, and that nothing else gives a login.
fn check_callback(config: &Config) -> Result<(), InvalidSetting> {
    match config.login_setting() {
        Some(name) => Err(InvalidSetting::new(
            name,
            "set",
            "none if there is a credentials callback",
        )),
        None if !config.endpoints_without_login().is_empty() => Ok(()),
        None => Err(InvalidSetting::new(
            "credentials",
            "a callback",
            "none unless a shard with servers has a URL without a login",
        )),
    }
}

/// The login for shards whose URL has none.
fn login_source(config: &Config, callback: Option<&CredentialsCallback>) -> LoginSource {
    let username = config.username.clone();
    match (callback, &config.password, &config.password_file) {
        (Some(callback), ..) => LoginSource::Callback(callback.clone()),
        (None, Some(password), _) => LoginSource::Settings(Credentials {
            username,
            password: password.clone(),
        }),
        (None, None, Some(path)) => LoginSource::File {
            username,
            path: path.clone(),
        },
        (None, None, None) => LoginSource::Url,
    }
}

/// A shard's store, connected or not.
struct Opened {
    store: Arc<dyn LeaseStore>,
    metrics: Arc<ShardMetrics>,
    kind: Arc<str>,
    /// Why it is not connected. The next attempt to connect is made on first use.
    unavailable: Option<LockError>,
}

/// A shard that is down must not keep the process from using the others. If all are down,
/// connecting fails.
fn reachable(opened: Vec<Opened>) -> Result<Vec<Opened>, LockError> {
    let unavailable = opened.iter().filter_map(|opened| opened.unavailable.as_ref());
    for error in unavailable.clone() {
        crate::log::warn!(%error, "a shard can't be reached; its keys can't be locked until it is available");
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
    login: Login,
    runtimes: &Arc<Runtimes>,
) -> Result<Opened, LockError> {
    let metrics = Arc::new(ShardMetrics::new(&shard.name, &config.class));
    let started = Moment::now();
    let endpoint = Endpoint::parse(&shard.url)?;
    let to_lock_error = |error: StoreError| {
        let error = error.map_reason(|reason| format!("{endpoint}: {reason}"));
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
        login: if endpoint.lacks_login() {
            login
        } else {
            Login::default()
        },
        metrics: Arc::clone(&metrics),
        runtimes: Arc::clone(runtimes),
    };
    let store = store::open(&endpoint, options)?;
    let no_answer = || StoreError::no_answer_within_store_timeout(limit);
    let connected = within(started, limit, store.connect().as_mut()).await;
    let unavailable = match connected.unwrap_or_else(|_| Err(no_answer())) {
        Ok(()) => None,
        Err(error @ StoreError::Unavailable(_)) => Some(to_lock_error(error)),
        Err(error) => return Err(to_lock_error(error)),
    };
    metrics.set_up(unavailable.is_none());
    Ok(Opened {
        store,
        metrics,
        kind: endpoint.scheme().into(),
        unavailable,
    })
}
