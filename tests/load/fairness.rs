//! No waiter starves: processes take turns, regardless of their number and of the number of waiting
//! tasks in each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::config::Builder;
use support::PATIENCE;
use support::worker::{self, Worker};
use support_locks::{TestStore, builder_of, lock, on_each_store, poll_once, soon, until, until_queued};
use tokio::task::JoinSet;

use super::ALONE;

/// Locks repeatedly in `SHARDLOCK_TEST_TASKS` tasks, for `SHARDLOCK_TEST_HOLD_MS` at a time, until
/// the test sends `stop`. Reports the number of acquisitions of each task on each request.
#[tokio::main]
pub(crate) async fn contend(me: &worker::Current) {
    let locks = builder_of(me).connect().await.expect("connect");
    let tasks: usize = me.var("SHARDLOCK_TEST_TASKS").parse().expect("a number");
    let hold = Duration::from_millis(me.var("SHARDLOCK_TEST_HOLD_MS").parse().expect("a number"));
    let over = Arc::new(AtomicBool::new(false));
    let had: Arc<[AtomicU64]> = (0..tasks).map(|_| AtomicU64::new(0)).collect();
    let mut contending = JoinSet::new();
    for task in 0..tasks {
        let (locks, over, had) = (locks.clone(), Arc::clone(&over), Arc::clone(&had));
        contending.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let guard = lock(&locks, "k").await;
                had[task].fetch_add(1, Ordering::Relaxed);
                // Simulated work under the lock.
                tokio::time::sleep(hold).await;
                guard.release().await.expect("release");
            }
        });
    }
    let count = move || {
        let had = had.iter().map(|count| count.load(Ordering::Relaxed).to_string());
        had.collect::<Vec<_>>().join(" ")
    };
    let told = tokio::task::spawn_blocking({
        let (me, count) = (me.clone(), count.clone());
        move || {
            while me.recv().expect("the test sends a line") == COUNT {
                me.send(count());
            }
        }
    });
    told.await.expect("listen");
    over.store(true, Ordering::Relaxed);
    while let Some(ended) = contending.join_next().await {
        ended.expect("a task");
    }
    me.send(count());
}

/// The lines that request the number of acquisitions and that stop a contender.
const COUNT: &str = "count";
const STOP: &str = "stop";

/// Minimum duration of the contention, the minimum number of acquisitions by all tasks together,
/// and by the average task. With fewer, on a slow machine or server, the shares mean nothing.
const CONTEND: Duration = Duration::from_secs(2);
const GUARDS_MIN: u64 = 400;
const ROUNDS_MIN: u64 = 10;

/// Number of acquisitions of each task of each process while they contend with `tasks[i]` tasks
/// each, and hold the lock for `hold_ms` at a time. A process without processor time misses some
/// turns. That matters less the longer they contend, so they may do so until the shares are fair.
async fn shares(
    store: &TestStore,
    tasks: &[u64],
    hold_ms: u64,
    are_fair: impl Fn(&[Vec<u64>]) -> bool,
) -> Vec<Vec<u64>> {
    let watcher = store.manager().await;
    let guard = lock(&watcher, "k").await;
    let hold_ms = hold_ms.to_string();
    let mut contenders: Vec<_> = tasks
        .iter()
        .map(|tasks| {
            let tasks = tasks.to_string();
            let variables = [
                ("SHARDLOCK_TEST_TASKS", tasks.as_str()),
                ("SHARDLOCK_TEST_HOLD_MS", hold_ms.as_str()),
            ];
            store.worker("contender", &variables)
        })
        .collect();
    until_queued(&watcher, "k", tasks.len() as u64).await;
    guard.release().await.expect("release");
    // Count while all processes contend: the last one to stop has the key to itself.
    let (mut shares, began) = (Vec::new(), Instant::now());
    until("there were enough turns", async || {
        tokio::time::sleep(CONTEND).await;
        shares = guards_of(&mut contenders, COUNT);
        let rounds = tasks.iter().sum::<u64>() * ROUNDS_MIN;
        let are_enough = shares.iter().flatten().sum::<u64>() >= GUARDS_MIN.max(rounds);
        are_enough && (are_fair(&shares) || began.elapsed() > PATIENCE * 3 / 4)
    })
    .await;
    guards_of(&mut contenders, STOP);
    shares
}

/// Sends a line to all contenders and returns the number of acquisitions of each of their tasks.
fn guards_of(contenders: &mut [Worker], line: &str) -> Vec<Vec<u64>> {
    for contender in &mut *contenders {
        contender.send(line);
    }
    let numbers = |line: String| {
        line.split(' ')
            .map(|number| number.parse().expect("a number"))
            .collect()
    };
    contenders.iter().map(|contender| numbers(contender.line())).collect()
}

/// The smallest and the largest share of a task.
fn extremes(shares: &[Vec<u64>]) -> (u64, u64) {
    let all = || shares.iter().flatten().copied();
    (all().min().expect("some"), all().max().expect("some"))
}

on_each_store! {
    on(servers);

    async fn many_processes_get_nearly_equal_shares(store: &TestStore) {
        let _alone = ALONE.lock().await;
        // On an idle machine they differ by one or two.
        let are_fair = |shares: &[Vec<u64>]| {
            let (least, most) = extremes(shares);
            least >= 10 && least * 10 >= most * 7
        };
        let shares = shares(store, &[1; 12], 1, are_fair).await;
        assert!(are_fair(&shares), "{shares:?}");
    }

    /// The 40 tasks of one process have about as much of the lock, each, as the task that is alone
    /// in the other process.
    async fn all_tasks_get_the_same_share_however_they_are_spread_over_processes(store: &TestStore) {
        let _alone = ALONE.lock().await;
        for tasks in [[20, 20], [40, 1]] {
            let are_fair = |shares: &[Vec<u64>]| {
                let (least, most) = extremes(shares);
                2 * most <= 3 * least
            };
            let shares = shares(store, &tasks, 5, are_fair).await;
            let (least, most) = extremes(&shares);
            println!("{tasks:?} tasks: the largest share is {most} guards, the smallest {least}; {shares:?}");
            assert!(are_fair(&shares), "{tasks:?}: {shares:?}");
        }
    }

    async fn a_process_with_one_task_is_not_starved_by_one_with_many(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let of_processes = |shares: &[Vec<u64>]| (shares[0][0], shares[1].iter().sum::<u64>());
        // The single task gets a turn after each of the other process, which serves each of its
        // tasks once.
        let are_fair = |shares: &[Vec<u64>]| {
            let (single, others) = of_processes(shares);
            single * 3 >= others / 100 * 2
        };
        let shares = shares(store, &[1, 100], 1, are_fair).await;
        assert!(are_fair(&shares), "{shares:?}");
        // The other process is not slowed down to the pace of the single task.
        let (single, others) = of_processes(&shares);
        assert!(others > single, "{shares:?}");
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

    async fn bursts_reach_but_never_exceed_max_burst(store: &TestStore) {
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
