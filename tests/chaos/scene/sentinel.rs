//! A primary and its replica, watched by three sentinels. A lease counts once the replica has it.

use std::thread;
use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;
use support::sentinel::Watched;
use support_chaos::{Fault, some_time};
use support_locks::lock_keys;

use super::{Scene, strike_nodes};

pub struct Sentinel(Watched);

impl Sentinel {
    pub fn start() -> Self {
        let watched = Watched::start(1);
        // Sentinels notice soon what became of an old primary.
        watched.publish_every(Duration::from_millis(200));
        Self(watched)
    }
}

impl Scene for Sentinel {
    fn ttl(&self) -> Duration {
        Duration::from_secs(1)
    }

    fn replicas_acked(&self) -> u32 {
        1
    }

    fn url(&self, _place: usize) -> String {
        self.0.url()
    }

    fn faults(&self) -> &'static [Fault] {
        &[
            Fault::KillWorker,
            Fault::StopWorker,
            Fault::BlockRuntime,
            Fault::HungPrimary,
            Fault::CrashPrimary,
            Fault::Failover,
            Fault::HungReplica,
            Fault::HungSentinel,
            Fault::CutSubscriptions,
            Fault::CutConnections,
            Fault::ScriptFlush,
            Fault::DeleteLease,
            Fault::OutOfMemory,
        ]
    }

    fn strike(&self, fault: Fault, rng: &mut SmallRng) {
        let watched = &self.0;
        let primary = watched.primary();
        if strike_nodes(&[primary], fault, rng) {
            return;
        }
        match fault {
            Fault::HungPrimary => {
                primary.stop();
                match rng.random_bool(0.5) {
                    true => thread::sleep(some_time(rng, 50, 500)),
                    false => {
                        watched.switched(primary.port());
                        thread::sleep(some_time(rng, 10, 1_500));
                    }
                }
                primary.cont();
                watched.has_replicas(1);
            }
            Fault::CrashPrimary => {
                primary.kill();
                watched.switched(primary.port());
                primary.restart();
                watched.has_replicas(1);
            }
            Fault::Failover => {
                watched.failover();
                watched.has_replicas(1);
            }
            Fault::HungReplica => {
                let replica = watched.replicas()[0];
                replica.stop();
                thread::sleep(some_time(rng, 50, 2_000));
                replica.cont();
                watched.has_replicas(1);
            }
            Fault::HungSentinel => {
                let sentinel = &watched.sentinels()[rng.random_range(0..watched.sentinels().len())];
                sentinel.stop();
                thread::sleep(some_time(rng, 50, 2_000));
                sentinel.cont();
            }
            other => panic!("not of this kind: {other:?}"),
        }
    }

    fn left(&self) -> Vec<String> {
        lock_keys(self.0.primary())
    }
}
