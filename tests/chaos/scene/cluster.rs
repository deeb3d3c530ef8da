//! A cluster of three primaries, each with a replica.

use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use support::{Cluster, PATIENCE, RedisServer, wait_until};
use support_chaos::{Fault, some_time};
use support_locks::lock_keys;

use super::{Scene, some_key, strike_nodes};

/// In milliseconds, longer and shorter than a node must be silent to be replaced.
const LONG: (u64, u64) = (2_500, 4_000);
const SHORT: (u64, u64) = (100, 900);

pub struct OfCluster {
    cluster: Cluster,
    is_confirmed: bool,
}

impl OfCluster {
    pub fn start(seed: u64) -> Self {
        Self {
            // Two of three primaries are needed to replace the third.
            cluster: Cluster::start(3, 3),
            is_confirmed: seed.is_multiple_of(2),
        }
    }

    fn primaries(&self) -> Vec<&RedisServer> {
        let owners = self.cluster.owners();
        owners.into_iter().map(|owner| &self.cluster.nodes()[owner]).collect()
    }

    fn slot_of(&self, key: &str) -> u16 {
        self.cluster.nodes()[0].query(&["CLUSTER", "KEYSLOT", &format!("lock:{key}")])
    }

    fn is_replica(node: &RedisServer) -> bool {
        let info: String = node.query(&["INFO", "replication"]);
        info.contains("role:slave")
    }
}

impl Scene for OfCluster {
    fn ttl(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn replicas_acked(&self) -> u32 {
        self.is_confirmed.into()
    }

    fn url(&self, _place: usize) -> String {
        self.cluster.url()
    }

    fn faults(&self) -> &'static [Fault] {
        &[
            Fault::KillWorker,
            Fault::StopWorker,
            Fault::BlockRuntime,
            Fault::HungPrimary,
            Fault::CrashPrimary,
            Fault::Failover,
            Fault::SlotMigration,
            Fault::CutSubscriptions,
            Fault::CutConnections,
            Fault::ScriptFlush,
            Fault::DeleteLease,
            Fault::FlushAll,
            Fault::OutOfMemory,
        ]
    }

    fn strike(&self, fault: Fault, rng: &mut SmallRng) {
        let cluster = &self.cluster;
        if strike_nodes(&self.primaries(), fault, rng) {
            return;
        }
        let slot = self.slot_of(&some_key(rng));
        let owner = cluster.owner(slot);
        match fault {
            Fault::HungPrimary => {
                let (least, most) = if rng.random_bool(0.5) { SHORT } else { LONG };
                cluster.nodes()[owner].stop();
                thread::sleep(some_time(rng, least, most));
                cluster.nodes()[owner].cont();
            }
            Fault::CrashPrimary => {
                let (dead, _) = cluster.fail_over(slot);
                cluster.nodes()[dead].restart();
            }
            Fault::Failover => {
                let replicas: Vec<&RedisServer> = cluster.alive().filter(|node| Self::is_replica(node)).collect();
                let replica = replicas[rng.random_range(0..replicas.len())];
                replica.command(&["CLUSTER", "FAILOVER"]);
                wait_until("the replica is a primary", PATIENCE, || !Self::is_replica(replica));
            }
            Fault::SlotMigration => {
                let others: Vec<usize> = cluster.owners().into_iter().filter(|&node| node != owner).collect();
                cluster.migrate_slot(slot, others[rng.random_range(0..others.len())]);
            }
            other => panic!("not of this kind: {other:?}"),
        }
        cluster.wait_until_in_order();
    }

    fn left(&self) -> Vec<String> {
        self.primaries().into_iter().flat_map(lock_keys).collect()
    }
}
