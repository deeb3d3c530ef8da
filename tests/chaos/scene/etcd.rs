//! An etcd with three members.

use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use support::etcd::{Etcd, LEASE_MIN};
use support_chaos::{Fault, some_time};
use tokio::runtime::Runtime;

use super::network::Network;
use super::{Scene, some_key};

const MEMBERS: usize = 3;

pub struct OfEtcd {
    etcd: Etcd,
    network: Network,
    runtime: Runtime,
}

impl OfEtcd {
    pub fn start() -> Self {
        let runtime = Runtime::new().expect("a runtime");
        let etcd = runtime.block_on(Etcd::start_members(MEMBERS));
        let hosts: Vec<String> = (0..MEMBERS).map(|member| etcd.place(member)).collect();
        let network = Network::to(&hosts);
        Self { etcd, network, runtime }
    }

    /// The leader, half of the time.
    fn some_member(&self, rng: &mut SmallRng) -> usize {
        match rng.random_bool(0.5) {
            true => self.runtime.block_on(self.etcd.leader()),
            false => rng.random_range(0..MEMBERS),
        }
    }

    async fn delete(&self, key: &str) {
        let mut keys = self.etcd.lock_keys().await;
        keys.retain(|name| name.contains(key));
        if let Some(first) = keys.first() {
            let mut client = self.etcd.client().await;
            client.delete(first.as_str(), None).await.expect("delete");
        }
    }
}

impl Scene for OfEtcd {
    fn ttl(&self) -> Duration {
        LEASE_MIN
    }

    fn url(&self, place: usize) -> String {
        format!("etcd://{}", self.network.hosts(place))
    }

    fn faults(&self) -> &'static [Fault] {
        &[
            Fault::KillWorker,
            Fault::StopWorker,
            Fault::BlockRuntime,
            Fault::HungNode,
            Fault::CrashNode,
            Fault::HungMajority,
            Fault::PartitionReplies,
            Fault::PartitionRequests,
            Fault::PartitionBoth,
            Fault::LateRequests,
            Fault::SlowReplies,
            Fault::LostReplies,
            Fault::DeleteLease,
        ]
    }

    fn strike(&self, fault: Fault, rng: &mut SmallRng) {
        if self.network.strike(fault, rng) {
            return;
        }
        match fault {
            Fault::DeleteLease => self.runtime.block_on(self.delete(&some_key(rng))),
            Fault::HungNode => {
                let member = self.some_member(rng);
                self.etcd.stop(member);
                thread::sleep(some_time(rng, 100, 4_000));
                self.etcd.cont(member);
            }
            Fault::CrashNode => {
                let member = self.some_member(rng);
                self.etcd.kill(member);
                thread::sleep(some_time(rng, 10, 3_000));
                self.runtime.block_on(self.etcd.restart(member));
            }
            Fault::HungMajority => {
                let spared = self.some_member(rng);
                let hung: Vec<usize> = (0..MEMBERS).filter(|&member| member != spared).collect();
                hung.iter().for_each(|&member| self.etcd.stop(member));
                thread::sleep(some_time(rng, 100, 3_000));
                hung.iter().for_each(|&member| self.etcd.cont(member));
            }
            other => panic!("not of this kind: {other:?}"),
        }
        // Wait until there is a leader.
        self.runtime.block_on(self.etcd.leader());
    }

    fn left(&self) -> Vec<String> {
        self.runtime.block_on(self.etcd.lock_keys())
    }
}
