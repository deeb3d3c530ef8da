//! Servers of a kind and the workers on them, as what a round attacks.

use std::path::Path;
use std::time::Duration;

use rand::rngs::SmallRng;
use support_chaos::member::{Processes, end_all};
use support_chaos::worker::{self, PLACES, Settings};
use support_chaos::{Attacked, Fault, Member, Plan, Terms, nanos, some_time};

use super::scene::{self, Scene};

/// One worker at each place. Each place has its own network path to the servers.
pub struct Crew {
    scene: Box<dyn Scene>,
    processes: Processes,
    members: Vec<Member>,
}

impl Crew {
    /// Starts servers of the plan's kind and the workers.
    pub fn start(plan: &Plan<'_>, history: &Path) -> Box<dyn Attacked> {
        let scene = scene::start(plan.kind, plan.seed);
        let mut crew = Self {
            processes: Processes::new(history, plan.seed, scene.ttl()),
            scene,
            members: Vec::new(),
        };
        for place in 0..PLACES {
            let member = crew.start_worker(place);
            crew.members.push(member);
        }
        crew.members.iter().for_each(Member::wait_until_ready);
        Box::new(crew)
    }

    fn start_worker(&mut self, place: usize) -> Member {
        let settings = Settings {
            place,
            url: self.scene.url(place),
            longest_ttl: self.scene.longest_ttl(),
            replicas_acked: self.scene.replicas_acked(),
        };
        worker::start(&mut self.processes, settings)
    }
}

impl Attacked for Crew {
    fn terms(&self) -> Terms {
        Terms {
            ttl: nanos(self.scene.ttl()),
            is_confirmed: self.scene.is_confirmed(),
        }
    }

    fn faults(&self) -> &'static [Fault] {
        self.scene.faults()
    }

    fn choices(&self) -> usize {
        PLACES
    }

    fn victim(&self, fault: Fault, place: usize) -> String {
        match fault {
            Fault::KillWorker | Fault::StopWorker | Fault::BlockRuntime => self.members[place].name.clone(),
            _ => "-".to_owned(),
        }
    }

    fn strike(&mut self, fault: Fault, place: usize, rng: &mut SmallRng) {
        let longer_than_a_lease = 3 * self.scene.ttl().as_millis() as u64;
        match fault {
            Fault::KillWorker => {
                self.members[place].worker.kill();
                let member = self.start_worker(place);
                member.wait_until_ready();
                self.members[place] = member;
            }
            Fault::StopWorker => self.members[place].stop_for(some_time(rng, 50, longer_than_a_lease)),
            Fault::BlockRuntime => self.members[place].block_for(some_time(rng, 50, longer_than_a_lease)),
            fault => self.scene.strike(fault, rng),
        }
    }

    fn end(&mut self, within: Duration) -> Vec<String> {
        end_all(&mut self.members, within)
    }

    fn left(&self) -> Vec<String> {
        self.scene.left()
    }
}
