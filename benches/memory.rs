//! The memory that a waiter and a lease take, measured by a counting allocator, and the time to
//! cancel a hundred thousand waiters; compared with `tokio::sync::Mutex`.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::future::IntoFuture;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use rand::seq::SliceRandom;
use shardlock::{LockGuard, LockManager};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use support::RedisServer;

const WAITERS: usize = 100_000;
const LEASES: usize = 20_000;

/// How many keys are locked at a time.
const AT_ONCE: usize = 256;

/// Limits that must hold on any machine.
const WAITER_BYTES_MAX: f64 = 400.0;
const CANCEL_MAX: Duration = Duration::from_secs(1);

/// The system's allocator, with a count of the bytes in use.
struct Counting;

static IN_USE: AtomicIsize = AtomicIsize::new(0);

#[expect(unsafe_code, reason = "an allocator is unsafe by its trait")]
// SAFETY: every call is passed on unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        IN_USE.fetch_add(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller upholds the contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        IN_USE.fetch_sub(layout.size() as isize, Ordering::Relaxed);
        // SAFETY: the caller upholds the contract.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Returns what `make` made, and the bytes that it left in use.
fn counted<T>(make: impl FnOnce() -> T) -> (T, f64) {
    let before = IN_USE.load(Ordering::Relaxed);
    let made = make();
    (made, (IN_USE.load(Ordering::Relaxed) - before) as f64)
}

/// The memory of one kind of waiter, and the time to cancel all of them.
struct Waiters {
    /// The size of the future, which is a part of the task.
    future: usize,
    /// All memory per waiter, including the future.
    bytes: f64,
    cancel: Duration,
}

/// Polls `WAITERS` futures once, and drops them in random order.
fn wait<F: Future>(make: impl Fn() -> F) -> Waiters {
    let (mut waiting, bytes) = counted(|| {
        let mut waiting = Vec::with_capacity(WAITERS);
        for _ in 0..WAITERS {
            let mut future = Box::pin(make());
            let poll = future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
            assert!(matches!(poll, Poll::Pending), "the future does not wait");
            waiting.push(future);
        }
        waiting
    });
    // The list's pointers belong to the bench itself.
    let bytes = bytes / WAITERS as f64 - size_of::<usize>() as f64;
    waiting.shuffle(&mut rand::rng());
    let start = Instant::now();
    drop(waiting);
    Waiters {
        future: size_of::<F>(),
        bytes,
        cancel: start.elapsed(),
    }
}

fn main() {
    let runtime = Runtime::new().expect("a runtime");
    let _entered = runtime.enter();
    let server = RedisServer::start();
    let locks = runtime
        .block_on(
            LockManager::builder()
                .shard(server.url())
                .max_waiters_per_key(2 * WAITERS)
                // Long, since the figures are about a machine that answers at all.
                .store_timeout(Duration::from_secs(5))
                .ttl(Duration::from_secs(60))
                .connect(),
        )
        .expect("a manager");

    let guard = runtime.block_on(locks.lock("hot").into_future()).expect("a lock");
    let ours = wait(|| locks.lock("hot").into_future());
    runtime.block_on(guard.release()).expect("a release");
    let mutex = tokio::sync::Mutex::new(());
    let held = mutex.try_lock().expect("the mutex is free");
    let limit = wait(|| mutex.lock());
    drop(held);

    println!("{WAITERS} waiters on one key of one process:");
    println!(
        "  {:<20}{:>20}{:>20}{:>26}",
        "", "bytes each", "of them the future", "cancelled in random order"
    );
    for (name, waiters) in [("shardlock", &ours), ("tokio::sync::Mutex", &limit)] {
        println!(
            "  {name:<20}{:>20.0}{:>20}{:>26}",
            waiters.bytes,
            waiters.future,
            format!("{:.1} ms", waiters.cancel.as_secs_f64() * 1e3)
        );
    }
    leases(&runtime, &locks, &server);
    assert!(
        ours.bytes <= WAITER_BYTES_MAX,
        "a waiter takes {:.0} bytes, more than {WAITER_BYTES_MAX}",
        ours.bytes
    );
    assert!(
        ours.cancel <= CANCEL_MAX,
        "cancelling took {:?}, longer than {CANCEL_MAX:?}",
        ours.cancel
    );
}

fn leases(runtime: &Runtime, locks: &LockManager, server: &RedisServer) {
    let take = async || {
        let mut tasks: JoinSet<Vec<LockGuard>> = (0..AT_ONCE)
            .map(|task| {
                let locks = locks.clone();
                async move {
                    let mut guards = vec![];
                    for key in (task..LEASES).step_by(AT_ONCE) {
                        guards.push(locks.lock(format!("lease:{key}")).await.expect("a lock"));
                    }
                    guards
                }
            })
            .collect();
        let mut guards = Vec::with_capacity(LEASES);
        while let Some(some) = tasks.join_next().await {
            guards.extend(some.expect("a task of the bench"));
        }
        guards
    };
    let (guards, bytes) = counted(|| runtime.block_on(take()));
    println!("\n{LEASES} leases that are held:");
    println!(
        "  {:<20}{:>20.0}{:>20}",
        "shardlock",
        bytes / LEASES as f64,
        size_of::<LockGuard>()
    );
    let server_bytes = |server: &RedisServer| -> f64 {
        let info: String = server.query(&["INFO", "memory"]);
        let used = info.lines().find_map(|line| line.strip_prefix("used_memory:"));
        used.expect("a figure").trim().parse().expect("a number")
    };
    let with = server_bytes(server);
    runtime.block_on(async {
        for guard in guards {
            guard.release().await.expect("a release");
        }
    });
    println!(
        "  {:<20}{:>20.0}",
        "on the server",
        (with - server_bytes(server)) / LEASES as f64
    );
}
