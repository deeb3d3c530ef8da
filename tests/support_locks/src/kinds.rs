//! The kinds of stores that the suite runs on. No other file lists them.
//!
//! To add a kind, add a variant of [`Kind`] with its properties, an implementation of [`Servers`],
//! and a line in [`tests_on!`] for the kind and for each set that it belongs to. README.md in the
//! tests' directory lists which behaviour is tested where, and why a kind is left out.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shardlock::config::Builder;
#[cfg(feature = "etcd")]
use support::etcd::{Etcd, LEASE_MIN};
use support::sentinel::Watched;
use support::wait::PATIENCE;
use support::{ClientType, Cluster, Quorum, RedisServer, directory, quorum};

use super::SHORT_TTL;

/// The kind of a shard, or of all shards of a manager.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// In this process.
    Memory,
    /// One primary.
    Redis,
    /// A primary with a replica, watched by sentinels.
    Sentinel,
    /// A cluster of three primaries.
    Cluster,
    /// A quorum of five nodes.
    Redlock,
    /// A single member.
    #[cfg(feature = "etcd")]
    Etcd,
    /// Shards of several kinds in one manager.
    Mixed,
}

/// Generates the tests of a function `test` for a kind, or for each kind of a set. `shared` or
/// `own` selects the servers.
///
/// - `all`: every kind.
/// - `servers`: the kinds that other processes can reach, each alone. Excludes `memory`, which is
///   in this process, and `mixed`, which has such a shard.
/// - `pausable`: the kinds whose servers keep their roles while they are stopped or down. The kinds
///   that start a failover in that case have their own tests.
/// - `redis_nodes`: the kinds made of Redis servers, whose connections and scripts a test can
///   remove.
/// - `foreign`: the kinds on which clients of other libraries can take the same key.
/// - `fast_path`: the kinds that always use the fast path for a key without known contenders, which
///   does not check its queue.
/// - `permits`: the kinds that have permits, which a quorum can't bound; all have shared locks.
///   `permits_of_servers`: those of them that other processes can reach.
/// - `counted`: the kinds whose servers only count what managers and tests send, and on which a
///   lock is one script call.
#[macro_export]
macro_rules! tests_on {
    ($how:ident all) => { $crate::tests_on! { $how memory redis sentinel cluster redlock etcd mixed } };
    ($how:ident servers) => { $crate::tests_on! { $how redis sentinel cluster redlock etcd } };
    ($how:ident pausable) => { $crate::tests_on! { $how redis redlock etcd } };
    ($how:ident redis_nodes) => { $crate::tests_on! { $how redis sentinel cluster redlock } };
    ($how:ident foreign) => { $crate::tests_on! { $how redis sentinel cluster } };
    ($how:ident fast_path) => { $crate::tests_on! { $how redis sentinel } };
    ($how:ident permits) => { $crate::tests_on! { $how memory redis sentinel cluster etcd } };
    ($how:ident permits_of_servers) => { $crate::tests_on! { $how redis sentinel cluster etcd } };
    ($how:ident counted) => { $crate::tests_on! { $how redis } };

    ($how:ident memory) => { $crate::tests_on! { $how on_memory: Memory } };
    ($how:ident redis) => { $crate::tests_on! { $how on_redis: Redis } };
    ($how:ident sentinel) => { $crate::tests_on! { $how on_sentinel: Sentinel } };
    ($how:ident cluster) => { $crate::tests_on! { $how on_cluster: Cluster } };
    ($how:ident redlock) => { $crate::tests_on! { $how on_redlock: Redlock } };
    ($how:ident etcd) => {
        #[cfg(feature = "etcd")]
        mod etcd {
            use super::test;

            $crate::tests_on! { $how on_etcd: Etcd }
        }
    };
    ($how:ident mixed) => { $crate::tests_on! { $how on_mixed: Mixed } };

    ($how:ident $name:ident: $kind:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            test(&$crate::TestStore::$how($crate::Kind::$kind)).await;
        }
    };
    ($how:ident $first:ident $($rest:ident)+) => {
        $crate::tests_on! { $how $first }
        $crate::tests_on! { $how $($rest)+ }
    };
}

impl Kind {
    /// All kinds, with the names passed to workers.
    pub const ALL: &[(&'static str, Self)] = &[
        ("memory", Self::Memory),
        ("redis", Self::Redis),
        ("sentinel", Self::Sentinel),
        ("cluster", Self::Cluster),
        ("redlock", Self::Redlock),
        #[cfg(feature = "etcd")]
        ("etcd", Self::Etcd),
        ("mixed", Self::Mixed),
    ];

    /// The name passed to a worker.
    pub fn name(self) -> &'static str {
        let mut kinds = Self::ALL.iter();
        kinds.find(|(_, kind)| *kind == self).expect("every kind is there").0
    }

    /// The kind with this name.
    pub fn named(name: &str) -> Self {
        let mut kinds = Self::ALL.iter();
        kinds.find(|(named, _)| *named == name).expect("a name of a kind").1
    }

    /// Starts servers for exclusive use.
    #[track_caller]
    pub fn start(self) -> Arc<dyn Servers> {
        match self {
            Self::Memory => Arc::new(Memory),
            Self::Redis => Arc::new(RedisServer::start()),
            Self::Sentinel => {
                let watched = Watched::start(1);
                // A busy machine must not cause a failover. Tests of failovers start their own.
                watched.consider_down_after(PATIENCE);
                Arc::new(watched)
            }
            Self::Cluster => Arc::new(Cluster::start(3, 0)),
            Self::Redlock => Arc::new(Quorum::start(5)),
            #[cfg(feature = "etcd")]
            Self::Etcd => Arc::new(at_once(Etcd::start())),
            Self::Mixed => Arc::new(Mixed(MIX.map(Self::start))),
        }
    }

    /// The servers shared by all tests of this process. They run until it ends.
    pub fn shared(self) -> Arc<dyn Servers> {
        static SHARED: [OnceLock<Arc<dyn Servers>>; Kind::ALL.len()] = [const { OnceLock::new() }; Kind::ALL.len()];
        let start = || {
            // Statics are never dropped, so the servers' directories would not be removed either.
            directory::remove_all_at_the_end();
            match self {
                Self::Mixed => Arc::new(Mixed(MIX.map(Self::shared))),
                kind => kind.start(),
            }
        };
        Arc::clone(SHARED[self as usize].get_or_init(start))
    }

    /// Settings that managers of this kind need besides the address.
    pub fn settings(self, builder: Builder) -> Builder {
        match self {
            // A node may not vote before the longest TTL has passed, so keep the TTL as short as
            // possible.
            Self::Redlock | Self::Mixed => builder.ttl(quorum::MAX_TTL).redlock_max_ttl(quorum::MAX_TTL),
            _ => builder,
        }
    }

    /// A TTL long enough for a loaded machine and short enough to wait until it expires.
    pub fn short_ttl(self) -> Duration {
        match self {
            // Etcd grants no shorter leases.
            #[cfg(feature = "etcd")]
            Self::Etcd => LEASE_MIN,
            _ => SHORT_TTL,
        }
    }

    /// The shortest reasonable TTL with a healthy, nearby server.
    pub fn least_ttl(self) -> Duration {
        match self {
            #[cfg(feature = "etcd")]
            Self::Etcd => LEASE_MIN,
            _ => Duration::from_millis(100),
        }
    }

    /// The longest time that a lease with this TTL can remain on the servers after its last
    /// renewal.
    pub fn dead_within(self, ttl: Duration) -> Duration {
        match self {
            // Etcd leases last whole seconds, and etcd looks for expired ones twice a second.
            #[cfg(feature = "etcd")]
            Self::Etcd => ttl.max(LEASE_MIN) + Duration::from_millis(1_500),
            _ => ttl,
        }
    }

    /// Whether a release may return before it has reached all servers or removed everything that
    /// belongs to it.
    pub fn cleans_up_later(self) -> bool {
        match self {
            Self::Redlock | Self::Mixed => true,
            // The note of a waiting cycle is removed with the cycle's lease, which is revoked in
            // the background.
            #[cfg(feature = "etcd")]
            Self::Etcd => true,
            _ => false,
        }
    }

    /// The number of keys that a process can use in a test of a few seconds.
    pub fn many_keys(self) -> usize {
        match self {
            Self::Memory | Self::Redis | Self::Mixed => 100_000,
            Self::Sentinel | Self::Cluster | Self::Redlock => 20_000,
            #[cfg(feature = "etcd")]
            Self::Etcd => 1_000,
        }
    }
}

/// What the suite does to the servers of a store, and what it reads from them.
pub trait Servers: Send + Sync {
    /// The URLs of the shards, for the test with this number.
    fn urls(&self, test: u32) -> Vec<String>;

    /// The Redis servers that hold leases and accept writes: one server, the primaries of a
    /// cluster, or the nodes of a quorum.
    fn nodes(&self) -> Vec<&RedisServer> {
        Vec::new()
    }

    /// All key and channel names on the servers.
    fn names(&self) -> Vec<String> {
        let nodes = self.nodes().into_iter();
        nodes
            .flat_map(|node| [node.keys(), node.channels(), node.shard_channels()].concat())
            .collect()
    }

    /// The keys in this namespace that belong to individual locks: everything except the slots'
    /// counters and the shard map.
    fn lock_keys(&self, namespace: &str) -> Vec<String> {
        let nodes = self.nodes().into_iter();
        let mut keys: Vec<_> = nodes.flat_map(RedisServer::keys).collect();
        keys.retain(|key| {
            let of_a_lock = |name: &str| !name.starts_with("%map") && !name.starts_with("%fence:");
            let bare = key.strip_prefix('{').unwrap_or(key);
            bare.strip_prefix(namespace).is_some_and(of_a_lock)
        });
        keys
    }

    /// Runs a command on every Redis server responsible for its key, and returns the last reply.
    #[track_caller]
    fn command(&self, words: &[&str]) -> redis::Value {
        let mut reply = None;
        for node in self.nodes() {
            match node.try_query(words) {
                Ok(said) => reply = Some(said),
                // Another node owns the key.
                Err(error) if error.code() == Some("MOVED") => {}
                Err(error) => panic!("{words:?}: {error}"),
            }
        }
        reply.unwrap_or_else(|| panic!("{words:?}: no server is responsible for the key"))
    }

    /// Deletes the lease with this name, as an administrator would.
    fn delete(&self, lease: &str) {
        self.command(&["DEL", lease]);
    }

    /// Takes the lease with this name, as an administrator or another library would.
    fn overwrite(&self, lease: &str, owner: &str, ttl: Duration) {
        self.command(&["SET", lease, owner, "PX", &ttl.as_millis().to_string()]);
    }

    /// Replaces or deletes the shard map of this namespace on all servers, as an administrator
    /// would.
    fn set_map(&self, namespace: &str, map: Option<&str>) {
        let key = format!("{namespace}%map");
        match map {
            Some(map) => self.command(&["SET", &key, map]),
            None => self.command(&["DEL", &key]),
        };
    }

    /// The shard map of this namespace, once for each server that stores one.
    fn maps(&self, namespace: &str) -> Vec<String> {
        let key = format!("{namespace}%map");
        let stored = |node: &&RedisServer| node.try_query::<Option<String>>(&["GET", &key]).ok().flatten();
        self.nodes().iter().filter_map(stored).collect()
    }

    /// Deletes all data.
    fn flush(&self) {
        for node in self.nodes() {
            node.command(&["FLUSHALL"]);
        }
    }

    /// Kills all servers with SIGKILL.
    fn kill(&self) {
        for node in self.nodes() {
            node.kill();
        }
    }

    /// Starts all killed servers again. Redis starts empty.
    fn restart(&self) {
        for node in self.nodes() {
            node.restart();
        }
    }

    /// Kills everything that keeps leases, until [`restart_all`](Self::restart_all).
    fn kill_all(&self) {
        self.kill();
    }

    /// Ends [`kill_all`](Self::kill_all).
    fn restart_all(&self) {
        self.restart();
    }

    /// Number of script calls on all servers since they started or since the last
    /// [`reset_all_stats`](Self::reset_all_stats).
    fn script_calls(&self) -> u64 {
        self.nodes().into_iter().map(RedisServer::script_calls).sum()
    }

    /// Resets the servers' statistics.
    fn reset_all_stats(&self) {
        for node in self.nodes() {
            node.reset_stats();
        }
    }

    /// Number of inboxes to which a manager is subscribed.
    fn inboxes(&self, namespace: &str) -> usize {
        let inbox = format!("{namespace}in:");
        self.names().iter().filter(|name| name.contains(&inbox)).count()
    }

    /// Deletes the token counters or sets them to an old number. Does nothing if there are none.
    fn set_counters(&self, number: Option<u64>) {
        let nodes = self.nodes();
        let counters = nodes
            .iter()
            .flat_map(|node| node.keys().into_iter().map(move |key| (node, key)));
        for (node, key) in counters.filter(|(_, key)| key.contains("%fence:")) {
            match number {
                Some(number) => node.command(&["SET", &key, &number.to_string()]),
                None => node.command(&["DEL", &key]),
            };
        }
    }

    /// Closes all connections of this type.
    fn cut(&self, connections: ClientType) {
        for node in self.nodes() {
            node.client_kill(connections);
        }
    }

    /// Stops all servers, so that none answers until [`resume_all`](Self::resume_all).
    fn stop_all(&self) {
        for node in self.nodes() {
            node.stop();
        }
    }

    /// Ends [`stop_all`](Self::stop_all).
    fn resume_all(&self) {
        for node in self.nodes() {
            node.cont();
        }
    }
}

impl Servers for RedisServer {
    fn urls(&self, _test: u32) -> Vec<String> {
        vec![self.url()]
    }

    fn nodes(&self) -> Vec<&RedisServer> {
        vec![self]
    }
}

impl Servers for Watched {
    fn urls(&self, _test: u32) -> Vec<String> {
        vec![self.url()]
    }

    fn nodes(&self) -> Vec<&RedisServer> {
        vec![self.primary()]
    }

    fn names(&self) -> Vec<String> {
        let primary = self.primary();
        let mut names = [primary.keys(), primary.channels()].concat();
        // Ignore the sentinels' own channel.
        names.retain(|name| !name.starts_with("__sentinel__:"));
        names
    }

    fn cut(&self, connections: ClientType) {
        // Sentinels would replace a primary that they lose contact with.
        self.primary().client_kill_but(connections, "sentinel-");
    }

    fn kill_all(&self) {
        // No replica is left to take over.
        self.servers().iter().for_each(RedisServer::kill);
    }

    fn restart_all(&self) {
        self.servers().iter().for_each(RedisServer::restart);
    }
}

impl Servers for Cluster {
    fn urls(&self, _test: u32) -> Vec<String> {
        vec![self.url()]
    }

    fn nodes(&self) -> Vec<&RedisServer> {
        Cluster::nodes(self).iter().collect()
    }
}

impl Servers for Quorum {
    fn urls(&self, _test: u32) -> Vec<String> {
        vec![self.url()]
    }

    fn nodes(&self) -> Vec<&RedisServer> {
        Quorum::nodes(self).iter().collect()
    }

    fn restart(&self) {
        let count = Quorum::nodes(self).len();
        Quorum::nodes(self).iter().for_each(RedisServer::restart);
        (0..count).for_each(|node| self.wait_for_vote(node));
    }
}

#[cfg(feature = "etcd")]
impl Servers for Etcd {
    fn urls(&self, _test: u32) -> Vec<String> {
        vec![self.url()]
    }

    fn names(&self) -> Vec<String> {
        at_once(self.keys())
    }

    fn lock_keys(&self, namespace: &str) -> Vec<String> {
        let mut keys = self.names();
        keys.retain(|key| key.strip_prefix(namespace).is_some_and(|name| name != "%map"));
        keys
    }

    fn delete(&self, lease: &str) {
        at_once(async {
            // The first key below the lease's name is the owner's.
            let prefix = format!("{lease}/");
            let owner = self.keys().await.into_iter().find(|key| key.starts_with(&prefix));
            self.client()
                .await
                .delete(owner.expect("an owner"), None)
                .await
                .expect("delete");
        });
    }

    fn set_map(&self, namespace: &str, map: Option<&str>) {
        let key = format!("{namespace}%map");
        at_once(async {
            let mut client = self.client().await;
            match map {
                Some(map) => client.put(key, map, None).await.map(drop),
                None => client.delete(key, None).await.map(drop),
            }
            .expect("etcd answers");
        });
    }

    fn maps(&self, namespace: &str) -> Vec<String> {
        let key = format!("{namespace}%map");
        at_once(async {
            let stored = self.client().await.get(key, None).await.expect("etcd answers");
            let text = |kv: &etcd_client::KeyValue| kv.value_str().expect("text").to_owned();
            stored.kvs().iter().map(text).collect()
        })
    }

    fn flush(&self) {
        at_once(async {
            let all = etcd_client::DeleteOptions::new().with_all_keys();
            self.client().await.delete("", Some(all)).await.expect("delete");
        });
    }

    fn stop_all(&self) {
        self.stop(0);
    }

    fn resume_all(&self) {
        self.cont(0);
    }

    fn kill(&self) {
        Etcd::kill(self, 0);
    }

    fn restart(&self) {
        at_once(Etcd::restart(self, 0));
    }
}

/// Blocks on a future. The calling test may itself run on a runtime.
#[cfg(feature = "etcd")]
fn at_once<T: Send>(future: impl Future<Output = T> + Send) -> T {
    let wait = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(future)
    };
    std::thread::scope(|scope| scope.spawn(wait).join()).expect("a thread")
}

/// Each test has its own memory store, since one costs nothing.
struct Memory;

impl Servers for Memory {
    fn urls(&self, test: u32) -> Vec<String> {
        vec![format!("memory://test-{test}")]
    }
}

/// The kinds of the shards of a mixed store.
const MIX: [Kind; 4] = [Kind::Redis, Kind::Cluster, Kind::Redlock, Kind::Memory];

/// One shard of each kind in [`MIX`].
struct Mixed([Arc<dyn Servers>; MIX.len()]);

impl Servers for Mixed {
    fn urls(&self, test: u32) -> Vec<String> {
        self.0.iter().flat_map(|servers| servers.urls(test)).collect()
    }

    fn nodes(&self) -> Vec<&RedisServer> {
        self.0.iter().flat_map(|servers| servers.nodes()).collect()
    }

    fn lock_keys(&self, namespace: &str) -> Vec<String> {
        self.0.iter().flat_map(|servers| servers.lock_keys(namespace)).collect()
    }
}
