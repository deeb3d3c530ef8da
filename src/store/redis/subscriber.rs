//! What the subscribers of a primary and of a cluster have in common: how a message to the
//! manager's inbox becomes a push.

use super::replica_ack::ReplicaAck;
use super::reply;
use crate::protocol::Push;
use crate::store::warn_malformed;

/// The push to deliver for a message, or `None` after a warning if the message is malformed.
///
/// If replicas must confirm leases, a grant only makes its cycle ask: the manager that made the
/// grant did not wait for them.
pub(super) fn read(message: &str, shard: &str, replica_ack: Option<&ReplicaAck>) -> Option<Push> {
    match reply::push(message) {
        Some(Push::Granted { key, grant }) if replica_ack.is_some() => Some(Push::YourTurn {
            key,
            cycle: grant.cycle,
        }),
        Some(push) => Some(push),
        None => {
            warn_malformed(shard, message);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::protocol::Cycle;

    #[test]
    fn grants_are_only_notifications_if_replicas_must_confirm_leases() {
        let grant = format!("g {} 7 1 0 key", Cycle::of(4));
        assert!(matches!(read(&grant, "s", None), Some(Push::Granted { .. })));
        let ack = ReplicaAck::new(1, Duration::from_secs(1));
        assert!(matches!(read(&grant, "s", ack.as_ref()), Some(Push::YourTurn { .. })));
        assert_eq!(read("nonsense", "s", ack.as_ref()), None);
    }
}
