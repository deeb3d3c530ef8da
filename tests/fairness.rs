//! Nobody starves: processes take turns, however many there are and however many tasks wait in one of them.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardlock::Builder;
use support::worker::{self, Worker};
use support_locks::{TestStore, builder_of, lock, on_each_store, poll_once, soon, until, until_queued};
use tokio::task::JoinSet;

#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        "contender" => contend(&me),
        name => panic!("no worker is called {name}"),
    }
}

/// Locks again and again in so many tasks until it is told to stop. Says how often it had the lock whenever it is asked.
#[tokio::main]
async fn contend(me: &worker::Current) {
    let locks = builder_of(me).connect().await.expect("connect");
    let tasks: usize = me.var("LOCKTEST_TASKS").parse().expect("a number");
    let over = Arc::new(AtomicBool::new(false));
    let had = Arc::new(AtomicU64::new(0));
    let mut contending = JoinSet::new();
    for _ in 0..tasks {
        let (locks, over, had) = (locks.clone(), Arc::clone(&over), Arc::clone(&had));
        contending.spawn(async move {
            while !over.load(Ordering::Relaxed) {
                let guard = lock(&locks, "k").await;
                had.fetch_add(1, Ordering::Relaxed);
                // The work that is done under the lock.
                tokio::time::sleep(Duration::from_millis(1)).await;
                guard.release().await.expect("release");
            }
        });
    }
    let told = tokio::task::spawn_blocking({
        let (me, had) = (me.clone(), Arc::clone(&had));
        move || {
            while me.hear().expect("the test tells when to stop") == COUNT {
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

/// What a contender is asked for the number of its turns by, and what it is stopped by.
const COUNT: &str = "count";
const STOP: &str = "stop";

/// For how long processes contend at least, and how many turns all of them together must have had then: what each of them got means nothing
/// where a machine, or a server, does only few in that time.
const CONTEND: Duration = Duration::from_secs(2);
const TURNS_MIN: u64 = 400;

/// How often each process had the lock while they contended for it with so many tasks each.
async fn shares(store: &TestStore, tasks: &[usize]) -> Vec<u64> {
    let watcher = store.manager().await;
    let guard = lock(&watcher, "k").await;
    let mut contenders: Vec<_> = tasks
        .iter()
        .map(|tasks| store.worker("contender", &[("LOCKTEST_TASKS", &tasks.to_string())]))
        .collect();
    until_queued(&watcher, "k", tasks.len() as u64).await;
    guard.release().await.expect("release");
    // While all contend: whoever is the last to stop has the key for itself.
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

/// Says this to all of them, and hears how often each had the lock.
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
        let shares = shares(store, &[1; 12]).await;
        let (least, most) = (shares.iter().min().expect("some"), shares.iter().max().expect("some"));
        // On an idle machine they differ by one or two; a process that gets no processor for a while misses some turns.
        assert!(*least >= 10 && *least * 10 >= *most * 7, "{shares:?}");
    }

    async fn a_process_with_one_task_is_not_starved_by_one_with_many(store: &TestStore) {
        let shares = shares(store, &[1, 100]).await;
        // The one gets a turn after each slice of 10 milliseconds of the other.
        assert!(shares[0] >= 20, "{shares:?}");
        // And the other is not slowed down to the pace of the one.
        assert!(shares[1] > shares[0], "{shares:?}");
    }
}

const TASKS: usize = 24;

/// In which order the managers had the lock, each of which had so many tasks in line.
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
            // The first poll takes the place in the line.
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

/// The lengths of the runs in which one manager had the lock.
fn runs(turns: &[usize]) -> Vec<usize> {
    turns
        .chunk_by(|left, right| left == right)
        .map(<[usize]>::len)
        .collect()
}

on_each_store! {
    async fn with_bursts_of_one_managers_alternate_strictly(store: &TestStore) {
        let turns = turns(store, 3, Duration::ZERO, |builder| builder.max_burst(1)).await;
        let expected: Vec<_> = (0..TASKS).flat_map(|_| 0..3).collect();
        assert_eq!(turns, expected);
    }

    async fn a_burst_is_as_long_as_it_may_be_and_no_longer(store: &TestStore) {
        let settings = |builder: Builder| builder.max_burst(4).max_slice(Duration::from_secs(10));
        let turns = turns(store, 2, Duration::ZERO, settings).await;
        assert_eq!(runs(&turns), [4; 2 * TASKS / 4]);
    }

    async fn a_slice_ends_a_burst(store: &TestStore) {
        let settings = |builder: Builder| builder.max_burst(1_000_000).max_slice(Duration::from_millis(20));
        let turns = turns(store, 2, Duration::from_millis(5), settings).await;
        // Each holds for 5 milliseconds at least, so that a slice has room for four; on a loaded machine for fewer.
        let mut runs = runs(&turns);
        // In the last run nobody else waits any more.
        runs.pop();
        assert!(runs.len() >= 5 && runs.into_iter().all(|run| run <= 4), "{turns:?}");
    }
}
