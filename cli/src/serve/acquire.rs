//! Turning a LOCK into a request of the library.

use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockGuard};

use super::agent::Agent;
use super::command::{Lock, Mode, Wait};

/// Sets the options of a command on a request that waits, or on one that does not: the two types
/// have the same methods.
macro_rules! with_options {
    ($request:expr, $agent:expr, $lock:expr) => {{
        let mut request = $request;
        if let Some(changed) = $agent.defaults.changed() {
            request = request
                .ttl(changed.ttl)
                .max_hold(changed.max_hold)
                .linger(changed.linger);
            if $lock.mode == Mode::Exclusive {
                request = request.min_hold(changed.min_hold);
            }
        }
        if let Some(ttl) = $lock.ttl {
            request = request.ttl(ttl);
        }
        if let Some(min_hold) = $lock.min_hold {
            request = request.min_hold(min_hold);
        }
        if let Some(max_hold) = $lock.max_hold {
            request = request.max_hold(max_hold);
        }
        if let Some(class) = &$lock.class {
            request = request.class(class);
        }
        request
    }};
}

/// Waits for the lock. `None` if it was not acquired in the time that the client has set.
///
/// Cancel safe: dropping the future gives up the place in the queue.
pub(super) async fn acquire(agent: &Agent, lock: &Lock) -> Result<Option<LockGuard>, LockError> {
    let (locks, key) = (&agent.locks, &lock.key);
    let limit = match lock.wait {
        Wait::No => {
            let request = match lock.mode {
                Mode::Exclusive => locks.try_lock(key),
                Mode::Shared => locks.try_lock(key).shared(),
                Mode::Permits { weight, limit } => locks.try_permits(key, limit).weight(weight),
            };
            return with_options!(request, agent, lock).await;
        }
        Wait::AtMost(limit) => Some(Some(limit)),
        Wait::Default => agent.defaults.changed().map(|changed| changed.timeout),
    };
    let mut request = match lock.mode {
        Mode::Exclusive => locks.lock(key),
        Mode::Shared => locks.lock(key).shared(),
        Mode::Permits { weight, limit } => locks.permits(key, limit).weight(weight),
    };
    if let Some(limit) = limit {
        request = request.timeout(limit);
    }
    match with_options!(request, agent, lock).await {
        Ok(guard) => Ok(Some(guard)),
        Err(error) if error.is_timeout() => Ok(None),
        Err(error) => Err(error),
    }
}

/// The reply for an error: its code, then the message.
pub(super) fn error_reply(error: &LockError) -> String {
    let code = match error.kind() {
        LockErrorKind::QueueFull
        | LockErrorKind::TooManyWaiters
        | LockErrorKind::TooManyKeys
        | LockErrorKind::TooManyLeases => "LIMIT",
        LockErrorKind::ShardDown | LockErrorKind::Unavailable | LockErrorKind::Closed => "UNAVAILABLE",
        LockErrorKind::Refused | LockErrorKind::ShardMapMismatch | LockErrorKind::TokenRegression => "REFUSED",
        // The request is invalid.
        _ => "ERR",
    };
    format!("{code} {error}")
}
