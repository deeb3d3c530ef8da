//! Settings in code.

use std::path::PathBuf;
use std::time::Duration;

use super::{Config, ShardConfig};
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
}

impl Builder {
    /// Creates a builder with the default settings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Replaces all settings, including those made before, for example by settings from a file and
    /// the environment. Later calls override them.
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

    /// Checks the settings and returns them.
    ///
    /// # Errors
    ///
    /// The errors of [`Config::validate`].
    pub fn build_config(self) -> Result<Config, InvalidSetting> {
        self.config.validate()?;
        Ok(self.config)
    }
}
