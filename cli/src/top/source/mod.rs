//! The sources of the view: the admin endpoint of a process, or the shards themselves.
//!
//! Each source is polled by its own task, so a source that does not answer delays neither the other
//! sources nor the keyboard.

mod endpoint;
mod pages;
mod scan;
mod shards;

use std::time::{Duration, Instant};

use shardlock::manager_of;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub(super) use endpoint::{Address, Endpoint};
pub(super) use shards::{Shards, Wanted};

/// One sample of a source.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Look {
    /// The manager's name, as in its owner tags; a different name means a different process. `None`
    /// if the shards were read.
    pub(super) manager: Option<String>,
    pub(super) uptime: Option<Duration>,
    pub(super) hot: Vec<HotKey>,
    pub(super) held: Vec<HeldLock>,
    /// How many locks are held. `held` may contain only the oldest of them.
    pub(super) held_total: usize,
    pub(super) shards: Vec<Shard>,
    /// A message for the status line.
    pub(super) note: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct HotKey {
    pub(super) key: String,
    pub(super) shard: String,
    /// How often a request found it held or waited for; decays over time.
    pub(super) contended: Option<u64>,
    pub(super) waiters: usize,
    pub(super) holder: Option<Holder>,
    pub(super) waits: Option<Quantiles>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Holder {
    /// The process, or the value that another library stored.
    pub(super) who: String,
    pub(super) age: Age,
}

/// How long a lock has been held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Age {
    pub(super) time: Duration,
    /// Whether it may be longer: a store does not know when the lock was acquired, so the time
    /// counts from when the holder was first seen.
    pub(super) at_least: bool,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Quantiles {
    pub(super) p50: Duration,
    pub(super) p99: Duration,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct HeldLock {
    pub(super) key: String,
    pub(super) shard: String,
    pub(super) who: String,
    pub(super) age: Age,
    /// The validity left; `None` for a lease without a TTL.
    pub(super) remaining: Option<Duration>,
    pub(super) waiters: usize,
    pub(super) token: Option<u64>,
    pub(super) caller: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Shard {
    pub(super) name: String,
    pub(super) kind: String,
    pub(super) up: bool,
    pub(super) leases: usize,
    pub(super) waiters: usize,
    /// `None` if the shards were read: they do not count locks.
    pub(super) locks: Option<Locks>,
    pub(super) round_trips: Quantiles,
}

/// Locks acquired, and how many of them were handed over within the process or from another
/// process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Locks {
    pub(super) acquired: u64,
    pub(super) local: u64,
    pub(super) remote: u64,
}

/// The process of an owner tag: `host-pid`, without the manager's random part and the cycle. Values
/// from other libraries are returned unchanged.
pub(super) fn process_of(owner: &str) -> &str {
    let manager = manager_of(owner).unwrap_or(owner);
    match manager.rsplit_once('-') {
        Some((process, random)) if random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit()) => process,
        _ => owner,
    }
}

#[derive(Debug)]
pub(super) enum Source {
    Endpoint(Endpoint),
    // The manager in it makes it large; it is then the only source.
    Shards(Box<Shards>),
}

impl Source {
    /// Its name on the screen.
    pub(super) fn label(&self) -> String {
        match self {
            Self::Endpoint(endpoint) => endpoint.label(),
            Self::Shards(shards) => shards.label(),
        }
    }

    /// # Errors
    ///
    /// A one-line message for the user.
    pub(super) async fn look(&mut self) -> Result<Look, String> {
        match self {
            Self::Endpoint(endpoint) => endpoint.look().await,
            Self::Shards(shards) => Ok(shards.look().await),
        }
    }

    async fn search(&mut self) {
        if let Self::Shards(shards) = self {
            shards.search().await;
        }
    }
}

#[derive(Debug)]
pub(super) struct Answer {
    /// The index of the source.
    pub(super) source: usize,
    pub(super) look: Result<Look, String>,
    pub(super) at: Instant,
}

/// What the user asks of the sources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) paused: bool,
    /// How many searches for more keys were requested.
    pub(super) searches: u64,
}

/// How many answers may be queued for display.
const ANSWERS_MAX: usize = 64;

/// Sources that are polled until this is dropped.
#[derive(Debug)]
pub(super) struct Asking {
    wish: watch::Sender<Wish>,
    answers: mpsc::Receiver<Answer>,
    /// Dropping it aborts the tasks.
    _tasks: JoinSet<()>,
}

impl Asking {
    pub(super) fn start(sources: Vec<Source>, interval: Duration) -> Self {
        let (wish, wishes) = watch::channel(Wish::default());
        let (sender, answers) = mpsc::channel(ANSWERS_MAX);
        let mut tasks = JoinSet::new();
        for (number, source) in sources.into_iter().enumerate() {
            tasks.spawn(ask(source, number, interval, wishes.clone(), sender.clone()));
        }
        Self {
            wish,
            answers,
            _tasks: tasks,
        }
    }

    /// Waits for the next answer. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<Answer> {
        self.answers.recv().await
    }

    pub(super) fn wish(&self, wish: Wish) {
        self.wish.send_if_modified(|was| std::mem::replace(was, wish) != wish);
    }
}

async fn ask(
    mut source: Source,
    number: usize,
    interval: Duration,
    mut wishes: watch::Receiver<Wish>,
    answers: mpsc::Sender<Answer>,
) {
    let mut searches = 0;
    loop {
        let Ok(wish) = wishes.wait_for(|wish| !wish.paused).await.map(|wish| *wish) else {
            return;
        };
        if wish.searches != searches {
            searches = wish.searches;
            source.search().await;
        }
        let look = source.look().await;
        let at = Instant::now();
        if answers
            .send(Answer {
                source: number,
                look,
                at,
            })
            .await
            .is_err()
        {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            changed = wishes.changed() => if changed.is_err() { return },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::process_of;

    #[test]
    fn an_owner_is_shortened_to_its_process_and_foreign_ones_are_left_alone() {
        assert_eq!(process_of("vm-26421-405e0207d6084959:2-10000-0badcafe"), "vm-26421");
        assert_eq!(process_of("vm-26421-405e0207d6084959:2"), "vm-26421");
        assert_eq!(process_of("vm-26421-405e0207d6084959"), "vm-26421");
        for foreign in ["", "redlock:17", "a-b:c", "vm-26421-405e:2", "0123456789abcdef"] {
            assert_eq!(process_of(foreign), foreign);
        }
    }
}
