//! A client of the agent: a process with several threads, each with a connection of its own.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use support::worker;
use support_chaos::clock::{Nanos, nanos, now};
use support_chaos::history::{Event, Journal};
use support_chaos::worker::{HOME_KEYS, LONG_KEYS, QUICK_KEYS};

use super::connection::{Connection, Reply};

pub(crate) const NAME: &str = "chaos client";

const QUICK_THREADS: usize = 6;
const HOME_THREADS: usize = 2;
const LONG_THREADS: usize = 2;

/// Interval between two questions for the validity.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// How long a reply may take beyond its limit. The checker finds it too long much earlier, unless
/// the agent is stopped.
const REPLY_WITHIN: Duration = Duration::from_secs(30);

struct Shared {
    socket: PathBuf,
    journal: Journal,
    numbers: AtomicU64,
    over: AtomicBool,
    ttl: Duration,
}

/// Runs until it receives `end`.
pub(crate) fn fight(me: &worker::Current) {
    let number = |name: &str| -> u64 { me.var(name).parse().expect("a number") };
    let seed = number("SHARDLOCK_TEST_SEED");
    let shared = Arc::new(Shared {
        socket: me.var("SHARDLOCK_TEST_SOCKET").into(),
        journal: Journal::create(
            Path::new(&me.var("SHARDLOCK_TEST_HISTORY")),
            &me.var("SHARDLOCK_TEST_WHO"),
        ),
        numbers: AtomicU64::new(0),
        over: AtomicBool::new(false),
        ttl: Duration::from_millis(number("SHARDLOCK_TEST_TTL")),
    });
    let threads: Vec<_> = (0..QUICK_THREADS + HOME_THREADS + LONG_THREADS)
        .map(|index| {
            let shared = Arc::clone(&shared);
            let rng = SmallRng::seed_from_u64(seed.wrapping_mul(1_000).wrapping_add(index as u64));
            thread::spawn(move || shared.work(index, rng))
        })
        .collect();
    me.send("ready");
    let line = me.recv();
    assert_eq!(line.as_deref(), Some("end"), "a client does not know this");
    shared.over.store(true, Ordering::Relaxed);
    for thread in threads {
        thread.join().expect("a thread ends");
    }
    shared.journal.note(now(), 0, Event::Down);
    me.send("ended");
}

impl Shared {
    fn work(&self, index: usize, mut rng: SmallRng) {
        let mut connection = None;
        while !self.over.load(Ordering::Relaxed) {
            let (key, hold, pause) = if index < QUICK_THREADS {
                // Skewed, as in the worker with a manager of its own.
                let key = rng.random_range(0..QUICK_KEYS).min(rng.random_range(0..QUICK_KEYS));
                let hold = match rng.random_range(0..100) {
                    0..60 => Duration::ZERO,
                    60..93 => Duration::from_micros(rng.random_range(100..3_000)),
                    _ => Duration::from_micros(rng.random_range(3_000..30_000)),
                };
                (
                    format!("quick{key}"),
                    hold,
                    Duration::from_micros(rng.random_range(0..3_000)),
                )
            } else if index < QUICK_THREADS + HOME_THREADS {
                let pause = Duration::from_millis(rng.random_range(0..20));
                (format!("home{}", rng.random_range(0..HOME_KEYS)), Duration::ZERO, pause)
            } else {
                let hold = self.ttl.mul_f64(rng.random_range(0.1..1.8));
                let pause = Duration::from_millis(rng.random_range(0..200));
                (format!("long{}", rng.random_range(0..LONG_KEYS)), hold, pause)
            };
            let open = match connection.take() {
                Some(open) => open,
                None => match Connection::open(&self.socket) {
                    Ok(open) => open,
                    // The agent starts again soon.
                    Err(_) => {
                        thread::sleep(Duration::from_millis(rng.random_range(1..50)));
                        continue;
                    }
                },
            };
            let number = self.numbers.fetch_add(1, Ordering::Relaxed) + 1;
            let mut acquisition = Acquisition {
                shared: self,
                number,
                connection: open,
            };
            // After an error, the connection is closed, and its locks are the agent's to release.
            connection = acquisition.run(&mut rng, &key, hold).then_some(acquisition.connection);
            thread::sleep(pause);
        }
    }
}

/// One attempt to acquire a lock, with the hold and the release if it succeeds.
struct Acquisition<'a> {
    shared: &'a Shared,
    number: u64,
    connection: Connection,
}

/// A lock as its holder sees it.
struct Held {
    key: String,
    token: i64,
    /// Until when it is certainly held, by the answers so far.
    until: Nanos,
}

/// Why a hold ends early, or `None`.
type Loss = Option<&'static str>;

impl Acquisition<'_> {
    fn note(&self, at: Nanos, event: Event) {
        self.shared.journal.note(at, self.number, event);
    }

    fn failed(&self, why: &str) {
        self.note(now(), Event::Failed { why: why.to_owned() });
    }

    /// Returns whether the connection can be used again.
    fn run(&mut self, rng: &mut SmallRng, key: &str, hold: Duration) -> bool {
        let (limit, is_cancelled) = match rng.random_range(0..10) {
            0 => (Duration::ZERO, false),
            1 => (Duration::from_micros(rng.random_range(0..10_000)), true),
            // From a few milliseconds to longer than most outages.
            _ => (
                Duration::from_millis(2).mul_f64(2_f64.powf(rng.random_range(2.0..13.0))),
                false,
            ),
        };
        let key = key.to_owned();
        let asked = Event::Asked {
            key: key.clone(),
            limit: nanos(limit),
        };
        self.note(now(), asked);
        let millis = limit.as_millis().max(1).to_string();
        let words: &[&str] = match limit {
            Duration::ZERO => &["LOCK", &key, "NOWAIT"],
            _ if is_cancelled => &["LOCK", &key],
            _ => &["LOCK", &key, "TIMEOUT", &millis],
        };
        let deadline = Instant::now() + if is_cancelled { limit } else { limit + REPLY_WITHIN };
        let reply = self
            .connection
            .send(words)
            .and_then(|()| self.connection.next(deadline));
        let token = match reply {
            Ok(Some(Reply::Int(token))) => token,
            Ok(Some(Reply::Nil)) => {
                self.failed(if limit.is_zero() { "held" } else { "timeout" });
                return true;
            }
            Ok(Some(Reply::Error(line))) => {
                let code = line.split(' ').next().unwrap_or_default();
                self.failed(&code.to_lowercase());
                // No request is wrong, and no limit is near.
                if code != "UNAVAILABLE" {
                    let what = format!("a client got {line:?}");
                    self.note(now(), Event::Left { what });
                }
                thread::sleep(Duration::from_millis(rng.random_range(5..50)));
                return true;
            }
            Ok(None) if is_cancelled => {
                self.failed("cancelled");
                return false;
            }
            Ok(None) => {
                self.failed("no-reply");
                return false;
            }
            Ok(Some(other)) => {
                let what = format!("a client got {other:?}");
                self.note(now(), Event::Left { what });
                return false;
            }
            Err(error) => {
                self.failed(&one_word(&error));
                return false;
            }
        };
        self.hold_and_release(rng, key, token, hold)
    }

    fn hold_and_release(&mut self, rng: &mut SmallRng, key: String, token: i64, hold: Duration) -> bool {
        let at = now();
        let mut held = Held { key, token, until: at };
        // Asked at that time, so the answer counts from then.
        let asked = self.query_held(&mut held, at, Instant::now() + REPLY_WITHIN);
        self.note(
            at,
            Event::Granted {
                token: token.cast_unsigned(),
                left: held.until - at,
            },
        );
        let loss = match asked {
            Ok(None) => self.hold(&mut held, hold),
            other => other,
        };
        let (mut is_open, mut is_told) = (true, false);
        match loss {
            Ok(None) => {}
            Ok(Some(reason)) => {
                self.note_loss(reason);
                // An answer that is still to come would be taken for another one.
                (is_open, is_told) = (reason != UNANSWERED, true);
            }
            Err(error) => {
                self.note_loss(&one_word(&error));
                (is_open, is_told) = (false, true);
            }
        }
        let at = now();
        let left = if is_told { 0 } else { held.until.saturating_sub(at) };
        self.note(at, Event::Ending { left });
        let (outcome, is_open) = match rng.random_range(0..10) {
            _ if !is_open => ("unknown", false),
            0..7 => self.unlock(&held),
            7..9 => ("unknown", false),
            _ => {
                // The reply is not awaited.
                let token = held.token.to_string();
                self.connection.send(&["UNLOCK", &held.key, &token]).ok();
                ("unknown", false)
            }
        };
        if !is_open {
            // Before the end is noted, as the connection holds the lock.
            self.connection.close();
        }
        let outcome = outcome.to_owned();
        self.note(now(), Event::Ended { outcome });
        is_open
    }

    fn note_loss(&self, reason: &str) {
        let reason = reason.to_owned();
        self.note(now(), Event::LossReported { reason });
    }

    /// Asks until when the lock is certainly held.
    fn query_held(&mut self, held: &mut Held, at: Nanos, deadline: Instant) -> io::Result<Loss> {
        let token = held.token.to_string();
        self.connection.send(&["HELD", &held.key, &token])?;
        loop {
            match self.connection.next(deadline)? {
                Some(Reply::Push(items)) => {
                    if let Some(reason) = loss_of(held, &items) {
                        // The answer follows, and is read with the next command.
                        self.connection.next(deadline)?;
                        return Ok(Some(reason));
                    }
                }
                Some(Reply::Int(0)) => return Ok(Some("not-held")),
                Some(Reply::Int(left)) => {
                    held.until = at + nanos(Duration::from_millis(left.cast_unsigned()));
                    return Ok(None);
                }
                None => return Ok(Some(UNANSWERED)),
                Some(other) => return Err(io::Error::other(format!("HELD: {other:?}"))),
            }
        }
    }

    /// Holds the lock, and asks for its validity again and again.
    fn hold(&mut self, held: &mut Held, hold: Duration) -> io::Result<Loss> {
        let until = Instant::now() + hold;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            if left < LOOK_EVERY {
                thread::sleep(left);
                return Ok(None);
            }
            // A loss may be reported meanwhile.
            if let Some(Reply::Push(items)) = self.connection.next(Instant::now() + LOOK_EVERY)?
                && let Some(reason) = loss_of(held, &items)
            {
                return Ok(Some(reason));
            }
            let at = now();
            let valid_for = Duration::from_nanos(held.until.saturating_sub(at));
            if valid_for.is_zero() {
                return Ok(Some("expired-unasked"));
            }
            match self.query_held(held, at, Instant::now() + valid_for)? {
                None => self.note(at, Event::Valid { left: held.until - at }),
                loss => return Ok(loss),
            }
        }
    }

    /// Releases the lock. Returns the outcome, and whether the connection can be used again.
    fn unlock(&mut self, held: &Held) -> (&'static str, bool) {
        let token = held.token.to_string();
        if self.connection.send(&["UNLOCK", &held.key, &token]).is_err() {
            return ("error", false);
        }
        let deadline = Instant::now() + REPLY_WITHIN;
        loop {
            match self.connection.next(deadline) {
                Ok(Some(Reply::Int(1))) => return ("ok", true),
                Ok(Some(Reply::Int(0))) => return ("lost", true),
                // A loss that was noticed at the same time.
                Ok(Some(Reply::Push(_))) => {}
                _ => return ("error", false),
            }
        }
    }
}

const UNANSWERED: &str = "unanswered";

/// The reason in a message that this lock was lost.
fn loss_of(held: &Held, items: &[Reply]) -> Loss {
    let [
        Reply::Text(kind),
        Reply::Text(key),
        Reply::Int(token),
        Reply::Text(reason),
    ] = items
    else {
        return None;
    };
    if kind != "lost" || *key != held.key || *token != held.token {
        return None;
    }
    let known = ["expired", "taken", "max_hold", "closed", "shard_map"];
    known.into_iter().find(|known| known == reason).or(Some("unknown"))
}

fn one_word(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            "disconnected".to_owned()
        }
        _ => error.to_string().replace(' ', "-"),
    }
}
