//! What the workers contend on: servers of one kind, the network paths to them, and their faults.

mod cluster;
#[cfg(feature = "etcd")]
mod etcd;
mod network;
mod redis;
mod redlock;
mod sentinel;

use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use support::{ClientType, RedisServer};
use support_chaos::worker::keys;
use support_chaos::{Fault, some_time};

pub trait Scene {
    fn ttl(&self) -> Duration;

    fn longest_ttl(&self) -> Duration {
        self.ttl()
    }

    fn replicas_acked(&self) -> u32 {
        0
    }

    /// Whether no failover forgets a lease.
    fn is_confirmed(&self) -> bool {
        self.replicas_acked() > 0
    }

    /// The URL by which the worker at a place reaches the servers.
    fn url(&self, place: usize) -> String;

    fn faults(&self) -> &'static [Fault];

    /// Injects the fault, and waits until it has ended and the servers are healthy.
    fn strike(&self, fault: Fault, rng: &mut SmallRng);

    /// Keys of individual locks that are left.
    fn left(&self) -> Vec<String>;
}

/// The kinds, by name.
pub const KINDS: &[&str] = &[
    "redis",
    "sentinel",
    "cluster",
    "redlock",
    #[cfg(feature = "etcd")]
    "etcd",
];

/// Starts servers of this kind. The seed determines the settings.
pub fn start(kind: &str, seed: u64) -> Box<dyn Scene> {
    match kind {
        "redis" => Box::new(redis::Redis::start(seed)),
        "sentinel" => Box::new(sentinel::Sentinel::start()),
        "cluster" => Box::new(cluster::OfCluster::start(seed)),
        "redlock" => Box::new(redlock::Redlock::start(seed)),
        #[cfg(feature = "etcd")]
        "etcd" => Box::new(etcd::OfEtcd::start()),
        _ => panic!("no kind is called {kind:?}; there are {KINDS:?}"),
    }
}

fn some_key(rng: &mut SmallRng) -> String {
    let mut keys = keys();
    keys.swap_remove(rng.random_range(0..keys.len()))
}

/// Injects a fault that is the same for all kinds of Redis. Returns whether this is one.
fn strike_nodes(nodes: &[&RedisServer], fault: Fault, rng: &mut SmallRng) -> bool {
    match fault {
        Fault::CutSubscriptions => nodes
            .iter()
            .for_each(|node| node.client_kill_but(ClientType::PubSub, "sentinel-")),
        Fault::CutConnections => nodes
            .iter()
            .for_each(|node| node.client_kill_but(ClientType::Normal, "sentinel-")),
        Fault::ScriptFlush => nodes.iter().for_each(|node| drop(node.command(&["SCRIPT", "FLUSH"]))),
        Fault::FlushAll => nodes.iter().for_each(|node| drop(node.command(&["FLUSHALL"]))),
        Fault::DeleteLease => {
            let lease = format!("lock:{}", some_key(rng));
            for node in nodes {
                // In a cluster, another node may own the key.
                drop(node.try_query::<u64>(&["DEL", &lease]));
            }
        }
        Fault::OutOfMemory => {
            let node = nodes[rng.random_range(0..nodes.len())];
            node.command(&["CONFIG", "SET", "maxmemory", "1"]);
            thread::sleep(some_time(rng, 50, 1_500));
            node.command(&["CONFIG", "SET", "maxmemory", "0"]);
        }
        _ => return false,
    }
    true
}
