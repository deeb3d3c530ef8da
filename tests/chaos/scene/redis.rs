//! One address that leads to a primary with a replica.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use support::other_clock::{self, OtherClock};
use support::sentinel::in_step;
use support::{ClientType, PATIENCE, RedisServer, wait_until};
use support_chaos::worker::PLACES;
use support_chaos::{Fault, some_time};
use support_locks::lock_keys;

use super::network::Network;
use super::{Scene, strike_nodes};

pub struct Redis {
    servers: [RedisServer; 2],
    primary: AtomicUsize,
    network: Network,
    is_confirmed: bool,
    /// The library that shifts the servers' clocks, if this round shifts them.
    clock: Option<OtherClock>,
}

macro_rules! faults {
    ($($more:ident)*) => {
        &[
            Fault::KillWorker,
            Fault::StopWorker,
            Fault::BlockRuntime,
            Fault::HungServer,
            Fault::CrashServer,
            Fault::SwitchOver,
            Fault::MisledInbox,
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
            Fault::FlushAll,
            Fault::OutOfMemory,
            $(Fault::$more,)*
        ]
    };
}

impl Redis {
    pub fn start(seed: u64) -> Self {
        // With a shiftable clock, each command reads a file.
        let clock = seed.is_multiple_of(3).then(OtherClock::build);
        let vars = clock.as_ref().map(OtherClock::settable);
        let vars = vars.as_ref().map_or(&[][..], |vars| &vars[..]);
        let start = || RedisServer::start_in(vars, &["--repl-diskless-sync-delay", "0"]);
        let servers = [start(), start()];
        let network = Network::to(&[servers[0].address()]);
        let scene = Self {
            servers,
            primary: AtomicUsize::new(0),
            network,
            is_confirmed: seed.is_multiple_of(2),
            clock,
        };
        scene.follow(1, 0);
        scene
    }

    fn primary(&self) -> &RedisServer {
        &self.servers[self.primary.load(Ordering::Relaxed)]
    }

    /// Makes one server a replica of the other, and waits until it is in sync.
    fn follow(&self, replica: usize, primary: usize) {
        let port = self.servers[primary].port().to_string();
        self.servers[replica].command(&["REPLICAOF", "127.0.0.1", &port]);
        self.is_in_step();
    }

    fn is_in_step(&self) {
        wait_until("the replica is in sync", PATIENCE, || {
            self.servers.iter().any(|server| in_step(server) == 1)
        });
    }

    fn switch_over(&self, rng: &mut SmallRng) {
        let old = self.primary.load(Ordering::Relaxed);
        let new = 1 - old;
        let demote = || {
            let port = self.servers[new].port().to_string();
            self.servers[old].command(&["REPLICAOF", "127.0.0.1", &port]);
        };
        let is_orderly = rng.random_bool(0.5);
        self.servers[new].command(&["REPLICAOF", "NO", "ONE"]);
        if is_orderly {
            demote();
        }
        for place in 0..PLACES {
            // A proxy or a resolver does not switch all clients at once.
            self.network.from(place)[0].lead_to(self.servers[new].address());
            thread::sleep(Duration::from_millis(rng.random_range(0..150)));
        }
        if !is_orderly {
            demote();
        }
        self.primary.store(new, Ordering::Relaxed);
        self.is_in_step();
    }
}

impl Scene for Redis {
    fn ttl(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn replicas_acked(&self) -> u32 {
        self.is_confirmed.into()
    }

    fn url(&self, place: usize) -> String {
        self.network.from(place)[0].url()
    }

    fn faults(&self) -> &'static [Fault] {
        match self.clock {
            Some(_) => faults!(ClockJump),
            None => faults!(),
        }
    }

    fn strike(&self, fault: Fault, rng: &mut SmallRng) {
        if self.network.strike(fault, rng) || strike_nodes(&[self.primary()], fault, rng) {
            return;
        }
        match fault {
            Fault::HungServer => {
                self.primary().stop();
                thread::sleep(some_time(rng, 100, 4_000));
                self.primary().cont();
            }
            Fault::CrashServer => {
                self.primary().kill();
                thread::sleep(some_time(rng, 10, 1_500));
                self.primary().restart();
                self.is_in_step();
            }
            Fault::SwitchOver => self.switch_over(rng),
            Fault::MisledInbox => {
                let replica = &self.servers[1 - self.primary.load(Ordering::Relaxed)];
                let way = &self.network.from(rng.random_range(0..PLACES))[0];
                way.lead_to(replica.address());
                self.primary().client_kill(ClientType::PubSub);
                thread::sleep(some_time(rng, 300, 4_000));
                way.lead_to(self.primary().address());
            }
            Fault::ClockJump => {
                let seconds = rng.random_range(1..4) * if rng.random_bool(0.5) { 1 } else { -1 };
                other_clock::set(self.primary().dir(), seconds);
                thread::sleep(some_time(rng, 100, 1_500));
                other_clock::set(self.primary().dir(), 0);
                // Wait until the tokens issued in the other time lie in the past.
                thread::sleep(Duration::from_secs(seconds.unsigned_abs()));
            }
            other => panic!("not of this kind: {other:?}"),
        }
    }

    fn left(&self) -> Vec<String> {
        lock_keys(self.primary())
    }
}
