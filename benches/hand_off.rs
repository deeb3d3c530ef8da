//! Measures the time from the release in one process to the entry in another, compared with a bare
//! message from one process to another through the same server.
//!
//! Several processes contend for one key and hold it for a millisecond. The same processes also
//! pass a message on in a ring, each after a millisecond. Locks and messages alternate, so that
//! both run under the same conditions.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::{Duration, Instant};

use futures_util::StreamExt;
use redis::AsyncCommands;
use redis::aio::MultiplexedConnection;
use rustix::time::{ClockId, clock_gettime};
use shardlock::LockManager;
use tokio::runtime::Builder;

#[path = "beside/mod.rs"]
mod beside;

use beside::{Raw, TIMEOUT, in_words};
use support::{RedisServer, Worker, worker};

const PROCESSES: [usize; 6] = [2, 4, 8, 16, 32, 64];

/// How many turns locks and messages take alternately, and how long a turn is.
const TURNS: usize = 3;
const TURN: Duration = Duration::from_millis(500);

const HOLD: Duration = Duration::from_millis(1);

/// The distance between the message numbers of two turns: more than a turn can have.
const MESSAGES_PER_TURN: usize = 1_000_000;

const URL: &str = "SHARDLOCK_TEST_URL";
const NUMBER: &str = "SHARDLOCK_TEST_NUMBER";
const COUNT: &str = "SHARDLOCK_TEST_COUNT";

/// A clock that all processes share.
fn now_ns() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// What a process saw: the token or message number, when it entered, and when it released.
type Seen = Vec<[u64; 3]>;

fn main() {
    if let Some(me) = worker::current() {
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(run_commands(&me));
        return;
    }
    println!(
        "from the release in one process to the guard in another, p50 and p99 of {TURNS} turns of {TURN:?} each; held for {HOLD:?}:"
    );
    println!(
        "  {:>9}{:>30}{:>30}{:>16}",
        "processes", "lock, release to entry", "message, PUBLISH to receipt", "ratio of p50s"
    );
    for count in PROCESSES {
        measure(count);
    }
}

fn measure(count: usize) {
    let server = RedisServer::start();
    let mut workers: Vec<Worker> = (0..count)
        .map(|number| {
            let (number, count) = (number.to_string(), count.to_string());
            worker::spawn("passer", &[(URL, &server.url()), (NUMBER, &number), (COUNT, &count)])
        })
        .collect();
    for worker in &workers {
        assert_eq!(worker.line(), "connected");
    }
    let (mut locks, mut messages) = (vec![], vec![]);
    for number in 1..=TURNS {
        locks.extend(passed_on(&turn(&mut workers, "locks"), |_, _| true));
        // A missed message would leave a gap.
        messages.extend(passed_on(
            &turn(&mut workers, &format!("ring {}", number * MESSAGES_PER_TURN)),
            |one, next| next == one + 1,
        ));
    }
    for worker in &mut workers {
        assert!(worker.wait().success());
    }
    let [locks, messages] = [locks, messages].map(|mut times: Vec<u64>| {
        times.sort_unstable();
        [times[times.len() / 2], times[times.len() * 99 / 100]]
    });
    let shown = |times: [u64; 2]| format!("{} / {}", in_words(times[0] as f64), in_words(times[1] as f64));
    println!(
        "  {count:>9}{:>30}{:>30}{:>16.2}",
        shown(locks),
        shown(messages),
        locks[0] as f64 / messages[0] as f64
    );
}

/// What all processes saw, in the order of tokens or messages, each with the number of its process.
fn turn(workers: &mut [Worker], what: &str) -> Vec<(usize, [u64; 3])> {
    for worker in workers.iter_mut() {
        worker.send(what);
    }
    let mut all = vec![];
    for (number, worker) in workers.iter().enumerate() {
        let line = worker.line();
        let numbers: Vec<u64> = line
            .split_whitespace()
            .map(|word| word.parse().expect("a number"))
            .collect();
        all.extend(
            numbers
                .chunks_exact(3)
                .map(|seen| (number, [seen[0], seen[1], seen[2]])),
        );
    }
    all.sort_unstable_by_key(|(_, [token, ..])| *token);
    all
}

/// How long each hand-off between two processes took.
fn passed_on(all: &[(usize, [u64; 3])], is_next: fn(u64, u64) -> bool) -> Vec<u64> {
    let pairs = all.windows(2).filter_map(|pair| {
        let [(from, [token, _, let_go]), (to, [next, had, _])] = [pair[0], pair[1]];
        (from != to && is_next(token, next)).then(|| {
            assert!(
                had >= let_go,
                "two processes held it at once: tokens {token} and {next}"
            );
            had - let_go
        })
    });
    let times: Vec<u64> = pairs.collect();
    assert!(!times.is_empty(), "nothing was passed on");
    times
}

async fn run_commands(me: &worker::Current) {
    let (number, count): (usize, usize) = (
        me.var(NUMBER).parse().expect("a number"),
        me.var(COUNT).parse().expect("a number"),
    );
    let url = me.var(URL);
    let locks = LockManager::builder().shard(&url).store_timeout(TIMEOUT).connect();
    let locks = locks.await.expect("a manager");
    let client = redis::Client::open(url.as_str()).expect("a client");
    let connection = Raw::connect_to(&url).await.connection;
    let mut inbox = client.get_async_pubsub().await.expect("a subscriber");
    inbox.subscribe(number.to_string()).await.expect("subscribe");
    let mut inbox = inbox.into_on_message();
    let next = ((number + 1) % count).to_string();
    me.send("connected");
    while let Some(what) = me.recv() {
        let seen = match what.strip_prefix("ring ") {
            None => contend(&locks).await,
            Some(first) => {
                let first = first.parse().expect("a number");
                pass(&mut inbox, connection.clone(), &next, number == 0, first).await
            }
        };
        let words: Vec<String> = seen.iter().flatten().map(u64::to_string).collect();
        me.send(words.join(" "));
    }
}

async fn contend(locks: &LockManager) -> Seen {
    let mut seen = Seen::new();
    let began = Instant::now();
    while began.elapsed() < TURN {
        let guard = locks.lock("passed").await.expect("a lock");
        let (token, had) = (guard.token().get(), now_ns());
        tokio::time::sleep(HOLD).await;
        seen.push([token, had, now_ns()]);
        guard.release().await.expect("a release");
    }
    seen
}

async fn pass(
    inbox: &mut (impl StreamExt<Item = redis::Msg> + Unpin),
    mut connection: MultiplexedConnection,
    next: &str,
    begins: bool,
    first: u64,
) -> Seen {
    let mut seen = Seen::new();
    let began = Instant::now();
    if begins {
        let _: u64 = connection.publish(next, first).await.expect("publish");
    }
    while let Some(left) = TURN.checked_sub(began.elapsed()) {
        let Ok(Some(message)) = tokio::time::timeout(left, inbox.next()).await else {
            break;
        };
        let had = now_ns();
        let message: u64 = message.get_payload().expect("a number");
        if message < first {
            // It was in flight when the previous turn ended.
            continue;
        }
        tokio::time::sleep(HOLD).await;
        seen.push([message, had, now_ns()]);
        let _: u64 = connection.publish(next, message + 1).await.expect("publish");
    }
    seen
}
