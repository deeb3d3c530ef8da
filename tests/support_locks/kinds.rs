//! The kinds of stores that the suite runs on. This is the one place that knows them.
//!
//! A new kind is: a variant of [`Kind`] with its facts, an implementation of [`Servers`] for what it is made of, and a line in
//! [`tests_on!`] for the kind and for each set of kinds that it belongs to. README.md in the tests' directory says which
//! behaviour is tested where, and why a kind is left out.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shardlock::Builder;

use super::SHORT_TTL;
#[cfg(feature = "etcd")]
use crate::support::etcd::{Etcd, LEASE_MIN};
use crate::support::sentinel::Watched;
use crate::support::{ClientType, Cluster, Quorum, RedisServer, directory, quorum};

/// What a shard is, or what all shards of a manager are.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Kind {
    /// Inside of this process.
    Memory,
    /// One primary.
    Redis,
    /// A primary that sentinels watch, with a replica.
    Sentinel,
    /// A cluster of three primaries.
    Cluster,
    /// A quorum of five nodes.
    Redlock,
    /// One member.
    #[cfg(feature = "etcd")]
    Etcd,
    /// Shards of several kinds in one manager.
    Mixed,
}

/// Makes the tests of a function `test` on a kind, or on each kind of a set. `shared` or `own` says of which servers.
///
/// | set | kinds |
/// |---|---|
/// | `all` | every kind |
/// | `servers` | those that other processes reach, each alone: not `memory`, which is inside of this one, nor `mixed`, which has such a shard |
/// | `pausable` | those whose servers keep their roles while they stand still or are down; where that begins a failover, the kind's own tests say what happens |
/// | `redis_nodes` | those made of Redis servers, whose connections and scripts a test can take away |
/// | `foreign` | those on which clients of other libraries take the same key |
/// | `free_path` | those that take a key that nobody seems to want without a look at its queue |
/// | `counted` | those whose servers count nothing but what managers and tests send, and for which a lock is one script call |
macro_rules! tests_on {
    ($how:ident all) => { $crate::support_locks::tests_on! { $how memory redis sentinel cluster redlock etcd mixed } };
    ($how:ident servers) => { $crate::support_locks::tests_on! { $how redis sentinel cluster redlock etcd } };
    ($how:ident pausable) => { $crate::support_locks::tests_on! { $how redis redlock etcd } };
    ($how:ident redis_nodes) => { $crate::support_locks::tests_on! { $how redis sentinel cluster redlock } };
    ($how:ident foreign) => { $crate::support_locks::tests_on! { $how redis sentinel cluster } };
    ($how:ident free_path) => { $crate::support_locks::tests_on! { $how redis sentinel } };
    ($how:ident counted) => { $crate::support_locks::tests_on! { $how redis } };

    ($how:ident memory) => { $crate::support_locks::tests_on! { $how on_memory: Memory } };
    ($how:ident redis) => { $crate::support_locks::tests_on! { $how on_redis: Redis } };
    ($how:ident sentinel) => { $crate::support_locks::tests_on! { $how on_sentinel: Sentinel } };
    ($how:ident cluster) => { $crate::support_locks::tests_on! { $how on_cluster: Cluster } };
    ($how:ident redlock) => { $crate::support_locks::tests_on! { $how on_redlock: Redlock } };
    ($how:ident etcd) => {
        #[cfg(feature = "etcd")]
        mod etcd {
            use super::test;

            $crate::support_locks::tests_on! { $how on_etcd: Etcd }
        }
    };
    ($how:ident mixed) => { $crate::support_locks::tests_on! { $how on_mixed: Mixed } };

    ($how:ident $name:ident: $kind:ident) => {
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            test(&$crate::support_locks::TestStore::$how($crate::support_locks::Kind::$kind)).await;
        }
    };
    ($how:ident $first:ident $($rest:ident)+) => {
        $crate::support_locks::tests_on! { $how $first }
        $crate::support_locks::tests_on! { $how $($rest)+ }
    };
}
pub(crate) use tests_on;

impl Kind {
    /// All kinds, by the names that workers are told.
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

    /// What a worker is told.
    pub fn name(self) -> &'static str {
        let mut kinds = Self::ALL.iter();
        kinds.find(|(_, kind)| *kind == self).expect("every kind is there").0
    }

    /// The kind of that name.
    pub fn named(name: &str) -> Self {
        let mut kinds = Self::ALL.iter();
        kinds.find(|(named, _)| *named == name).expect("a name of a kind").1
    }

    /// Servers that nobody else uses.
    #[track_caller]
    pub fn start(self) -> Arc<dyn Servers> {
        match self {
            Self::Memory => Arc::new(Memory),
            Self::Redis => Arc::new(RedisServer::start()),
            Self::Sentinel => Arc::new(Watched::start(1)),
            Self::Cluster => Arc::new(Cluster::start(3, 0)),
            Self::Redlock => Arc::new(Quorum::start(5)),
            #[cfg(feature = "etcd")]
            Self::Etcd => Arc::new(at_once(Etcd::start())),
            Self::Mixed => Arc::new(Mixed(MIX.map(Self::start))),
        }
    }

    /// The servers that all tests of this process share. They end with it.
    pub fn shared(self) -> Arc<dyn Servers> {
        static SHARED: [OnceLock<Arc<dyn Servers>>; Kind::ALL.len()] = [const { OnceLock::new() }; Kind::ALL.len()];
        let start = || {
            // Nothing in a static is ever dropped, and so neither are the servers' directories.
            directory::remove_all_at_the_end();
            match self {
                Self::Mixed => Arc::new(Mixed(MIX.map(Self::shared))),
                kind => kind.start(),
            }
        };
        Arc::clone(SHARED[self as usize].get_or_init(start))
    }

    /// What managers of this kind need besides the address.
    pub fn settings(self, builder: Builder) -> Builder {
        match self {
            // A node has no vote before the longest TTL has passed, so a test waits for no longer than it must.
            Self::Redlock | Self::Mixed => builder.ttl(quorum::MAX_TTL).redlock_max_ttl(quorum::MAX_TTL),
            _ => builder,
        }
    }

    /// A TTL that lives long enough for a loaded machine and short enough to wait for its end.
    pub fn short_ttl(self) -> Duration {
        match self {
            // It does not give shorter ones.
            #[cfg(feature = "etcd")]
            Self::Etcd => LEASE_MIN,
            _ => SHORT_TTL,
        }
    }

    /// A TTL as short as makes sense with a server that is well and near.
    pub fn least_ttl(self) -> Duration {
        match self {
            #[cfg(feature = "etcd")]
            Self::Etcd => LEASE_MIN,
            _ => Duration::from_millis(100),
        }
    }

    /// How long a lease with this TTL lasts on the servers at the longest, when nobody renews it any more.
    pub fn dead_within(self, ttl: Duration) -> Duration {
        match self {
            // Etcd's leases last for whole seconds, and it looks for those that ended twice a second.
            #[cfg(feature = "etcd")]
            Self::Etcd => ttl.max(LEASE_MIN) + Duration::from_millis(1_500),
            _ => ttl,
        }
    }

    /// Whether a release may reach some of the servers, or take along all that belongs to it, a moment after it is over.
    pub fn tidies_up_later(self) -> bool {
        match self {
            Self::Redlock | Self::Mixed => true,
            // A note of a waiting cycle goes with the cycle's lease, which is revoked in the background.
            #[cfg(feature = "etcd")]
            Self::Etcd => true,
            _ => false,
        }
    }

    /// How many keys a process can use in a test of some seconds.
    pub fn many_keys(self) -> usize {
        match self {
            Self::Memory | Self::Redis | Self::Mixed => 100_000,
            Self::Sentinel | Self::Cluster | Self::Redlock => 20_000,
            #[cfg(feature = "etcd")]
            Self::Etcd => 1_000,
        }
    }
}

/// What the suite does to the servers of a store, and how it looks at them.
pub trait Servers: Send + Sync {
    /// The URLs of the shards, for the test of this number.
    fn urls(&self, test: u32) -> Vec<String>;

    /// The Redis servers that hold leases and take writes: one, the primaries of a cluster, the nodes of a quorum.
    fn nodes(&self) -> Vec<&RedisServer> {
        Vec::new()
    }

    /// All names on the servers, of keys and of channels.
    fn names(&self) -> Vec<String> {
        let nodes = self.nodes().into_iter();
        nodes
            .flat_map(|node| [node.keys(), node.channels(), node.shard_channels()].concat())
            .collect()
    }

    /// What belongs to single locks in this namespace: all keys but the counters of the slots and the shard map.
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

    /// Runs a command on each Redis server that is in charge of its key, and returns the last reply.
    #[track_caller]
    fn command(&self, words: &[&str]) -> redis::Value {
        let mut reply = None;
        for node in self.nodes() {
            match node.try_query(words) {
                Ok(said) => reply = Some(said),
                // The key is another's.
                Err(error) if error.code() == Some("MOVED") => {}
                Err(error) => panic!("{words:?}: {error}"),
            }
        }
        reply.unwrap_or_else(|| panic!("{words:?}: no server is in charge of it"))
    }

    /// An administrator deletes the lease of that name.
    fn delete(&self, lease: &str) {
        self.command(&["DEL", lease]);
    }

    /// An administrator, or another library, takes the lease of that name.
    fn overwrite(&self, lease: &str, owner: &str, ttl: Duration) {
        self.command(&["SET", lease, owner, "PX", &ttl.as_millis().to_string()]);
    }

    /// An administrator replaces the shard map of this namespace everywhere, or deletes it.
    fn set_map(&self, namespace: &str, map: Option<&str>) {
        let key = format!("{namespace}%map");
        match map {
            Some(map) => self.command(&["SET", &key, map]),
            None => self.command(&["DEL", &key]),
        };
    }

    /// What the servers have stored as the shard map of this namespace, each once.
    fn maps(&self, namespace: &str) -> Vec<String> {
        let key = format!("{namespace}%map");
        let stored = |node: &&RedisServer| node.try_query::<Option<String>>(&["GET", &key]).ok().flatten();
        self.nodes().iter().filter_map(stored).collect()
    }

    /// All data are gone.
    fn flush(&self) {
        for node in self.nodes() {
            node.command(&["FLUSHALL"]);
        }
    }

    /// All servers are killed with SIGKILL.
    fn kill(&self) {
        for node in self.nodes() {
            node.kill();
        }
    }

    /// All servers that were killed come back; Redis with nothing of what it knew.
    fn restart(&self) {
        for node in self.nodes() {
            node.restart();
        }
    }

    /// Nothing that keeps leases answers any more, until [`restart_all`](Self::restart_all).
    fn kill_all(&self) {
        self.kill();
    }

    /// Ends [`kill_all`](Self::kill_all).
    fn restart_all(&self) {
        self.restart();
    }

    /// How often scripts were called on all servers, since they began or were told to count anew.
    fn script_calls(&self) -> u64 {
        self.nodes().into_iter().map(RedisServer::script_calls).sum()
    }

    /// The servers count from zero again.
    fn count_anew(&self) {
        for node in self.nodes() {
            node.reset_stats();
        }
    }

    /// How many inboxes there are in which a manager listens.
    fn inboxes(&self, namespace: &str) -> usize {
        let inbox = format!("{namespace}in:");
        self.names().iter().filter(|name| name.contains(&inbox)).count()
    }

    /// The counters that tokens come from are lost, or go back to an old number. Nothing happens where there are none.
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

    /// Connections of this type break.
    fn cut(&self, connections: ClientType) {
        for node in self.nodes() {
            node.client_kill(connections);
        }
    }

    /// No server answers any more, until [`go_on`](Self::go_on).
    fn stand_still(&self) {
        for node in self.nodes() {
            node.stop();
        }
    }

    /// Ends [`stand_still`](Self::stand_still).
    fn go_on(&self) {
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
        // The sentinels' own.
        names.retain(|name| !name.starts_with("__sentinel__:"));
        names
    }

    fn cut(&self, connections: ClientType) {
        // A primary that the sentinels have lost is one that they replace.
        self.primary().client_kill_but(connections, "sentinel-");
    }

    fn kill_all(&self) {
        // Without any replica, nobody can take over.
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
            // The first key under the lease's name is the owner's.
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

    fn stand_still(&self) {
        self.stop(0);
    }

    fn go_on(&self) {
        self.cont(0);
    }

    fn kill(&self) {
        Etcd::kill(self, 0);
    }

    fn restart(&self) {
        at_once(Etcd::restart(self, 0));
    }
}

/// Waits for a future from a test that may itself run on a runtime.
#[cfg(feature = "etcd")]
fn at_once<T: Send>(future: impl Future<Output = T> + Send) -> T {
    let wait = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(future)
    };
    std::thread::scope(|scope| scope.spawn(wait).join()).expect("a thread")
}

/// Each test has a memory of its own, as it costs nothing.
struct Memory;

impl Servers for Memory {
    fn urls(&self, test: u32) -> Vec<String> {
        vec![format!("memory://test-{test}")]
    }
}

/// The kinds of a mixed store's shards.
const MIX: [Kind; 4] = [Kind::Redis, Kind::Cluster, Kind::Redlock, Kind::Memory];

/// A shard of each of those kinds.
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
