//! What all connections share.

use std::time::Instant;

use shardlock::LockManager;
use tokio::sync::watch;

use super::access::Access;
use super::clients::Clients;
use super::defaults::Defaults;
use super::held::HeldLocks;
use super::limits::Limits;
use super::metrics::AgentMetrics;

/// The agent, as its connections see it.
pub(super) struct Agent {
    pub(super) locks: LockManager,
    pub(super) held: HeldLocks,
    pub(super) clients: Clients,
    pub(super) limits: Limits,
    pub(super) access: Access,
    pub(super) defaults: Defaults,
    pub(super) metrics: AgentMetrics,
    pub(super) started: Instant,
    phase: watch::Sender<Phase>,
}

/// The phases of an agent's life, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Locks are granted.
    Serving,
    /// No lock is granted, and those that are held may be released.
    Draining,
    /// All locks were released, and connections are closed.
    Stopping,
}

impl Agent {
    /// Call this once a metrics recorder is installed, if there will be one.
    pub(super) fn new(locks: LockManager, limits: Limits, access: Access, defaults: Defaults) -> Self {
        let metrics = AgentMetrics::new(limits.max_connections);
        Self {
            locks,
            held: HeldLocks::new(metrics.locks.clone()),
            clients: Clients::new(metrics.connections.clone()),
            limits,
            access,
            defaults,
            metrics,
            started: Instant::now(),
            phase: watch::Sender::new(Phase::Serving),
        }
    }

    pub(super) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(super) fn enter(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    pub(super) fn phases(&self) -> Phases {
        Phases(self.phase.subscribe())
    }
}

/// Waits for phases.
#[derive(Clone)]
pub(super) struct Phases(watch::Receiver<Phase>);

impl Phases {
    /// Waits until this phase or a later one has begun.
    ///
    /// Cancel safe.
    pub(super) async fn reached(&mut self, phase: Phase) {
        // Fails once the agent is gone, which is later than any phase.
        self.0.wait_for(|&now| now >= phase).await.ok();
    }
}
