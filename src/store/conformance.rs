//! Compares the Lua scripts with the reference. The same commands go to [`MemoryCore`] and, through
//! the store of a primary or of a cluster, to a real server. Every reply, every push and the state
//! of the keys after each command are compared.
//!
//! Time plays no part: leases last for minutes and end only by deletion. Tokens are compared
//! exactly. All non-zero floors lie above the server's time, so the server's clock never raises a
//! counter.

mod commands;

use std::time::Duration;

use commands::{Command, FLOOR, Given, KEYS, Lock, MANAGERS, command, numbered};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use redis::{FromRedisValue, PushInfo, PushKind};
use support::{Cluster, PATIENCE, RedisServer};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::clock::Moment;
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::protocol::{
    Acquire, AcquireKind, AcquireReply, Push, QueuePosition, Release, ReleaseReply, RenewReply, Renewal,
};
use crate::store::memory::{MemoryCore, Terms};
use crate::store::redis::Compared;
use crate::store::redis::claim::{Claim, ClaimKind, Claimed};
use crate::store::{Holder, KeyState, Priority};

/// How much remaining times may differ. All TTLs differ by more.
const SLACK: Duration = Duration::from_secs(40);
/// The TTL of a lease whose new owner can't be notified, in the reference and in the scripts. The
/// real one would end while this test is paused on a busy machine.
const UNNOTIFIED_LEASE: Duration = Duration::from_secs(200);

/// A reply of any kind, with times in a comparable form.
#[derive(Debug, Clone, PartialEq)]
enum Reply {
    Acquired(AcquireReply),
    Released(ReleaseReply),
    Claimed(Claimed),
    Renewed(Vec<RenewReply>),
    None,
}

/// The reference and the server, in the same state.
struct Pair {
    managers: Vec<ManagerId>,
    keys: Vec<LockKey>,
    core: MemoryCore,
    stores: Vec<Box<dyn Compared>>,
    control: redis::aio::MultiplexedConnection,
    inboxes: redis::aio::MultiplexedConnection,
    pushes: UnboundedReceiver<PushInfo>,
    /// Whether the server counts the subscriptions of the inboxes. Those at a replica receive its
    /// messages as well, but it does not count them.
    counts_inboxes: bool,
    /// The prefix of the pub/sub commands.
    sharded: &'static str,
}

const SYNC: &str = "everything before this was received";

fn reference() -> MemoryCore {
    let mut core = MemoryCore::default();
    core.unnotified_lease = Some(UNNOTIFIED_LEASE);
    core
}

impl Pair {
    /// Connects to the server at `url`. In a cluster, channels are sharded.
    async fn new(url: &str, in_cluster: bool) -> Self {
        Self::with_inboxes_at(url, url, in_cluster).await
    }

    async fn with_inboxes_at(inbox_url: &str, url: &str, in_cluster: bool) -> Self {
        let managers: Vec<ManagerId> = (0..MANAGERS)
            .map(|number| ManagerId::of("h", 1, number as u64))
            .collect();
        crate::store::redis::with_unnotified_lease(UNNOTIFIED_LEASE);
        let mut stores = Vec::new();
        for manager in &managers {
            stores.push(crate::store::redis::for_comparison(url, in_cluster, manager).await);
        }
        let open = |url: &str| redis::Client::open(format!("{url}?protocol=resp3")).unwrap();
        let (sender, pushes) = tokio::sync::mpsc::unbounded_channel();
        // The client's own limits are a second and half a second, which a busy machine exceeds.
        let config = redis::AsyncConnectionConfig::new()
            .set_connection_timeout(Some(PATIENCE))
            .set_response_timeout(Some(PATIENCE));
        let connect = async |url: &str, config| {
            open(url)
                .get_multiplexed_async_connection_with_config(&config)
                .await
                .unwrap()
        };
        let control = connect(url, config.clone()).await;
        let inboxes = connect(inbox_url, config.set_push_sender(sender)).await;
        let mut pair = Self {
            managers,
            keys: KEYS.iter().map(|key| LockKey::new(key).unwrap()).collect(),
            core: reference(),
            stores,
            control,
            inboxes,
            pushes,
            counts_inboxes: inbox_url == url,
            sharded: if in_cluster { "S" } else { "" },
        };
        pair.on_channel("SUBSCRIBE", SYNC).await;
        pair
    }

    async fn on_channel(&mut self, verb: &str, channel: &str) {
        let mut command = redis::cmd(&format!("{}{verb}", self.sharded));
        command.arg(channel).exec_async(&mut self.inboxes).await.unwrap();
    }

    async fn reset(&mut self) {
        self.core = reference();
        redis::cmd("FLUSHALL").exec_async(&mut self.control).await.unwrap();
        for manager in 0..MANAGERS {
            self.listen(manager, true).await;
        }
    }

    async fn listen(&mut self, manager: usize, listens: bool) {
        let is_counted = listens && self.counts_inboxes;
        self.core.set_subscribed(self.managers[manager].as_str(), is_counted);
        let verb = if listens { "SUBSCRIBE" } else { "UNSUBSCRIBE" };
        for inbox in self.stores[manager].inboxes(&self.keys) {
            self.on_channel(verb, &inbox).await;
        }
        self.stores[manager].inboxes_changed();
    }

    /// What the server has pushed so far, and to which manager.
    async fn received(&mut self) -> Vec<(String, Push)> {
        let mut sync = redis::cmd(&format!("{}PUBLISH", self.sharded));
        sync.arg(SYNC).arg("").exec_async(&mut self.control).await.unwrap();
        let mut received = Vec::new();
        while let Some(PushInfo { kind, data }) = self.pushes.recv().await {
            if !matches!(kind, PushKind::Message | PushKind::SMessage) {
                continue;
            }
            let text = |index: usize| String::from_redis_value(data[index].clone()).unwrap();
            let (channel, message) = (text(0), text(1));
            if channel == SYNC {
                break;
            }
            let manager = channel.rsplit(':').next().unwrap().to_owned();
            received.push((manager, crate::store::redis::read_push(&message).unwrap()));
        }
        received
    }

    /// Executes the command in the reference.
    fn refer(&mut self, command: &Command) -> Reply {
        let now = Moment::default();
        let terms = |given: Given| Terms {
            now,
            server_time: 0,
            ttl: given.ttl,
            tokens: given.tokens,
            floor: given.floor,
        };
        let owner_tag = |manager: usize, cycle: u64| self.managers[manager].owner_tag(numbered(cycle)).to_string();
        match command {
            Command::Acquire {
                lock,
                kind,
                terms: given,
            } => {
                let (key, me) = (&self.keys[lock.key], owner_tag(lock.manager, lock.cycle));
                let is_free = self.core.owners(key, now).is_empty() && self.core.queue(key).is_empty();
                Reply::Acquired(match kind {
                    // By a script in a cluster, which reserves tokens only if the key is free.
                    AcquireKind::Fast if !self.sharded.is_empty() => match is_free {
                        true => self.core.acquire(key, &me, true, terms(*given)),
                        false => AcquireReply::Taken,
                    },
                    AcquireKind::Fast => self.core.acquire_fast(key, &me, terms(*given)),
                    AcquireKind::Enqueue => self.core.acquire(key, &me, false, terms(*given)),
                    AcquireKind::Try => self.core.acquire(key, &me, true, terms(*given)),
                    AcquireKind::Extend => self.core.acquire_extension(key, &me, terms(*given)),
                })
            }
            Command::Release {
                lock,
                requeue,
                terms: given,
            } => {
                let next = requeue.map(|next| owner_tag(lock.manager, next));
                let me = owner_tag(lock.manager, lock.cycle);
                // A lease that is passed on gets the TTL of the cycle that receives it.
                let ttl = requeue.map_or(Duration::ZERO, |next| numbered(next).ttl());
                let terms = terms(Given { ttl, ..*given });
                Reply::Released(self.core.release(&self.keys[lock.key], &me, next.as_deref(), terms))
            }
            Command::Retire {
                lock,
                rest,
                terms: given,
            } => {
                let (key, me) = (&self.keys[lock.key], owner_tag(lock.manager, lock.cycle));
                let retired = self.managers[lock.manager].owner_tag(numbered(lock.cycle).retired());
                let is_retired = self.core.retire(key, &me, &retired.to_string(), now, now + *rest);
                let terms = terms(Given {
                    ttl: Duration::ZERO,
                    ..*given
                });
                Reply::Released(match is_retired {
                    true => ReleaseReply::HELD,
                    false => self.core.release(key, &me, None, terms),
                })
            }
            Command::Claim {
                lock,
                kind,
                at_least,
                terms: given,
            } => {
                let (key, me) = (&self.keys[lock.key], owner_tag(lock.manager, lock.cycle));
                Reply::Claimed(self.core.claim(key, &me, *kind, *at_least, terms(*given)))
            }
            Command::Renew { manager, leases } => {
                let mut replies = Vec::new();
                for &(key, cycle, ttl) in leases {
                    let me = owner_tag(*manager, cycle);
                    replies.push(self.core.renew(&self.keys[key], &me, now, ttl));
                }
                Reply::Renewed(replies)
            }
            Command::Put { key, owner, ttl } => {
                self.core.put(&self.keys[*key], owner, ttl.map(|ttl| now + ttl));
                Reply::None
            }
            Command::Delete { key } => {
                self.core.delete(&self.keys[*key]);
                Reply::None
            }
            Command::Listen { .. } => Reply::None,
        }
    }

    /// Executes the command on the server.
    async fn serve(&mut self, command: &Command) -> Reply {
        match *command {
            Command::Acquire { lock, kind, terms } => {
                let store = &self.stores[lock.manager];
                let key = self.keys[lock.key].clone();
                store.set_floor(&key, terms.floor);
                let request = Acquire {
                    key,
                    cycle: numbered(lock.cycle),
                    kind,
                    ttl: terms.ttl,
                    tokens: terms.tokens,
                };
                Reply::Acquired(store.acquire(request).await.unwrap().reply)
            }
            Command::Release { lock, requeue, terms } => {
                let store = &self.stores[lock.manager];
                let key = self.keys[lock.key].clone();
                store.set_floor(&key, terms.floor);
                let request = Release {
                    key,
                    cycle: numbered(lock.cycle),
                    requeue: requeue.map(numbered),
                    // Only a hint: whether it is right must make no difference.
                    nobody_waits: requeue.is_none() && lock.cycle % 2 == 0,
                    tokens: terms.tokens,
                    retire_until: None,
                };
                // Both classes of connection must work.
                let priority = if lock.cycle % 2 == 0 {
                    Priority::Foreground
                } else {
                    Priority::Background
                };
                Reply::Released(store.release(priority, request).await.unwrap().reply)
            }
            Command::Retire { lock, rest, terms } => {
                let store = &self.stores[lock.manager];
                let key = self.keys[lock.key].clone();
                store.set_floor(&key, terms.floor);
                let request = Release {
                    key,
                    cycle: numbered(lock.cycle),
                    requeue: None,
                    nobody_waits: lock.cycle % 2 == 0,
                    tokens: terms.tokens,
                    retire_until: Some(Moment::now() + rest),
                };
                Reply::Released(store.release(Priority::Foreground, request).await.unwrap().reply)
            }
            Command::Claim {
                lock,
                kind,
                at_least,
                terms,
            } => {
                let store = &self.stores[lock.manager];
                let key = self.keys[lock.key].clone();
                store.set_floor(&key, terms.floor);
                let claim = Claim {
                    key,
                    cycle: numbered(lock.cycle),
                    ttl: terms.ttl,
                    at_least,
                    kind,
                };
                Reply::Claimed(store.claim(claim).await.unwrap())
            }
            Command::Renew { manager, ref leases } => {
                let renewal = |&(key, cycle, ttl): &(usize, u64, Duration)| Renewal {
                    key: self.keys[key].clone(),
                    cycle: numbered(cycle),
                    ttl,
                };
                let batch = leases.iter().map(renewal).collect();
                let replies = self.stores[manager]
                    .renew(batch, Duration::from_secs(20))
                    .await
                    .unwrap();
                Reply::Renewed(replies.into_iter().map(Option::unwrap).collect())
            }
            Command::Put { key, ref owner, ttl } => {
                let mut put = redis::cmd("SET");
                put.arg(self.stores[0].lease_name(&self.keys[key])).arg(owner);
                if let Some(ttl) = ttl {
                    put.arg("PX").arg(ttl.as_millis() as u64);
                }
                put.exec_async(&mut self.control).await.unwrap();
                Reply::None
            }
            Command::Delete { key } => {
                let name = self.stores[0].lease_name(&self.keys[key]);
                redis::cmd("DEL").arg(name).exec_async(&mut self.control).await.unwrap();
                Reply::None
            }
            Command::Listen { manager, listens } => {
                self.listen(manager, listens).await;
                Reply::None
            }
        }
    }

    /// Executes the commands on both sides and compares the results.
    async fn compare(&mut self, commands: &[Command]) -> Result<(), TestCaseError> {
        self.reset().await;
        for (number, command) in commands.iter().enumerate() {
            let expected = self.refer(command);
            let reply = self.serve(command).await;
            prop_assert!(
                same_reply(&expected, &reply),
                "command {number} {command:?}:\nreference {expected:?}\nserver    {reply:?}"
            );
            let expected = in_order(std::mem::take(&mut self.core.outbox));
            let mut received = in_order(self.received().await);
            if !self.counts_inboxes {
                // All others are hints, for which nobody needs to be counted.
                received.retain(|(_, push)| matches!(push, Push::Granted { .. }));
            }
            prop_assert_eq!(expected, received, "pushes of command {} {:?}", number, command);
            for key in 0..KEYS.len() {
                let key = self.keys[key].clone();
                let expected = self.core.inspect(&key, Moment::default());
                let found = self.stores[0].inspect(key).await.unwrap();
                prop_assert!(
                    same_inspection(&expected, &found),
                    "after command {number} {command:?}:\nreference {expected:?}\nserver    {found:?}"
                );
            }
        }
        Ok(())
    }
}

/// The order in which several holders are notified of a waiter does not matter.
fn in_order(mut pushes: Vec<(String, Push)>) -> Vec<(String, Push)> {
    pushes.sort_by_key(|(manager, push)| match push {
        Push::RemoteWaiter { cycle, .. } => format!("{manager}:{cycle}"),
        _ => String::new(),
    });
    pushes
}

/// The server's time is a little shorter, since time passes there.
fn same_time(expected: Option<Duration>, found: Option<Duration>) -> bool {
    match (expected, found) {
        (Some(expected), Some(found)) => found <= expected && expected - found < SLACK,
        (None, None) => true,
        _ => false,
    }
}

fn same_acquired(expected: &AcquireReply, found: &AcquireReply) -> bool {
    match (expected, found) {
        (AcquireReply::Queued(expected), AcquireReply::Queued(found)) => {
            let timeless = |position: &QueuePosition| QueuePosition {
                owner_ttl: None,
                ..*position
            };
            same_time(expected.owner_ttl, found.owner_ttl) && timeless(expected) == timeless(found)
        }
        _ => expected == found,
    }
}

fn same_reply(expected: &Reply, found: &Reply) -> bool {
    match (expected, found) {
        (Reply::Acquired(expected), Reply::Acquired(found)) => same_acquired(expected, found),
        (Reply::Released(expected), Reply::Released(found)) => {
            let same_requeued = match (&expected.requeued, &found.requeued) {
                (Some(expected), Some(found)) => same_acquired(expected, found),
                (None, None) => true,
                _ => false,
            };
            expected.held == found.held && same_requeued
        }
        _ => expected == found,
    }
}

fn same_inspection(expected: &KeyState, found: &KeyState) -> bool {
    // Holders are listed by the end of their leases. Equal ends in the reference differ a little on
    // the server.
    let by_owner = |inspection: &KeyState| {
        let mut holders = inspection.holders.clone();
        holders.sort_by(|one, other| one.owner.cmp(&other.owner));
        inspection
            .holder
            .iter()
            .cloned()
            .chain(holders)
            .collect::<Vec<Holder>>()
    };
    let (holders, found_holders) = (by_owner(expected), by_owner(found));
    let timeless = |inspection: &KeyState| KeyState {
        holder: None,
        holders: Vec::new(),
        ..inspection.clone()
    };
    let same_holder = |(one, other): (&Holder, &Holder)| {
        let timeless = |holder: &Holder| Holder {
            remaining: None,
            ..holder.clone()
        };
        same_time(one.remaining, other.remaining) && timeless(one) == timeless(other)
    };
    expected.holder.is_some() == found.holder.is_some()
        && holders.len() == found_holders.len()
        && holders.iter().zip(&found_holders).all(same_holder)
        && timeless(expected) == timeless(found)
}

/// A cluster raises counters that are below the server's clock.
fn as_in_a_cluster(command: Command) -> Command {
    let after_now = |terms: Given| Given {
        floor: terms.floor.max(FLOOR),
        ..terms
    };
    match command {
        Command::Acquire { lock, kind, terms } => Command::Acquire {
            lock,
            kind,
            terms: after_now(terms),
        },
        Command::Release { lock, requeue, terms } => Command::Release {
            lock,
            requeue,
            terms: after_now(terms),
        },
        Command::Retire { lock, rest, terms } => Command::Retire {
            lock,
            rest,
            terms: after_now(terms),
        },
        // A cluster is no node of a quorum.
        Command::Claim { lock, terms, .. } => Command::Release {
            lock,
            requeue: None,
            terms: after_now(terms),
        },
        other => other,
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

fn compare(url: &str, in_cluster: bool) {
    compare_with_inboxes_at(url, url, in_cluster);
}

fn compare_with_inboxes_at(inbox_url: &str, url: &str, in_cluster: bool) {
    let runtime = runtime();
    let pair = runtime.block_on(Pair::with_inboxes_at(inbox_url, url, in_cluster));
    let pair = std::cell::RefCell::new(pair);
    // More of them than usual: PROPTEST_CASES.
    let cases = match std::env::var_os("PROPTEST_CASES") {
        Some(_) => Config::default().cases,
        None => 128,
    };
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let command = command().prop_map(move |command| if in_cluster { as_in_a_cluster(command) } else { command });
    let commands = prop::collection::vec(command, 10..60);
    let result = TestRunner::new(config).run(&commands, |commands| {
        runtime.block_on(pair.borrow_mut().compare(&commands))
    });
    if let Err(difference) = result {
        panic!("{difference}");
    }
}

/// The stack of a comparison: without optimizations, the futures of all commands together take more
/// than a test has.
const STACK: usize = 16 << 20;

fn with_a_large_stack(comparison: impl FnOnce() + Send) {
    std::thread::scope(|scope| {
        let comparing = std::thread::Builder::new()
            .stack_size(STACK)
            .spawn_scoped(scope, comparison);
        if let Err(panic) = comparing.unwrap().join() {
            std::panic::resume_unwind(panic);
        }
    });
}

/// A node of a quorum that was the sequencer before has the cycle in its queue when it is claimed.
/// It was served once more when it was released: a grant was pushed for a lease that was then
/// deleted.
#[test]
fn claimed_cycle_leaves_the_queue() {
    let server = RedisServer::start();
    let (lock, terms) = (
        Lock {
            manager: 0,
            key: 0,
            cycle: 4,
        },
        Given {
            ttl: Duration::from_secs(100),
            tokens: 1,
            floor: 0,
        },
    );
    let commands = [
        Command::Put {
            key: 0,
            owner: "another-library".to_owned(),
            ttl: None,
        },
        Command::Acquire {
            lock,
            kind: AcquireKind::Enqueue,
            terms,
        },
        Command::Delete { key: 0 },
        Command::Claim {
            lock,
            kind: ClaimKind::Take,
            at_least: 0,
            terms,
        },
        Command::Release {
            lock,
            requeue: None,
            terms,
        },
    ];
    with_a_large_stack(|| {
        let runtime = runtime();
        let mut pair = runtime.block_on(Pair::new(&server.url(), false));
        runtime.block_on(pair.compare(&commands)).unwrap();
        assert_eq!(pair.core.owners(&pair.keys[0], Moment::default()), [""; 0]);
    });
}

#[test]
fn scripts_agree_with_the_reference() {
    with_a_large_stack(|| compare(&RedisServer::start().url(), false));
}

/// Regression: a primary's messages also reach the subscribers of its replicas, which it does not
/// count. A grant was delivered to a waiter that was passed over, and the next waiter got the same
/// tokens.
#[test]
fn scripts_agree_with_the_reference_while_the_inboxes_are_at_a_replica() {
    let (primary, replica) = (RedisServer::start(), RedisServer::start());
    replica.command(&["REPLICAOF", "127.0.0.1", &primary.port().to_string()]);
    support::wait::wait_until("the replica is in sync", PATIENCE, || {
        replica
            .query::<String>(&["INFO", "replication"])
            .contains("master_link_status:up")
    });
    with_a_large_stack(|| compare_with_inboxes_at(&replica.url(), &primary.url(), false));
}

#[test]
fn cluster_scripts_agree_with_the_reference() {
    with_a_large_stack(|| compare(&Cluster::start(1, 0).nodes()[0].url(), true));
}
