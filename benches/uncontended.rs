//! Tasks with a key each, without contention, compared with plain commands on one multiplexed
//! connection.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Instant;

#[path = "beside/mod.rs"]
mod beside;

use beside::{Comparison, RAW_CYCLE, Raw, as_the_median, criterion, in_a_task, setting, share};

/// Acquires and releases.
fn own_keys(tasks: u64, operations: u64) -> Comparison {
    let (runtime, server, locks) = setting();
    let raw = runtime.block_on(Raw::connect(&server));
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        of_the_limit.block_on(share(tasks, operations, |number, count| {
            let mut raw = raw.clone();
            async move {
                let key = format!("raw:{number}");
                for _ in 0..count {
                    raw.acquire(&key).await;
                    raw.release(&key).await;
                }
            }
        }))
    };
    let ours = move |operations| {
        runtime.block_on(share(tasks, operations, |number, count| {
            let locks = locks.clone();
            async move {
                let key = format!("own:{number}");
                for _ in 0..count {
                    let guard = locks.lock(&key).await.expect("a lock");
                    guard.release().await.expect("a release");
                }
            }
        }))
    };
    Comparison {
        name: format!("a key each, tasks: {tasks}"),
        ours: Box::new(ours),
        limit_name: RAW_CYCLE,
        limit: Box::new(limit),
        operations,
        server: Some(server),
    }
}

/// One task, a free key. Only acquiring is timed, and the median of a round counts.
fn acquire_only() -> Comparison {
    let (runtime, server, locks) = setting();
    let raw = runtime.block_on(Raw::connect(&server));
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        let mut raw = raw.clone();
        in_a_task(&of_the_limit, async move {
            let mut took = Vec::new();
            for _ in 0..operations {
                let start = Instant::now();
                raw.acquire("raw:one").await;
                took.push(start.elapsed());
                raw.release("raw:one").await;
            }
            as_the_median(took)
        })
    };
    let ours = move |operations| {
        let locks = locks.clone();
        in_a_task(&runtime, async move {
            let mut took = Vec::new();
            for _ in 0..operations {
                let start = Instant::now();
                let guard = locks.lock("one").await.expect("a lock");
                took.push(start.elapsed());
                guard.release().await.expect("a release");
            }
            as_the_median(took)
        })
    };
    Comparison {
        name: "1 task, free key, acquire only, p50".to_owned(),
        ours: Box::new(ours),
        limit_name: "raw SET NX PX",
        limit: Box::new(limit),
        operations: 500,
        server: Some(server),
    }
}

/// One task that drops its guards. It uses a different key each time, since the next lock of the
/// same key must wait for the release: only the time of the task itself is measured.
fn dropped_guards() -> Comparison {
    let (runtime, server, locks) = setting();
    let raw = runtime.block_on(Raw::connect(&server));
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        let mut raw = raw.clone();
        in_a_task(&of_the_limit, async move {
            let start = Instant::now();
            for _ in 0..operations {
                raw.acquire("raw:one").await;
                raw.release("raw:one").await;
            }
            start.elapsed()
        })
    };
    let keys: Arc<[String]> = (0..100).map(|number| format!("dropped:{number}")).collect();
    let ours = move |operations| {
        let (locks, keys) = (locks.clone(), Arc::clone(&keys));
        in_a_task(&runtime, async move {
            let start = Instant::now();
            for (_, key) in (0..operations).zip(keys.iter().cycle()) {
                drop(locks.lock(key).await.expect("a lock"));
            }
            start.elapsed()
        })
    };
    Comparison {
        name: "1 task, whole cycle, dropped guard".to_owned(),
        ours: Box::new(ours),
        limit_name: RAW_CYCLE,
        limit: Box::new(limit),
        operations: 500,
        server: Some(server),
    }
}

fn main() {
    let mut criterion = criterion();
    for (tasks, operations) in [(1, 500), (16, 5_000), (64, 20_000), (256, 40_000)] {
        own_keys(tasks, operations).run(&mut criterion);
    }
    acquire_only().run(&mut criterion);
    dropped_guards().run(&mut criterion);
    criterion.final_summary();
}
