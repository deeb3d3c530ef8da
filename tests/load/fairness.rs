//! No waiter starves: processes take turns, regardless of their number and of the number of waiting
//! tasks in each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardlock::config::Builder;
use support::worker::{self, Worker};
use support_locks::{TestStore, builder_of, lock, on_each_store, poll_once, soon, until, until_queued};
use tokio::task::JoinSet;

use super::ALONE;

/// Locks repeatedly in `SHARDLOCK_TEST_TASKS` tasks until the test sends `stop`. Reports the number
/// of acquisitions on each request.
#[tokio::main]
pub(crate) async fn contend(me: &worker::Current) {
    let locks = builder_of(me).connect().await.expect("connect");
    let tasks: usize = me.var("SHARDLOCK_TEST_TASKS").parse().expect("a number");
    let over = Arc::new(AtomicBool::new(false));
    let had = Arc::new(AtomicU64::new(0));
    let mut contending = JoinSet::new();
    for _ in 0..tasks {
        let (locks, over, had) = (locks.clone(), Arc::clone(&over), Arc::clone(&had));
        contending.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let guard = lock(&locks, "k").await;
                had.fetch_add(1, Ordering::Relaxed);
                // Simulated work under the lock.
                tokio::time::sleep(Duration::from_millis(1)).await;
                guard.release().await.expect("release");
            }
        });
    }
    let told = tokio::task::spawn_blocking({
        let (me, had) = (me.clone(), Arc::clone(&had));
        move || {
            while me.hear().expect("the test sends a line") == COUNT {
                me.say(had.load(Ordering::Relaxed).to_string());
            }
        }
    });
    told.await.expect("listen");
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = contending.join_next().await {
        ended.expect("a task");
    }
    me.say(had.load(Ordering::Relaxed).to_string());
}

/// The lines that request the number of acquisitions and that stop a contender.
const COUNT: &str = "count";
const STOP: &str = "stop";

/// Minimum duration of the contention, and the minimum number of acquisitions by all processes
/// together. With fewer, on a slow machine or server, the shares mean nothing.
const CONTEND: Duration = Duration::from_secs(2);
const TURNS_MIN: u64 = 400;

/// Number of acquisitions of each process while they contend with `tasks[i]` tasks each.
async fn shares(store: &TestStore, tasks: &[usize]) -> Vec<u64> {
    let watcher = store.manager().await;
    let guard = lock(&watcher, "k").await;
    let mut contenders: Vec<_> = tasks
        .iter()
        .map(|tasks| store.worker("contender", &[("SHARDLOCK_TEST_TASKS", &tasks.to_string())]))
        .collect();
    until_queued(&watcher, "k", tasks.len() as u64).await;
    guard.release().await.expect("release");
    // Count while all processes contend: the last one to stop has the key to itself.
    let mut shares = Vec::new();
    until("there were enough turns", async || {
        tokio::time::sleep(CONTEND).await;
        shares = turns_of(&mut contenders, COUNT);
        shares.iter().sum::<u64>() >= TURNS_MIN
    })
    .await;
    turns_of(&mut contenders, STOP);
    shares
}

/// Sends a line to all contenders and returns the number of acquisitions of each.
fn turns_of(contenders: &mut [Worker], line: &str) -> Vec<u64> {
    for contender in &mut *contenders {
        contender.send(line);
    }
    contenders
        .iter()
        .map(|contender| contender.line().parse().expect("a number"))
        .collect()
}

on_each_store! {
    on(servers);

    async fn the_least_lucky_of_many_processes_gets_nearly_what_the_luckiest_gets(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let shares = shares(store, &[1; 12]).await;
        let (least, most) = (shares.iter().min().expect("some"), shares.iter().max().expect("some"));
        // On an idle machine they differ by one or two. A process without processor time misses
        // some turns.
        assert!(*least >= 10 && *least * 10 >= *most * 7, "{shares:?}");
    }

    async fn a_process_with_one_task_is_not_starved_by_one_with_many(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let shares = shares(store, &[1, 100]).await;
        // The single task gets a turn after each 10 ms slice of the other process.
        assert!(shares[0] >= 20, "{shares:?}");
        // The other process is not slowed down to the pace of the single task.
        assert!(shares[1] > shares[0], "{shares:?}");
    }
}

const TASKS: usize = 24;

/// The order in which the managers acquired the lock, with [`TASKS`] waiting tasks each.
async fn turns(
    store: &TestStore,
    managers: usize,
    hold: Duration,
    settings: impl Fn(Builder) -> Builder,
) -> Vec<usize> {
    let watcher = store.manager().await;
    let guard = lock(&watcher, "k").await;
    let turns = Arc::new(Mutex::new(Vec::new()));
    let mut tasks = JoinSet::new();
    for manager in 0..managers {
        let locks = settings(store.builder()).connect().await.expect("connect");
        for _ in 0..TASKS {
            let (locks, turns) = (locks.clone(), Arc::clone(&turns));
            let mut waiting = Box::pin(async move {
                let guard = lock(&locks, "k").await;
                turns.lock().push(manager);
                if !hold.is_zero() {
                    tokio::time::sleep(hold).await;
                }
                guard.release().await.expect("release");
            });
            // The first poll enqueues the request.
            assert!(poll_once(&mut waiting).is_none());
            tasks.spawn(waiting);
        }
        until_queued(&watcher, "k", manager as u64 + 1).await;
    }
    guard.release().await.expect("release");
    while let Some(ended) = soon("the tasks", tasks.join_next()).await {
        ended.expect("a task");
    }
    let turns = turns.lock().clone();
    assert_eq!(turns.len(), managers * TASKS);
    turns
}

/// The lengths of the runs of consecutive acquisitions by one manager.
fn runs(turns: &[usize]) -> Vec<usize> {
    turns
        .chunk_by(|left, right| left == right)
        .map(<[usize]>::len)
        .collect()
}

on_each_store! {
    async fn with_bursts_of_one_managers_alternate_strictly(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let turns = turns(store, 3, Duration::ZERO, |builder| builder.max_burst(1)).await;
        let expected: Vec<_> = (0..TASKS).flat_map(|_| 0..3).collect();
        assert_eq!(turns, expected);
    }

    async fn a_burst_is_as_long_as_it_may_be_and_no_longer(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let settings = |builder: Builder| builder.max_burst(4).max_slice(Duration::from_secs(10));
        let turns = turns(store, 2, Duration::ZERO, settings).await;
        assert_eq!(runs(&turns), [4; 2 * TASKS / 4]);
    }

    async fn a_slice_ends_a_burst(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let settings = |builder: Builder| builder.max_burst(1_000_000).max_slice(Duration::from_millis(20));
        let turns = turns(store, 2, Duration::from_millis(5), settings).await;
        // Each hold takes at least 5 ms, so a slice of 20 ms fits at most four; fewer on a loaded
        // machine.
        let mut runs = runs(&turns);
        // In the last run no other manager waits.
        runs.pop();
        assert!(runs.len() >= 5 && runs.into_iter().all(|run| run <= 4), "{turns:?}");
    }
}
