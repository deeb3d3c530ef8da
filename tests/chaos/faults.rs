//! The faults, and the order in which they come.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident = $name:literal,)*) => {
        /// What can go wrong.
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum Fault {
            $($(#[$doc])* $fault,)*
        }

        impl Fault {
            #[cfg(test)]
            pub const ALL: &[Self] = &[$(Self::$fault,)*];

            /// What it is called in histories and reports.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$fault => $name,)*
                }
            }
        }
    };
}

faults! {
    /// SIGKILL of a worker; a new one takes its place.
    KillWorker = "kill-worker",
    /// SIGSTOP of a worker, for moments or for longer than a lease lasts.
    StopWorker = "stop-worker",
    /// All threads of a worker's runtime are blocked.
    BlockRuntime = "block-runtime",
    /// SIGSTOP of the only server.
    HungServer = "hung-server",
    /// SIGKILL of the only server, which comes back without its data.
    CrashServer = "crash-server",
    /// The address leads to the promoted replica, one client after the other; the old primary becomes its replica.
    SwitchOver = "switch-over",
    /// The address leads one client's subscription to the replica for a while.
    MisledInbox = "misled-inbox",
    /// SIGSTOP of a primary that others replace if it lasts.
    HungPrimary = "hung-primary",
    /// SIGKILL of such a primary, which comes back once a replica has taken over.
    CrashPrimary = "crash-primary",
    /// A replica takes over while the primary is well.
    Failover = "failover",
    HungReplica = "hung-replica",
    HungSentinel = "hung-sentinel",
    /// SIGSTOP of one of several independent or replicated servers.
    HungNode = "hung-node",
    /// SIGKILL of one of them.
    CrashNode = "crash-node",
    /// SIGSTOP of so many that no majority is left.
    HungMajority = "hung-majority",
    /// Servers receive everything, and clients nothing.
    PartitionReplies = "partition-replies",
    /// Servers receive nothing of what clients send.
    PartitionRequests = "partition-requests",
    PartitionBoth = "partition-both",
    /// What clients have sent arrives late, after they have given up.
    LateRequests = "late-requests",
    SlowReplies = "slow-replies",
    /// Connections fall silent without ending.
    LostReplies = "lost-replies",
    CutSubscriptions = "cut-subscriptions",
    CutConnections = "cut-connections",
    ScriptFlush = "script-flush",
    /// A lease is deleted by hand.
    DeleteLease = "delete-lease",
    FlushAll = "flush-all",
    OutOfMemory = "out-of-memory",
    SlotMigration = "slot-migration",
    /// The clock of a server jumps, and later back.
    ClockJump = "clock-jump",
}

/// Each fault comes once before any comes again.
pub struct Deck {
    all: Vec<Fault>,
    left: Vec<Fault>,
}

impl Deck {
    pub fn new(all: Vec<Fault>) -> Self {
        Self { all, left: Vec::new() }
    }

    /// Whether each has come as often as any other.
    pub fn is_through(&self) -> bool {
        self.left.is_empty()
    }

    pub fn draw(&mut self, rng: &mut SmallRng) -> Fault {
        if self.left.is_empty() {
            self.left = self.all.clone();
            self.left.shuffle(rng);
        }
        self.left.pop().expect("there are faults to choose from")
    }
}

/// A time in milliseconds, as likely around ten as around a thousand.
pub fn some_time(rng: &mut SmallRng, least: u64, most: u64) -> std::time::Duration {
    let (least, most) = ((least as f64).ln(), (most as f64).ln());
    std::time::Duration::from_secs_f64(rng.random_range(least..most).exp() / 1_000.0)
}
