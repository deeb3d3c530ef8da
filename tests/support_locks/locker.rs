//! A worker that locks when it is told to.

use std::ops::{Deref, DerefMut};
use std::time::Duration;

use super::{TestStore, builder_of, lock};
use crate::support::{Worker, worker};

/// What the worker is called; a test's `worker_entry` runs [`obey`] for it.
pub const LOCKER: &str = "locker";

/// The test's side: a process that has a manager, and at most one guard, of the key `k`.
pub struct Locker(Worker);

impl TestStore {
    /// So many processes whose leases have this TTL. All of them are connected.
    #[track_caller]
    pub fn lockers(&self, count: usize, ttl: Duration) -> Vec<Locker> {
        self.lockers_with(count, ttl, &[])
    }

    /// [`lockers`](Self::lockers) with these environment variables.
    #[track_caller]
    pub fn lockers_with(&self, count: usize, ttl: Duration, vars: &[(&str, &str)]) -> Vec<Locker> {
        let ttl = ttl.as_millis().to_string();
        let vars = [&[("LOCKTEST_TTL", ttl.as_str())], vars].concat();
        let spawn = |_| Locker(self.worker(LOCKER, &vars));
        let lockers: Vec<_> = (0..count).map(spawn).collect();
        for locker in &lockers {
            assert_eq!(locker.line(), "connected");
        }
        lockers
    }

    /// One process whose leases are short.
    #[track_caller]
    pub fn locker(&self) -> Locker {
        self.lockers(1, self.short_ttl()).remove(0)
    }
}

impl Locker {
    /// Has it ask for the lock.
    #[track_caller]
    pub fn ask(&mut self) {
        self.send("lock");
    }

    /// Waits until it has the lock that it asked for, and returns the token.
    #[track_caller]
    pub fn locked(&self) -> u64 {
        self.line().parse().expect("a token")
    }

    /// Has it lock, and returns the token.
    #[track_caller]
    pub fn lock(&mut self) -> u64 {
        self.ask();
        self.locked()
    }

    /// Has it give the lock back.
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

/// The worker's side: hears `lock` and says the token when it has the lock, hears `release` and says `released`.
#[tokio::main]
pub async fn obey(me: &worker::Current) {
    let ttl = Duration::from_millis(me.var("LOCKTEST_TTL").parse().expect("milliseconds"));
    let locks = builder_of(me).ttl(ttl).connect().await.expect("connect");
    me.say("connected");
    let mut held = None;
    loop {
        let me = me.clone();
        let told = tokio::task::spawn_blocking(move || (me.hear(), me)).await;
        let (line, me) = told.expect("listen");
        match line.as_deref() {
            Some("lock") => {
                let guard = lock(&locks, "k").await;
                me.say(guard.token().to_string());
                held = Some(guard);
            }
            Some("release") => {
                let guard = held.take().expect("a lock to give back");
                guard.release().await.expect("release");
                me.say("released");
            }
            Some(line) => panic!("a locker does not know {line:?}"),
            None => return,
        }
    }
}
