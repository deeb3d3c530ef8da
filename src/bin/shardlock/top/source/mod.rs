//! Where the view comes from: the admin endpoint of a process, or the shards themselves.
//!
//! Each source is asked by a task of its own, so that one that gives no answer keeps nobody else waiting, and the keyboard least of all.

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

/// What a source said at one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Look {
    /// The manager that was asked, as it signs its leases; another name is another process. Nothing where shards were looked at.
    pub(super) manager: Option<String>,
    pub(super) uptime: Option<Duration>,
    pub(super) hot: Vec<HotKey>,
    pub(super) held: Vec<HeldLock>,
    /// How many are held, of which `held` may have the oldest only.
    pub(super) held_total: usize,
    pub(super) shards: Vec<Shard>,
    /// What is to be known of how this came about.
    pub(super) note: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct HotKey {
    pub(super) key: String,
    pub(super) shard: String,
    /// How often it was found held or wanted; fades in time.
    pub(super) contended: Option<u64>,
    pub(super) waiters: usize,
    pub(super) holder: Option<Holder>,
    pub(super) waits: Option<Quantiles>,
}

#[derive(Debug, Clone, PartialEq)]
pub(super) struct Holder {
    /// The process, or whatever another library has written.
    pub(super) who: String,
    pub(super) age: Age,
}

/// For how long something is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Age {
    pub(super) time: Duration,
    /// It may be longer: a store does not tell since when, so it counts from when it was first seen.
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
    /// Until when it is certainly held; nothing if it has no end.
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
    /// Nothing where shards were looked at: they do not count locks.
    pub(super) locks: Option<Locks>,
    pub(super) round_trips: Quantiles,
}

/// How many locks were had, and how many of them after waiting for a task of the same process, or for another process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Locks {
    pub(super) acquired: u64,
    pub(super) local: u64,
    pub(super) remote: u64,
}

/// The process that signed a lease: `host-pid`, without what only tells managers and their cycles apart. What another library wrote stays whole.
pub(super) fn process_of(owner: &str) -> &str {
    let manager = manager_of(owner).unwrap_or(owner);
    match manager.rsplit_once('-') {
        Some((process, random)) if random.len() == 16 && random.bytes().all(|byte| byte.is_ascii_hexdigit()) => process,
        _ => owner,
    }
}

/// What is asked.
#[derive(Debug)]
pub(super) enum Source {
    Endpoint(Endpoint),
    // It has a manager, and is the only one then.
    Shards(Box<Shards>),
}

impl Source {
    /// How it is called on the screen.
    pub(super) fn label(&self) -> String {
        match self {
            Self::Endpoint(endpoint) => endpoint.label(),
            Self::Shards(shards) => shards.label(),
        }
    }

    /// # Errors
    ///
    /// In words for people, in one line.
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

/// What a source answered, and when.
#[derive(Debug)]
pub(super) struct Answer {
    /// Which source, counted from zero.
    pub(super) source: usize,
    pub(super) look: Result<Look, String>,
    pub(super) at: Instant,
}

/// What the person at the keyboard wants of the sources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Wish {
    pub(super) paused: bool,
    /// How often a search for more keys was asked for.
    pub(super) searches: u64,
}

/// How many answers may wait to be shown.
const ANSWERS_MAX: usize = 64;

/// Sources that are asked again and again until this is dropped.
#[derive(Debug)]
pub(super) struct Asking {
    wish: watch::Sender<Wish>,
    answers: mpsc::Receiver<Answer>,
    /// Dropping it ends the tasks.
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

    /// Waits for the next answer. Nothing is lost if this is cancelled.
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
