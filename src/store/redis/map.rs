//! Reads and stores the shard map on Redis servers, independent of how commands are sent.

use std::future::Future;
use std::pin::Pin;

use deadpool_redis::redis::{Cmd, Value, cmd};

use super::reply::{as_text, shown};
use crate::store::StoreError;
use crate::store::map::{MAP_ATTEMPTS, MapState, MapStep, RESERVED_FOR, StoredMap};

/// Replaces the map if it has the expected value, and returns what is stored afterwards.
const SWAP: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end return redis.call('GET', KEYS[1])";

/// The outcome of a command.
pub(super) type Reply<'a> = Pin<Box<dyn Future<Output = Result<Value, StoreError>> + Send + 'a>>;

/// The command that reads the map.
pub(super) fn read(map: &StoredMap) -> Cmd {
    let mut get = cmd("GET");
    get.arg(map.key());
    get
}

/// Compares the reply to [`read`] with this manager's map.
pub(super) fn check(map: &StoredMap, reply: &Value) -> Result<MapState, StoreError> {
    map.check(stored(map, reply)?.as_deref())
}

/// The same for a health probe, which holds nothing.
pub(super) fn check_or_forget(map: &StoredMap, reply: &Value) -> Result<(), StoreError> {
    map.check_or_forget(stored(map, reply)?.as_deref())
}

fn stored(map: &StoredMap, reply: &Value) -> Result<Option<String>, StoreError> {
    match (reply, as_text(reply)) {
        (Value::Nil, _) => Ok(None),
        (_, Some(theirs)) => Ok(Some(theirs)),
        (_, None) => Err(StoreError::Refused(
            format!("unexpected reply to GET {}: {}", map.key(), shown(reply)).into(),
        )),
    }
}

/// Executes one step.
///
/// # Errors
///
/// Another map is stored, or the server did not answer.
pub(super) async fn step<'a>(
    map: &StoredMap,
    step: MapStep,
    send: &(dyn Fn(Cmd) -> Reply<'a> + Sync),
) -> Result<MapState, StoreError> {
    for _ in 0..MAP_ATTEMPTS {
        let stored = send(read(map)).await?;
        let state = check(map, &stored)?;
        let write = match (step, state) {
            (MapStep::Read, _) | (_, MapState::Ours) | (MapStep::Reserve, MapState::Reserved) => return Ok(state),
            (MapStep::Confirm, MapState::Reserved) => {
                let mut swap = cmd("EVAL");
                let seen = as_text(&stored).unwrap_or_default();
                swap.arg(SWAP).arg(1).arg(map.key()).arg(seen).arg(map.ours());
                swap
            }
            (MapStep::Reserve, MapState::None) => {
                let mut set = cmd("SET");
                set.arg(map.key()).arg(map.reservation());
                set.arg("PX").arg(RESERVED_FOR.as_millis() as u64);
                set.arg("NX");
                set
            }
            (MapStep::Confirm, MapState::None) => {
                let mut set = cmd("SET");
                set.arg(map.key()).arg(map.ours()).arg("NX");
                set
            }
        };
        // The next iteration checks the result: another manager may have been first.
        send(write).await?;
    }
    Err(StoreError::Unavailable(
        format!("other managers keep changing {}; try again", map.key()).into(),
    ))
}
