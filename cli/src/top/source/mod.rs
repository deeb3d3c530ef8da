//! The sources of the view: the admin endpoint of a process, or the shards themselves.
//!
//! Each source is polled by its own task, so a source that does not answer delays neither the other
//! sources nor the keyboard.

mod endpoint;
mod pages;
mod shards;

use std::time::{Duration, Instant};

use shardlock::tool::manager_of;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

pub(super) use crate::held_mode::HeldMode;
use crate::serve::ClientsPage;
pub(super) use endpoint::{Address, Endpoint};
pub(super) use shards::{KeySelection, Shards};

/// One sample of a source.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Sample {
    /// The manager's name, as in its owner tags; a different name means a different process. `None`
    /// if the shards were read.
    pub(super) manager: Option<String>,
    pub(super) uptime: Option<Duration>,
    pub(super) hot: Vec<HotKey>,
    pub(super) held: Vec<HeldLock>,
    /// How many locks are held. `held` may contain only the oldest of them.
    pub(super) held_total: usize,
    pub(super) shards: Vec<Shard>,
    /// The clients, if the process is an agent.
    pub(super) clients: Option<ClientsPage>,
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
    pub(super) process: String,
    pub(super) age: Age,
}

/// In place of a process if several hold a key together.
pub(super) const SEVERAL: &str = "several";

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
    /// The process, or [`SEVERAL`].
    pub(super) holder: String,
    pub(super) mode: HeldMode,
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
    pub(super) async fn sample(&mut self) -> Result<Sample, String> {
        match self {
            Self::Endpoint(endpoint) => endpoint.sample().await,
            Self::Shards(shards) => Ok(shards.sample().await),
        }
    }

    async fn search(&mut self) {
        if let Self::Shards(shards) = self {
            shards.search().await;
        }
    }
}

#[derive(Debug)]
pub(super) struct PolledSample {
    /// The index of the source.
    pub(super) source: usize,
    pub(super) sample: Result<Sample, String>,
    pub(super) at: Instant,
}

/// What the user wants of the sources.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PollControl {
    pub(super) paused: bool,
    /// How many searches for more keys were requested.
    pub(super) searches: u64,
}

/// How many samples may be queued for display.
const SAMPLES_QUEUED_MAX: usize = 64;

/// Sources that are polled until this is dropped.
#[derive(Debug)]
pub(super) struct Poller {
    control: watch::Sender<PollControl>,
    samples: mpsc::Receiver<PolledSample>,
    /// Dropping it aborts the tasks.
    _tasks: JoinSet<()>,
}

impl Poller {
    pub(super) fn start(sources: Vec<Source>, interval: Duration) -> Self {
        let (control, controls) = watch::channel(PollControl::default());
        let (sender, samples) = mpsc::channel(SAMPLES_QUEUED_MAX);
        let mut tasks = JoinSet::new();
        for (number, source) in sources.into_iter().enumerate() {
            tasks.spawn(poll(source, number, interval, controls.clone(), sender.clone()));
        }
        Self {
            control,
            samples,
            _tasks: tasks,
        }
    }

    /// Waits for the next sample. Cancel safe.
    pub(super) async fn next(&mut self) -> Option<PolledSample> {
        self.samples.recv().await
    }

    pub(super) fn control(&self, control: PollControl) {
        self.control
            .send_if_modified(|current| std::mem::replace(current, control) != control);
    }
}

async fn poll(
    mut source: Source,
    number: usize,
    interval: Duration,
    mut controls: watch::Receiver<PollControl>,
    samples: mpsc::Sender<PolledSample>,
) {
    let mut searches = 0;
    loop {
        let Ok(control) = controls
            .wait_for(|control| !control.paused)
            .await
            .map(|control| *control)
        else {
            return;
        };
        if control.searches != searches {
            searches = control.searches;
            source.search().await;
        }
        let sample = source.sample().await;
        let at = Instant::now();
        if samples
            .send(PolledSample {
                source: number,
                sample,
                at,
            })
            .await
            .is_err()
        {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {}
            changed = controls.changed() => if changed.is_err() { return },
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
