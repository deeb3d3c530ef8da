//! Acquiring a key, or a place in its queue.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Compare, CompareOp, LeaseGrantOptions, PutOptions, Txn, TxnOp, TxnResponse};

use super::Shared;
use super::cycles::EtcdLease;
use super::error::{self, EtcdError};
use super::link::Link;
use super::names::member;
use super::queue::{self, Member, Queue, first_in, floor_of, tokens_of};
use super::release::withdraw;
use super::term::{ConfirmedIn, RenewedIn};
use super::waits::WaitingCycle;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::identity::parse_owner_tag;
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Answer, Cycle, QueuePosition};
use crate::store::StoreError;

/// How many times a lease may end under one request before the request fails.
const LEASES_PER_REQUEST: usize = 3;
/// A request renews its lease unless it was confirmed within this fraction of its TTL (a tenth),
/// and within `AGE_MAX`.
const AGE_PART: u32 = 10;
const AGE_MAX: Duration = Duration::from_secs(1);
/// The first and the longest pause before a lease that was not confirmed is renewed again.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_millis(100);
/// When a waiting cycle asks again by itself. The watch reports the end of the key before it,
/// however that comes about; this is a fallback for anything unforeseen.
const LOOK_AGAIN: Duration = Duration::from_secs(10);
/// How many notes one transaction leaves: etcd allows 128 operations.
const NOTES_PER_TRANSACTION: usize = 100;

/// A cycle that contends for a key, and the parameters of its requests.
#[derive(Debug, Clone)]
pub(super) struct EtcdContender {
    pub(super) key: LockKey,
    pub(super) cycle: Cycle,
    pub(super) ttl: Duration,
    pub(super) tokens: u32,
    /// The common prefix of all contenders' names.
    pub(super) prefix: String,
    pub(super) name: String,
}

impl EtcdContender {
    pub(super) fn new(shared: &Shared, key: &LockKey, cycle: Cycle, ttl: Duration, tokens: u32) -> Self {
        Self {
            prefix: shared.names.prefix(key),
            name: shared.names.cycle(key, cycle),
            key: key.clone(),
            cycle,
            ttl,
            tokens,
        }
    }

    /// How long ago its lease may have been confirmed for a request not to renew it.
    pub(super) fn age_max(&self) -> Duration {
        (self.ttl / AGE_PART).min(AGE_MAX)
    }

    pub(super) const fn mode(&self) -> LockMode {
        self.cycle.mode()
    }

    /// Creates its key. The value is the number of tokens that come with the key's revision.
    pub(super) fn put(&self, lease: EtcdLease) -> TxnOp {
        let options = PutOptions::new().with_lease(lease.id);
        TxnOp::put(self.name.as_str(), self.tokens.to_string(), Some(options))
    }

    /// Puts its key again, to get another revision. The key keeps its place and its lease.
    pub(super) fn put_again(&self) -> TxnOp {
        let options = PutOptions::new().with_ignore_lease();
        TxnOp::put(self.name.as_str(), self.tokens.to_string(), Some(options))
    }

    /// The condition that its key does not exist yet.
    pub(super) fn is_new(&self) -> Compare {
        Compare::create_revision(self.name.as_str(), CompareOp::Equal, 0)
    }
}

pub(super) async fn acquire(
    shared: Arc<Shared>,
    link: Arc<Link>,
    request: Acquire,
) -> Result<Answer<AcquireReply>, StoreError> {
    let Acquire {
        key,
        cycle,
        kind,
        ttl,
        tokens,
    } = request;
    let contender = EtcdContender::new(&shared, &key, cycle, ttl, tokens);
    let floor = shared.floor();
    let answer = |(sent_at, reply)| Answer {
        sent_at,
        ttl,
        floor,
        reply,
    };
    if kind == AcquireKind::Try && shared.cycles.lease(cycle).is_none() && is_taken(&shared, &link, &contender).await? {
        // Nothing was requested, so there is nothing to release.
        return Ok(answer((Moment::now(), AcquireReply::Busy)));
    }
    shared.cycles.open(cycle, ttl, Moment::now());
    let taken = match kind {
        AcquireKind::Enqueue | AcquireKind::Extend => join(&shared, &link, &contender).await,
        AcquireKind::Fast | AcquireKind::Try if cycle.mode().is_exclusive() => {
            take(&shared, &link, &contender, kind).await
        }
        AcquireKind::Fast | AcquireKind::Try => take_beside(&shared, &link, &contender, kind).await,
    };
    taken.map(answer).map_err(EtcdError::into_store_error)
}

/// Whether the key has holders or waiters that leave no room for the contender.
async fn is_taken(shared: &Shared, link: &Link, contender: &EtcdContender) -> Result<bool, StoreError> {
    let read = async |mut client: etcd_client::Client| {
        let members = match contender.mode() {
            LockMode::Exclusive => queue::in_order().with_limit(1),
            mode => queue::for_mode(mode),
        };
        client.get(contender.prefix.as_str(), Some(members)).await
    };
    let (found, _) = link.request(read).await.map_err(EtcdError::into_store_error)?;
    shared.observe_revision(found.header());
    let revision = found.header().map_or(0, etcd_client::ResponseHeader::revision);
    let admits = Queue::of(&found, revision).admits(contender.mode());
    admits.map(|admits| !admits).map_err(EtcdError::into_store_error)
}

/// Takes the key if it has neither an owner nor waiters.
async fn take(
    shared: &Shared,
    link: &Link,
    contender: &EtcdContender,
    kind: AcquireKind,
) -> Result<(Moment, AcquireReply), EtcdError> {
    let Ran { sent_at, reply, .. } = under_a_lease(shared, link, contender, contender.age_max(), |lease| {
        Txn::new()
            .when([Compare::create_revision(contender.prefix.as_str(), CompareOp::Equal, 0).with_prefix()])
            .and_then([contender.put(lease), Queue::read_first(&contender.prefix)])
            .or_else([Queue::read_first(&contender.prefix)])
    })
    .await?;
    let queue = Queue::in_reply(&reply)?;
    let first_is_ours = queue.members.first().is_some_and(|first| first.is(&contender.name));
    if reply.succeeded() {
        let mine = queue.members.first().ok_or_else(queue::unexpected)?;
        return Ok((sent_at, granted(shared, contender, &queue, mine)?));
    }
    if first_is_ours {
        // An earlier request of this cycle took the key; its reply was lost.
        return join(shared, link, contender).await;
    }
    shared.revokes.add(shared.cycles.close(contender.cycle));
    Ok((sent_at, refused(kind)))
}

/// The reply to a request that must not wait.
const fn refused(kind: AcquireKind) -> AcquireReply {
    match kind {
        AcquireKind::Try => AcquireReply::Busy,
        AcquireKind::Fast | AcquireKind::Enqueue | AcquireKind::Extend => AcquireReply::Taken,
    }
}

/// Takes the key in another mode than exclusive, if nobody has to be waited for. No condition of a
/// transaction tells whether a mode is admitted, so the contender takes a place in the queue and
/// gives it back if it would have to wait. The caller has seen room for it, so that is rare.
async fn take_beside(
    shared: &Shared,
    link: &Link,
    contender: &EtcdContender,
    kind: AcquireKind,
) -> Result<(Moment, AcquireReply), EtcdError> {
    let ran = put_and_read(shared, link, contender).await?;
    let queue = Queue::in_reply(&ran.reply)?;
    if queue.position(&contender.name)? < queue.holders() {
        let reply = judge(shared, link, contender, &queue, ran.lease).await?;
        return Ok((ran.counted_from(&reply), reply));
    }
    withdraw(shared, link, contender).await?;
    Ok((ran.asked_at, refused(kind)))
}

/// Takes the key, extends it, or joins the queue.
pub(super) async fn join(
    shared: &Shared,
    link: &Link,
    contender: &EtcdContender,
) -> Result<(Moment, AcquireReply), EtcdError> {
    let ran = put_and_read(shared, link, contender).await?;
    let queue = Queue::in_reply(&ran.reply)?;
    let reply = judge(shared, link, contender, &queue, ran.lease).await?;
    Ok((ran.counted_from(&reply), reply))
}

/// Puts the contender's key, for the first time or again, and reads the queue.
async fn put_and_read(shared: &Shared, link: &Link, contender: &EtcdContender) -> Result<Ran, EtcdError> {
    let read = || Queue::read(&contender.prefix, contender.mode());
    under_a_lease(shared, link, contender, contender.age_max(), |lease| {
        Txn::new()
            .when([contender.is_new()])
            .and_then([contender.put(lease), read()])
            .or_else([contender.put_again(), read()])
    })
    .await
}

/// Ensures that the key is attached to this lease, and not to an earlier one of its cycle, which is
/// then revoked. A lease's lifetime never changes; only a move attaches a key to another lease, and
/// only if the key still has the lease that it was seen with. So a move that executes late moves
/// nothing.
pub(super) async fn move_to(
    shared: &Shared,
    link: &Link,
    contender: &EtcdContender,
    lease: EtcdLease,
    seen: &Member,
) -> Result<(), EtcdError> {
    if seen.lease != lease.id {
        let Some(current) = shared.cycles.lease(contender.cycle) else {
            return Err(released_meanwhile());
        };
        if current.id != lease.id {
            // Another request asked for a longer lease meanwhile. It was granted after ours was
            // sent, so the lease that the key was moved to lasts long enough.
            return if seen.lease == current.id {
                Ok(())
            } else {
                Err(EtcdError::LeaseGone)
            };
        }
        let name = contender.name.as_str();
        let send = async |mut client: etcd_client::Client| {
            let kept = [
                Compare::create_revision(name, CompareOp::Equal, seen.create_revision),
                Compare::lease(name, CompareOp::Equal, seen.lease),
            ];
            let options = PutOptions::new().with_lease(lease.id).with_ignore_value();
            let moving = Txn::new()
                .when(kept)
                .and_then([TxnOp::put(name, "", Some(options))])
                .or_else([Queue::read_one(name)]);
            client.txn(moving).await
        };
        let (reply, _) = link.request(send).await?;
        shared.observe_revision(reply.header());
        let is_there = reply.succeeded()
            || first_in(reply.op_responses().first())
                .is_some_and(|now| now.create_revision == seen.create_revision && now.lease == lease.id);
        if !is_there {
            return Err(EtcdError::LeaseGone);
        }
    }
    shared.revokes.add(shared.cycles.moved(contender.cycle, lease));
    Ok(())
}

/// The result of a transaction under a lease.
pub(super) struct Ran {
    /// When the request began.
    pub(super) asked_at: Moment,
    /// The earliest moment from which the cluster counts the lease's time.
    pub(super) sent_at: Moment,
    pub(super) lease: EtcdLease,
    pub(super) reply: TxnResponse,
    /// Whether it was sent more than once, so that an earlier copy may have been executed.
    pub(super) repeated: bool,
}

impl Ran {
    /// The moment from which the reply counts.
    pub(super) const fn counted_from(&self, reply: &AcquireReply) -> Moment {
        match reply {
            AcquireReply::Granted { .. } => self.sent_at,
            _ => self.asked_at,
        }
    }
}

/// Runs a transaction that needs the cycle's lease. Ensures that the cluster counts the lease's
/// time from the returned `sent_at` or later, and that `sent_at` is at most `age_max` before the
/// transaction is sent.
pub(super) async fn under_a_lease(
    shared: &Shared,
    link: &Link,
    contender: &EtcdContender,
    age_max: Duration,
    transaction: impl Fn(EtcdLease) -> Txn,
) -> Result<Ran, EtcdError> {
    let cycle = contender.cycle;
    let asked_at = Moment::now();
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    let mut executed = false;
    let mut ended = 0;
    loop {
        // Taken before the lease is looked up: a lease that replaces it is granted later.
        let now = Moment::now();
        // The cycle was released meanwhile: nothing of it may be created again.
        let Some(lease) = shared.cycles.lease(cycle) else {
            return Err(released_meanwhile());
        };
        let known = shared.cycles.confirmed_at(cycle, lease);
        let (sent_at, ran) = match known.filter(|&at| now.since(at) <= age_max) {
            Some(at) => (at, run(shared, link, &transaction, lease).await.map(|ran| (None, ran))),
            None if lease.granted => {
                let (kept, ran) = tokio::join!(
                    keep_in_term(shared, link, cycle, lease),
                    run(shared, link, &transaction, lease)
                );
                (now, kept.and_then(|kept| Ok((Some(kept), ran?))))
            }
            None => match grant(shared, link, cycle, lease).await {
                Ok(kept) => (now, run(shared, link, &transaction, lease).await.map(|ran| (kept, ran))),
                Err(error) => (now, Err(error)),
            },
        };
        match ran {
            Ok((kept, (reply, repeated))) => {
                executed |= repeated;
                if kept.is_none_or(|kept| kept.is_confirmed_by(ConfirmedIn::of(reply.header()))) {
                    shared.cycles.confirmed(cycle, lease, sent_at);
                    return Ok(Ran {
                        asked_at,
                        sent_at,
                        lease,
                        reply,
                        repeated: executed,
                    });
                }
                executed = true;
                // Another member may know the new leader already.
                link.give_up_since(now);
                let pause = backoff.next_delay();
                if (Moment::now().since(asked_at) + pause) * 2 > shared.timeout {
                    return Err(unconfirmed());
                }
                tokio::time::sleep(pause).await;
            }
            Err(error @ EtcdError::LeaseGone) => {
                shared.cycles.unleased(cycle, lease);
                ended += 1;
                if ended == LEASES_PER_REQUEST {
                    return Err(error);
                }
            }
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn unconfirmed() -> EtcdError {
    EtcdError::Other(StoreError::Unavailable(
        "etcd elected another leader meanwhile, which did not confirm the lease; try again".into(),
    ))
}

async fn run(
    shared: &Shared,
    link: &Link,
    transaction: &impl Fn(EtcdLease) -> Txn,
    lease: EtcdLease,
) -> Result<(TxnResponse, bool), EtcdError> {
    let send = async |mut client: etcd_client::Client| client.txn(transaction(lease)).await;
    let (reply, repeated) = link.request(send).await?;
    shared.observe_revision(reply.header());
    Ok((reply, repeated))
}

/// Creates the lease, or renews one that an earlier request has created. Such a renewal must then
/// be confirmed.
async fn grant(shared: &Shared, link: &Link, cycle: Cycle, lease: EtcdLease) -> Result<Option<RenewedIn>, EtcdError> {
    let sent_at = Moment::now();
    let secs = i64::try_from(lease.secs).unwrap_or(i64::MAX);
    let make = async |mut client: etcd_client::Client| {
        let options = LeaseGrantOptions::new().with_id(lease.id);
        client.lease_grant(secs, Some(options)).await
    };
    match link.request(make).await {
        Ok(_) => {
            shared.cycles.leased(cycle, lease, sent_at);
            Ok(None)
        }
        Err(EtcdError::LeaseThere) => keep_in_term(shared, link, cycle, lease).await.map(Some),
        Err(error) => Err(error),
    }
}

/// Renews the lease, as far as the answering member knows. Only for a lease that nothing relies on;
/// otherwise see [`keep_in_term`].
pub(super) async fn keep(shared: &Shared, link: &Link, cycle: Cycle, lease: EtcdLease) -> Result<(), EtcdError> {
    let sent_at = Moment::now();
    let keep = async |mut client: etcd_client::Client| client.lease_keep_alive(lease.id).await;
    link.request(keep).await?;
    shared.cycles.leased(cycle, lease, sent_at);
    Ok(())
}

/// Renews the lease and returns the term of the renewal.
pub(super) async fn keep_in_term(
    shared: &Shared,
    link: &Link,
    cycle: Cycle,
    lease: EtcdLease,
) -> Result<RenewedIn, EtcdError> {
    let sent_at = Moment::now();
    let keep = async |mut client: etcd_client::Client| {
        // The client library hides the first reply, and with it the term.
        let (mut keeper, mut replies) = client.lease_keep_alive(lease.id).await?;
        keeper.keep_alive().await?;
        let ended = || etcd_client::Error::LeaseKeepAliveError(error::LEASE_NOT_FOUND.to_owned());
        match replies.message().await? {
            Some(reply) if reply.ttl() > 0 => Ok(RenewedIn::of(reply.header())),
            Some(_) => Err(ended()),
            None => Err(etcd_client::Error::LeaseKeepAliveError(
                "etcd closed the stream of a renewal".to_owned(),
            )),
        }
    };
    let (renewed, _) = link.request(keep).await?;
    shared.cycles.leased(cycle, lease, sent_at);
    Ok(renewed)
}

/// The reply to a contender that was put into the queue.
pub(super) async fn judge(
    shared: &Shared,
    link: &Link,
    contender: &EtcdContender,
    queue: &Queue,
    lease: EtcdLease,
) -> Result<AcquireReply, EtcdError> {
    let position = queue.position(&contender.name)?;
    move_to(shared, link, contender, lease, &queue.members[position]).await?;
    let holders = queue.holders();
    if position < holders {
        return granted(shared, contender, queue, &queue.members[position]);
    }
    let is_new = queue.members[position].create_revision == queue.revision;
    let blocker = queue.blocker(position, contender.mode())?;
    shared.waits.add(
        contender.cycle,
        WaitingCycle::new(contender.key.clone(), lease, blocker, queue.revision),
    );
    if shared.cycles.lease(contender.cycle).is_none() {
        // The release ran before the wait was added, and did not find it.
        shared.waits.remove(contender.cycle);
        return Err(released_meanwhile());
    }
    let waiting = position - holders;
    if waiting == 0 || !is_new {
        notify_holders(shared, link, contender, &queue.members[..holders], lease).await;
    }
    Ok(AcquireReply::Queued(QueuePosition {
        enqueue_token: floor_of(u64::try_from(queue.revision).unwrap_or(0)),
        owner_ttl: Some(LOOK_AGAIN),
        // The watch reports the end of what blocks us, no matter which process owns it.
        owner_foreign: false,
        is_subscribed: true,
        // All holders together count as one.
        ahead: waiting as u64 + 1,
    }))
}

/// The reply to a member that holds the key.
fn granted(
    shared: &Shared,
    contender: &EtcdContender,
    queue: &Queue,
    mine: &Member,
) -> Result<AcquireReply, EtcdError> {
    let tokens = tokens_of(queue.revision, contender.tokens)?;
    shared.waits.remove(contender.cycle);
    Ok(AcquireReply::Granted {
        tokens,
        queued: queue.waiting(),
        extended: shared.cycles.owns(contender.cycle, mine.create_revision),
    })
}

/// Leaves notes for the holders that do not expect other contenders. They end with the waiter's
/// lease.
async fn notify_holders(shared: &Shared, link: &Link, contender: &EtcdContender, holders: &[Member], lease: EtcdLease) {
    let tags = holders.iter().map(|holder| member(&contender.prefix, &holder.name));
    let notes: Vec<String> = tags
        .filter_map(|tag| {
            let (manager, cycle) = parse_owner_tag(&tag)?;
            // A manager has its exclusive guards of a key in one queue, and each other mode in
            // another.
            let is_known = manager == shared.names.manager().as_str()
                && cycle.mode().is_exclusive()
                && contender.mode().is_exclusive();
            let note = || shared.names.note(manager, cycle, &contender.key, contender.cycle);
            (!cycle.expects_remote_waiters() && !is_known).then(note)
        })
        .collect();
    let leave_all = async {
        for part in notes.chunks(NOTES_PER_TRANSACTION) {
            leave_notes(link, part, lease).await?;
        }
        Ok::<_, EtcdError>(())
    };
    // The cycle already has its place, which must not be lost over a note: the next renewal of a
    // holder reports the waiter, too.
    match tokio::time::timeout(shared.timeout / 4, leave_all).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => crate::log::debug!(?notes, ?error, "could not leave notes for the holders of a key"),
        Err(_) => crate::log::debug!(?notes, "no answer to notes for the holders of a key"),
    }
}

async fn leave_notes(link: &Link, notes: &[String], lease: EtcdLease) -> Result<(), EtcdError> {
    let options = || Some(PutOptions::new().with_lease(lease.id));
    if let [note] = notes {
        let leave = async |mut client: etcd_client::Client| client.put(note.as_str(), "", options()).await;
        return link.request(leave).await.map(drop);
    }
    let leave = async |mut client: etcd_client::Client| {
        let puts: Vec<_> = notes
            .iter()
            .map(|note| TxnOp::put(note.as_str(), "", options()))
            .collect();
        client.txn(Txn::new().and_then(puts)).await
    };
    link.request(leave).await.map(drop)
}

fn released_meanwhile() -> EtcdError {
    EtcdError::Other(StoreError::Unavailable(
        "this cycle was released while it was being acquired".into(),
    ))
}
