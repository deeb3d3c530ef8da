//! Parses server replies.

use std::fmt::{self, Write};
use std::time::Duration;

use deadpool_redis::redis::{ErrorKind, RedisError, ServerErrorKind, Value};

use super::permission;
use super::script::MARKER;
use crate::fence::{FencingToken, TokenBlock};
use crate::identity::parse_owner_tag;
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::protocol::{AcquireReply, Cycle, Grant, Push, QueuePosition, ReleaseReply, RenewReply};
use crate::store::{Holder, INSPECTED_MAX, KeyState, StoreError};
use crate::text::{printable, shortened};

pub(super) fn as_int(value: &Value) -> Option<i64> {
    match value {
        Value::Int(number) => Some(*number),
        Value::BulkString(bytes) => std::str::from_utf8(bytes).ok()?.parse().ok(),
        _ => None,
    }
}

pub(super) fn as_text(value: &Value) -> Option<String> {
    match value {
        Value::BulkString(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        Value::SimpleString(text) => Some(text.clone()),
        _ => None,
    }
}

pub(super) fn ints(value: &Value) -> Option<Vec<i64>> {
    match value {
        Value::Array(values) => values.iter().map(as_int).collect(),
        _ => None,
    }
}

pub(super) fn unexpected(what: &str, value: &Value) -> StoreError {
    let shown = shown(value);
    StoreError::Refused(format!("unexpected reply to {what}: {shown}; do all managers run the same version?").into())
}

/// A reply as shown in an error. The reply itself may have any length and content.
pub(super) fn shown(value: &Value) -> String {
    let mut shown = Cut(String::new());
    match write!(shown, "{value:?}") {
        Ok(()) => printable(&shown.0).into_owned(),
        Err(fmt::Error) => format!("{}...", printable(&shown.0)),
    }
}

/// The beginning of a text; the rest is discarded.
struct Cut(String);

impl Cut {
    const BYTES_MAX: usize = 150;
}

impl Write for Cut {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let kept = shortened(text, Self::BYTES_MAX - self.0.len());
        self.0.push_str(kept);
        if kept.len() < text.len() {
            Err(fmt::Error)
        } else {
            Ok(())
        }
    }
}

/// Precedes the arguments that a server repeats when it does not know a command.
const ARGUMENTS: &str = "with args beginning with";

/// An error that is safe to show. A server without HELLO or AUTH, for example with renamed
/// commands, repeats their arguments, which include the password.
pub(super) fn without_arguments(error: &str) -> &str {
    let end = error.find(ARGUMENTS).unwrap_or(error.len());
    error[..end].trim_end_matches([',', ' '])
}

/// Seconds and microseconds of a `TIME` reply.
pub(super) fn server_time(value: &Value) -> Option<(u64, u64)> {
    match ints(value)?[..] {
        [seconds, micros] => Some((seconds.try_into().ok()?, micros.try_into().ok()?)),
        _ => None,
    }
}

/// The role of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Role {
    Primary,
    /// A replica of the server at this `host:port`.
    Replica {
        of: String,
    },
    Sentinel,
}

/// Parses the reply to `ROLE`.
pub(super) fn role(value: &Value) -> Result<Role, StoreError> {
    let read = || {
        let Value::Array(parts) = value else { return None };
        Some(match as_text(parts.first()?)?.as_str() {
            "master" => Role::Primary,
            "slave" => Role::Replica {
                of: format!("{}:{}", as_text(parts.get(1)?)?, as_int(parts.get(2)?)?),
            },
            "sentinel" => Role::Sentinel,
            _ => return None,
        })
    };
    read().ok_or_else(|| unexpected("ROLE", value))
}

fn acquire_reply(values: &[Value], tokens: u32) -> Option<AcquireReply> {
    Some(match values {
        [Value::Int(0)] => AcquireReply::Busy,
        [Value::Int(1), last, queued, extended] => AcquireReply::Granted {
            tokens: TokenBlock::ending_at(as_int(last)?.try_into().ok()?, tokens),
            queued: as_int(queued)?.try_into().ok()?,
            extended: as_int(extended)? == 1,
        },
        [Value::Int(2), mark, left, owner, ahead, reached] => AcquireReply::Queued(QueuePosition {
            enqueue_token: as_int(mark)?.try_into().ok()?,
            owner_ttl: u64::try_from(as_int(left)?).ok().map(Duration::from_millis),
            owner_foreign: is_foreign(owner)?,
            ahead: as_int(ahead)?.try_into().ok()?,
            is_subscribed: as_int(reached)? == 1,
        }),
        _ => return None,
    })
}

/// Whether another library wrote the owner of a lease. It is null if it is known to be a manager,
/// and cut off if it is longer than every owner tag.
pub(super) fn is_foreign(owner: &Value) -> Option<bool> {
    match owner {
        Value::Nil => Some(false),
        Value::BulkString(owner) => {
            let owner = std::str::from_utf8(owner).ok();
            Some(owner.and_then(parse_owner_tag).is_none())
        }
        _ => None,
    }
}

/// Whether the script of an exclusive cycle did nothing, since shared holders or permits are
/// concerned: the script for all modes must be called instead.
pub(super) fn concerns_modes(value: &Value) -> bool {
    matches!(value, Value::Array(values) if values[..] == [Value::Int(3)])
}

/// The reply of the acquire script, which was asked for this number of tokens.
pub(super) fn acquired(value: &Value, tokens: u32) -> Result<AcquireReply, StoreError> {
    let read = || match value {
        Value::Array(values) => acquire_reply(values, tokens),
        _ => None,
    };
    read().ok_or_else(|| unexpected("acquire", value))
}

/// The replies of the fast path: `SET ... NX` and `INCRBY`.
pub(super) fn acquired_fast(replies: &[Value], tokens: u32) -> Result<AcquireReply, StoreError> {
    match replies {
        [Value::Nil, _] => Ok(AcquireReply::Taken),
        [Value::Okay, last] if as_int(last).is_some() => {
            let last = as_int(last).and_then(|last| last.try_into().ok()).unwrap_or_default();
            Ok(AcquireReply::Granted {
                tokens: TokenBlock::ending_at(last, tokens),
                queued: 0,
                extended: false,
            })
        }
        _ => Err(unexpected("SET and INCRBY", &Value::Array(replies.to_vec()))),
    }
}

/// The reply of the release script; `requeued` states whether the request asked to enqueue again.
pub(super) fn released(value: &Value, requeued: bool, tokens: u32) -> Result<ReleaseReply, StoreError> {
    let read = || {
        let Value::Array(values) = value else { return None };
        let (held, rest) = values.split_first()?;
        let requeued = if requeued {
            Some(acquire_reply(rest, tokens)?)
        } else {
            None
        };
        Some(ReleaseReply {
            held: as_int(held)? == 1,
            requeued,
        })
    };
    read().ok_or_else(|| unexpected("release", value))
}

/// The replies of the renewal script.
pub(super) fn renewed(value: &Value, count: usize) -> Result<Vec<RenewReply>, StoreError> {
    let read = |number: i64| match number {
        0 => RenewReply::NotOurs,
        number => RenewReply::Extended {
            has_waiters: number == 2,
        },
    };
    match ints(value) {
        Some(numbers) if numbers.len() == count => Ok(numbers.into_iter().map(read).collect()),
        _ => Err(unexpected("renew", value)),
    }
}

/// The replies to an inspection.
pub(super) fn inspected(replies: &[Value]) -> Result<KeyState, StoreError> {
    let [owner, left, queue_length, queue, counter, holders, time] = replies else {
        return Err(unexpected("an inspection", &Value::Array(replies.to_vec())));
    };
    let owner = as_text(owner);
    let mut holders = match owner.as_deref() {
        Some(MARKER) => {
            let (seconds, micros) = server_time(time).ok_or_else(|| unexpected("TIME", time))?;
            live_holders(holders, u128::from(seconds) * 1_000 + u128::from(micros / 1_000))
        }
        // The marker is gone, and with it the leases.
        _ => Vec::new(),
    };
    let holder_count = holders.len() as u64;
    let permits = holders.iter().map(|holder| holder.mode.weight());
    let permits_in_use = permits.fold(0, u32::saturating_add);
    holders.truncate(INSPECTED_MAX);
    let holder = owner.filter(|owner| owner != MARKER).map(|owner| Holder {
        is_manager: parse_owner_tag(&owner).is_some(),
        owner,
        mode: LockMode::Exclusive,
        remaining: as_int(left)
            .and_then(|left| u64::try_from(left).ok())
            .map(Duration::from_millis),
    });
    let queue = match queue {
        Value::Array(members) => members.iter().filter_map(as_text).collect(),
        _ => Vec::new(),
    };
    Ok(KeyState {
        holder,
        holders,
        holder_count,
        permits_in_use,
        queue_length: as_int(queue_length)
            .and_then(|length| length.try_into().ok())
            .unwrap_or_default(),
        queue,
        last_token: as_int(counter)
            .and_then(|token| token.try_into().ok())
            .and_then(FencingToken::new),
    })
}

/// The members of a holder set whose leases have not ended at this time in ms of the server's
/// clock, those that end first in front.
fn live_holders(members: &Value, now: u128) -> Vec<Holder> {
    let Value::Array(items) = members else {
        return Vec::new();
    };
    // With RESP3, each member comes in an array with its score.
    let pairs: Vec<&[Value]> = match items.first() {
        Some(Value::Array(_)) => items
            .iter()
            .filter_map(|item| match item {
                Value::Array(pair) => Some(&pair[..]),
                _ => None,
            })
            .collect(),
        _ => items.chunks(2).collect(),
    };
    let live = pairs.into_iter().filter_map(|pair| {
        let [member, end] = pair else { return None };
        let owner = as_text(member)?;
        let end = match end {
            Value::Double(end) => *end,
            end => as_text(end)?.parse::<f64>().ok()?,
        };
        let remaining = (end as u128).checked_sub(now).filter(|&left| left > 0)?;
        let mode = parse_owner_tag(&owner)?.1.mode();
        let remaining = u64::try_from(remaining).unwrap_or(u64::MAX);
        Some(Holder {
            is_manager: true,
            owner,
            mode,
            remaining: Some(Duration::from_millis(remaining)),
        })
    });
    live.collect()
}

/// A message in the inbox: `g <cycle> <largest token> <tokens> <queue length> <key>`,
/// `w <cycle> <key>` or `t <cycle> <key>`.
pub(super) fn push(message: &str) -> Option<Push> {
    let (kind, rest) = message.split_once(' ')?;
    match kind {
        "g" => {
            let mut parts = rest.splitn(5, ' ');
            let cycle = Cycle::parse(parts.next()?)?;
            let mut number = || parts.next()?.parse::<u64>().ok();
            let (last, count, queued) = (number()?, number()?, number()?);
            let key = LockKey::new(parts.next()?).ok()?;
            let grant = Grant {
                cycle,
                tokens: TokenBlock::ending_at(last, count.try_into().ok()?),
                queued,
            };
            Some(Push::Granted { key, grant })
        }
        "w" | "t" => {
            let (cycle, key) = rest.split_once(' ')?;
            let (key, cycle) = (LockKey::new(key).ok()?, Cycle::parse(cycle)?);
            Some(match kind {
                "w" => Push::RemoteWaiter { key, cycle },
                _ => Push::YourTurn { key, cycle },
            })
        }
        _ => None,
    }
}

/// The error for a connection that did not answer in time. It closes the connection.
pub(super) fn no_answer(limit: Duration) -> RedisError {
    std::io::Error::new(std::io::ErrorKind::BrokenPipe, format!("no answer within {limit:?}")).into()
}

/// Converts an error for the caller, with advice where possible. It contains no password.
pub(super) fn to_store_error(error: &RedisError) -> StoreError {
    explain(error).caused_by(error)
}

fn explain(error: &RedisError) -> StoreError {
    if let Some(words) = permission::describe_error(error) {
        return StoreError::Refused(without_arguments(&words).into());
    }
    let text = error.to_string();
    let said = without_arguments(&text);
    #[cfg(feature = "tls")]
    if let Some(advice) = crate::store::tls::cause(error).and_then(crate::store::tls::advice) {
        return StoreError::Refused(format!("{advice}: {said}").into());
    }
    let advice = match error.kind() {
        ErrorKind::Server(kind) => match kind {
            ServerErrorKind::BusyLoading
            | ServerErrorKind::MasterDown
            | ServerErrorKind::ClusterDown
            | ServerErrorKind::TryAgain => {
                return StoreError::Unavailable(format!("the server is not ready: {said}").into());
            }
            ServerErrorKind::ReadOnly => "the server is a replica; connect to the primary",
            ServerErrorKind::Moved | ServerErrorKind::Ask | ServerErrorKind::CrossSlot => {
                "the server is part of a Redis Cluster, which a redis:// shard does not support"
            }
            _ => "the server answered with an error",
        },
        ErrorKind::AuthenticationFailed => "check the user and the password",
        ErrorKind::Extension => match error.code() {
            Some("WRONGTYPE") => {
                "the key holds a value that is not a lock; nothing was changed; use another name or namespace"
            }
            Some("OOM") => "the server is out of memory; raise maxmemory, and set maxmemory-policy noeviction",
            Some("NOAUTH" | "WRONGPASS") => "check the user and the password",
            Some("BUSY") => {
                return StoreError::Unavailable(format!("the server is busy with a script: {said}").into());
            }
            Some("MISCONF" | "NOREPLICAS") => "the server does not accept writes",
            _ => "the server answered with an error",
        },
        ErrorKind::InvalidClientConfig | ErrorKind::RESP3NotSupported => {
            "the connection settings do not match the server"
        }
        ErrorKind::Parse => {
            "the reply is not in the Redis protocol; if this is a TLS port, use a TLS URL (such as rediss://)"
        }
        _ => return StoreError::Unavailable(said.into()),
    };
    StoreError::Refused(format!("{advice}: {said}").into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_of_an_unknown_command_does_not_repeat_the_password() {
        let said = "unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'user' 's3cret'";
        for error in [
            (
                ErrorKind::Server(ServerErrorKind::ResponseError),
                "an error",
                said.to_owned(),
            ),
            (
                ErrorKind::Server(ServerErrorKind::NoPerm),
                "an error",
                format!("a key: {said}"),
            ),
        ] {
            let (StoreError::Refused(words) | StoreError::Unavailable(words)) = to_store_error(&error.into()) else {
                panic!("unexpected kind of error")
            };
            assert!(
                words.ends_with("unknown command 'HELLO'") && !words.contains("s3cret"),
                "{words}"
            );
        }
    }

    #[test]
    fn error_about_a_reply_shows_its_beginning_in_one_line() {
        let long = shown(&Value::BulkString(vec![b'x'; 1 << 20]));
        assert!(
            long.len() < 200 && long.starts_with("bulk-string('\"xxx") && long.ends_with("x..."),
            "{long}"
        );
        let cut = shown(&Value::SimpleString("é".repeat(200)));
        assert!(cut.ends_with("é..."), "{cut}");
        let hostile = deadpool_redis::redis::parse_redis_value(b"*1\r\n-ERR \x1b[2J\r\n").unwrap();
        assert_eq!(shown(&hostile), r"array([Server error: `ERR: \u{1b}[2J`])");
    }

    #[test]
    fn pushes_are_parsed_and_malformed_ones_are_ignored() {
        let key = LockKey::new("a key with spaces").unwrap();
        let grant = Grant {
            cycle: Cycle::of(5),
            tokens: TokenBlock::ending_at(90, 8),
            queued: 3,
        };
        assert_eq!(
            push(&format!("g {} 90 8 3 a key with spaces", Cycle::of(5))),
            Some(Push::Granted {
                key: key.clone(),
                grant
            })
        );
        assert_eq!(
            push(&format!("w {} a key with spaces", Cycle::of(4))),
            Some(Push::RemoteWaiter {
                key: key.clone(),
                cycle: Cycle::of(4)
            })
        );
        assert_eq!(
            push(&format!("t {} a key with spaces", Cycle::of(4))),
            Some(Push::YourTurn {
                key,
                cycle: Cycle::of(4)
            })
        );
        for nonsense in [
            "",
            "g",
            "g 1 2 3",
            "x 1 k",
            "w x k",
            "w 1 k",
            "g 1 2 3 4 k",
            "g 1-1-00000000 2 3 4 ",
        ] {
            assert_eq!(push(nonsense), None, "{nonsense:?}");
        }
    }
}
