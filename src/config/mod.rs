//! The settings, their sources, and the one place that checks them.

mod bounds;
mod builder;
mod env;
mod fields;
#[cfg(feature = "file")]
mod file;
mod kubernetes;
mod nearest;
mod overrides;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

pub use crate::credentials::{Credentials, CredentialsRequest, Password};
pub use crate::endpoint::Endpoint;
pub use builder::Builder;
pub(crate) use overrides::check_overrides;

use crate::credentials::of_file;
use crate::endpoint::{EndpointKind, redact, with_login};
use crate::error::InvalidSetting;
use crate::key::LockKey;
use crate::router::ShardMap;
use crate::store::redis::names::Names;
use bounds::Problem;
use fields::{FIELDS, Field};

/// The settings of a lock manager.
///
/// The same names are used everywhere: `max_burst` here and in the [`Builder`], `max_burst = 64` in
/// a TOML file, `SHARDLOCK_MAX_BURST=64` in the environment. A later source overrides an earlier
/// one, so apply them in this order:
///
/// 1. the defaults, as documented on each field,
/// 2. a file (`Config::from_file`, with the feature `file`),
/// 3. the environment ([`Config::apply_env`]),
/// 4. code or command-line flags ([`Builder`], or the fields).
///
/// Each source checks the values that it sets. [`Config::validate`] checks all values, and a
/// manager calls it before it connects.
///
/// ```
/// use std::time::Duration;
///
/// use shardlock::config::{Config, ShardConfig};
///
/// let mut config = Config::default();
/// config.shards = vec![ShardConfig::new("main", "redis://10.0.0.1")];
/// config.max_hold = Some(Duration::from_secs(60));
/// config.validate()?;
/// assert_eq!(config.shards[0].name, "main");
/// # Ok::<(), shardlock::error::InvalidSetting>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Config {
    /// The shards, 1 to 1024 of them. Their order decides which shard owns which keys, so it must
    /// be the same in every process. Default: none; at least one must be given.
    pub shards: Vec<ShardConfig>,

    /// The prefix of all key names in Redis: 1 to 64 bytes of printable ASCII without spaces,
    /// braces and `%`. Managers with different namespaces do not affect each other. Default:
    /// `lock:`.
    pub namespace: String,

    /// How long a lease lasts if it is not renewed, and so how long a key stays locked after its
    /// holder died: 50 ms to 24 h. Can be overridden per request. Default: 10 s.
    pub ttl: Duration,

    /// The fraction of its TTL after which a lease is renewed: 0.02 to 0.5. Default: 0.1, so nine
    /// renewals may fail before a lock is lost.
    pub renew_fraction: f64,

    /// How long a request waits for its lock: zero (a single try) to 365 days, or `None` to wait
    /// forever. Can be overridden per request. Default: `None`.
    pub timeout: Option<Duration>,

    /// How long the lease of a guard is renewed, so that a stuck task loses its lock: 1 ms to 365
    /// days, or `None` for no limit. Can be overridden per request. Default: `None`.
    pub max_hold: Option<Duration>,

    /// How long a key stays locked after a lock of it was acquired, even if the lock is released
    /// earlier: 0 (off) to 24 h. Can be overridden per request. Default: 0.
    ///
    /// Use it for work that must not be repeated within a certain time, such as a job that a timer
    /// starts on several machines at about the same time. If the job takes a moment on the first
    /// machine, the others still find the key locked.
    ///
    /// The time counts from when the server granted the lock. A release before it has passed
    /// leaves the lease on the server for the rest of the time and returns as usual. From then on
    /// this process does not hold it, does not renew it, and can't release it earlier, not even by
    /// a shutdown. Nobody gets the key meanwhile: not another process, and not another task of this
    /// one either. Waiters stay in the queue and get the key when the time has passed; a try finds
    /// it busy. A task that gives up before it has its guard leaves the key unlocked.
    ///
    /// If the process dies, the key stays locked for `ttl` since the last renewal, and for
    /// `min_hold` since the grant, whichever is later: the first TTL of the lease is the longer of
    /// the two. A lock that is lost, for example because of `max_hold`, also leaves the key locked
    /// until `min_hold` has passed. A server that lost its data, or a failover to a replica that
    /// lacks the lease, ends it early, like any lease.
    ///
    /// It applies to exclusive locks. A request for a shared lock or for permits that sets it is
    /// refused, and the default of the manager does not apply to such requests.
    ///
    /// A request with `min_hold` always takes a new lease: it is neither served under a lease that
    /// another task of this process held before, nor under a lingering one. `linger` applies only
    /// if the release comes after `min_hold` has passed.
    ///
    /// On etcd, the rest is rounded up to whole seconds, and to the shortest lease that the cluster
    /// grants (2 s by default); if the process dies, the key stays locked for the longer of `ttl`
    /// and `min_hold` since the last renewal. On a `redlock://` shard, `min_hold` must not exceed
    /// `redlock_max_ttl`.
    pub min_hold: Duration,

    /// How long a lease stays with this process after its last guard is gone, if no task waits for
    /// the key: 0 (off) to 1 h. Can be overridden per request. Default: 0.
    ///
    /// Meanwhile the lease is renewed like any other, and the next lock of the key in this process
    /// needs no message; its fencing token is still larger than all earlier ones. The lease is
    /// released up to an eighth of this time early. It is released at once when another process
    /// starts to wait for the key, when `max_keys` is reached, at a shutdown, and when the last
    /// handle of the manager is dropped. Use it for keys that one process locks again and again,
    /// and other processes rarely.
    ///
    /// Effects on other processes:
    ///
    /// - A try in another process finds the key held, although there is no guard, and does not make
    ///   this process release it. The same goes for `SET NX` from a client of another library,
    ///   which has no way to request the key.
    /// - A waiting process gets the key one message later than if the key were free. If that
    ///   message is lost with its connection, or the runtime on which this manager was connected is
    ///   blocked, this process learns of the waiter at the next renewal of the lease: after
    ///   `renew_fraction` of the TTL.
    /// - If this process dies, its keys stay locked until their leases expire, including those
    ///   without a guard.
    ///
    /// Effects on this process:
    ///
    /// - A release does not contact the server, so it can't report that an administrator took the
    ///   lock since the last renewal. Until the next renewal the lease continues to serve guards.
    ///   Their tokens are smaller than those that other processes got meanwhile, so a resource that
    ///   compares tokens rejects them.
    /// - A server that was replaced (a failover) or restarted may also have forgotten the lease.
    ///   After a connection to it broke, a failover was announced, or a renewal is overdue by half
    ///   of its interval, the next lock waits for the server to confirm the lease, which takes one
    ///   round trip. If the server does not have the lease, the lock is requested anew.
    /// - Until this process is notified that another process waits, its own locks and tries may
    ///   still overtake that process.
    /// - A lease is not kept if another process waited for the key while it was held. This also
    ///   applies to the next lease of that key in this process.
    ///
    /// A lingering key takes about half a kilobyte of memory, and its release a few kilobytes for a
    /// moment. When many leases end at once, the process grows by that amount. The system's
    /// allocator might not return this memory to the system, but later releases reuse it, so the
    /// process does not grow further.
    pub linger: Duration,

    /// How long a shard may take to reply before it counts as unavailable: 10 ms to 60 s. A request
    /// without a `timeout` also tolerates an outage for this long
    /// ([`LockRequest`](crate::LockRequest)). Default: 1 s.
    pub store_timeout: Duration,

    /// The number of command connections to each shard: 1 to 16. One connection carries about
    /// 100,000 locks per second. Default: 1.
    pub connections: usize,

    /// The largest number of guards in one turn of this process: 1 to 1,000,000, or `None` for no
    /// limit. While other processes wait for a key, a turn serves those tasks of this process that
    /// waited when it began, and then the lock is passed to the next process. With 1, processes
    /// alternate strictly. Default: `None`.
    pub max_burst: Option<u32>,

    /// How long a turn of this process may last: 0 to 10 s. A guard that is in use is not cut
    /// short; the tasks that are left wait for the next turn. Lower: other processes wait less for
    /// a process with a long line, but its tasks get a smaller share than theirs. Default: 1 s.
    pub max_slice: Duration,

    /// The maximum number of tasks of this process that wait for one key: 1 to 10,000,000. Default:
    /// 100,000.
    pub max_waiters_per_key: usize,

    /// The maximum number of tasks of this process that wait, over all keys: 1 to 10,000,000.
    /// Default: 1,000,000.
    pub max_waiters: usize,

    /// The maximum number of keys that this process holds or waits for at a time: 1 to 10,000,000.
    /// Default: 100,000. Lingering leases are released when a new key needs the room; until that is
    /// done, there may be up to twice as many keys.
    ///
    /// The default follows from the cost of renewals: a lease of 10 s is renewed once a second, and
    /// a server with little else to do renews about 100,000 to 300,000 leases per second. Each
    /// shard with its own server adds that much. Leases of 1 s need ten times as many renewals as
    /// leases of 10 s. A shard that can't keep up with its renewals accepts no further keys,
    /// whatever the limit ([`LockErrorKind::TooManyLeases`]).
    ///
    /// [`LockErrorKind::TooManyLeases`]: crate::error::LockErrorKind::TooManyLeases
    pub max_keys: usize,

    /// The class under which metrics count requests that name none: 1 to 32 lower-case letters,
    /// digits, `_` and `-`. Default: `default`.
    pub class: String,

    /// The maximum number of classes in metrics: 1 to 1000. Further classes are counted as `other`,
    /// so that a naming mistake can't flood the metrics store. Default: 32.
    pub max_classes: usize,

    /// The number of keys with the most contention that are tracked by name
    /// ([`LockManager::hot_keys`](crate::LockManager::hot_keys)): 1 to 1024. Each takes about 200
    /// bytes. Default: 64.
    pub hot_keys: usize,

    /// Whether the metrics page of the admin endpoint has a series for each of these hot keys, with
    /// the key as a label. Enable it only if keys are not secret and the metrics store can handle
    /// series that come and go. Default: `false`.
    pub hot_key_metrics: bool,

    /// The duration from which a wait is logged as slow, with the place in the program that
    /// requested the lock: 1 ms to 365 days, or `None` for never. Each place is logged at most once
    /// in ten seconds. Default: 10 s.
    pub slow_wait: Option<Duration>,

    /// The duration from which a guard is logged as held for long, while it is still held, with the
    /// place in the program that requested the lock: 1 ms to 365 days, or `None` for never. Each
    /// place is logged at most once in ten seconds. Default: `None`.
    pub long_hold: Option<Duration>,

    /// Whether log lines about lost locks, slow waits and long holds name the key. Set it to
    /// `false` if keys are secret or personal data: then no log line above debug level contains a
    /// key. Errors always name the key. Default: `true`.
    pub log_keys: bool,

    /// When `/readyz` of the admin endpoint answers 200. Default: [`ReadyWhen::AnyShardUp`].
    pub ready_when: ReadyWhen,

    /// The number of replicas that must acknowledge a lease (by `WAIT`) before it counts, when it
    /// is taken and at each renewal: 0 to 16. Default: 0. If fewer acknowledge it, a lock fails
    /// with [`LockErrorKind::Unavailable`], and a held lock is lost when its lease ends. Applies to
    /// `redis://`, `redis+sentinel://` and `redis+cluster://`.
    ///
    /// Each lock then costs a round trip to a replica, and a failover can forget it only if the
    /// promoted replica did not acknowledge it. If the value equals the number of replicas, this
    /// can't happen, but nothing can be locked while one of them is down. If the value is smaller,
    /// it can happen: one replica may lack what another has acknowledged, and for a moment after a
    /// promotion the other replicas still acknowledge leases that the old primary takes. A second
    /// holder may then enter until the first has reached the new primary.
    ///
    /// [`LockErrorKind::Unavailable`]: crate::error::LockErrorKind::Unavailable
    pub min_replicas_acked: u32,

    /// The longest TTL of a lock in a `redlock://` shard: 50 ms to 24 h, and at least `ttl`. A node
    /// that restarted less than this ago may have forgotten leases and does not vote. The value
    /// must be the same in every process; a manager with another value is refused. Default: 10 s.
    pub redlock_max_ttl: Duration,

    /// Whether each connect to a Redis server checks by `ROLE` that the server is a primary.
    /// Default: `true`. Set it to `false` for servers and proxies that lack the command (Redis
    /// Enterprise, Envoy) and whose address always leads to a primary. A replica is then detected
    /// only when it refuses a write, and a lease that a demoted server has forgotten counts as
    /// lost. Applies to the Redis servers of all kinds of shards except `redis+cluster://`, whose
    /// nodes are not checked.
    pub check_role: bool,

    /// The user that logs in to the servers: 1 to 128 bytes, or `None` for the default user of a
    /// Redis server. This and the two settings below apply to the shards whose URL has no login;
    /// without such a shard, setting them is an error. They apply to Redis servers and etcd, which
    /// needs a user, but not to sentinels, whose login is `?sentinel_password=` in the URL. Needs a
    /// `password` or a `password_file`. Default: `None`.
    pub username: Option<String>,

    /// The password that goes with `username`: 1 to 16,384 bytes. No error, log line or `Debug`
    /// output shows it. Default: `None`.
    pub password: Option<Password>,

    /// A file that contains the password, and nothing else but a line end after it. It is read at
    /// each connect, so a password that is replaced takes effect at the next connect, without a
    /// restart: a file that is missing when the manager starts is an error, and one that is missing
    /// later makes the shard unavailable. Set either this or `password`. Default: `None`.
    ///
    /// [`Builder::credentials`] takes a callback in place of a file.
    pub password_file: Option<PathBuf>,

    /// A PEM file with the certificate authorities that sign server certificates, or `None` for
    /// those of the system. This and the two settings below apply to URLs with TLS; without such a
    /// URL, setting them is an error. Default: `None`.
    pub tls_ca: Option<PathBuf>,

    /// A PEM file with the certificate to present to servers, or `None` to present none. Default:
    /// `None`.
    pub tls_cert: Option<PathBuf>,

    /// A PEM file with the private key of `tls_cert`. Set either both or neither. Default: `None`.
    pub tls_key: Option<PathBuf>,
}

/// When `/readyz` of the admin endpoint answers 200. A manager that was shut down is never ready.
///
/// A shard is up if it answered its last request and accepts locks. With either rule, the page
/// lists the shards that are down, and why.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ReadyWhen {
    /// If at least one shard is up; `any` in a file and the environment. While one of several
    /// shards is down, the processes stay in service for the keys of the others.
    #[default]
    AnyShardUp,
    /// Only if all shards are up; `all` in a file and the environment. Each process that uses the
    /// shard that is down leaves its load balancer, usually all of them at the same time, so use it
    /// only if a process can do nothing without one of its shards.
    AllShardsUp,
}

impl ReadyWhen {
    const EACH: [Self; 2] = [Self::AnyShardUp, Self::AllShardsUp];

    /// Returns the value as it is written in a file and the environment.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::AnyShardUp => "any",
            Self::AllShardsUp => "all",
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            shards: Vec::new(),
            namespace: "lock:".to_owned(),
            ttl: Duration::from_secs(10),
            renew_fraction: 0.1,
            timeout: None,
            max_hold: None,
            min_hold: Duration::ZERO,
            linger: Duration::ZERO,
            store_timeout: Duration::from_secs(1),
            connections: 1,
            max_burst: None,
            max_slice: Duration::from_secs(1),
            max_waiters_per_key: 100_000,
            max_waiters: 1_000_000,
            max_keys: 100_000,
            class: "default".to_owned(),
            max_classes: 32,
            hot_keys: 64,
            hot_key_metrics: false,
            slow_wait: Some(Duration::from_secs(10)),
            long_hold: None,
            log_keys: true,
            ready_when: ReadyWhen::AnyShardUp,
            min_replicas_acked: 0,
            redlock_max_ttl: Duration::from_secs(10),
            check_role: true,
            username: None,
            password: None,
            password_file: None,
            tls_ca: None,
            tls_cert: None,
            tls_key: None,
        }
    }
}

impl Config {
    /// The names of all settings, each with a one-line description.
    pub(crate) fn fields() -> impl ExactSizeIterator<Item = (&'static str, &'static str)> {
        FIELDS.iter().map(|field| (field.name, field.doc))
    }

    /// Checks every value.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`] for the first value that is outside its bounds.
    pub fn validate(&self) -> Result<(), InvalidSetting> {
        FIELDS
            .iter()
            .try_for_each(|field| (field.check)(self).map_err(|problem| problem.of(field.name)))?;
        self.check_together()
    }

    /// Checks the settings that depend on one another.
    fn check_together(&self) -> Result<(), InvalidSetting> {
        match (&self.tls_cert, &self.tls_key) {
            (Some(_), None) => {
                return Err(InvalidSetting::new(
                    "tls_key",
                    "none",
                    "the file with the key of tls_cert",
                ));
            }
            (None, Some(_)) => {
                return Err(InvalidSetting::new(
                    "tls_cert",
                    "none",
                    "the file with the certificate of tls_key",
                ));
            }
            _ => {}
        }
        self.check_login()?;
        let endpoints: Vec<Endpoint> = self
            .shards
            .iter()
            .filter_map(|shard| Endpoint::parse(&shard.url).ok())
            .collect();
        let is_redlock = |endpoint: &Endpoint| matches!(endpoint.kind(), EndpointKind::Redlock { .. });
        let has_redlock = endpoints.iter().any(is_redlock);
        for (name, time) in [("ttl", self.ttl), ("min_hold", self.min_hold)] {
            if time > self.redlock_max_ttl && has_redlock {
                let bound = format!("at least the {name} ({time:?}) if a shard is redlock://");
                return Err(InvalidSetting::new(
                    "redlock_max_ttl",
                    format!("{:?}", self.redlock_max_ttl),
                    bound,
                ));
            }
        }
        if endpoints.is_empty() {
            return Ok(());
        }
        // A setting that applies to no shard would promise something that is not done.
        let replicates = |endpoint: &Endpoint| {
            use EndpointKind::{Cluster, Redis, Sentinel};
            matches!(endpoint.kind(), Redis(_) | Sentinel { .. } | Cluster { .. })
        };
        if self.min_replicas_acked > 0 && !endpoints.iter().any(replicates) {
            return Err(InvalidSetting::new(
                "min_replicas_acked",
                self.min_replicas_acked.to_string(),
                "0 unless a shard is redis://, redis+sentinel:// or redis+cluster://, the kinds with replicas",
            ));
        }
        for (name, file) in [
            ("tls_ca", &self.tls_ca),
            ("tls_cert", &self.tls_cert),
            ("tls_key", &self.tls_key),
        ] {
            if let Some(file) = file
                && !endpoints.iter().any(Endpoint::is_encrypted)
            {
                return Err(InvalidSetting::new(
                    name,
                    bounds::plain(&file.display().to_string()),
                    "none unless a shard's URL uses TLS (rediss:// and the like)",
                ));
            }
        }
        Ok(())
    }

    /// Checks the login that is given beside the URLs.
    fn check_login(&self) -> Result<(), InvalidSetting> {
        if let (Some(_), Some(path)) = (&self.password, &self.password_file) {
            let path = bounds::plain(&path.display().to_string());
            return Err(InvalidSetting::new(
                "password_file",
                path,
                "none if password is set; use only one of them",
            ));
        }
        let Some(name) = self.login_setting() else {
            return Ok(());
        };
        if let (Some(username), None, None) = (&self.username, &self.password, &self.password_file) {
            return Err(InvalidSetting::new(
                "username",
                bounds::echo(username),
                "none, or set together with password or password_file",
            ));
        }
        let needing = self.endpoints_without_login();
        let is_etcd = |endpoint: &Endpoint| matches!(endpoint.kind(), EndpointKind::Etcd { .. });
        if self.username.is_none() && needing.iter().any(is_etcd) {
            return Err(InvalidSetting::new(
                "username",
                "none",
                "set together with the password if a shard is etcd, which has no default user",
            ));
        }
        if self.shards.is_empty() || !needing.is_empty() {
            return Ok(());
        }
        Err(InvalidSetting::new(
            name,
            "set",
            "none unless a shard with servers has a URL without a login",
        ))
    }

    /// The first setting of the login that is set.
    pub(crate) fn login_setting(&self) -> Option<&'static str> {
        let set = [
            ("username", self.username.is_some()),
            ("password", self.password.is_some()),
            ("password_file", self.password_file.is_some()),
        ];
        set.into_iter().find(|(_, is_set)| *is_set).map(|(name, _)| name)
    }

    /// The shards whose servers may need a login that their URLs lack.
    pub(crate) fn endpoints_without_login(&self) -> Vec<Endpoint> {
        let endpoints = self.shards.iter().filter_map(|shard| Endpoint::parse(&shard.url).ok());
        endpoints.filter(Endpoint::lacks_login).collect()
    }

    /// Puts the login of the settings into the URLs that have none, for tools that connect to
    /// servers themselves. A password file is read now.
    ///
    /// # Errors
    ///
    /// The password file can't be used, or a URL gets too long.
    pub(crate) fn put_login_into_urls(&mut self) -> Result<(), InvalidSetting> {
        let password = match (&self.password, &self.password_file) {
            (Some(password), _) => password.clone(),
            (None, Some(path)) => of_file(path)?,
            (None, None) => return Ok(()),
        };
        let credentials = Credentials {
            username: self.username.take(),
            password,
        };
        for shard in &mut self.shards {
            if Endpoint::parse(&shard.url)?.lacks_login() {
                shard.url = with_login(&shard.url, &credentials);
                Endpoint::parse(&shard.url)?;
            }
        }
        (self.password, self.password_file) = (None, None);
        Ok(())
    }

    /// Returns the map of which shard owns which keys, without connecting to any shard.
    #[must_use]
    pub fn shard_map(&self) -> ShardMap {
        ShardMap::new(self.shards.iter().map(|shard| shard.name.clone()))
    }

    /// What each shard must have stored under [`map_key`](Self::map_key), in the order of the
    /// shards: the version of the layout and the whole map. The first lock of a manager writes it
    /// if there is none yet. A manager is refused if the stored one does not
    /// [agree](ShardMap::agree).
    #[cfg(test)]
    fn fingerprints(&self) -> Vec<String> {
        let map = self.shard_map();
        (0..map.len()).map(|index| map.fingerprint(index)).collect()
    }

    /// The fingerprints for the servers of one shard: a single one, or for a quorum one per
    /// node, in the order of its URL. Empty if there is no such shard.
    pub(crate) fn fingerprints_at(&self, shard: usize) -> Vec<String> {
        let Some(of_shard) = self.shards.get(shard) else {
            return Vec::new();
        };
        let fingerprint = self.shard_map().fingerprint(shard);
        match Endpoint::parse(&of_shard.url) {
            Ok(endpoint) if matches!(endpoint.kind(), EndpointKind::Redlock { .. }) => {
                let count = endpoint.servers().len();
                let of_node = |number| ShardMap::of_node(&fingerprint, number, count, self.redlock_max_ttl);
                (1..=count).map(of_node).collect()
            }
            _ => vec![fingerprint],
        }
    }

    /// The name of the Redis key under which the fingerprint of the shard map is stored.
    pub(crate) fn map_key(&self) -> String {
        Names::new(&self.namespace).map()
    }

    /// The key whose lease has this name in Redis, or `None` if the name is not a lease of this
    /// namespace.
    pub(crate) fn key_of_lease(&self, name: &str) -> Option<LockKey> {
        Names::new(&self.namespace).key_of_lease(name)
    }

    /// Sets one value by its name, from text: `set("ttl", "10s")`.
    ///
    /// Durations are written like `500ms`, `10s` or `2m`. `timeout`, `max_hold`, `slow_wait`,
    /// `long_hold`, `username`, `password`, `password_file` and the `tls_` files may be `none`.
    /// `shards` is a list of `url` or `name=url`, separated by commas or spaces; it replaces the
    /// previous shards.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`] if there is no such setting, or if the value can't be parsed or is
    /// outside its bounds. Nothing has been changed in that case.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<(), InvalidSetting> {
        let Some(field) = Field::named(name) else {
            let known: Vec<_> = FIELDS.iter().map(|field| field.name).collect();
            let meant = nearest::did_you_mean(name, known.iter().copied());
            let bound = format!("one of {}{meant}", known.join(", "));
            return Err(InvalidSetting::new("setting", bounds::echo(name), bound));
        };
        self.change(|config| (field.set)(config, value).and_then(|()| (field.check)(config)))
            .map_err(|problem| problem.of(name))
    }

    /// Applies a change, or nothing if it fails.
    fn change(&mut self, apply: impl FnOnce(&mut Self) -> Result<(), Problem>) -> Result<(), Problem> {
        let mut changed = self.clone();
        apply(&mut changed)?;
        *self = changed;
        Ok(())
    }
}

/// One shard: its name, which appears in errors and metrics, and its URL.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardConfig {
    /// The name: 1 to 32 letters, digits, dots, `_` and `-`, unique among the shards. It stays the
    /// same when the shard moves to another address.
    pub name: String,
    /// The URL, in the form accepted by [`Endpoint::parse`](crate::config::Endpoint::parse). It may
    /// contain a password, which `Debug` hides.
    pub url: String,
}

impl ShardConfig {
    /// Creates a shard with this name and URL, unchecked.
    pub fn new(name: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            url: url.into(),
        }
    }

    /// A shard named after its position in the list.
    pub(crate) fn unnamed(position: usize, url: impl Into<String>) -> Self {
        Self::new(format!("shard-{position}"), url)
    }

    /// Parses `url` or `name=url`.
    fn from_text(position: usize, text: &str) -> Self {
        match text.split_once('=') {
            // A `=` may also be part of a password, but a name contains none of the characters that
            // precede it then.
            Some((name, url)) if !name.contains([':', '/', '@']) => Self::new(name, url),
            _ => Self::unnamed(position, text),
        }
    }
}

impl fmt::Debug for ShardConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardConfig")
            .field("name", &self.name)
            .field("url", &redact(&self.url))
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one_shard() -> Config {
        let mut config = Config::default();
        // A shard to which every setting applies.
        let url = if cfg!(feature = "tls") {
            "rediss://a"
        } else {
            "redis://a"
        };
        config.set("shards", url).unwrap();
        config
    }

    #[test]
    fn every_field_of_the_struct_is_in_the_table_and_has_a_setter_in_the_builder() {
        let debug = format!("{:#?}", Config::default());
        let fields: Vec<_> = debug
            .lines()
            .filter_map(|line| line.strip_prefix("    ")?.split_once(':'))
            .filter(|(name, _)| !name.starts_with(' '))
            .map(|(name, _)| name)
            .collect();
        let table: Vec<_> = Config::fields().map(|(name, _)| name).collect();
        assert_eq!(fields, table);

        let builder = include_str!("builder.rs");
        for name in table {
            let setter = format!("pub fn {name}(");
            let generic_setter = format!("pub fn {name}<");
            assert!(builder.contains(&setter) || builder.contains(&generic_setter), "{name}");
        }
    }

    #[test]
    fn each_value_is_allowed_up_to_its_bounds_and_refused_beyond_them() {
        for (name, allowed, refused) in [
            (
                "namespace",
                &["a", "lock:", "~!"][..],
                &["", "a b", "{a}", "a%", "ä", "a\u{7f}"][..],
            ),
            (
                "ttl",
                &["50ms", "24h"],
                &["49ms", "24h 1ms", "0s", "10", "-1s", "none", "", "1e9s"],
            ),
            (
                "renew_fraction",
                &["0.02", "0.5"],
                &["0.019", "0.51", "NaN", "inf", "-0.1", "10%"],
            ),
            ("timeout", &["none", "0s", "365d"], &["365d 1ms", "never", ""]),
            ("max_hold", &["none", "1ms", "365d"], &["0s", "999us", "366d"]),
            ("min_hold", &["0s", "1ms", "24h"], &["24h 1ms", "none", "0", "-1s"]),
            ("linger", &["0s", "1us", "1h"], &["3601s", "none", "0", "-1s"]),
            ("store_timeout", &["10ms", "60s"], &["9ms", "61s"]),
            ("connections", &["1", "16"], &["0", "17", "-1", "1.0", "one"]),
            (
                "max_burst",
                &["none", "1", "1000000"],
                &["0", "1000001", "4294967297", "", "never"],
            ),
            ("max_slice", &["0s", "10s"], &["10001ms"]),
            ("max_waiters_per_key", &["1", "10000000"], &["0", "10000001"]),
            ("max_waiters", &["1", "10000000"], &["0", "10000001"]),
            ("max_keys", &["1", "10000000"], &["0", "10000001"]),
            ("class", &["a", "a_b-9"], &["", "A", "a b", "ä", "a.b"]),
            ("max_classes", &["1", "1000"], &["0", "1001"]),
            ("hot_keys", &["1", "1024"], &["0", "1025"]),
            ("hot_key_metrics", &["true", "false"], &["", "1", "yes", "True", "none"]),
            ("check_role", &["true", "false"], &["", "1", "yes", "True", "none"]),
            ("log_keys", &["true", "false"], &["", "1", "yes", "True", "none"]),
            ("ready_when", &["any", "all"], &["", "one", "Any", "true", "none"]),
            ("slow_wait", &["none", "1ms", "365d"], &["0s", "366d", "never"]),
            ("long_hold", &["none", "1ms", "365d"], &["0s", "366d", "never"]),
            ("min_replicas_acked", &["0", "16"], &["17", "-1"]),
            ("redlock_max_ttl", &["50ms", "24h"], &["49ms", "25h"]),
            ("tls_ca", &["none", "/etc/ca.pem"], &[""]),
            (
                "shards",
                &["memory://", "a=memory://,b=memory://x", " redis://:a=b@h\nredis://i "],
                &[
                    "",
                    " , ",
                    "x",
                    "a=memory://,a=memory://x",
                    "=memory://",
                    "a/b=memory://",
                    "b a=memory://",
                ],
            ),
        ] {
            let mut config = one_shard();
            for value in allowed {
                config.set(name, value).unwrap();
                config.validate().unwrap();
            }
            let before = config.clone();
            for value in refused {
                let error = config.set(name, value).unwrap_err();
                assert!(error.field.starts_with(name), "{name} {value:?}: {error}");
                assert!(!error.bound.is_empty());
                assert_eq!(config, before, "{name} {value:?}");
            }
        }
        let text = |bytes| "a".repeat(bytes);
        let mut config = one_shard();
        for (name, most) in [("namespace", 64), ("class", 32)] {
            config.set(name, &text(most)).unwrap();
            assert!(config.set(name, &text(most + 1)).is_err());
        }
        config.set("shards", &format!("{}=memory://", text(32))).unwrap();
        assert!(config.set("shards", &format!("{}=memory://", text(33))).is_err());
        config.set("shards", &"memory:// ".repeat(1024)).unwrap();
        assert!(config.set("shards", &"memory:// ".repeat(1025)).is_err());
    }

    #[test]
    fn values_set_in_code_are_checked_too() {
        let message = |change: fn(&mut Config)| {
            let mut config = one_shard();
            change(&mut config);
            config.validate().unwrap_err().to_string()
        };
        assert_eq!(
            message(|config| config.ttl = Duration::from_millis(5)),
            "ttl is 5ms, but must be from 50ms to 1d"
        );
        assert_eq!(
            message(|config| config.max_hold = Some(Duration::ZERO)),
            "max_hold is 0s, but must be none, or from 1ms to 365d"
        );
        assert_eq!(
            message(|config| config.renew_fraction = f64::NAN),
            "renew_fraction is NaN, but must be from 0.02 to 0.5"
        );
        assert_eq!(
            message(|config| config.connections = 17),
            "connections is 17, but must be from 1 to 16"
        );
        assert_eq!(
            message(|config| config.shards.clear()),
            "shards is empty, but must be a list of 1 to 1024 shards"
        );
        assert_eq!(
            message(|config| config.namespace = "a{b".into()),
            "namespace is \"a{b\", but must be 1 to 64 bytes of printable ASCII without spaces, braces and %"
        );
    }

    #[test]
    fn setting_that_no_shard_reads_is_refused() {
        let refusal = |shards: &str, name: &str, value: &str| {
            let mut config = Config::default();
            config.set("shards", shards).unwrap();
            config.set(name, value).unwrap();
            config.validate().map_err(|error| error.to_string())
        };
        assert_eq!(
            refusal("redis://a memory://", "tls_ca", "/a/ca.pem").unwrap_err(),
            "tls_ca is /a/ca.pem, but must be none unless a shard's URL uses TLS (rediss:// and the like)"
        );
        let misplaced = refusal("redis://a", "tls_ca", "redis://:s3cret@\u{1b}host").unwrap_err();
        assert!(
            misplaced.starts_with("tls_ca is redis://:***@\\u{1b}host, but must be"),
            "{misplaced}"
        );
        assert_eq!(
            refusal("memory://", "min_replicas_acked", "1").unwrap_err(),
            "min_replicas_acked is 1, but must be 0 unless a shard is redis://, redis+sentinel:// or redis+cluster://, the kinds with replicas"
        );
        assert_eq!(refusal("memory:// redis://a", "min_replicas_acked", "1"), Ok(()));
        #[cfg(feature = "tls")]
        assert_eq!(refusal("redis://a rediss://b", "tls_ca", "/a/ca.pem"), Ok(()));
    }

    #[test]
    fn text_that_cannot_be_read_is_refused_with_its_name_value_and_form() {
        let message = |name, value| one_shard().set(name, value).unwrap_err().to_string();
        assert_eq!(
            message("ttl", "10"),
            "ttl is \"10\", but must be a duration such as 500ms, 10s or 2m, from 50ms to 1d"
        );
        assert_eq!(
            message("timeout", "never"),
            "timeout is \"never\", but must be none, or a duration such as 500ms, 10s or 2m, from 0s to 365d"
        );
        assert_eq!(
            message("max_burst", "many"),
            "max_burst is \"many\", but must be none, or a whole number from 1 to 1000000"
        );
        let unknown = message("tll", "10s");
        assert!(unknown.starts_with("setting is \"tll\", but must be one of shards, namespace, ttl, "));
        assert!(unknown.ends_with("; did you mean ttl?"), "{unknown}");
    }

    #[test]
    fn fingerprints_are_what_shards_have_stored() {
        let mut config = Config::default();
        config.set("shards", "a=memory://x,b=memory://y").unwrap();
        assert_eq!(config.fingerprints()[1], "v2 a:0-8191,b:8192-16383 here=b");
        assert_eq!(config.map_key(), "lock:%map");
        let key = |name| config.key_of_lease(name).map(|key| key.to_string());
        assert_eq!(key("lock:100%25"), Some("100%".to_owned()));
        assert_eq!(key("lock:%map"), None);
    }

    #[test]
    fn shards_are_named_by_their_position_unless_they_have_a_name() {
        let mut config = Config::default();
        config
            .set("shards", "redis://:pa=ss@a, b=redis://b\nredis://c")
            .unwrap();
        let expected = [
            ShardConfig::new("shard-0", "redis://:pa=ss@a"),
            ShardConfig::new("b", "redis://b"),
            ShardConfig::new("shard-2", "redis://c"),
        ];
        assert_eq!(config.shards, expected);
        let error = config.set("shards", "redis://a,redis://b:0").unwrap_err();
        assert_eq!(error.field, "shards[1].url");
        let error = config.set("shards", "shard-1=redis://a,redis://b").unwrap_err();
        assert_eq!(
            error.to_string(),
            "shards[1].name is \"shard-1\", but must be given to one shard only"
        );
    }

    #[test]
    fn no_message_shows_a_password() {
        let mut config = one_shard();
        for (name, value) in [
            ("shards", "redis://:s3cret@host:99999"),
            ("shards", "a=redis://user:s3cret@host/x"),
            ("shards", "redis://:12,s3cret@host:x"),
            ("shards", "redis://:s3cret,34@host/x"),
            ("shards", "user:s3cret=@host"),
            ("ttl", "redis://:s3cret@host"),
            ("namespace", "redis://:s3cret@host{"),
            ("redis://:s3cret@host", "ttl"),
        ] {
            let error = config.set(name, value).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{error}");
        }
        config.shards = vec![ShardConfig::new("redis://:s3cret@host", "a")];
        assert!(!config.validate().unwrap_err().to_string().contains("s3cret"));
        config.shards = vec![ShardConfig::new("a", "redis://:s3cret@host")];
        assert!(!format!("{config:?}").contains("s3cret"));
    }
}
