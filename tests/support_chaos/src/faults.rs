//! The faults and their order.

use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::SliceRandom;

macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident = $name:literal,)*) => {
        /// A simulated fault.
        #[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
        pub enum Fault {
            $($(#[$doc])* $fault,)*
        }

        impl Fault {
            #[cfg(test)]
            pub(crate) const ALL: &[Self] = &[$(Self::$fault,)*];

            /// The fault's name in histories and reports.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$fault => $name,)*
                }
            }
        }
    };
}

faults! {
    /// SIGKILL of a worker; a new worker takes its place.
    KillWorker = "kill-worker",
    /// SIGSTOP of a worker, for a moment or for longer than a lease lasts.
    StopWorker = "stop-worker",
    /// Blocks all threads of a worker's runtime.
    BlockRuntime = "block-runtime",
    /// SIGKILL of a client process of an agent; a new one takes its place.
    KillClient = "kill-client",
    /// SIGSTOP of a client process of an agent.
    StopClient = "stop-client",
    /// SIGKILL of the agent; a new one takes its place.
    KillAgent = "kill-agent",
    /// SIGTERM of the agent, which waits for its holders; a new one takes its place.
    DrainAgent = "drain-agent",
    /// SIGSTOP of the agent, for a moment or for longer than a lease lasts.
    StopAgent = "stop-agent",
    /// SIGSTOP of the only server.
    HungServer = "hung-server",
    /// SIGKILL of the only server, which restarts without its data.
    CrashServer = "crash-server",
    /// SIGKILL of the only server, which has written everything to its disk before it answered.
    RestartServer = "restart-server",
    /// The address is redirected to the promoted replica, one client after the other; the old
    /// primary becomes its replica.
    SwitchOver = "switch-over",
    /// The address leads one client's subscription to the replica for a while.
    MisledInbox = "misled-inbox",
    /// SIGSTOP of a primary, which is replaced if the stop lasts.
    HungPrimary = "hung-primary",
    /// SIGKILL of such a primary, which restarts once a replica has taken over.
    CrashPrimary = "crash-primary",
    /// A replica takes over from a healthy primary.
    Failover = "failover",
    /// SIGSTOP of a replica.
    HungReplica = "hung-replica",
    /// SIGSTOP of a sentinel.
    HungSentinel = "hung-sentinel",
    /// SIGSTOP of one of several independent or replicated servers.
    HungNode = "hung-node",
    /// SIGKILL of one of several independent or replicated servers.
    CrashNode = "crash-node",
    /// SIGSTOP of enough servers that no majority is left.
    HungMajority = "hung-majority",
    /// Servers receive everything, clients receive nothing.
    PartitionReplies = "partition-replies",
    /// Servers receive nothing from clients.
    PartitionRequests = "partition-requests",
    /// Servers and clients receive nothing from each other.
    PartitionBoth = "partition-both",
    /// Requests arrive late, after their clients have given up.
    LateRequests = "late-requests",
    /// Replies arrive late.
    SlowReplies = "slow-replies",
    /// Connections become silent without being closed.
    LostReplies = "lost-replies",
    /// The server closes the connections that subscribe.
    CutSubscriptions = "cut-subscriptions",
    /// The server closes the connections that send commands.
    CutConnections = "cut-connections",
    /// `SCRIPT FLUSH`.
    ScriptFlush = "script-flush",
    /// A lease is deleted manually.
    DeleteLease = "delete-lease",
    /// `FLUSHALL`.
    FlushAll = "flush-all",
    /// A server is out of memory for a while.
    OutOfMemory = "out-of-memory",
    /// A slot moves to another node.
    SlotMigration = "slot-migration",
    /// A server's clock jumps, and later jumps back.
    ClockJump = "clock-jump",
}

/// Draws each fault once before any fault is repeated.
pub(crate) struct Deck {
    all: Vec<Fault>,
    left: Vec<Fault>,
}

impl Deck {
    pub(crate) fn new(all: Vec<Fault>) -> Self {
        Self { all, left: Vec::new() }
    }

    /// Whether every fault has been drawn equally often.
    pub(crate) fn is_through(&self) -> bool {
        self.left.is_empty()
    }

    pub(crate) fn draw(&mut self, rng: &mut SmallRng) -> Fault {
        if self.left.is_empty() {
            self.left = self.all.clone();
            self.left.shuffle(rng);
        }
        self.left.pop().expect("there are faults to choose from")
    }
}

/// A random time in milliseconds with a log-uniform distribution: around ten is as likely as around
/// a thousand.
pub fn some_time(rng: &mut SmallRng, least: u64, most: u64) -> std::time::Duration {
    let (least, most) = ((least as f64).ln(), (most as f64).ln());
    std::time::Duration::from_secs_f64(rng.random_range(least..most).exp() / 1_000.0)
}
