//! The network paths from each place to each server, where network faults are injected.

use std::thread;

use rand::Rng;
use rand::rngs::SmallRng;
use support::proxy::Proxy;
use support_chaos::worker::PLACES;
use support_chaos::{Fault, some_time};

pub struct Network {
    /// By place, then by server.
    ways: Vec<Vec<Proxy>>,
}

impl Network {
    pub fn to(servers: &[String]) -> Self {
        let ways_of_place = |_| servers.iter().map(|server| Proxy::start(server.clone())).collect();
        Self {
            ways: (0..PLACES).map(ways_of_place).collect(),
        }
    }

    /// The paths from a place, in the order of the servers.
    pub fn from(&self, place: usize) -> &[Proxy] {
        &self.ways[place]
    }

    /// `host:port,host:port`
    pub fn hosts(&self, place: usize) -> String {
        let hosts: Vec<String> = self.ways[place].iter().map(Proxy::address).collect();
        hosts.join(",")
    }

    /// Injects the fault if it is a network fault. Returns whether it is.
    pub fn strike(&self, fault: Fault, rng: &mut SmallRng) -> bool {
        let (replies, requests) = match fault {
            Fault::PartitionReplies => (true, false),
            Fault::PartitionRequests => (false, true),
            Fault::PartitionBoth => (true, true),
            Fault::LateRequests | Fault::SlowReplies | Fault::LostReplies => (false, false),
            _ => return false,
        };
        let chosen = self.choose(rng);
        let lasting = some_time(rng, 100, 4_000);
        // Unsent bytes are either sent when the network is back, or their connections are gone by
        // then.
        let delivers = fault == Fault::LateRequests || rng.random_bool(0.7);
        let late = some_time(rng, 10, 300);
        for way in &chosen {
            match fault {
                Fault::SlowReplies => way.slow_down(late),
                Fault::LostReplies => way.silence(),
                Fault::LateRequests => way.withhold(),
                _ => {
                    if replies {
                        way.hold_back();
                    }
                    if requests {
                        way.cut_off();
                    }
                }
            }
        }
        thread::sleep(lasting);
        for way in &chosen {
            way.slow_down(std::time::Duration::ZERO);
            way.heal(delivers);
            way.let_through();
        }
        true
    }

    /// One place or all, and for each of them one server or all.
    fn choose(&self, rng: &mut SmallRng) -> Vec<&Proxy> {
        let place = rng.random_bool(0.7).then(|| rng.random_range(0..PLACES));
        let servers = self.ways[0].len();
        let server = rng.random_bool(0.4).then(|| rng.random_range(0..servers));
        let places = (0..PLACES).filter(|&at| place.is_none_or(|place| place == at));
        places
            .flat_map(|at| {
                let ways = self.ways[at].iter().enumerate();
                ways.filter(|(to, _)| server.is_none_or(|server| server == *to))
                    .map(|(_, way)| way)
            })
            .collect()
    }
}
