//! Load on a Redis Cluster while slots migrate back and forth, and in one test a primary dies. No
//! two holders overlap, tokens grow, and every waiter is served.
//!
//! Each runs for `SHARDLOCK_TEST_CLUSTER_SECONDS`, 15 by default with a failover, 6 without.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardlock::LockManager;
use shardlock::introspect::Slot;
use support::{Cluster, PATIENCE};
use support_locks::{lock, until};
use tokio::task::JoinSet;

const MANAGERS: usize = 6;
const KEYS: usize = 24;

/// What differs between the tests.
struct Load {
    seconds: u64,
    tasks_each: usize,
    /// The number of slots of the keys.
    slots: usize,
    /// With a replica for each primary, which acknowledges each lease: without, a failover may lose
    /// the last leases.
    is_replicated: bool,
}

/// The number of current holders, and the last holder's token.
#[derive(Default)]
struct Ledger {
    inside: AtomicU64,
    last_token: AtomicU64,
    entered: AtomicU64,
}

#[derive(Default)]
struct Findings {
    overlaps: AtomicU64,
    out_of_order: AtomicU64,
    errors: AtomicU64,
    lost: AtomicU64,
    longest_wait_ms: AtomicU64,
}

impl Load {
    fn key(&self, number: usize) -> String {
        format!("{{load-{}}}{number}", number % self.slots)
    }
}

fn slot(key: &str) -> u16 {
    Slot::of(format!("lock:{key}").as_bytes()).number()
}

/// Locks one key after the other until the end.
async fn work(
    load: &Load,
    locks: LockManager,
    mut number: usize,
    ledgers: Arc<Vec<Ledger>>,
    findings: Arc<Findings>,
    over: Arc<AtomicBool>,
) {
    while !over.load(Ordering::Relaxed) {
        // Each task visits the keys in its own order, and half of the visits go to the first few
        // keys.
        number = number
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let place = (number >> 33) % if number >> 63 == 0 { KEYS } else { 4 };
        let ledger = &ledgers[place];
        let asked = Instant::now();
        let guard = match locks.lock(load.key(place)).await {
            Ok(guard) => guard,
            Err(error) => {
                eprintln!("{error}");
                findings.errors.fetch_add(1, Ordering::Relaxed);
                continue;
            }
        };
        let waited = asked.elapsed().as_millis() as u64;
        findings.longest_wait_ms.fetch_max(waited, Ordering::Relaxed);
        if ledger.inside.fetch_add(1, Ordering::SeqCst) > 0 {
            findings.overlaps.fetch_add(1, Ordering::Relaxed);
        }
        let token = guard.token().get();
        if ledger.last_token.fetch_max(token, Ordering::SeqCst) >= token {
            findings.out_of_order.fetch_add(1, Ordering::Relaxed);
        }
        ledger.entered.fetch_add(1, Ordering::Relaxed);
        tokio::time::sleep(Duration::from_millis((number >> 40) as u64 % 3)).await;
        ledger.inside.fetch_sub(1, Ordering::SeqCst);
        if let Err(error) = guard.release().await {
            eprintln!("{error}");
            findings.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Migrates the slots of the keys back and forth until the deadline, and at least once. Returns the
/// number of migrations.
fn migrate(load: &Load, cluster: &Cluster, until: Instant) -> u64 {
    let mut owners: HashMap<u16, usize> = (0..KEYS)
        .map(|number| slot(&load.key(number)))
        .map(|slot| (slot, cluster.owner(slot)))
        .collect();
    let nodes = cluster.owners();
    let mut moved = 0;
    loop {
        for (slot, from) in &mut owners {
            let here = nodes.iter().position(|node| node == from).expect("an owner");
            let to = nodes[(here + 1 + moved as usize % 2) % nodes.len()];
            cluster.begin_migration(*slot, *from, to);
            cluster.move_keys(*slot, *from, to);
            cluster.finish_migration(*slot, *from, to);
            *from = to;
            moved += 1;
            std::thread::sleep(Duration::from_millis(20));
        }
        if Instant::now() >= until {
            return moved;
        }
    }
}

#[test]
fn holders_never_overlap_and_waiters_are_served_while_slots_move_and_a_primary_dies() {
    let _alone = super::LANES[1].lock();
    contend(&Load {
        seconds: 15,
        tasks_each: 8,
        slots: KEYS,
        is_replicated: true,
    });
}

/// Without acknowledgements, free locks in busy slots need no script.
#[test]
fn holders_never_overlap_and_tokens_grow_while_slots_move_beside_plain_commands() {
    let _alone = super::LANES[0].lock();
    let cluster = contend(&Load {
        seconds: 6,
        tasks_each: 2,
        slots: 4,
        is_replicated: false,
    });
    let plain: u64 = cluster.alive().map(|node| node.calls("incrby")).sum();
    assert!(plain > 0, "no plain command was sent");
}

#[tokio::main(worker_threads = 2)]
async fn contend(load: &'static Load) -> Arc<Cluster> {
    let seconds = std::env::var("SHARDLOCK_TEST_CLUSTER_SECONDS");
    let seconds = seconds.map_or(load.seconds, |seconds| seconds.parse().expect("a number"));
    let cluster = Arc::new(Cluster::start(3, if load.is_replicated { 3 } else { 0 }));
    let (ledgers, findings): (Arc<Vec<Ledger>>, Arc<Findings>) =
        (Arc::new((0..KEYS).map(|_| Ledger::default()).collect()), Arc::default());
    let over = Arc::new(AtomicBool::new(false));
    let mut tasks = JoinSet::new();
    let mut managers = Vec::new();
    for manager in 0..MANAGERS {
        let locks = LockManager::builder()
            .shard(cluster.url())
            .store_timeout(Duration::from_secs(15))
            .min_replicas_acked(load.is_replicated.into())
            .connect()
            .await
            .expect("connect");
        for task in 0..load.tasks_each {
            let (ledgers, findings, over) = (Arc::clone(&ledgers), Arc::clone(&findings), Arc::clone(&over));
            let number = 1 + manager * load.tasks_each + task;
            tasks.spawn(work(load, locks.clone(), number, ledgers, findings, over));
        }
        managers.push(locks);
    }
    // Held throughout, one in the slot of each key.
    let mut kept = Vec::new();
    for number in 0..KEYS {
        let key = format!("{}-kept", load.key(number));
        kept.push(lock(&managers[number % MANAGERS], &key).await);
    }

    let chaos = tokio::task::spawn_blocking({
        let cluster = Arc::clone(&cluster);
        move || {
            let started = Instant::now();
            let part = Duration::from_secs(seconds) / 3;
            let before = migrate(load, &cluster, started + part);
            cluster.wait_until_in_order();
            if !load.is_replicated {
                let after = migrate(load, &cluster, started + 3 * part);
                return (before, after, started.elapsed());
            }
            let killed = Instant::now();
            let (dead, heir) = cluster.fail_over(slot(&load.key(0)));
            let failover = killed.elapsed();
            cluster.nodes()[dead].restart();
            cluster.wait_until_in_order();
            let after = migrate(load, &cluster, (started + 3 * part).max(Instant::now() + part / 2));
            println!("node {dead} was killed; node {heir} took over after {failover:?}");
            (before, after, started.elapsed())
        }
    });
    let (before, after, took) = chaos.await.expect("the trouble");
    over.store(true, Ordering::Relaxed);
    let everybody = async {
        while let Some(ended) = tasks.join_next().await {
            ended.expect("a task")
        }
    };
    let all_served = tokio::time::timeout(PATIENCE, everybody).await.is_ok();

    let count = |number: &AtomicU64| number.load(Ordering::Relaxed);
    let entered: u64 = ledgers.iter().map(|ledger| count(&ledger.entered)).sum();
    println!(
        "{took:?}: {entered} locks by {} tasks of {MANAGERS} managers on {KEYS} keys; {before} slots moved, then {after}; \
         overlapping holders {}, tokens out of order {}, errors {}, lost {}, longest wait {} ms, all served: {all_served}",
        MANAGERS * load.tasks_each,
        count(&findings.overlaps),
        count(&findings.out_of_order),
        count(&findings.errors),
        count(&findings.lost),
        count(&findings.longest_wait_ms),
    );
    assert!(all_served, "some waiter was never served");
    assert_eq!(count(&findings.overlaps), 0, "overlapping holders");
    assert_eq!(count(&findings.out_of_order), 0, "tokens out of order");
    assert_eq!(count(&findings.errors), 0, "errors of waiters");
    assert_eq!(count(&findings.lost), 0, "locks lost");
    assert!(
        ledgers.iter().all(|ledger| count(&ledger.entered) > 0),
        "every key was locked"
    );
    assert!(before > 0 && after > 0, "slots moved");
    for guard in kept {
        assert!(guard.is_valid(), "{:?} was lost", guard.key());
        guard.release().await.expect("release");
    }
    until("nothing is left", async || {
        cluster
            .keys()
            .iter()
            .all(|key| key.starts_with("lock:%map") || key.starts_with("lock:%fence:"))
    })
    .await;
    for locks in &managers {
        locks.shutdown().await.ok();
    }
    drop(managers);
    until("no channel is left", async || cluster.shard_channels().is_empty()).await;
    cluster
}
