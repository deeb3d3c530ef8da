//! Many tasks of one process on one key, with no work under the lock, compared with
//! `tokio::sync::Mutex`; and the cost of the metrics there.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use metrics_exporter_prometheus::PrometheusBuilder;
use shardlock::LockManager;
use shardlock::metrics::Histograms;

#[path = "beside/mod.rs"]
mod beside;

use beside::{Comparison, Side, criterion, setting, share};

fn fan_in(tasks: u64, operations: u64) -> Comparison {
    let (runtime, server, locks) = setting();
    let (mutex, last) = (Arc::new(tokio::sync::Mutex::new(0_u64)), Arc::new(AtomicU64::new(0)));
    let of_the_limit = Arc::clone(&runtime);
    let limit = move |operations| {
        of_the_limit.block_on(share(tasks, operations, |_, count| {
            let mutex = Arc::clone(&mutex);
            async move {
                for _ in 0..count {
                    *mutex.lock().await += 1;
                }
            }
        }))
    };
    let ours = move |operations| {
        runtime.block_on(share(tasks, operations, |_, count| {
            let (locks, last) = (locks.clone(), Arc::clone(&last));
            async move {
                for _ in 0..count {
                    let guard = locks.lock("hot").await.expect("a lock");
                    let token = guard.token().get();
                    assert!(last.swap(token, Ordering::Relaxed) < token, "tokens must grow");
                    guard.release().await.expect("a release");
                }
            }
        }))
    };
    Comparison {
        name: format!("one key, tasks: {tasks}"),
        ours: Box::new(ours),
        limit_name: "tokio::sync::Mutex",
        limit: Box::new(limit),
        operations,
        server: Some(server),
    }
}

/// The fan-in again, to measure the cost of the metrics when a recorder receives them.
///
/// Handles that were created without a recorder never do anything, so the manager without one comes
/// first.
fn metrics_on_fan_in() -> Comparison {
    let (runtime, server, without) = setting();
    let recorder = PrometheusBuilder::new().build_recorder();
    let exporter = recorder.handle();
    metrics::set_global_recorder(Histograms::default().in_front_of(recorder)).expect("no recorder before");
    let with = runtime
        .block_on(
            LockManager::builder()
                .named_shard("with", server.url())
                .namespace("with:")
                .connect(),
        )
        .expect("a manager");
    runtime.spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            exporter.run_upkeep();
        }
    });
    let side = |locks: LockManager| -> Side {
        let runtime = Arc::clone(&runtime);
        Box::new(move |operations| {
            runtime.block_on(share(1000, operations, |_, count| {
                let locks = locks.clone();
                async move {
                    for _ in 0..count {
                        let guard = locks.lock("hot").await.expect("a lock");
                        guard.release().await.expect("a release");
                    }
                }
            }))
        })
    };
    Comparison {
        name: "metrics with the exporter, one key, tasks: 1000".to_owned(),
        ours: side(with),
        limit_name: "without a recorder",
        limit: side(without),
        operations: 200_000,
        server: Some(server),
    }
}

fn main() {
    let mut criterion = criterion();
    let times = [
        // A single task has no other to hand the lock to, so each lock is two round trips.
        (1, 200),
        (10, 20_000),
        (100, 50_000),
        (1_000, 200_000),
        (10_000, 400_000),
    ]
    .map(|(tasks, operations)| fan_in(tasks, operations).run(&mut criterion));
    println!(
        "= one key, tasks: 10000: {:.2} of the rate of 1000\n",
        times[3] / times[4]
    );
    // Last, because from then on there is a recorder.
    metrics_on_fan_in().run(&mut criterion);
    criterion.final_summary();
}
