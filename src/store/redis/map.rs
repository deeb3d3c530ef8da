//! Reading and storing the shard map at servers of the Redis family, whichever way a command gets there.

use std::future::Future;
use std::pin::Pin;

use deadpool_redis::redis::{Cmd, Value, cmd};

use super::reply::{as_text, shown};
use crate::store::StoreError;
use crate::store::map::{MAP_ATTEMPTS, MapState, MapStep, RESERVED_FOR, StoredMap};

/// Replaces the map if it is what it is thought to be, and returns what is stored then.
const SWAP: &str = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('SET', KEYS[1], ARGV[2]) end return redis.call('GET', KEYS[1])";

/// What comes of a command that was sent.
pub(super) type Reply<'a> = Pin<Box<dyn Future<Output = Result<Value, StoreError>> + Send + 'a>>;

/// The command that reads the map.
pub(super) fn read(map: &StoredMap) -> Cmd {
    let mut get = cmd("GET");
    get.arg(map.key());
    get
}

/// What the reply to [`read`] says.
pub(super) fn check(map: &StoredMap, reply: &Value) -> Result<MapState, StoreError> {
    map.check(stored(map, reply)?.as_deref())
}

/// The same for one who holds nothing and only looks.
pub(super) fn look(map: &StoredMap, reply: &Value) -> Result<(), StoreError> {
    map.look(stored(map, reply)?.as_deref())
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

/// Carries out one step.
///
/// # Errors
///
/// Another map is stored, or there was no answer.
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
        // Whether it took effect is looked at: somebody else may have been first.
        send(write).await?;
    }
    Err(StoreError::Unavailable(
        format!("other managers keep changing {}; try again", map.key()).into(),
    ))
}
