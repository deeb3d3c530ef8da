//! The processes of a round.

use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use support::{Worker, worker};

/// Starts the processes of a round, each with a name and a seed of its own.
pub struct Processes {
    history: PathBuf,
    /// That of the round.
    pub(crate) seed: u64,
    pub(crate) ttl: Duration,
    /// Number of processes started so far.
    count: usize,
}

/// A process that writes a history under its name.
pub struct Member {
    /// Its name in histories.
    pub name: String,
    /// The process.
    pub worker: Worker,
}

impl Processes {
    /// For a round with this seed, in which locks have this TTL. Histories are written into the
    /// folder.
    pub fn new(history: &Path, seed: u64, ttl: Duration) -> Self {
        Self {
            history: history.to_owned(),
            seed,
            ttl,
            count: 0,
        }
    }

    /// Starts a process with this entry, and with these variables beside those that all have. Its
    /// name is the prefix and a number. It says `ready` when it is
    /// ([`wait_until_ready`](Member::wait_until_ready)).
    pub fn start(&mut self, entry: &str, prefix: &str, more: &[(&str, String)]) -> Member {
        self.count += 1;
        let name = format!("{prefix}{}", self.count);
        let seed = self.seed.wrapping_mul(100).wrapping_add(self.count as u64);
        let common = [
            ("SHARDLOCK_TEST_WHO", name.clone()),
            ("SHARDLOCK_TEST_HISTORY", self.history.display().to_string()),
            ("SHARDLOCK_TEST_TTL", self.ttl.as_millis().to_string()),
            ("SHARDLOCK_TEST_SEED", seed.to_string()),
        ];
        let vars: Vec<_> = common
            .iter()
            .chain(more)
            .map(|(name, value)| (*name, value.as_str()))
            .collect();
        let worker = worker::spawn(entry, &vars);
        Member { name, worker }
    }
}

impl Member {
    /// Waits until the process takes part in the round.
    pub fn wait_until_ready(&self) {
        assert_eq!(self.worker.line(), "ready");
    }

    /// Stops the process for this long.
    pub fn stop_for(&self, time: Duration) {
        self.worker.stop();
        thread::sleep(time);
        self.worker.cont();
    }

    /// Blocks all threads of a worker's runtime for this long.
    pub fn block_for(&mut self, time: Duration) {
        self.worker.send(&format!("block {}", time.as_millis()));
        thread::sleep(time);
    }
}

/// Asks the processes to finish, and returns the names of those that do not finish in time.
pub fn end_all(members: &mut [Member], within: Duration) -> Vec<String> {
    for member in &mut *members {
        member.worker.send("end");
    }
    let look = Duration::from_millis(50);
    // Count polls instead of measuring time, because time during which the machine is stalled must
    // not count.
    let looks = within.as_millis() / look.as_millis();
    let ended = |member: &Member| {
        let mut said = (0..looks).map(|_| member.worker.line_within(look));
        said.find_map(|line| line).as_deref() == Some("ended")
    };
    let late = members.iter().filter(|member| !ended(member));
    late.map(|member| member.name.clone()).collect()
}
