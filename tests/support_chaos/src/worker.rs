//! A worker: a process with one manager and several tasks that contend for a few keys.

use std::future::IntoFuture;
use std::path::Path;
use std::sync::Arc;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockGuard, LockManager};
use support::{PATIENCE, worker};

use crate::clock::{nanos, now};
use crate::history::{Event, Journal};
use crate::member::{Member, Processes};

/// The name of the entry, which calls [`fight`].
pub const NAME: &str = "chaos";

/// The number of places. Each has keys that mostly the worker at that place wants.
pub const PLACES: usize = 3;

/// The number of keys `quick0`, `quick1`, ... that all tasks want briefly.
pub const QUICK_KEYS: usize = 10;
/// The number of keys `home0`, ... that mostly one process wants and keeps.
pub const HOME_KEYS: usize = 15;
/// The number of keys `long0`, ... that are held for as long as a lease lasts, or longer.
pub const LONG_KEYS: usize = 2;

const THREADS: usize = 2;
const QUICK_TASKS: usize = 8;
const HOME_TASKS: usize = 3;
const HAVE_NO_LONG: usize = QUICK_TASKS + HOME_TASKS;
/// Interval between two readings of a guard that is held for long.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The names of all keys.
pub fn keys() -> Vec<String> {
    let quick = (0..QUICK_KEYS).map(|number| format!("quick{number}"));
    let home = (0..HOME_KEYS).map(|number| format!("home{number}"));
    let long = (0..LONG_KEYS).map(|number| format!("long{number}"));
    quick.chain(home).chain(long).collect()
}

struct Shared {
    locks: LockManager,
    journal: Journal,
    numbers: AtomicU64,
    over: AtomicBool,
    ttl: Duration,
    place: usize,
}

/// Runs until it receives `end`. `block <ms>` blocks all threads of its runtime for that time.
pub fn fight(me: &worker::Current) {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .expect("a runtime");
    let number = |name: &str| -> u64 { me.var(name).parse().expect("a number") };
    let ttl = Duration::from_millis(number("SHARDLOCK_TEST_TTL"));
    let seed = number("SHARDLOCK_TEST_SEED");
    let journal = Journal::create(
        Path::new(&me.var("SHARDLOCK_TEST_HISTORY")),
        &me.var("SHARDLOCK_TEST_WHO"),
    );
    let shared = Arc::new(Shared {
        locks: runtime.block_on(connect(me, ttl)),
        journal,
        numbers: AtomicU64::new(0),
        over: AtomicBool::new(false),
        ttl,
        place: number("SHARDLOCK_TEST_PLACE") as usize,
    });
    let tasks: Vec<_> = (0..QUICK_TASKS + HOME_TASKS + LONG_KEYS)
        .map(|task| {
            let shared = Arc::clone(&shared);
            let rng = SmallRng::seed_from_u64(seed.wrapping_mul(1_000).wrapping_add(task as u64));
            runtime.spawn(async move {
                match task {
                    0..QUICK_TASKS => shared.lock_briefly(rng).await,
                    QUICK_TASKS..HAVE_NO_LONG => shared.lock_home_keys(rng).await,
                    _ => shared.hold_long(rng).await,
                }
            })
        })
        .collect();
    me.send("ready");
    while let Some(line) = me.recv() {
        match line.split_once(' ') {
            Some(("block", millis)) => block(&runtime, Duration::from_millis(millis.parse().expect("a number"))),
            None if line == "end" => break,
            _ => panic!("a worker does not know {line:?}"),
        }
    }
    shared.over.store(true, Ordering::Relaxed);
    runtime.block_on(async {
        for task in tasks {
            task.await.expect("a task ends");
        }
        shared.locks.shutdown().await.ok();
    });
    shared.journal.note(now(), 0, Event::Down);
    me.send("ended");
}

/// What a worker needs beside the variables that all processes of a round have.
pub struct Settings {
    /// Below [`PLACES`].
    pub place: usize,
    /// The shard.
    pub url: String,
    /// The longest TTL of a quorum.
    pub longest_ttl: Duration,
    /// The setting `min_replicas_acked`.
    pub replicas_acked: u32,
}

/// Starts a worker.
pub fn start(processes: &mut Processes, settings: Settings) -> Member {
    // With a late renewal, a holder relies on its lease for longer.
    let renew_fraction = if processes.seed.is_multiple_of(4) { 0.1 } else { 0.4 };
    let more = [
        ("SHARDLOCK_TEST_PLACE", settings.place.to_string()),
        ("SHARDLOCK_TEST_RENEW", renew_fraction.to_string()),
        ("SHARDLOCK_TEST_URL", settings.url),
        (
            "SHARDLOCK_TEST_LONGEST_TTL",
            settings.longest_ttl.as_millis().to_string(),
        ),
        ("SHARDLOCK_TEST_REPLICAS", settings.replicas_acked.to_string()),
    ];
    processes.start(NAME, "w", &more)
}

async fn connect(me: &worker::Current, ttl: Duration) -> LockManager {
    let replicas = me.var("SHARDLOCK_TEST_REPLICAS").parse().expect("a number");
    let mut builder = LockManager::builder()
        .shard(me.var("SHARDLOCK_TEST_URL"))
        .ttl(ttl)
        .renew_fraction(me.var("SHARDLOCK_TEST_RENEW").parse().expect("a number"))
        .min_replicas_acked(replicas);
    if me.var("SHARDLOCK_TEST_URL").starts_with("redlock") {
        let longest = me.var("SHARDLOCK_TEST_LONGEST_TTL").parse().expect("a number");
        builder = builder.redlock_max_ttl(Duration::from_millis(longest));
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        // A server may still be recovering from the last fault.
        match builder.clone().connect().await {
            Ok(locks) => return locks,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Blocks all threads of the runtime at the same time.
fn block(runtime: &tokio::runtime::Runtime, time: Duration) {
    let all = Arc::new(Barrier::new(THREADS));
    for _ in 0..THREADS {
        let all = Arc::clone(&all);
        runtime.spawn(async move {
            all.wait();
            std::thread::sleep(time);
        });
    }
}

impl Shared {
    async fn lock_briefly(&self, mut rng: SmallRng) {
        while !self.over.load(Ordering::Relaxed) {
            // Skewed: the first keys are requested more often.
            let key = rng.random_range(0..QUICK_KEYS).min(rng.random_range(0..QUICK_KEYS));
            let hold = match rng.random_range(0..100) {
                0..60 => Duration::ZERO,
                60..93 => Duration::from_micros(rng.random_range(100..3_000)),
                _ => Duration::from_micros(rng.random_range(3_000..30_000)),
            };
            let linger = Duration::from_millis(if rng.random_bool(0.2) {
                rng.random_range(2..80)
            } else {
                0
            });
            self.once(&mut rng, &format!("quick{key}"), hold, linger).await;
            if rng.random_bool(0.5) {
                tokio::time::sleep(Duration::from_micros(rng.random_range(0..3_000))).await;
            }
        }
    }

    /// Mostly locks the keys of its own place, which linger until another process wants them.
    async fn lock_home_keys(&self, mut rng: SmallRng) {
        while !self.over.load(Ordering::Relaxed) {
            let at_home = rng.random_bool(0.95);
            let place = if at_home {
                self.place
            } else {
                rng.random_range(0..PLACES)
            };
            let key = rng.random_range(0..HOME_KEYS / PLACES) * PLACES + place;
            let linger = Duration::from_millis(if at_home { rng.random_range(100..2_000) } else { 0 });
            self.once(&mut rng, &format!("home{key}"), Duration::ZERO, linger).await;
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..20))).await;
        }
    }

    async fn hold_long(&self, mut rng: SmallRng) {
        while !self.over.load(Ordering::Relaxed) {
            let key = rng.random_range(0..LONG_KEYS);
            let hold = self.ttl.mul_f64(rng.random_range(0.1..1.8));
            self.once(&mut rng, &format!("long{key}"), hold, Duration::ZERO).await;
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..200))).await;
        }
    }

    /// One attempt to acquire a lock, with the hold and the release if it succeeds.
    async fn once(&self, rng: &mut SmallRng, key: &str, hold: Duration, linger: Duration) {
        let number = self.numbers.fetch_add(1, Ordering::Relaxed) + 1;
        let note = |at, event| self.journal.note(at, number, event);
        let asked = |limit| Event::Asked {
            key: key.to_owned(),
            limit: nanos(limit),
        };
        let got = match rng.random_range(0..10) {
            0 => {
                note(now(), asked(Duration::ZERO));
                let request = self.locks.try_lock(key).linger(linger);
                request
                    .await
                    .map_err(|error| word(&error))
                    .and_then(|guard| guard.ok_or("held"))
            }
            1 => {
                let limit = Duration::from_micros(rng.random_range(0..10_000));
                note(now(), asked(limit));
                let request = self.locks.lock(key).linger(linger).into_future();
                match tokio::time::timeout(limit, request).await {
                    Ok(got) => got.map_err(|error| word(&error)),
                    Err(_) => Err("cancelled"),
                }
            }
            _ => {
                // From a few milliseconds to longer than most outages.
                let limit = Duration::from_millis(2).mul_f64(2_f64.powf(rng.random_range(2.0..13.0)));
                note(now(), asked(limit));
                let request = self.locks.lock(key).timeout(limit).linger(linger);
                request.await.map_err(|error| word(&error))
            }
        };
        match got {
            Ok(guard) => {
                let at = now();
                let (token, left) = (guard.token().get(), nanos(guard.remaining()));
                note(at, Event::Granted { token, left });
                self.hold(number, &guard, hold).await;
                self.release(number, guard, rng.random_range(0..10)).await;
            }
            Err(why) => {
                note(now(), Event::Failed { why: why.to_owned() });
                if !matches!(why, "held" | "cancelled" | "timeout") {
                    tokio::time::sleep(Duration::from_millis(rng.random_range(5..50))).await;
                }
            }
        }
    }

    async fn hold(&self, number: u64, guard: &LockGuard, hold: Duration) {
        let until = Instant::now() + hold;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            match tokio::time::timeout(left.min(LOOK_EVERY), guard.lost()).await {
                Ok(reason) => {
                    let reason = reason.as_str().to_owned();
                    return self.journal.note(now(), number, Event::LossReported { reason });
                }
                Err(_) => {
                    let at = now();
                    let left = nanos(guard.remaining());
                    self.journal.note(at, number, Event::Valid { left });
                }
            }
        }
    }

    async fn release(&self, number: u64, guard: LockGuard, how: u32) {
        let at = now();
        let left = nanos(guard.remaining());
        self.journal.note(at, number, Event::Ending { left });
        let outcome = match how {
            0..6 => match guard.release().await {
                Ok(()) => "ok",
                Err(error) if error.is_lost() => "lost",
                Err(_) => "error",
            },
            6..9 => {
                drop(guard);
                "unknown"
            }
            _ => {
                // The release is polled once, or not at all.
                drop(tokio::time::timeout(Duration::ZERO, guard.release()).await);
                "unknown"
            }
        };
        let outcome = outcome.to_owned();
        self.journal.note(now(), number, Event::Ended { outcome });
    }
}

fn word(error: &LockError) -> &'static str {
    match error.kind() {
        LockErrorKind::Timeout => "timeout",
        LockErrorKind::Unavailable => "unavailable",
        LockErrorKind::Refused => "refused",
        LockErrorKind::Lost => "lost",
        LockErrorKind::TokenRegression => "token-regression",
        LockErrorKind::ShardDown => "shard-down",
        LockErrorKind::TooManyLeases => "too-many-leases",
        LockErrorKind::ShardMapMismatch => "shard-map",
        LockErrorKind::Closed => "closed",
        _ => panic!("no task can get this: {error}"),
    }
}
