//! A quorum of three independent servers.

use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use support::other_clock::{self, OtherClock};
use support::quorum::MAX_TTL;
use support::{Quorum, RedisServer};
use support_chaos::{Fault, some_time};
use support_locks::lock_keys;

use super::network::Network;
use super::{Scene, strike_nodes};

pub struct Redlock {
    quorum: Quorum,
    network: Network,
    clock: Option<OtherClock>,
}

macro_rules! faults {
    ($($more:ident)*) => {
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
            Fault::CutSubscriptions,
            Fault::CutConnections,
            Fault::ScriptFlush,
            Fault::DeleteLease,
            Fault::OutOfMemory,
            $(Fault::$more,)*
        ]
    };
}

impl Redlock {
    pub fn start(seed: u64) -> Self {
        let clock = seed.is_multiple_of(3).then(OtherClock::build);
        let vars = clock.as_ref().map(OtherClock::settable);
        let quorum = Quorum::start_in(3, vars.as_ref().map_or(&[][..], |vars| &vars[..]));
        let hosts: Vec<String> = quorum.nodes().iter().map(RedisServer::address).collect();
        let network = Network::to(&hosts);
        Self { quorum, network, clock }
    }
}

impl Scene for Redlock {
    fn ttl(&self) -> Duration {
        Duration::from_millis(1_500)
    }

    fn longest_ttl(&self) -> Duration {
        MAX_TTL
    }

    fn url(&self, place: usize) -> String {
        format!("redlock://{}", self.network.hosts(place))
    }

    fn faults(&self) -> &'static [Fault] {
        match self.clock {
            Some(_) => faults!(ClockJump),
            None => faults!(),
        }
    }

    fn strike(&self, fault: Fault, rng: &mut SmallRng) {
        let nodes: Vec<&RedisServer> = self.quorum.nodes().iter().collect();
        if self.network.strike(fault, rng) || strike_nodes(&nodes, fault, rng) {
            return;
        }
        let chosen = rng.random_range(0..nodes.len());
        match fault {
            Fault::HungNode => {
                nodes[chosen].stop();
                thread::sleep(some_time(rng, 100, 4_000));
                nodes[chosen].cont();
            }
            Fault::CrashNode => {
                nodes[chosen].kill();
                thread::sleep(some_time(rng, 10, 2_000));
                nodes[chosen].restart();
                self.quorum.wait_for_vote(chosen);
            }
            Fault::HungMajority => {
                let hung: Vec<&RedisServer> = nodes
                    .iter()
                    .copied()
                    .filter(|node| node.port() != nodes[chosen].port())
                    .collect();
                hung.iter().for_each(|node| node.stop());
                thread::sleep(some_time(rng, 100, 3_000));
                hung.iter().for_each(|node| node.cont());
            }
            Fault::ClockJump => {
                let seconds = rng.random_range(1..4) * if rng.random_bool(0.5) { 1 } else { -1 };
                other_clock::set(nodes[chosen].dir(), seconds);
                thread::sleep(some_time(rng, 100, 1_500));
                other_clock::set(nodes[chosen].dir(), 0);
                thread::sleep(Duration::from_secs(seconds.unsigned_abs()));
            }
            other => panic!("not of this kind: {other:?}"),
        }
    }

    fn left(&self) -> Vec<String> {
        self.quorum.nodes().iter().flat_map(lock_keys).collect()
    }
}
