//! A worker that locks and releases on command.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use support::{Worker, worker};

use super::{TestStore, builder_of, lock};

/// The worker's name. A test's `worker_entry` runs [`run_commands`] for it.
pub const LOCKER: &str = "locker";

/// The test's side of a process with one manager and at most one guard, for the key `k`.
pub struct Locker(Worker);

impl TestStore {
    /// Starts `count` processes whose leases have this TTL, and waits until all are connected.
    #[track_caller]
    pub fn lockers(&self, count: usize, ttl: Duration) -> Vec<Locker> {
        self.lockers_with(count, ttl, &[])
    }

    /// [`lockers`](Self::lockers) with these environment variables.
    #[track_caller]
    pub fn lockers_with(&self, count: usize, ttl: Duration, vars: &[(&str, &str)]) -> Vec<Locker> {
        let ttl = ttl.as_millis().to_string();
        let vars = [&[("SHARDLOCK_TEST_TTL", ttl.as_str())], vars].concat();
        let spawn = |_| Locker(self.worker(LOCKER, &vars));
        let lockers: Vec<_> = (0..count).map(spawn).collect();
        for locker in &lockers {
            assert_eq!(locker.line(), "connected");
        }
        lockers
    }

    /// One process with short leases.
    #[track_caller]
    pub fn locker(&self) -> Locker {
        self.lockers(1, self.short_ttl()).remove(0)
    }
}

impl Locker {
    /// Makes the process request the lock.
    #[track_caller]
    pub fn request(&mut self) {
        self.send("lock");
    }

    /// Waits until the process has acquired the requested lock, and returns the token.
    #[track_caller]
    pub fn locked(&self) -> u64 {
        self.line().parse().expect("a token")
    }

    /// Makes the process acquire the lock, and returns the token.
    #[track_caller]
    pub fn lock(&mut self) -> u64 {
        self.request();
        self.locked()
    }

    /// Makes the process release the lock.
    #[track_caller]
    pub fn release(&mut self) {
        self.send("release");
        assert_eq!(self.line(), "released");
    }
}

impl Deref for Locker {
    type Target = Worker;

    fn deref(&self) -> &Worker {
        &self.0
    }
}

impl DerefMut for Locker {
    fn deref_mut(&mut self) -> &mut Worker {
        &mut self.0
    }
}

/// The worker's side. On `lock` it acquires the lock and prints the token; on `release` it releases
/// the lock and prints `released`.
#[tokio::main]
pub async fn run_commands(me: &worker::Current) {
    let ttl = Duration::from_millis(me.var("SHARDLOCK_TEST_TTL").parse().expect("milliseconds"));
    let locks = builder_of(me).ttl(ttl).connect().await.expect("connect");
    me.send("connected");
    let mut held = None;
    loop {
        let me = me.clone();
        let received = tokio::task::spawn_blocking(move || (me.recv(), me)).await;
        let (line, me) = received.expect("receive");
        match line.as_deref() {
            Some("lock") => {
                let guard = lock(&locks, "k").await;
                me.send(guard.token().to_string());
                held = Some(guard);
            }
            Some("release") => {
                let guard = held.take().expect("a lock to release");
                guard.release().await.expect("release");
                me.send("released");
            }
            Some(line) => panic!("a locker does not know {line:?}"),
            None => return,
        }
    }
}
