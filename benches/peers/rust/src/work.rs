//! The load: tasks that acquire and release locks, and the counts.

use crate::hold_timer::HoldTimer;
use crate::options::Options;
use crate::peer::Peer;
use std::collections::BTreeMap;
use std::error::Error;
use std::fmt::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::time::Instant;

/// One more than the bucket of the longest wait that is distinguished, which is over an hour.
const BUCKETS: usize = 64 * 26 + 128;

/// The counts of one task. Its mutex is locked by the task, and once more when the measured time is
/// over.
struct Tally {
    locks: u64,
    waits: Box<[u32]>,
    wait_max_us: u64,
    hold_sum_us: u64,
    last_us: u64,
    errors: u64,
    first_error: Option<String>,
    /// When the task began to wait, if it waits.
    since: Option<Instant>,
}

type Shared = Arc<Mutex<Tally>>;

impl Tally {
    fn shared() -> Shared {
        let waits = vec![0; BUCKETS].into();
        let (locks, wait_max_us, hold_sum_us, last_us, errors) = (0, 0, 0, 0, 0);
        Arc::new(Mutex::new(Self {
            locks,
            waits,
            wait_max_us,
            hold_sum_us,
            last_us,
            errors,
            first_error: None,
            since: None,
        }))
    }

    /// Counts a wait once, at its end or at the end of the measured time.
    fn waited(&mut self, since: Instant, until: Instant) {
        if self.since.take_if(|waits| *waits == since).is_some() {
            let wait = micros(until.saturating_duration_since(since));
            self.waits[bucket(wait).min(BUCKETS - 1)] += 1;
            self.wait_max_us = self.wait_max_us.max(wait);
        }
    }
}

/// Opens the connections and runs the code that waits, on keys of this process alone. Nothing of it
/// is left when the measured time begins. The raw commands can't wait.
pub async fn warm_up(peer: &Arc<Peer>, options: &Options) {
    let contended = if matches!(**peer, Peer::Raw { .. }) {
        1
    } else {
        options.tasks.min(8)
    };
    for (tasks, one_key) in [(options.tasks, false), (contended, true)] {
        let (start, mut all) = (Instant::now(), tokio::task::JoinSet::new());
        for task in 0..tasks {
            let key = if one_key {
                format!("warm:{}", options.process)
            } else {
                format!("warm:{}:{task}", options.process)
            };
            let (peer, end) = (Arc::clone(peer), start + options.warmup / 2);
            all.spawn(async move { run(&peer, || key.clone(), Duration::ZERO, start, end, &Tally::shared()).await });
        }
        while all.join_next().await.is_some() {}
    }
}

/// Runs the load and returns the report as JSON.
pub async fn measure(peer: &Arc<Peer>, options: &Options, start: Instant, end: Instant) -> String {
    let own_keys = options.keys == options.processes * options.tasks;
    tokio::time::sleep_until(start).await;
    let mut tallies = Vec::new();
    for task in 0..options.tasks {
        let tally = Tally::shared();
        tallies.push(Arc::clone(&tally));
        let (peer, keys, hold) = (Arc::clone(peer), options.keys, options.hold);
        let mut random = Random::of(options.process, task);
        let own = format!("bench:{}", options.process * options.tasks + task);
        tokio::spawn(async move {
            let next = move || {
                if own_keys {
                    own.clone()
                } else {
                    format!("bench:{}", random.below(keys))
                }
            };
            run(&peer, next, hold, start, end, &tally).await;
        });
    }
    tokio::time::sleep_until(end).await;
    report(&tallies, end)
}

async fn run(
    peer: &Peer,
    mut next: impl FnMut() -> String,
    hold: Duration,
    start: Instant,
    end: Instant,
    tally: &Shared,
) {
    let mut timer = HoldTimer::default();
    while Instant::now() < end {
        let since = Instant::now();
        locked(tally).since = Some(since);
        let key = next();
        let guard = loop {
            match peer.lock(&key).await {
                Ok(guard) => break guard,
                Err(error) => failed(tally, error, end).await,
            }
            if Instant::now() >= end {
                return;
            }
        };
        let entered = Instant::now();
        locked(tally).waited(since, entered.min(end));
        if !hold.is_zero() {
            timer.sleep(hold).await;
        }
        let left = Instant::now();
        if let Err(error) = peer.release(guard).await {
            failed(tally, error, end).await;
            continue;
        }
        let released = Instant::now();
        if released > end {
            return;
        }
        let mut tally = locked(tally);
        tally.locks += 1;
        tally.hold_sum_us += micros(left - entered);
        tally.last_us = micros(released - start);
    }
}

async fn failed(tally: &Shared, error: Box<dyn Error + Send + Sync>, end: Instant) {
    if Instant::now() < end {
        let mut tally = locked(tally);
        tally.errors += 1;
        tally.first_error.get_or_insert_with(|| error.to_string());
    }
    // A peer that fails at once must not keep the machine busy with its failures.
    tokio::time::sleep(Duration::from_millis(1)).await;
}

fn report(tallies: &[Shared], end: Instant) -> String {
    let (mut tasks, mut waits) = (Vec::new(), BTreeMap::<usize, u64>::new());
    let (mut wait_max, mut hold_sum, mut last, mut errors) = (0, 0, 0, 0);
    let mut first_error = None;
    for tally in tallies {
        let mut tally = locked(tally);
        if let Some(since) = tally.since {
            tally.waited(since, end);
        }
        tasks.push(tally.locks);
        for (bucket, count) in tally.waits.iter().enumerate().filter(|(_, count)| **count > 0) {
            *waits.entry(bucket).or_default() += u64::from(*count);
        }
        wait_max = wait_max.max(tally.wait_max_us);
        hold_sum += tally.hold_sum_us;
        last = last.max(tally.last_us);
        errors += tally.errors;
        first_error = first_error.or_else(|| tally.first_error.clone());
    }
    let waits: Vec<String> = waits
        .iter()
        .map(|(bucket, count)| format!("\"{bucket}\":{count}"))
        .collect();
    format!(
        "{{\"tasks\":{tasks:?},\"waits\":{{{}}},\"wait_max_us\":{wait_max},\"hold_sum_us\":{hold_sum},\"last_us\":{last},\
         \"errors\":{errors},\"first_error\":{}}}",
        waits.join(","),
        json_string(first_error.as_deref().unwrap_or_default()),
    )
}

/// The histogram bucket: exact below 128 us, then 64 buckets for each doubling. The runner uses the
/// same.
fn bucket(us: u64) -> usize {
    if us < 128 {
        return us as usize;
    }
    let shift = 64 - us.leading_zeros() as usize - 7;
    shift * 64 + (us >> shift) as usize
}

fn json_string(text: &str) -> String {
    let mut json = String::from('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => json.extend(['\\', c]),
            c if c.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(json, "\\u{:04x}", c as u32);
            }
            c => json.push(c),
        }
    }
    json.push('"');
    json
}

fn micros(duration: Duration) -> u64 {
    duration.as_micros() as u64
}

fn locked(tally: &Shared) -> std::sync::MutexGuard<'_, Tally> {
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// SplitMix64: the choice of the next key need not be more random than that.
struct Random(u64);

impl Random {
    fn of(process: usize, task: usize) -> Self {
        Self(((process as u64) << 32) ^ task as u64)
    }

    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ (mixed >> 31)) % bound as u64) as usize
    }
}
