//! Renewing held leases.
//!
//! # Implementation details
//!
//! Each etcd lease is kept alive, and one read for many keys shows whether each key is still its
//! holder's, and under which lease. Both are sent concurrently. A renewal counts if the read
//! confirms it ([`term`](super::term)). If the two replies disagree, because another leader was
//! elected between them or the key is moving to another lease, both are sent once more, to another
//! member.
//!
//! An exclusive holder's key must be the first in its queue. In another mode, a cycle that once
//! held the lock does so until its key is gone.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Txn, TxnOp, TxnOpResponse};
use futures_util::StreamExt;

use super::Shared;
use super::acquire::{EtcdContender, keep_in_term, move_to, unconfirmed, under_a_lease};
use super::cycles::EtcdLease;
use super::error::EtcdError;
use super::keep_alive::AT_A_TIME;
use super::map;
use super::queue::{Queue, first_in, revision};
use super::term::{ConfirmedIn, RenewedIn};
use crate::clock::Moment;
use crate::protocol::{RenewReply, Renewal};
use crate::store::{MapState, MapStep, StoreError};

/// How many reads one transaction makes: etcd allows 128 operations.
const READS_PER_TRANSACTION: usize = 100;
/// How many members of a queue a renewal in another mode than exclusive reads to find one that
/// waits. Behind more holders than that, only the waiter's notes tell of it.
const MEMBERS_READ: usize = 100;
/// A placeholder: a renewal reserves no tokens.
const NO_TOKENS: u32 = 1;
/// How many times a renewal is sent within one call until it is confirmed or refused.
const ROUNDS: usize = 2;

/// A renewal, and what is known of it.
struct Renewing {
    contender: EtcdContender,
    /// The create revision with which the cycle became the owner.
    owned: Option<i64>,
    verdict: RenewalVerdict,
}

/// What the replies to a renewal mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RenewalVerdict {
    Known(RenewReply),
    /// There was no reply, or none that is conclusive about the lease.
    Unanswered,
    /// The replies do not agree.
    Unconfirmed,
}

/// The outcome of keeping one lease alive.
enum Kept {
    /// The lease was renewed.
    Renewed(EtcdLease, RenewedIn),
    /// The key was moved to a lease whose time the cluster counts from after the renewal began.
    Moved,
    /// The cycle was released meanwhile, or its key is gone.
    NotOurs,
}

/// What the read has shown about one key.
enum Seen {
    Ours {
        lease: i64,
        has_waiters: bool,
        confirmed: ConfirmedIn,
    },
    NotOurs,
}

pub(super) async fn renew(
    shared: Arc<Shared>,
    batch: Vec<Renewal>,
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    // The caller waits no longer than `limit`, and needs the known replies by then.
    let until = Moment::now() + limit.mul_f64(0.9);
    let mut renewing: Vec<Renewing> = batch
        .iter()
        .map(|renewal| Renewing {
            contender: EtcdContender::new(&shared, &renewal.key, renewal.cycle, renewal.ttl, NO_TOKENS),
            owned: shared.cycles.owned(renewal.cycle),
            verdict: RenewalVerdict::Unanswered,
        })
        .collect();
    let mut failed = None;
    let reading = tokio::time::timeout(until.since(Moment::now()), map::read(&shared.background));
    let renewed = renew_in_rounds(&shared, &mut renewing, until, &mut failed);
    let (map, ()) = tokio::join!(reading, renewed);
    let replies: Vec<Option<RenewReply>> = renewing.iter().map(Renewing::reply).collect();
    match map {
        Ok(Err(error @ StoreError::MapMismatch { .. })) => return Err(error),
        Ok(Ok(MapState::None | MapState::Reserved)) if RenewReply::some_are_extended(&replies) => {
            // The map was deleted while leases exist. Restore it, so that no other map is stored
            // meanwhile.
            let live = shared.background.get().await?;
            let left = until.since(Moment::now());
            let restoring = map::step(&shared.servers, &live.client, MapStep::Confirm);
            if let Ok(Err(error @ StoreError::MapMismatch { .. })) = tokio::time::timeout(left, restoring).await {
                return Err(error);
            }
        }
        // If the map could not be read, the renewals themselves find out why.
        Ok(_) | Err(_) => {}
    }
    match failed {
        Some(error) if replies.iter().all(Option::is_none) => Err(error.into_store_error()),
        _ => Ok(replies),
    }
}

/// Renews all leases, and once more those whose replies do not agree.
async fn renew_in_rounds(
    shared: &Arc<Shared>,
    renewing: &mut [Renewing],
    until: Moment,
    failed: &mut Option<EtcdError>,
) {
    let mut rest: Vec<&mut Renewing> = renewing.iter_mut().collect();
    for round in 0..ROUNDS {
        let started = Moment::now();
        let left = until.since(started);
        if rest.is_empty() || left.is_zero() {
            break;
        }
        keep_and_read(shared, &mut rest, left, failed).await;
        rest.retain(|one| one.verdict == RenewalVerdict::Unconfirmed);
        if !rest.is_empty() {
            crate::log::debug!(shard = %shared.shard, round, leases = rest.len(), "renewals were not confirmed");
            *failed = Some(unconfirmed());
            // Another member may know the new leader already.
            shared.background.give_up_since(started);
        }
    }
}

/// Keeps all leases alive and reads all keys.
async fn keep_and_read(
    shared: &Arc<Shared>,
    renewing: &mut [&mut Renewing],
    limit: Duration,
    failed: &mut Option<EtcdError>,
) {
    let keeping: Vec<_> = renewing
        .iter()
        .enumerate()
        .map(|(index, one)| keep_one(Arc::clone(shared), one.contender.clone(), one.owned, limit, index))
        .collect();
    let keeping = futures_util::stream::iter(keeping)
        .buffer_unordered(AT_A_TIME)
        .collect::<Vec<_>>();
    let reading: Vec<_> = in_parts(renewing)
        .into_iter()
        .map(|part| tokio::time::timeout(limit, read_owners_divided(shared, part)))
        .collect();
    let reading = futures_util::future::join_all(reading);
    let started = Moment::now();
    let (mut kept, reads) = tokio::join!(keeping, reading);
    if kept.iter().all(|(_, kept)| kept.is_none()) {
        // The server hangs or is cut off. Send the next request to another.
        shared.background.give_up_since(started);
    }
    let mut seen = Vec::with_capacity(renewing.len());
    for (part, read) in in_parts(renewing).into_iter().zip(reads) {
        let of_part = match read {
            Ok(Ok(of_part)) => of_part,
            Ok(Err(error)) => {
                *failed = Some(error);
                Vec::new()
            }
            // There was no answer in time.
            Err(_) => Vec::new(),
        };
        let missing = part.len().saturating_sub(of_part.len());
        seen.extend(of_part.into_iter().chain(std::iter::repeat_with(|| None).take(missing)));
    }
    kept.sort_unstable_by_key(|&(index, _)| index);
    for ((one, (_, kept)), seen) in renewing.iter_mut().zip(kept).zip(seen) {
        let renewed = match &kept {
            Some(Ok(Kept::Renewed(lease, _))) => Some(*lease),
            _ => None,
        };
        one.verdict = verdict(kept, seen, failed);
        if let (Some(lease), RenewalVerdict::Known(RenewReply::Extended { .. })) = (renewed, one.verdict) {
            shared.cycles.confirmed(one.contender.cycle, lease, started);
        }
    }
}

fn verdict(
    kept: Option<Result<Kept, EtcdError>>,
    seen: Option<Seen>,
    failed: &mut Option<EtcdError>,
) -> RenewalVerdict {
    let (lease, has_waiters, confirmed) = match seen {
        Some(Seen::NotOurs) => return RenewalVerdict::Known(RenewReply::NotOurs),
        Some(Seen::Ours {
            lease,
            has_waiters,
            confirmed,
        }) => (Some(lease), has_waiters, Some(confirmed)),
        None => (None, false, None),
    };
    match (kept, lease, confirmed) {
        (Some(Ok(Kept::NotOurs)), ..) => RenewalVerdict::Known(RenewReply::NotOurs),
        (Some(Ok(Kept::Moved)), Some(_), _) => RenewalVerdict::Known(RenewReply::Extended { has_waiters }),
        (Some(Ok(Kept::Renewed(kept, term))), Some(lease), Some(confirmed)) => {
            match kept.id == lease && term.is_confirmed_by(confirmed) {
                true => RenewalVerdict::Known(RenewReply::Extended { has_waiters }),
                false => RenewalVerdict::Unconfirmed,
            }
        }
        // A member that lags behind may not know the lease yet, or the key has moved to another
        // lease. If neither is true, a later read does not find the key.
        (Some(Err(EtcdError::LeaseGone)), ..) => RenewalVerdict::Unconfirmed,
        (Some(Err(error)), ..) => {
            *failed = Some(error);
            RenewalVerdict::Unanswered
        }
        (Some(Ok(_)) | None, ..) => RenewalVerdict::Unanswered,
    }
}

impl Renewing {
    fn is_exclusive(&self) -> bool {
        self.contender.mode().is_exclusive()
    }

    /// What shows whether the cycle still holds the lock, and whether another waits for it.
    fn reads(&self) -> Vec<TxnOp> {
        let EtcdContender { prefix, name, .. } = &self.contender;
        match self.is_exclusive() {
            true => vec![Queue::read_first(prefix)],
            false => vec![Queue::read_one(name), Queue::read_some(prefix, MEMBERS_READ)],
        }
    }

    fn reply(&self) -> Option<RenewReply> {
        match self.verdict {
            RenewalVerdict::Known(reply) => Some(reply),
            RenewalVerdict::Unanswered | RenewalVerdict::Unconfirmed => None,
        }
    }
}

async fn keep_one(
    shared: Arc<Shared>,
    contender: EtcdContender,
    owned: Option<i64>,
    limit: Duration,
    index: usize,
) -> (usize, Option<Result<Kept, EtcdError>>) {
    let kept = tokio::time::timeout(limit, extend(&shared, &contender, owned)).await;
    (index, kept.ok())
}

/// Keeps the lease alive, or replaces it by one that is long enough.
async fn extend(shared: &Shared, contender: &EtcdContender, owned: Option<i64>) -> Result<Kept, EtcdError> {
    let cycle = contender.cycle;
    if shared.cycles.lease(cycle).is_none() {
        return Ok(Kept::NotOurs);
    }
    let lease = shared.cycles.open(cycle, contender.ttl, Moment::now());
    // Until a move is known to be complete, the key may be attached to the earlier lease, which is
    // the one that would end.
    if lease.granted && !shared.cycles.is_moving(cycle) {
        let renewed = keep_in_term(shared, &shared.background, cycle, lease).await?;
        return Ok(Kept::Renewed(lease, renewed));
    }
    let Some(owned) = owned else {
        return Ok(Kept::NotOurs);
    };
    let ran = under_a_lease(shared, &shared.background, contender, Duration::ZERO, |_| {
        Txn::new().and_then([Queue::read_one(&contender.name)])
    })
    .await?;
    match first_in(ran.reply.op_responses().first()) {
        Some(seen) if seen.create_revision == owned => {
            move_to(shared, &shared.background, contender, ran.lease, &seen).await?;
            Ok(Kept::Moved)
        }
        _ => Ok(Kept::NotOurs),
    }
}

/// Reads all keys, and in parts if the read is refused, so that a key that the user may not read
/// costs no other lease.
async fn read_owners_divided(shared: &Shared, part: &[&mut Renewing]) -> Result<Vec<Option<Seen>>, EtcdError> {
    let mut seen = Vec::with_capacity(part.len());
    let (mut parts, mut refused) = (vec![part], None);
    // The parts are popped in the order of the leases.
    while let Some(part) = parts.pop() {
        match read_owners(shared, part).await {
            Ok(some) => seen.extend(some),
            Err(EtcdError::Other(StoreError::Refused(_))) if part.len() > 1 => {
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([second, first]);
            }
            Err(error @ EtcdError::Other(StoreError::Refused(_))) => {
                seen.push(None);
                refused = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    match refused {
        Some(error) if seen.iter().all(Option::is_none) => Err(error),
        _ => Ok(seen),
    }
}

/// Whether each cycle is still the owner, by the key that made it the owner, and whether others
/// wait.
async fn read_owners(shared: &Shared, part: &[&mut Renewing]) -> Result<Vec<Option<Seen>>, EtcdError> {
    let send = async |mut client: etcd_client::Client| {
        let reads: Vec<_> = part.iter().flat_map(|one| one.reads()).collect();
        client.txn(Txn::new().and_then(reads)).await
    };
    let (reply, _) = shared.background.request(send).await?;
    shared.observe_revision(reply.header());
    let confirmed = ConfirmedIn::of(reply.header());
    let mut replies = reply.op_responses().into_iter();
    let revision = revision(&reply)?;
    let seen = part.iter().map(|one| {
        let mut next = || match replies.next() {
            Some(TxnOpResponse::Get(found)) => Some(Queue::of(&found, revision)),
            _ => None,
        };
        let first = next()?;
        // The first member is the exclusive holder, or else the only one that was read.
        let queue = if one.is_exclusive() { None } else { Some(next()?) };
        let mut ours = first.members.iter();
        let ours = ours.find(|first| first.is(&one.contender.name) && one.owned == Some(first.create_revision));
        Some(match ours {
            Some(ours) => Seen::Ours {
                lease: ours.lease,
                has_waiters: match &queue {
                    None => first.count > 1,
                    Some(queue) => queue.holders() < queue.members.len(),
                },
                confirmed,
            },
            None => Seen::NotOurs,
        })
    });
    Ok(seen.collect())
}

/// Divides the renewals such that one transaction can make the reads of each part.
fn in_parts<'a, 'b>(mut rest: &'a [&'b mut Renewing]) -> Vec<&'a [&'b mut Renewing]> {
    let mut parts = Vec::new();
    while !rest.is_empty() {
        let mut reads = 0;
        let fit = rest.iter().take_while(|one| {
            reads += if one.is_exclusive() { 1 } else { 2 };
            reads <= READS_PER_TRANSACTION
        });
        let (part, others) = rest.split_at(fit.count().max(1));
        parts.push(part);
        rest = others;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: EtcdLease = EtcdLease {
        id: 7,
        secs: 10,
        granted: true,
    };

    fn of(kept: Result<Kept, EtcdError>, seen: Option<Seen>) -> RenewalVerdict {
        verdict(Some(kept), seen, &mut None)
    }

    fn renewed_in(term: u64) -> Result<Kept, EtcdError> {
        Ok(Kept::Renewed(LEASE, RenewedIn(term)))
    }

    fn seen(lease: i64, term: u64) -> Option<Seen> {
        Some(Seen::Ours {
            lease,
            has_waiters: true,
            confirmed: ConfirmedIn(term),
        })
    }

    #[test]
    fn renewal_counts_if_the_read_is_of_its_lease_and_of_no_later_term() {
        let extended = RenewalVerdict::Known(RenewReply::Extended { has_waiters: true });
        assert_eq!(of(renewed_in(3), seen(LEASE.id, 3)), extended);
        assert_eq!(of(renewed_in(2), seen(LEASE.id, 3)), RenewalVerdict::Unconfirmed);
        assert_eq!(of(renewed_in(3), seen(8, 3)), RenewalVerdict::Unconfirmed);
        assert_eq!(of(renewed_in(3), None), RenewalVerdict::Unanswered);
        assert_eq!(of(Ok(Kept::Moved), seen(8, 3)), extended);
    }

    #[test]
    fn only_a_read_refuses_a_renewal() {
        let refused = RenewalVerdict::Known(RenewReply::NotOurs);
        assert_eq!(of(renewed_in(3), Some(Seen::NotOurs)), refused);
        assert_eq!(verdict(None, Some(Seen::NotOurs), &mut None), refused);
        // A member that lags behind does not know every lease.
        assert_eq!(
            of(Err(EtcdError::LeaseGone), seen(LEASE.id, 3)),
            RenewalVerdict::Unconfirmed
        );
        assert_eq!(of(Err(EtcdError::LeaseGone), None), RenewalVerdict::Unconfirmed);
        assert_eq!(of(Ok(Kept::NotOurs), None), refused);
    }
}
