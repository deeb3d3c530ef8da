//! An agent with clients and workers with managers of their own, as what a round attacks.

use std::path::Path;
use std::thread;
use std::time::Duration;

use rand::rngs::SmallRng;
use support::{ClientType, RedisServer};
use support_chaos::member::{Processes, end_all};
use support_chaos::worker::{self, Settings};
use support_chaos::{Attacked, Fault, Member, Plan, Terms, nanos, some_time};
use support_locks::lock_keys;

use super::agent::Agent;
use super::client;

const TTL: Duration = Duration::from_secs(1);

const CLIENTS: usize = 3;
const WORKERS: usize = 2;

/// The names of the clients begin with it.
const CLIENT_PREFIX: &str = "agent-c";
/// All clients of the agent.
const ALL_CLIENTS: &str = "agent-*";

pub(super) struct Crew {
    server: RedisServer,
    agent: Agent,
    processes: Processes,
    clients: Vec<Member>,
    workers: Vec<Member>,
}

impl Crew {
    pub(super) fn start(plan: &Plan<'_>, history: &Path) -> Box<dyn Attacked> {
        // A killed server forgets nothing that it has answered: it writes before it answers. It
        // does not wait for the disk: a kill does not need that, and a slow disk costs leases.
        let server = RedisServer::start_with(&["--appendonly", "yes", "--appendfsync", "no"]);
        let mut crew = Self {
            agent: Agent::start(&server, TTL),
            server,
            processes: Processes::new(history, plan.seed, TTL),
            clients: Vec::new(),
            workers: Vec::new(),
        };
        crew.clients = (0..CLIENTS).map(|_| crew.start_client()).collect();
        crew.workers = (0..WORKERS).map(|place| crew.start_worker(place)).collect();
        crew.clients
            .iter()
            .chain(&crew.workers)
            .for_each(Member::wait_until_ready);
        Box::new(crew)
    }

    fn start_client(&mut self) -> Member {
        let socket = self.agent.socket().display().to_string();
        self.processes
            .start(client::NAME, CLIENT_PREFIX, &[("SHARDLOCK_TEST_SOCKET", socket)])
    }

    fn start_worker(&mut self, place: usize) -> Member {
        let settings = Settings {
            place,
            url: self.server.url(),
            longest_ttl: TTL,
            replicas_acked: 0,
        };
        worker::start(&mut self.processes, settings)
    }
}

impl Attacked for Crew {
    fn terms(&self) -> Terms {
        Terms {
            ttl: nanos(TTL),
            is_confirmed: false,
        }
    }

    /// What happens to the agent, to its clients, to others and to the server.
    fn faults(&self) -> &'static [Fault] {
        &[
            Fault::KillClient,
            Fault::StopClient,
            Fault::KillAgent,
            Fault::DrainAgent,
            Fault::StopAgent,
            Fault::KillWorker,
            Fault::StopWorker,
            Fault::BlockRuntime,
            Fault::HungServer,
            Fault::RestartServer,
            Fault::CutConnections,
            Fault::CutSubscriptions,
        ]
    }

    fn choices(&self) -> usize {
        CLIENTS * WORKERS
    }

    fn victim(&self, fault: Fault, choice: usize) -> String {
        match fault {
            Fault::KillClient | Fault::StopClient => self.clients[choice % CLIENTS].name.clone(),
            Fault::KillWorker | Fault::StopWorker | Fault::BlockRuntime => self.workers[choice % WORKERS].name.clone(),
            Fault::KillAgent | Fault::DrainAgent | Fault::StopAgent => ALL_CLIENTS.to_owned(),
            _ => "-".to_owned(),
        }
    }

    fn strike(&mut self, fault: Fault, choice: usize, rng: &mut SmallRng) {
        let longer_than_a_lease = 3 * TTL.as_millis() as u64;
        let (client, worker) = (choice % CLIENTS, choice % WORKERS);
        match fault {
            Fault::KillClient => {
                self.clients[client].worker.kill();
                let member = self.start_client();
                member.wait_until_ready();
                self.clients[client] = member;
            }
            Fault::StopClient => self.clients[client].stop_for(some_time(rng, 50, longer_than_a_lease)),
            Fault::KillAgent => {
                self.agent.kill();
                thread::sleep(some_time(rng, 10, longer_than_a_lease));
                self.agent.restart();
            }
            Fault::DrainAgent => {
                let ended = self.agent.drain();
                assert_eq!(ended.code, 0, "the agent has not released everything: {}", ended.stderr);
                self.agent.restart();
            }
            Fault::StopAgent => {
                self.agent.stop();
                thread::sleep(some_time(rng, 50, longer_than_a_lease));
                self.agent.cont();
            }
            Fault::KillWorker => {
                self.workers[worker].worker.kill();
                let member = self.start_worker(worker);
                member.wait_until_ready();
                self.workers[worker] = member;
            }
            Fault::StopWorker => self.workers[worker].stop_for(some_time(rng, 50, longer_than_a_lease)),
            Fault::BlockRuntime => self.workers[worker].block_for(some_time(rng, 50, longer_than_a_lease)),
            Fault::HungServer => {
                self.server.stop();
                thread::sleep(some_time(rng, 100, 4_000));
                self.server.cont();
            }
            Fault::RestartServer => {
                self.server.kill();
                thread::sleep(some_time(rng, 10, 1_500));
                self.server.restart();
            }
            Fault::CutConnections => drop(self.server.client_kill(ClientType::Normal)),
            Fault::CutSubscriptions => drop(self.server.client_kill(ClientType::PubSub)),
            other => panic!("not of an agent: {other:?}"),
        }
    }

    fn end(&mut self, within: Duration) -> Vec<String> {
        let mut members: Vec<Member> = self.clients.drain(..).chain(self.workers.drain(..)).collect();
        let mut late = end_all(&mut members, within);
        let ended = self.agent.drain();
        if ended.code != 0 {
            late.push(format!("the agent ended with {}: {}", ended.code, ended.stderr));
        }
        late
    }

    fn left(&self) -> Vec<String> {
        lock_keys(&self.server)
    }
}
