//! A real Redis Cluster for one test: primaries, replicas, and slots that can be migrated.
//!
//! The cluster is set up with Redis commands only, so the server binary is the only dependency.

use parking_lot::{Condvar, Mutex};
use redis::{RedisResult, Value};

use crate::server::RedisServer;
use crate::wait::{PATIENCE, wait_until};

/// Number of slots.
const SLOTS: usize = 16384;

/// `cluster-node-timeout` in milliseconds, with and without replicas. It is short when a replica
/// should take over soon. Otherwise it exceeds any delay that a loaded machine causes.
const NODE_TIMEOUT: (&str, &str) = ("1500", "15000");

/// Number of clusters that run at the same time in one test process, including the one that tests
/// share. On a starved machine nodes report one another as failed.
const AT_A_TIME: usize = 3;

static RUNNING: Mutex<usize> = Mutex::new(0);
static ENDED: Condvar = Condvar::new();

/// A permit to run a cluster.
struct Leave;

impl Leave {
    fn get() -> Self {
        let mut running = RUNNING.lock();
        ENDED.wait_while(&mut running, |running| *running >= AT_A_TIME);
        *running += 1;
        Self
    }
}

impl Drop for Leave {
    fn drop(&mut self) {
        *RUNNING.lock() -= 1;
        ENDED.notify_one();
    }
}

/// A cluster whose nodes know each other. The primaries come first; node `primaries + i` starts as
/// a replica of primary `i % primaries`.
pub struct Cluster {
    nodes: Vec<RedisServer>,
    primaries: usize,
    /// Released after the nodes have been dropped.
    _leave: Leave,
}

impl Cluster {
    /// Starts a cluster and waits until it is healthy and every replica is in sync.
    #[track_caller]
    pub fn start(primaries: usize, replicas: usize) -> Self {
        Self::start_with(primaries, replicas, &[])
    }

    /// [`start`](Self::start) with extra server arguments.
    #[track_caller]
    pub fn start_with(primaries: usize, replicas: usize, args: &[&str]) -> Self {
        Self::start_in(primaries, replicas, &[], args)
    }

    /// [`start_with`](Self::start_with) with extra environment variables for each node.
    #[track_caller]
    pub fn start_in(primaries: usize, replicas: usize, vars: &[(&str, String)], args: &[&str]) -> Self {
        let mut all = vec![
            "--cluster-enabled",
            "yes",
            "--cluster-config-file",
            "nodes.conf",
            "--cluster-node-timeout",
            if replicas > 0 { NODE_TIMEOUT.0 } else { NODE_TIMEOUT.1 },
            // Lets a replica take over even after a long disconnection.
            "--cluster-replica-validity-factor",
            "0",
            "--repl-diskless-sync-delay",
            "0",
        ];
        all.extend(args);
        let leave = Leave::get();
        let count = primaries + replicas;
        let nodes: Vec<RedisServer> = (0..count).map(|_| RedisServer::start_in(vars, &all)).collect();
        let cluster = Self {
            nodes,
            primaries,
            _leave: leave,
        };
        cluster.join();
        cluster
    }

    fn join(&self) {
        let share = SLOTS.div_ceil(self.primaries);
        for (index, node) in self.nodes.iter().enumerate() {
            node.command(&["CLUSTER", "SET-CONFIG-EPOCH", &(index + 1).to_string()]);
            if index < self.primaries {
                let (first, last) = (index * share, ((index + 1) * share).min(SLOTS) - 1);
                node.command(&["CLUSTER", "ADDSLOTSRANGE", &first.to_string(), &last.to_string()]);
            }
        }
        // Introduce every node to every other: gossip would take seconds.
        for node in &self.nodes {
            for other in &self.nodes {
                if node.port() != other.port() {
                    node.command(&["CLUSTER", "MEET", "127.0.0.1", &other.port().to_string()]);
                }
            }
        }
        wait_until("all nodes know each other", PATIENCE, || {
            let known = |node: &RedisServer| {
                let nodes: String = node.query(&["CLUSTER", "NODES"]);
                nodes.lines().filter(|line| !line.contains("handshake")).count()
            };
            self.nodes.iter().all(|node| known(node) == self.nodes.len())
        });
        for (index, replica) in self.nodes[self.primaries..].iter().enumerate() {
            let primary: String = self.nodes[index % self.primaries].query(&["CLUSTER", "MYID"]);
            replica.command(&["CLUSTER", "REPLICATE", &primary]);
        }
        self.wait_until_in_order();
    }

    /// `redis+cluster://` URL with all nodes.
    pub fn url(&self) -> String {
        let places: Vec<String> = self.nodes.iter().map(RedisServer::address).collect();
        format!("redis+cluster://{}", places.join(","))
    }

    /// A URL that names a single node.
    pub fn url_of(&self, node: usize) -> String {
        format!("redis+cluster://{}", self.nodes[node].address())
    }

    /// All nodes, whether they are up or not.
    pub fn nodes(&self) -> &[RedisServer] {
        &self.nodes
    }

    /// The nodes that are up.
    pub fn alive(&self) -> impl Iterator<Item = &RedisServer> {
        self.nodes.iter().filter(|node| node.is_up())
    }

    /// Waits until every running node reports a healthy cluster, all of them agree on the slot
    /// owners, and each replica is in sync.
    #[track_caller]
    pub fn wait_until_in_order(&self) {
        wait_until("the cluster is healthy", PATIENCE, || {
            let mut views: Vec<Vec<Option<u16>>> = Vec::new();
            for node in self.alive() {
                let Ok(info) = node.try_query::<String>(&["CLUSTER", "INFO"]) else {
                    return false;
                };
                if !info.contains("cluster_state:ok") || !info.contains("cluster_slots_fail:0") {
                    return false;
                }
                let Ok(role) = node.try_query::<String>(&["INFO", "replication"]) else {
                    return false;
                };
                if role.contains("role:slave") && !role.contains("master_link_status:up") {
                    return false;
                }
                views.push(owners(node));
            }
            views.windows(2).all(|pair| pair[0] == pair[1])
        });
    }

    /// The node that owns a slot. Waits until all running nodes agree on it.
    #[track_caller]
    pub fn owner(&self, slot: u16) -> usize {
        let mut owner = None;
        wait_until(&format!("slot {slot} has one owner"), PATIENCE, || {
            let mut seen: Vec<Option<u16>> = self.alive().map(|node| owners(node)[usize::from(slot)]).collect();
            seen.dedup();
            owner = match seen[..] {
                [Some(port)] => self.nodes.iter().position(|node| node.port() == port && node.is_up()),
                _ => None,
            };
            owner.is_some()
        });
        owner.expect("just seen")
    }

    /// Indexes of the nodes that own slots.
    pub fn owners(&self) -> Vec<usize> {
        let asked = self.alive().next().expect("some node is up");
        let ports = owners(asked);
        (0..self.nodes.len())
            .filter(|&index| ports.contains(&Some(self.nodes[index].port())))
            .collect()
    }

    /// Migrates a slot the way an administrator does: key by key, under load.
    #[track_caller]
    pub fn migrate_slot(&self, slot: u16, to: usize) {
        let from = self.owner(slot);
        if from != to {
            self.begin_migration(slot, from, to);
            self.move_keys(slot, from, to);
            self.finish_migration(slot, from, to);
        }
    }

    /// Begins a migration. From now on the source redirects requests for keys it does not have to
    /// the target.
    #[track_caller]
    pub fn begin_migration(&self, slot: u16, from: usize, to: usize) {
        self.try_migration(slot, from, to).expect("begin the migration");
    }

    fn try_migration(&self, slot: u16, from: usize, to: usize) -> RedisResult<()> {
        let slot = slot.to_string();
        let (source, target): (String, String) = (
            self.nodes[from].try_query(&["CLUSTER", "MYID"])?,
            self.nodes[to].try_query(&["CLUSTER", "MYID"])?,
        );
        self.nodes[to].try_query::<()>(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &source])?;
        self.nodes[from].try_query::<()>(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &target])
    }

    /// Moves all keys of the slot, including those created in the meantime.
    #[track_caller]
    pub fn move_keys(&self, slot: u16, from: usize, to: usize) {
        let port = self.nodes[to].port().to_string();
        loop {
            let keys: Vec<String> = self.nodes[from].query(&["CLUSTER", "GETKEYSINSLOT", &slot.to_string(), "100"]);
            if keys.is_empty() {
                return;
            }
            let mut words = vec!["MIGRATE", "127.0.0.1", &port, "", "0", "5000", "KEYS"];
            words.extend(keys.iter().map(String::as_str));
            // The reply is NOKEY if all of them were deleted in the meantime.
            match self.nodes[from].try_query::<Value>(&words) {
                Ok(_) => {}
                // On a busy machine a node may believe that others are down and then takes no keys.
                Err(error) if error.to_string().contains("CLUSTERDOWN") => self.wait_until_in_order(),
                Err(error) => panic!("{words:?}: {error}"),
            }
        }
    }

    /// Makes the target the owner of the slot. The target is updated first, so that no client is
    /// redirected in a circle.
    #[track_caller]
    pub fn finish_migration(&self, slot: u16, from: usize, to: usize) {
        let target: String = self.nodes[to].query(&["CLUSTER", "MYID"]);
        let words = ["CLUSTER", "SETSLOT", &slot.to_string(), "NODE", &target];
        self.nodes[to].command(&words);
        // The source refuses if a key was created after the last check.
        wait_until("the source gives up the slot", PATIENCE, || {
            self.move_keys(slot, from, to);
            self.nodes[from].try_query::<()>(&words).is_ok()
        });
        for node in self.owners() {
            if node != from && node != to {
                // A busy node learns of the new owner by gossip.
                drop(self.nodes[node].try_query::<()>(&words));
            }
        }
    }

    /// Kills the primary that owns the slot and waits until a replica takes over. Returns the
    /// indexes of the dead primary and the new one.
    #[track_caller]
    pub fn fail_over(&self, slot: u16) -> (usize, usize) {
        let dead = self.owner(slot);
        let port = self.nodes[dead].port();
        self.nodes[dead].kill();
        wait_until("a replica has taken over", PATIENCE, || {
            self.alive().all(|node| {
                let owner = owners(node)[usize::from(slot)];
                owner.is_some() && owner != Some(port)
            })
        });
        (dead, self.owner(slot))
    }

    /// The keys on all running primaries, sorted.
    #[track_caller]
    pub fn keys(&self) -> Vec<String> {
        let owners = self.owners();
        let mut keys: Vec<String> = owners.iter().flat_map(|&index| self.nodes[index].keys()).collect();
        keys.sort();
        keys
    }

    /// The sharded channels on all running nodes, sorted.
    #[track_caller]
    pub fn shard_channels(&self) -> Vec<String> {
        let mut channels: Vec<String> = self.alive().flat_map(RedisServer::shard_channels).collect();
        channels.sort();
        channels
    }

    /// Number of script calls, over all running nodes.
    #[track_caller]
    pub fn script_calls(&self) -> u64 {
        self.alive().map(RedisServer::script_calls).sum()
    }

    /// Number of published messages, over all running nodes.
    #[track_caller]
    pub fn publishes(&self) -> u64 {
        self.alive().map(RedisServer::publishes).sum()
    }

    /// Resets the statistics of all running nodes.
    #[track_caller]
    pub fn reset_stats(&self) {
        self.alive().for_each(RedisServer::reset_stats);
    }
}

/// The port of each slot's owner, as seen by this node.
fn owners(node: &RedisServer) -> Vec<Option<u16>> {
    let mut owners = vec![None; SLOTS];
    let Ok(Value::Array(ranges)) = node.try_query::<Value>(&["CLUSTER", "SLOTS"]) else {
        return owners;
    };
    for range in ranges {
        let Value::Array(range) = range else { continue };
        if let [Value::Int(first), Value::Int(last), Value::Array(primary), ..] = &range[..]
            && let Some(Value::Int(port)) = primary.get(1)
        {
            let port = u16::try_from(*port).ok();
            owners[*first as usize..=*last as usize].fill(port);
        }
    }
    owners
}
