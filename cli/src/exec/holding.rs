//! The locks that the keeper holds: those of its own manager, or of an agent.

use std::fmt;

use shardlock::{LockAllGuard, LockGuard};

use super::agent_locks::AgentLocks;
use crate::exit;

/// The locks under which the command runs.
pub(super) enum Holding {
    /// Of a manager in this process.
    Manager(LockAllGuard),
    /// Of the agent of this host.
    Agent(AgentLocks),
}

/// A lock, as the command learns of it.
pub(super) struct Described {
    pub(super) token: u64,
    /// The owner of the lease as written in the store. An agent does not report it.
    pub(super) owner: Option<String>,
}

/// Why a release did not end a lock that was held.
pub(super) enum NotReleased {
    /// It had been lost before.
    Lost(String),
    /// The release was not confirmed.
    Unconfirmed(String),
}

impl Holding {
    /// The lock of this key, if it is one of them.
    pub(super) fn describe(&self, key: &str) -> Option<Described> {
        match self {
            Self::Manager(guards) => guards.guard(key).map(|guard: &LockGuard| Described {
                token: guard.token().get(),
                owner: Some(guard.owner()),
            }),
            Self::Agent(locks) => locks.token(key).map(|token| Described { token, owner: None }),
        }
    }

    /// Whether all locks are certainly held.
    pub(super) fn is_valid(&self) -> bool {
        match self {
            Self::Manager(guards) => guards.is_valid(),
            Self::Agent(locks) => locks.is_valid(),
        }
    }

    /// Waits until a lock is lost. Returns which one, and why.
    pub(super) async fn lost(&self) -> String {
        match self {
            Self::Manager(guards) => guards.lost().await.to_string(),
            Self::Agent(locks) => locks.lost().await,
        }
    }

    pub(super) async fn release(self) -> Result<(), NotReleased> {
        match self {
            Self::Manager(guards) => guards.release().await.map_err(|error| {
                if error.is_lost() {
                    NotReleased::Lost(error.to_string())
                } else {
                    NotReleased::Unconfirmed(exit::describe_error(&error))
                }
            }),
            Self::Agent(locks) => locks.release().await,
        }
    }
}

impl fmt::Debug for Holding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Manager(guards) => guards.fmt(f),
            Self::Agent(locks) => locks.fmt(f),
        }
    }
}
