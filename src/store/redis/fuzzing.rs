//! Properties that must hold for any input from servers and other clients. See [`crate::fuzzing`].

#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::time::Duration;

use deadpool_redis::redis::{Cmd, PushKind, RedisError, Value, parse_redis_value};

use super::names::Names;
use super::permission::{self, Permissions};
use super::refusal::Answer;
use super::{batch, map, reply};
use crate::cycle::Cycles;
use crate::fence::{FencingToken, TokenBlock};
use crate::fuzzing::{SECRET, head, text};
use crate::identity::{ManagerId, parse_owner_tag};
use crate::key::{LockKey, Slot};
use crate::protocol::{AcquireReply, Cycle, Grant, Push, RenewReply};
use crate::store::StoreError;
use crate::store::map::StoredMap;
use crate::text::must_be_escaped;

/// Key names: those of locks, which users choose, and those that a scan finds on a server.
pub fn names(data: &[u8]) {
    let text = text(data);
    let named = LockKey::new(&text);
    assert_eq!(named.is_ok(), (1..=LockKey::BYTES_MAX).contains(&text.len()));
    for namespace in ["lock:", "a*?[^\\", "x"] {
        let names = Names::new(namespace);
        if let Some(key) = names.key_of_lease(&text) {
            assert_eq!(
                names.of(&key).lease().to_string(),
                text,
                "only a lease's own name maps to its key"
            );
        }
        if let Ok(key) = &named {
            of_a_lock(&names, key);
        }
    }
}

fn of_a_lock(names: &Names, key: &LockKey) {
    let of = names.of(key);
    let slot = of.slot();
    let manager = ManagerId::of("h", 1, 2);
    let (lease, queue) = (of.lease().to_string(), of.queue().to_string());
    let (holders, counter) = (of.holders().to_string(), of.counter().to_string());
    for name in [
        &lease,
        &queue,
        &holders,
        &counter,
        &names.scratch_in(slot).to_string(),
        &names.inbox_in(slot, &manager),
    ] {
        assert_eq!(Slot::of(name.as_bytes()), slot, "{name} is in the slot of its lock");
    }
    assert_eq!(names.key_of_lease(&lease).as_ref(), Some(key));
    for other in [&queue, &holders, &counter, &names.map()] {
        assert_eq!(names.key_of_lease(other), None, "{other} is not a lease");
    }
    for (name, shown) in [
        (of.lease(), &lease),
        (of.queue(), &queue),
        (of.holders(), &holders),
        (of.counter(), &counter),
    ] {
        let mut command = Cmd::new();
        name.write(&mut command);
        let arguments = [Value::BulkString(shown.clone().into_bytes())];
        assert_eq!(
            parse_redis_value(&command.get_packed_command()).unwrap(),
            Value::Array(arguments.into())
        );
        assert!(names.is_ours(shown.as_bytes()));
    }
}

/// Inbox messages, which anyone can publish: the bare message, as a primary's subscription delivers
/// it, or inside the push of a cluster node.
pub fn pushes(data: &[u8]) {
    let message = text(data);
    pushed(&message);
    if let Ok(Value::Push { kind, data }) = parse_redis_value(data)
        && matches!(kind, PushKind::SMessage | PushKind::Message)
        && let Some(message) = data.get(1).and_then(reply::as_text)
    {
        pushed(&message);
    }
    let (numbers, key) = head::<24>(data);
    let part = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().unwrap());
    if let Ok(key) = LockKey::new(&text(key)) {
        let mode = ["", "-s", "-p1-1", "-p3-1000"][(part(16) % 4) as usize];
        let cycle = format!("{}-{}-{:08x}{mode}", part(0), part(8) as u32, part(8) >> 32);
        let cycle = Cycle::parse(&cycle).unwrap();
        let tokens = TokenBlock::ending_at(part(16), part(8) as u32);
        let queued = part(0) ^ part(16);
        let grant = Grant { cycle, tokens, queued };
        for push in [
            Push::Granted {
                key: key.clone(),
                grant,
            },
            Push::RemoteWaiter {
                key: key.clone(),
                cycle,
            },
            Push::YourTurn { key, cycle },
        ] {
            assert_eq!(reply::push(&written(&push)), Some(push));
        }
    }
}

fn pushed(message: &str) {
    let Some(push) = reply::push(message) else { return };
    let written = written(&push);
    assert_eq!(
        reply::push(&written).as_ref(),
        Some(&push),
        "{message:?} is read as {written:?}"
    );
    let (Push::Granted { key, .. } | Push::RemoteWaiter { key, .. } | Push::YourTurn { key, .. }) = &push else {
        panic!("{push:?} is never sent as a message")
    };
    assert!(message.ends_with(&format!(" {key}")));
    if let Push::Granted { grant, .. } = &push {
        block(grant.tokens, u32::MAX);
    }
    // A secret that the message can't know.
    let cycle = push.cycle().unwrap();
    Cycles::with_secret([1, 2]).has_opened(cycle);
}

/// The message as the scripts write it.
fn written(push: &Push) -> String {
    match push {
        Push::Granted { key, grant } => {
            let Grant { cycle, tokens, queued } = grant;
            format!("g {cycle} {} {} {queued} {key}", tokens.last(), tokens.remaining())
        }
        Push::RemoteWaiter { key, cycle } => format!("w {cycle} {key}"),
        Push::YourTurn { key, cycle } => format!("t {cycle} {key}"),
        other => panic!("{other:?} is never sent as a message"),
    }
}

/// Checks a block of tokens that was requested.
fn block(mut tokens: TokenBlock, asked: u32) {
    assert!(tokens.remaining() <= asked.into());
    let last = tokens.last();
    let first = tokens.first();
    let taken: Vec<FencingToken> = std::iter::from_fn(|| tokens.take()).take(3).collect();
    assert!(taken.is_sorted_by(|one, next| one < next));
    assert!(taken.iter().all(|token| (first..=last).contains(&token.get())));
}

/// Replies to the scripts and commands of a lock.
pub fn replies(data: &[u8]) {
    let Ok(value) = parse_redis_value(data) else { return };
    for tokens in [1, 64, u32::MAX] {
        let acquired = reply::acquired(&value, tokens);
        if let Ok(acquired) = acquired {
            acquire_reply(acquired, tokens);
            assert_eq!(reply::acquired(&as_written(acquired, &[]), tokens).unwrap(), acquired);
        }
        for requeued in [false, true] {
            if let Ok(released) = reply::released(&value, requeued, tokens) {
                assert_eq!(released.requeued.is_some(), requeued);
                if let Some(again) = released.requeued {
                    acquire_reply(again, tokens);
                    let written = as_written(again, &[i64::from(released.held)]);
                    assert_eq!(reply::released(&written, true, tokens).unwrap(), released);
                }
            }
        }
    }
    let items = match &value {
        Value::Array(items) => &items[..],
        _ => &[],
    };
    for tokens in [1, 64] {
        if let Ok(acquired) = reply::acquired_fast(items, tokens) {
            acquire_reply(acquired, tokens);
        }
    }
    for count in [items.len(), items.len() + 1] {
        if let Ok(renewed) = reply::renewed(&value, count) {
            assert_eq!(renewed.len(), count);
            for (item, reply) in items.iter().zip(renewed) {
                assert_eq!(reply == RenewReply::NotOurs, reply::as_int(item) == Some(0));
            }
        }
    }
    if let Ok(inspection) = reply::inspected(items) {
        if let Some(holder) = &inspection.holder {
            assert_eq!(holder.is_manager, parse_owner_tag(&holder.owner).is_some());
        }
        assert!(inspection.queue.len() <= data.len());
        assert!(inspection.holders.len() as u64 <= inspection.holder_count);
        assert!(inspection.holders.iter().all(|holder| holder.is_manager));
        assert!(inspection.holder.is_none() || inspection.holder_count == 0);
    }
    if let Some((seconds, micros)) = reply::server_time(&value) {
        let time = Duration::from_secs(seconds) + Duration::from_micros(micros);
        assert!(
            time.as_secs() >= seconds
                && FencingToken::from_server_time(seconds, micros) >= FencingToken::from_server_time(seconds, 0)
        );
    }
    let stored = StoredMap::new("v2 a:0-16383 here=a".to_owned(), "lock:%map".to_owned());
    let errors = [
        reply::acquired(&value, 1).err(),
        reply::acquired_fast(items, 1).err(),
        reply::released(&value, true, 1).err(),
        reply::renewed(&value, 3).err(),
        reply::inspected(items).err(),
        reply::role(&value).err(),
        map::check(&stored, &value).err(),
        map::check_or_forget(&stored, &value).err(),
    ];
    for error in errors.into_iter().flatten() {
        match error {
            StoreError::Refused(words) => {
                assert!(words.len() <= 1024, "{} bytes of {words}", words.len());
                assert!(!words.contains(must_be_escaped), "{words}");
            }
            StoreError::MapMismatch { .. } => assert!(!error.to_string().contains(must_be_escaped), "{error}"),
            StoreError::Unavailable(words) => panic!("{words}: there was a reply"),
        }
    }
}

fn acquire_reply(reply: AcquireReply, asked: u32) {
    if let AcquireReply::Granted { tokens, .. } = reply {
        block(tokens, asked);
    }
}

/// The reply as a script writes it, after some other numbers.
fn as_written(reply: AcquireReply, before: &[i64]) -> Value {
    let number = |number: u64| Value::Int(number.try_into().unwrap());
    let flag = |flag: bool| Value::Int(flag.into());
    let values = match reply {
        AcquireReply::Granted {
            tokens,
            queued,
            extended,
        } => vec![Value::Int(1), number(tokens.last()), number(queued), flag(extended)],
        AcquireReply::Queued(position) => vec![
            Value::Int(2),
            number(position.enqueue_token),
            position
                .owner_ttl
                .map_or(Value::Int(-1), |ttl| number(ttl.as_millis() as u64)),
            if position.owner_foreign {
                Value::BulkString(b"another library".to_vec())
            } else {
                Value::Nil
            },
            number(position.ahead),
            flag(position.is_subscribed),
        ],
        AcquireReply::Busy => vec![Value::Int(0)],
        AcquireReply::Taken => panic!("no script replies that"),
    };
    Value::Array(before.iter().copied().map(Value::Int).chain(values).collect())
}

/// Error replies of servers, and answers of other services at a server's address.
pub fn refusals(data: &[u8]) {
    let answer = Answer {
        bytes: data.to_vec(),
        ended: true,
    };
    for line in [Some(answer.line()), answer.refusal(), answer.foreign()]
        .into_iter()
        .flatten()
    {
        assert!(line.chars().count() <= 80 && !line.contains(must_be_escaped), "{line}");
    }
    assert!(answer.refusal().is_none() || answer.foreign().is_none());
    let Ok(Err(error)) = parse_redis_value(data).map(Value::extract_error) else {
        return;
    };
    let get = {
        let mut get = Cmd::new();
        get.arg("GET").arg("lock:a");
        get
    };
    let permissions = Permissions::new("lock:");
    said(&error);
    batch::may_concern_some_keys(&error);
    for named in [
        permissions.of_command(error.clone(), &get),
        permissions.of_subscription(error),
    ] {
        said(&named);
        assert!(!(permission::is_about_a_command(&named) && batch::may_concern_some_keys(&named)));
    }
    let (number, code) = head::<1>(data);
    permission::command_in(&text(code), (number[0] > 0).then_some(number[0].into()));
}

fn said(error: &RedisError) {
    let (StoreError::Unavailable(words) | StoreError::Refused(words)) = reply::to_store_error(error) else {
        panic!("{error} is of an unexpected kind")
    };
    assert!(!words.is_empty());
    // A server that does not know a command repeats its arguments, which include the password.
    let quoted = error.to_string();
    if let Some(at) = quoted.find("with args beginning with")
        && !quoted[..at].contains(SECRET)
    {
        assert!(!words.contains(SECRET), "{words}");
    }
}

pub use places::places;

/// Server addresses as reported by other servers.
mod places {
    use super::super::{cluster, primary};
    use crate::fuzzing::text;

    /// Server addresses as reported by cluster nodes and sentinels, and what a server reports about
    /// itself.
    pub fn places(data: &[u8]) {
        cluster::fuzzing::places(data);
        primary::fuzzing::places(&text(data));
    }
}
