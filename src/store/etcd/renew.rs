//! Renewing what is held.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Txn, TxnOpResponse};
use futures_util::StreamExt;

use super::Shared;
use super::acquire::{Contender, keep, move_to, under_a_lease};
use super::fault::Fault;
use super::keeping::AT_A_TIME;
use super::line::{Line, first, first_in};
use crate::clock::Moment;
use crate::protocol::{RenewReply, Renewal};
use crate::store::StoreError;

/// How many keys one transaction reads: etcd allows 128 operations.
const READS_PER_TRANSACTION: usize = 100;
/// The value beside a key whose lease was replaced; it only ever has to have a place.
const NO_TOKENS: u32 = 1;

/// One renewal as far as it is known.
struct Renewing {
    contender: Contender,
    /// With which create revision it became the owner.
    owned: Option<i64>,
    kept: Option<Result<(), Fault>>,
    seen: Option<RenewReply>,
}

pub(super) async fn renew(
    shared: Arc<Shared>,
    batch: Vec<Renewal>,
    limit: Duration,
) -> Result<Vec<Option<RenewReply>>, StoreError> {
    // Whoever asks waits no longer than the limit, and is to know by then what there is to know.
    let limit = limit.mul_f64(0.9);
    let mut renewing: Vec<Renewing> = batch
        .iter()
        .map(|renewal| Renewing {
            contender: Contender::new(&shared, &renewal.key, renewal.cycle, renewal.ttl, NO_TOKENS),
            owned: shared.cycles.owned(renewal.cycle),
            kept: None,
            seen: None,
        })
        .collect();
    let keeping: Vec<_> = renewing
        .iter()
        .enumerate()
        .map(|(index, one)| keep_one(Arc::clone(&shared), one.contender.clone(), one.owned, limit, index))
        .collect();
    let keeping = futures_util::stream::iter(keeping)
        .buffer_unordered(AT_A_TIME)
        .collect::<Vec<_>>();
    let looking: Vec<_> = renewing
        .chunks(READS_PER_TRANSACTION)
        .map(|part| tokio::time::timeout(limit, look_divided(&shared, part)))
        .collect();
    let looking = futures_util::future::join_all(looking);
    let started = Moment::now();
    let (kept, looks) = tokio::join!(keeping, looking);
    if kept.iter().all(|(_, kept)| kept.is_none()) {
        // The server hangs or is cut off: the next request goes to another.
        shared.background.give_up_since(started);
    }
    let mut failed = None;
    for (index, kept) in kept {
        renewing[index].kept = kept;
    }
    for (part, look) in renewing.chunks_mut(READS_PER_TRANSACTION).zip(looks) {
        match look {
            Ok(Ok(seen)) => part.iter_mut().zip(seen).for_each(|(one, seen)| one.seen = seen),
            Ok(Err(fault)) => failed = Some(fault),
            // It was not answered in time.
            Err(_) => {}
        }
    }
    let replies: Vec<Option<RenewReply>> = renewing.iter().map(|one| one.reply(&mut failed)).collect();
    match failed {
        Some(fault) if replies.iter().all(Option::is_none) => Err(fault.into_store_error()),
        _ => Ok(replies),
    }
}

impl Renewing {
    fn reply(&self, failed: &mut Option<Fault>) -> Option<RenewReply> {
        match (&self.kept, self.seen) {
            (_, Some(RenewReply::NotOurs)) | (Some(Err(Fault::LeaseGone)), _) => Some(RenewReply::NotOurs),
            (Some(Ok(())), seen) => seen,
            (Some(Err(fault)), _) => {
                *failed = Some(fault.clone());
                None
            }
            (None, _) => None,
        }
    }
}

async fn keep_one(
    shared: Arc<Shared>,
    contender: Contender,
    owned: Option<i64>,
    limit: Duration,
    index: usize,
) -> (usize, Option<Result<(), Fault>>) {
    let kept = tokio::time::timeout(limit, extend(&shared, &contender, owned)).await;
    (index, kept.ok())
}

/// Keeps the lease alive, or replaces it by one that is long enough.
async fn extend(shared: &Shared, contender: &Contender, owned: Option<i64>) -> Result<(), Fault> {
    if shared.cycles.lease(contender.cycle).is_none() {
        return Err(Fault::LeaseGone);
    }
    let lease = shared.cycles.open(contender.cycle, contender.ttl, Moment::now());
    if lease.granted {
        return keep(shared, &shared.background, contender.cycle, lease).await;
    }
    let Some(owned) = owned else {
        return Err(Fault::LeaseGone);
    };
    let ran = under_a_lease(shared, &shared.background, contender, |_| {
        Txn::new().and_then([Line::read_one(&contender.name)])
    })
    .await?;
    match first_in(ran.reply.op_responses().first()) {
        Some(seen) if seen.create_revision == owned => {
            move_to(shared, &shared.background, contender, ran.lease, &seen).await
        }
        _ => Err(Fault::LeaseGone),
    }
}

/// Looks at all of them, and in parts if the look is refused, so that a key that the user may not read costs no other lease.
async fn look_divided(shared: &Shared, part: &[Renewing]) -> Result<Vec<Option<RenewReply>>, Fault> {
    let mut seen = Vec::with_capacity(part.len());
    let (mut parts, mut refused) = (vec![part], None);
    // The parts come off in the order of the leases.
    while let Some(part) = parts.pop() {
        match look(shared, part).await {
            Ok(some) => seen.extend(some),
            Err(Fault::Other(StoreError::Refused(_))) if part.len() > 1 => {
                let (first, second) = part.split_at(part.len() / 2);
                parts.extend([second, first]);
            }
            Err(fault @ Fault::Other(StoreError::Refused(_))) => {
                seen.push(None);
                refused = Some(fault);
            }
            Err(fault) => return Err(fault),
        }
    }
    match refused {
        Some(fault) if seen.iter().all(Option::is_none) => Err(fault),
        _ => Ok(seen),
    }
}

/// Whether each is still the owner, by the key with which it became that, and whether somebody waits.
async fn look(shared: &Shared, part: &[Renewing]) -> Result<Vec<Option<RenewReply>>, Fault> {
    let send = async |mut client: etcd_client::Client| {
        let reads: Vec<_> = part.iter().map(|one| Line::read_first(&one.contender.prefix)).collect();
        client.txn(Txn::new().and_then(reads)).await
    };
    let (reply, _) = shared.background.request(send).await?;
    shared.saw(reply.header());
    let replies = reply.op_responses();
    let seen = part.iter().zip(&replies).map(|(one, reply)| {
        let TxnOpResponse::Get(found) = reply else { return None };
        let ours =
            first(found).is_some_and(|first| first.is(&one.contender.name) && one.owned == Some(first.create_revision));
        Some(if ours {
            RenewReply::Extended {
                wanted: found.count() > 1,
            }
        } else {
            RenewReply::NotOurs
        })
    });
    Ok(seen.collect())
}
