//! Settings in code.

use std::error::Error;
use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use super::{Config, Credentials, CredentialsRequest, Password, ReadyWhen, ShardConfig};
use crate::credentials::CredentialsCallback;
use crate::error::InvalidSetting;

/// Collects the settings of a lock manager, under the names that [`Config`] documents.
///
/// ```
/// use std::time::Duration;
///
/// let config = shardlock::config::Builder::new()
///     .shard("redis://10.0.0.1")
///     .named_shard("spare", "redis://10.0.0.2")
///     .ttl(Duration::from_secs(5))
///     .timeout(Duration::from_secs(2))
///     .build_config()?;
/// assert_eq!(config.shards[0].name, "shard-0");
/// # Ok::<(), shardlock::error::InvalidSetting>(())
/// ```
#[derive(Debug, Clone, Default)]
#[must_use = "a builder does nothing until it is used"]
pub struct Builder {
    pub(crate) config: Config,
    pub(crate) credentials: Option<CredentialsCallback>,
}

impl Builder {
    /// Creates a builder with the default settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces all settings, including those made before, for example by settings from a file and
    /// the environment. Later calls override them. A callback for credentials stays.
    pub fn config(mut self, config: Config) -> Self {
        self.config = config;
        self
    }

    /// Adds a shard, named after its position: `shard-0`, `shard-1` and so on.
    pub fn shard(mut self, url: impl Into<String>) -> Self {
        let position = self.config.shards.len();
        self.config.shards.push(ShardConfig::unnamed(position, url));
        self
    }

    /// Adds a shard with a name.
    pub fn named_shard(mut self, name: impl Into<String>, url: impl Into<String>) -> Self {
        self.config.shards.push(ShardConfig::new(name, url));
        self
    }

    /// Sets [`Config::shards`], replacing the previous shards.
    pub fn shards(mut self, shards: impl IntoIterator<Item = ShardConfig>) -> Self {
        self.config.shards = shards.into_iter().collect();
        self
    }

    /// Sets [`Config::namespace`].
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.config.namespace = namespace.into();
        self
    }

    /// Sets [`Config::ttl`].
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.config.ttl = ttl;
        self
    }

    /// Sets [`Config::renew_fraction`].
    pub fn renew_fraction(mut self, fraction: f64) -> Self {
        self.config.renew_fraction = fraction;
        self
    }

    /// Sets [`Config::timeout`]; takes a duration or `None`.
    pub fn timeout(mut self, timeout: impl Into<Option<Duration>>) -> Self {
        self.config.timeout = timeout.into();
        self
    }

    /// Sets [`Config::max_hold`]; takes a duration or `None`.
    pub fn max_hold(mut self, limit: impl Into<Option<Duration>>) -> Self {
        self.config.max_hold = limit.into();
        self
    }

    /// Sets [`Config::min_hold`]; zero is off.
    pub fn min_hold(mut self, time: Duration) -> Self {
        self.config.min_hold = time;
        self
    }

    /// Sets [`Config::linger`]; zero is off.
    pub fn linger(mut self, time: Duration) -> Self {
        self.config.linger = time;
        self
    }

    /// Sets [`Config::store_timeout`].
    pub fn store_timeout(mut self, timeout: Duration) -> Self {
        self.config.store_timeout = timeout;
        self
    }

    /// Sets [`Config::connections`].
    pub fn connections(mut self, count: usize) -> Self {
        self.config.connections = count;
        self
    }

    /// Sets [`Config::max_burst`]; takes a number or `None`.
    pub fn max_burst(mut self, limit: impl Into<Option<u32>>) -> Self {
        self.config.max_burst = limit.into();
        self
    }

    /// Sets [`Config::max_slice`].
    pub fn max_slice(mut self, limit: Duration) -> Self {
        self.config.max_slice = limit;
        self
    }

    /// Sets [`Config::max_waiters_per_key`].
    pub fn max_waiters_per_key(mut self, limit: usize) -> Self {
        self.config.max_waiters_per_key = limit;
        self
    }

    /// Sets [`Config::max_waiters`].
    pub fn max_waiters(mut self, limit: usize) -> Self {
        self.config.max_waiters = limit;
        self
    }

    /// Sets [`Config::max_keys`].
    pub fn max_keys(mut self, limit: usize) -> Self {
        self.config.max_keys = limit;
        self
    }

    /// Sets [`Config::class`].
    pub fn class(mut self, class: impl Into<String>) -> Self {
        self.config.class = class.into();
        self
    }

    /// Sets [`Config::max_classes`].
    pub fn max_classes(mut self, limit: usize) -> Self {
        self.config.max_classes = limit;
        self
    }

    /// Sets [`Config::hot_keys`].
    pub fn hot_keys(mut self, count: usize) -> Self {
        self.config.hot_keys = count;
        self
    }

    /// Sets [`Config::hot_key_metrics`].
    pub fn hot_key_metrics(mut self, on: bool) -> Self {
        self.config.hot_key_metrics = on;
        self
    }

    /// Sets [`Config::slow_wait`]; takes a duration or `None`.
    pub fn slow_wait(mut self, bound: impl Into<Option<Duration>>) -> Self {
        self.config.slow_wait = bound.into();
        self
    }

    /// Sets [`Config::long_hold`]; takes a duration or `None`.
    pub fn long_hold(mut self, bound: impl Into<Option<Duration>>) -> Self {
        self.config.long_hold = bound.into();
        self
    }

    /// Sets [`Config::log_keys`].
    pub fn log_keys(mut self, on: bool) -> Self {
        self.config.log_keys = on;
        self
    }

    /// Sets [`Config::ready_when`].
    pub fn ready_when(mut self, rule: ReadyWhen) -> Self {
        self.config.ready_when = rule;
        self
    }

    /// Sets [`Config::min_replicas_acked`].
    pub fn min_replicas_acked(mut self, count: u32) -> Self {
        self.config.min_replicas_acked = count;
        self
    }

    /// Sets [`Config::redlock_max_ttl`].
    pub fn redlock_max_ttl(mut self, longest: Duration) -> Self {
        self.config.redlock_max_ttl = longest;
        self
    }

    /// Sets [`Config::check_role`].
    pub fn check_role(mut self, check: bool) -> Self {
        self.config.check_role = check;
        self
    }

    /// Sets [`Config::username`].
    pub fn username(mut self, username: impl Into<String>) -> Self {
        self.config.username = Some(username.into());
        self
    }

    /// Sets [`Config::password`].
    pub fn password(mut self, password: impl Into<Password>) -> Self {
        self.config.password = Some(password.into());
        self
    }

    /// Sets [`Config::password_file`].
    pub fn password_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.config.password_file = Some(file.into());
        self
    }

    /// Sets a callback that returns the credentials for each new connection: for passwords that a
    /// secret store hands out, or tokens that expire.
    ///
    /// It is called at each connect to a server of a shard whose URL has no login, also for several
    /// connections at a time, so cache what is expensive. Sentinels are contacted with the login in
    /// the URL. With a callback, `username`, `password` and `password_file` must not be set.
    ///
    /// The callback has half of `store_timeout` for its answer. An error, a panic or no answer
    /// makes the shard unavailable, which requests tolerate like any outage; the text of the error
    /// appears in errors and logs, so it must not contain the password. An open connection is not
    /// affected by a change of the password, unless the server closes it.
    ///
    /// The callback may be called on the application's runtime and on a runtime of the manager's
    /// own thread. Don't block in it: that thread renews leases.
    ///
    /// # Cancel safety
    ///
    /// The future that the callback returns is dropped if the connect is given up.
    ///
    /// # Examples
    ///
    /// ```no_run
    /// use shardlock::LockManager;
    /// use shardlock::config::{Credentials, CredentialsRequest};
    ///
    /// async fn token(server: &str) -> Result<String, std::io::Error> {
    /// #   let _ = server;
    ///     // Ask the cloud provider, or a cache.
    /// #   Ok(String::new())
    /// }
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), shardlock::LockError> {
    /// let locks = LockManager::builder()
    ///     .shard("redis://10.0.0.1")
    ///     .credentials(async |request: CredentialsRequest| {
    ///         let token = token(request.address()).await?;
    ///         Ok::<_, std::io::Error>(Credentials::new("worker", token))
    ///     })
    ///     .connect()
    ///     .await?;
    /// # Ok(()) }
    /// ```
    pub fn credentials<F, Fut, E>(mut self, callback: F) -> Self
    where
        F: Fn(CredentialsRequest) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<Credentials, E>> + Send + 'static,
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        self.credentials = Some(CredentialsCallback::new(callback));
        self
    }

    /// Sets [`Config::tls_ca`].
    pub fn tls_ca(mut self, file: impl Into<PathBuf>) -> Self {
        self.config.tls_ca = Some(file.into());
        self
    }

    /// Sets [`Config::tls_cert`]; [`tls_key`](Self::tls_key) must be set too.
    pub fn tls_cert(mut self, file: impl Into<PathBuf>) -> Self {
        self.config.tls_cert = Some(file.into());
        self
    }

    /// Sets [`Config::tls_key`].
    pub fn tls_key(mut self, file: impl Into<PathBuf>) -> Self {
        self.config.tls_key = Some(file.into());
        self
    }

    /// Checks the settings and returns them, without a callback for credentials.
    ///
    /// # Errors
    ///
    /// The errors of [`Config::validate`].
    pub fn build_config(self) -> Result<Config, InvalidSetting> {
        self.config.validate()?;
        Ok(self.config)
    }
}
