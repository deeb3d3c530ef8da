//! Renews leases, many per call.
//!
//! # Implementation details
//!
//! The leases of one call are in many slots. A server, or a proxy in front of it, may refuse a call
//! because of some of its keys: a key that the user may not access, or keys of several slots if the
//! address leads to a cluster. Such a call is split and resent until each refused lease is alone;
//! the others are renewed. Once a connection has refused several slots, its calls contain one slot
//! each. A proxy may also close the connection instead of answering. After this happened twice in a
//! row, the next connection starts with calls of one slot.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::{Cmd, RedisError, Value, cmd};
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::time::{Instant, timeout, timeout_at};

use super::super::batch::{self, Part, RENEWALS_PER_CALL};
use super::super::connection::SILENCE_MIN;
use super::super::map;
use super::super::reply::{renewed, role};
use super::Shared;
use super::link::{Link, Live};
use crate::clock::Moment;
use crate::protocol::{RenewReply, Renewal};
use crate::store::{MapState, MapStep, StoreError};

/// How many calls may be in flight at a time.
const CALLS_AT_A_TIME: usize = 1024;
/// After this many unanswered batches in a row that ended with a broken connection, the next
/// connection sends one slot per call.
const BREAKS_MAX: u8 = 2;

/// Which calls the renewal connection accepts, as far as known.
#[derive(Default)]
pub(super) struct CallShape(Mutex<Known>);

#[derive(Default)]
struct Known {
    /// The connection this describes: its link and its generation.
    connection: (usize, u64),
    by_slot: bool,
    /// How many connections in a row broke during a batch of several slots.
    breaks: u8,
}

impl CallShape {
    fn is_by_slot(&self, connection: (usize, u64)) -> bool {
        let mut known = self.0.lock();
        if known.connection != connection {
            known.connection = connection;
            known.by_slot = known.breaks >= BREAKS_MAX;
            if known.by_slot {
                // The connection after this one starts with a whole batch again.
                known.breaks = BREAKS_MAX - 1;
            }
        }
        known.by_slot
    }

    fn wants_one_slot(&self) {
        self.0.lock().by_slot = true;
    }

    fn broke(&self) {
        let mut known = self.0.lock();
        if !known.by_slot {
            known.breaks = (known.breaks + 1).min(BREAKS_MAX);
        }
    }

    fn answered(&self) {
        let mut known = self.0.lock();
        if !known.by_slot {
            known.breaks = 0;
        }
    }
}

/// Renews the leases that are still ours, on this connection.
pub(super) async fn renew(
    shared: &Shared,
    link: &Arc<Link>,
    live: &Live,
    batch: &[Renewal],
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    let in_words = |error: RedisError| {
        link.close_if_broken(&error, live);
        shared.discovery.to_store_error(&error)
    };
    let reading = timeout(
        limit.mul_f64(0.8),
        shared.map_command(link, live, map::read(&shared.map)),
    );
    let (replies, stored) = tokio::join!(send(shared, link, live, batch, limit), reading);
    let map = match stored {
        Ok(Ok(stored)) => map::check(&shared.map, &stored),
        // If the map can't be read, the renewals themselves report why.
        Ok(Err(_)) | Err(_) => Ok(MapState::Ours),
    };
    let mut replies = match (replies, &map) {
        (Err(error), Ok(_)) => return Err(error),
        (Err(_), Err(_)) => Vec::new(),
        (Ok(replies), _) => replies,
    };
    let mut connection = live.connection.clone();
    if shared.check_role && (map.is_err() || replies.contains(&Some(RenewReply::NotOurs))) {
        // If there is nothing to write, a server that was demoted meanwhile does not report it. A
        // lease it does not know may exist on the new primary.
        let answer = cmd("ROLE").query_async(&mut connection).await.map_err(in_words)?;
        if let Err(error) = shared.discovery.check_role(&role(&answer)?, "the server") {
            link.broken(live);
            return Err(error);
        }
    }
    if map? != MapState::Ours && RenewReply::some_are_extended(&replies) {
        // The map was deleted while the leases were kept. Restore it before another map is stored.
        restore_map(shared, link, live, limit / 5).await?;
    }
    if let Some(ack) = &shared.replica_ack {
        let wait = ack.within(limit);
        let acked = connection.send_packed_command(&wait.command()).await;
        let acked = acked.and_then(Value::extract_error).map_err(in_words)?;
        if let Err(error) = ack.check(wait, &acked) {
            if let Some(suppressed) = shared.failed_renewals.admit(Moment::now()) {
                crate::log::warn!(shard = %shared.shard, %error, leases = batch.len(), suppressed, "too few replicas confirmed the renewed leases; retrying until they expire");
            }
            replies
                .iter_mut()
                .for_each(|reply| *reply = reply.filter(|reply| *reply == RenewReply::NotOurs));
        }
    }
    if shared.switches() != live.switches {
        // Replies of a server that has been replaced meanwhile must be discarded.
        replies.fill(None);
    }
    Ok(replies)
}

/// Stores the map again. If there is no answer, the next renewal retries.
///
/// # Errors
///
/// Another map is stored by now.
async fn restore_map(shared: &Shared, link: &Link, live: &Live, limit: Duration) -> Result<(), StoreError> {
    let send = |command| Box::pin(shared.map_command(link, live, command)) as map::Reply<'_>;
    match timeout(limit, map::step(&shared.map, MapStep::Confirm, &send)).await {
        Ok(Ok(_)) => {
            crate::log::warn!(shard = %shared.shard, "the shard map was missing on the server and has been restored");
            Ok(())
        }
        Ok(Err(error @ StoreError::MapMismatch { .. })) => Err(error),
        Ok(Err(_)) | Err(_) => Ok(()),
    }
}

/// Sends the calls, and resends refused ones in parts. Fails if no lease has a reply.
async fn send(
    shared: &Shared,
    link: &Arc<Link>,
    live: &Live,
    batch: &[Renewal],
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    // A busy server answers only some of many calls in time: those leases are renewed, and only the
    // others are retried.
    let each = limit.mul_f64(if shared.replica_ack.is_some() { 0.5 } else { 0.8 });
    let deadline = Instant::now() + each;
    let slot = |item: usize| shared.commands.names.of(&batch[item].key).slot().number();
    let divided = |part: Part| batch::by_slot(part, slot, RENEWALS_PER_CALL);
    let by_slot = shared
        .call_shape
        .is_by_slot((Arc::as_ptr(link).addr(), live.generation));
    // Each call has leases of one script.
    let (exclusive, others): (Part, Part) = (0..batch.len()).partition(|&item| batch[item].cycle.mode().is_exclusive());
    let parts = [exclusive, others].into_iter().flat_map(|part| match by_slot {
        true => divided(part),
        false => part.chunks(RENEWALS_PER_CALL).map(<[usize]>::to_vec).collect(),
    });
    let mut parts: Vec<Part> = parts.collect();
    let mut replies = vec![None; batch.len()];
    let (mut answered, mut failed, mut refused) = (false, None, Refused::default());
    while !parts.is_empty() {
        let calls: Vec<_> = parts
            .into_iter()
            .map(|part| async move {
                let answer = timeout_at(deadline, call(shared, live, batch, &part)).await;
                (part, answer.ok())
            })
            .collect();
        let answers: Vec<_> = futures_util::stream::iter(calls)
            .buffered(CALLS_AT_A_TIME)
            .collect()
            .await;
        parts = Vec::new();
        for (part, answer) in answers {
            match answer {
                // No answer in time.
                None => {}
                Some(Ok(value)) => {
                    answered = true;
                    let values = renewed(&value, part.len())?;
                    part.iter()
                        .zip(values)
                        .for_each(|(&item, reply)| replies[item] = Some(reply));
                }
                Some(Err(error)) if link.close_if_broken(&error, live) => failed = Some(error),
                Some(Err(error)) => {
                    answered = true;
                    if part.len() == 1 || !batch::may_concern_some_keys(&error) {
                        refused.note(&part, error);
                        continue;
                    }
                    if batch::wants_one_slot(&error) {
                        let by_slot = divided(part);
                        if by_slot.len() > 1 {
                            shared.call_shape.wants_one_slot();
                            parts.extend(by_slot);
                        } else {
                            parts.extend(by_slot.into_iter().flat_map(batch::halves));
                        }
                    } else {
                        parts.extend(batch::halves(part));
                    }
                }
            }
        }
        if failed.is_some() {
            break;
        }
    }
    if answered {
        shared.call_shape.answered();
    } else if failed.is_some() && batch.len() > 1 {
        shared.call_shape.broke();
    }
    let has_some = replies.iter().any(Option::is_some);
    match (failed, refused.first) {
        // A server that became unusable may have answered some calls before.
        (Some(error), _) if !has_some || shared.discovery.is_demotion(&error) => {
            Err(shared.discovery.to_store_error(&error))
        }
        (None, Some((_, error))) if !has_some => Err(shared.discovery.to_store_error(&error)),
        (None, None) if !answered => {
            if each >= shared.patience().min(SILENCE_MIN) {
                // The lease may be too short for another attempt on the same connection.
                link.broken(live);
            }
            Err(StoreError::no_answer(each))
        }
        (_, Some((item, error))) => {
            let (error, leases, key) = (shared.discovery.to_store_error(&error), refused.count, &batch[item].key);
            if let Some(suppressed) = shared.failed_renewals.admit(Moment::now()) {
                crate::log::warn!(shard = %shared.shard, %error, leases, suppressed, "failed to renew leases; retrying until they expire");
            }
            crate::log::debug!(shard = %shared.shard, %key, %error, "the renewal of this lease was refused");
            Ok(replies)
        }
        _ => Ok(replies),
    }
}

/// The leases whose renewal is refused even in a call of their own.
#[derive(Default)]
struct Refused {
    count: usize,
    first: Option<(usize, RedisError)>,
}

impl Refused {
    fn note(&mut self, part: &[usize], error: RedisError) {
        self.count += part.len();
        if let (None, [item, ..]) = (&self.first, part) {
            self.first = Some((*item, error));
        }
    }
}

/// Renews these leases, which are all exclusive or none of them is.
async fn call(shared: &Shared, live: &Live, batch: &[Renewal], part: &[usize]) -> Result<Value, RedisError> {
    let mut connection = live.connection.clone();
    let (commands, scripts) = (&shared.commands, &shared.scripts);
    let renewals = || part.iter().map(|&item| &batch[item]);
    if renewals().all(|renewal| renewal.cycle.mode().is_exclusive()) {
        let fill = |command: &mut Cmd| commands.fill_renew(command, renewals());
        return scripts.renew.call(&mut connection, fill).await;
    }
    let fill = |command: &mut Cmd| commands.fill_renew_modes(command, renewals());
    scripts.modes.renew.call(&mut connection, fill).await
}
