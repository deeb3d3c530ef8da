//! The settings, their sources, and the one place that checks them.

mod bounds;
mod builder;
mod env;
mod fields;
#[cfg(feature = "file")]
mod file;
mod kubernetes;
mod login;
mod nearest;
mod overrides;
mod shard;
mod validate;

use std::path::PathBuf;
use std::time::Duration;

pub use crate::credentials::{Credentials, CredentialsRequest, Password};
pub use crate::endpoint::Endpoint;
pub use builder::Builder;
pub(crate) use overrides::check_overrides;
pub use shard::ShardConfig;

use crate::endpoint::EndpointKind;
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
            let bound = nearest::a_known_one(&meant, &known);
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

#[cfg(test)]
mod tests;
