//! How to split a batch when a server, or a proxy in front of it, refuses part of it, so that one
//! refused item does not fail the others.

use std::collections::BTreeMap;

use deadpool_redis::redis::{ErrorKind, RedisError, ServerErrorKind};

use super::permission;

/// How many leases one call of the renewal script covers: few enough that other requests get a turn
/// in between.
pub(super) const RENEWALS_PER_CALL: usize = 128;

/// Indices into a batch, for items sent in one call.
pub(super) type Part = Vec<usize>;

/// Whether a refused call may succeed for some of its keys alone. Any other refusal does not depend
/// on the keys, so splitting the call would only multiply the requests.
pub(super) fn may_concern_some_keys(error: &RedisError) -> bool {
    if permission::is_about_a_command(error) {
        return false;
    }
    match error.kind() {
        ErrorKind::Server(kind) => !matches!(
            kind,
            ServerErrorKind::BusyLoading
                | ServerErrorKind::NoScript
                | ServerErrorKind::ClusterDown
                | ServerErrorKind::MasterDown
                | ServerErrorKind::ReadOnly
        ),
        ErrorKind::Extension => !matches!(
            error.code(),
            Some("OOM" | "MISCONF" | "NOREPLICAS" | "NOAUTH" | "WRONGPASS" | "BUSY" | "UNBLOCKED" | "DENIED")
        ),
        _ => false,
    }
}

/// Whether the server refused the call because its keys are in different slots.
pub(super) fn wants_one_slot(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Server(ServerErrorKind::CrossSlot)
}

/// Splits a part that has more than one item into two halves.
pub(super) fn halves(mut part: Part) -> [Part; 2] {
    let second = part.split_off(part.len() / 2);
    [part, second]
}

/// Groups the items by slot, in parts of at most `most` items.
pub(super) fn by_slot<S: Ord>(
    items: impl IntoIterator<Item = usize>,
    slot: impl Fn(usize) -> S,
    most: usize,
) -> Vec<Part> {
    let mut slots: BTreeMap<S, Part> = BTreeMap::new();
    for item in items {
        slots.entry(slot(item)).or_default().push(item);
    }
    let parts = slots.into_values();
    parts
        .flat_map(|part| part.chunks(most).map(<[usize]>::to_vec).collect::<Vec<_>>())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_contain_each_item_once_and_at_most_their_limit() {
        assert_eq!(halves(vec![1, 2, 3]), [vec![1], vec![2, 3]]);
        assert_eq!(
            by_slot(0..7, |item| item % 2, 3),
            [vec![0, 2, 4], vec![6], vec![1, 3, 5]]
        );
    }

    #[test]
    fn only_refusals_that_may_concern_keys_are_retried() {
        let error = |kind, text: &str| RedisError::from((kind, "an error", text.to_owned()));
        let server = |kind| error(ErrorKind::Server(kind), "words");
        for kind in [
            ServerErrorKind::CrossSlot,
            ServerErrorKind::NoPerm,
            ServerErrorKind::ResponseError,
        ] {
            assert!(may_concern_some_keys(&server(kind)), "{kind:?}");
        }
        for kind in [
            ServerErrorKind::ReadOnly,
            ServerErrorKind::BusyLoading,
            ServerErrorKind::ClusterDown,
        ] {
            assert!(!may_concern_some_keys(&server(kind)), "{kind:?}");
        }
        let no_command = "this user has no permissions to run the 'evalsha' command";
        assert!(!may_concern_some_keys(&error(
            ErrorKind::Server(ServerErrorKind::NoPerm),
            no_command
        )));
        assert!(!may_concern_some_keys(
            &std::io::Error::from(std::io::ErrorKind::BrokenPipe).into()
        ));
    }
}
