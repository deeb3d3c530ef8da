//! Releasing a key, or a place in its queue.

use std::sync::Arc;
use std::time::Duration;

use etcd_client::{
    Compare, CompareOp, DeleteOptions, KeyValue, LeaseGrantOptions, PutOptions, Txn, TxnOp, TxnOpResponse,
};

use super::Shared;
use super::acquire::{EtcdContender, judge, under_a_lease};
use super::cycles::EtcdLease;
use super::error::EtcdError;
use super::link::Link;
use super::queue::{Member, Queue, first, first_in, in_order};
use crate::clock::Moment;
use crate::protocol::{Answer, Cycle, Release, ReleaseReply};
use crate::store::StoreError;

/// Revokes the leases of a cycle when its release has ended, however it ended. Every key needs its
/// lease, so nothing that was sent for the cycle can take effect afterwards. Not earlier, because
/// the release must still find the cycle's key.
struct RevokeAtTheEnd<'a> {
    shared: &'a Shared,
    leases: Vec<EtcdLease>,
    /// The create revision of the key with which the cycle held the lock.
    owned: Option<i64>,
}

impl Drop for RevokeAtTheEnd<'_> {
    fn drop(&mut self) {
        self.shared.revokes.add(std::mem::take(&mut self.leases));
    }
}

pub(super) async fn release(
    shared: Arc<Shared>,
    link: Arc<Link>,
    request: Release,
) -> Result<Answer<ReleaseReply>, StoreError> {
    let ttl = request.ttl();
    let rest = request.rest(Moment::now());
    let Release {
        key,
        cycle,
        requeue,
        nobody_waits: _,
        tokens,
        retire_until: _,
    } = request;
    let mut end = RevokeAtTheEnd::begin(&shared, cycle);
    let floor = shared.floor();
    let leaving = EtcdContender::new(&shared, &key, cycle, cycle.ttl(), tokens);
    let released = match (requeue, rest) {
        (None, Some(rest)) => retire(&shared, &link, &leaving, rest, &mut end).await,
        (None, None) => leave(&shared, &link, &leaving, &mut end).await,
        (Some(next), _) => {
            let next = EtcdContender::new(&shared, &key, next, next.ttl(), tokens);
            leave_and_join(&shared, &link, &leaving, &next, &mut end).await
        }
    };
    let (sent_at, reply) = released.map_err(EtcdError::into_store_error)?;
    Ok(Answer {
        sent_at,
        ttl,
        floor,
        reply,
    })
}

/// Releases a key whose `min_hold` has not passed: moves it to a lease that lasts for the rest of
/// that time. No later release deletes a key with that lease. The key keeps its place, so others
/// stay behind it.
async fn retire(
    shared: &Shared,
    link: &Link,
    leaving: &EtcdContender,
    rest: Duration,
    end: &mut RevokeAtTheEnd<'_>,
) -> Result<(Moment, ReleaseReply), EtcdError> {
    // Until the key is moved it needs its present lease. If this fails, the release is repeated, or
    // the key ends with that lease.
    let leases = std::mem::take(&mut end.leases);
    let sent_at = Moment::now();
    let owner = read_owner(shared, link, leaving).await?;
    let Some(owner) = owner.filter(|owner| owner.is(&leaving.name)) else {
        end.leases = leases;
        return leave(shared, link, leaving, end).await;
    };
    let lease = shared.cycles.of_retired(leaving.cycle, rest);
    if owner.lease != lease.id {
        let secs = i64::try_from(lease.secs).unwrap_or(i64::MAX);
        let make = async |mut client: etcd_client::Client| {
            let options = LeaseGrantOptions::new().with_id(lease.id);
            client.lease_grant(secs, Some(options)).await
        };
        match link.request(make).await {
            // An earlier attempt has created it.
            Ok(_) | Err(EtcdError::LeaseThere) => {}
            Err(error) => return Err(error),
        }
        let name = leaving.name.as_str();
        let send = async |mut client: etcd_client::Client| {
            let is_unchanged = Compare::create_revision(name, CompareOp::Equal, owner.create_revision);
            let options = PutOptions::new().with_lease(lease.id).with_ignore_value();
            let moving = TxnOp::put(name, "", Some(options));
            client.txn(Txn::new().when([is_unchanged]).and_then([moving])).await
        };
        let (reply, repeated) = link.request(send).await?;
        shared.observe_revision(reply.header());
        if !reply.succeeded() {
            // The key has ended, or was deleted.
            end.leases = leases;
            let (sent_at, mut reply) = leave(shared, link, leaving, end).await?;
            // An earlier attempt, whose reply was lost, may have moved it, and the rest of its
            // `min_hold` is over. That is no loss.
            reply.held |= repeated;
            return Ok((sent_at, reply));
        }
        end.leases = leases;
        end.add(owner.lease);
    } else {
        end.leases = leases;
    }
    Ok((sent_at, ReleaseReply::HELD))
}

async fn read_owner(shared: &Shared, link: &Link, leaving: &EtcdContender) -> Result<Option<Member>, EtcdError> {
    let read = async |mut client: etcd_client::Client| {
        let only_first = in_order().with_limit(1);
        client.get(leaving.prefix.as_str(), Some(only_first)).await
    };
    let (found, _) = link.request(read).await?;
    shared.observe_revision(found.header());
    Ok(first(&found))
}

/// Leaves the queue. Revokes the leases of the cycle only after a reply: without one, the cycle is
/// sent again under the same lease, or released.
pub(super) async fn withdraw(shared: &Shared, link: &Link, leaving: &EtcdContender) -> Result<(), EtcdError> {
    let mut end = RevokeAtTheEnd {
        shared,
        leases: Vec::new(),
        owned: None,
    };
    leave(shared, link, leaving, &mut end).await?;
    shared.waits.remove(leaving.cycle);
    let closed = shared.cycles.close(leaving.cycle);
    end.leases
        .retain(|lease| closed.iter().all(|closed| closed.id != lease.id));
    end.leases.extend(closed);
    Ok(())
}

async fn leave(
    shared: &Shared,
    link: &Link,
    leaving: &EtcdContender,
    end: &mut RevokeAtTheEnd<'_>,
) -> Result<(Moment, ReleaseReply), EtcdError> {
    let sent_at = Moment::now();
    let send = async |mut client: etcd_client::Client| {
        let retired = shared.cycles.of_retired(leaving.cycle, Duration::ZERO).id;
        let is_not_retired = Compare::lease(leaving.name.as_str(), CompareOp::NotEqual, retired);
        let read = || Queue::read_first(&leaving.prefix);
        let leaving = Txn::new()
            .when([is_not_retired])
            .and_then([read(), delete(leaving)])
            .or_else([read()]);
        client.txn(leaving).await
    };
    let (reply, repeated) = link.request(send).await?;
    shared.observe_revision(reply.header());
    let replies = reply.op_responses();
    let held = end.held(leaving, &replies);
    end.also(replies.get(1));
    let reply = ReleaseReply {
        // An earlier attempt, whose reply was lost, may have deleted the key. Then a missing key is
        // no loss.
        held: held || repeated,
        requeued: None,
    };
    Ok((sent_at, reply))
}

async fn leave_and_join(
    shared: &Shared,
    link: &Link,
    leaving: &EtcdContender,
    next: &EtcdContender,
    end: &mut RevokeAtTheEnd<'_>,
) -> Result<(Moment, ReleaseReply), EtcdError> {
    shared.cycles.open(next.cycle, next.ttl, Moment::now());
    // Its place is behind all others, whose keys existed before this transaction.
    let ran = under_a_lease(shared, link, next, next.age_max(), |lease| {
        let beside = |put| {
            [
                Queue::read_first(&leaving.prefix),
                delete(leaving),
                put,
                Queue::read(&next.prefix, next.mode()),
            ]
        };
        Txn::new()
            .when([next.is_new()])
            .and_then(beside(next.put(lease)))
            .or_else(beside(next.put_again()))
    })
    .await?;
    let replies = ran.reply.op_responses();
    let held = end.held(leaving, &replies);
    end.also(replies.get(1));
    let queue = Queue::in_reply(&ran.reply)?;
    let requeued = judge(shared, link, next, &queue, ran.lease).await?;
    let sent_at = ran.counted_from(&requeued);
    let reply = ReleaseReply {
        held: held || ran.repeated,
        requeued: Some(requeued),
    };
    Ok((sent_at, reply))
}

fn delete(leaving: &EtcdContender) -> TxnOp {
    let options = DeleteOptions::new().with_prev_key();
    TxnOp::delete(leaving.name.as_str(), Some(options))
}

/// What a delete has removed.
fn deleted_by(reply: &TxnOpResponse) -> &[KeyValue] {
    match reply {
        TxnOpResponse::Delete(deleted) => deleted.prev_kvs(),
        _ => &[],
    }
}

impl<'a> RevokeAtTheEnd<'a> {
    /// From now on, what the server reports about the cycle no longer matters.
    fn begin(shared: &'a Shared, cycle: Cycle) -> Self {
        shared.waits.remove(cycle);
        Self {
            shared,
            owned: shared.cycles.owned(cycle),
            leases: shared.cycles.close(cycle),
        }
    }

    /// Whether the cycle still held the lock: exclusively if its key was the first, in another mode
    /// if its key is the one with which it held the lock before.
    fn held(&self, leaving: &EtcdContender, replies: &[TxnOpResponse]) -> bool {
        if leaving.mode().is_exclusive() {
            return first_in(replies.first()).is_some_and(|first| first.is(&leaving.name));
        }
        let deleted = replies.get(1).map(deleted_by).unwrap_or_default();
        deleted.iter().any(|kv| self.owned == Some(kv.create_revision()))
    }

    /// Adds the lease of the deleted key if there was no record of it.
    fn also(&mut self, deleted: Option<&TxnOpResponse>) {
        let deleted = deleted.map(deleted_by).unwrap_or_default();
        deleted.iter().for_each(|deleted| self.add(deleted.lease()));
    }

    fn add(&mut self, id: i64) {
        if id != 0 && self.leases.iter().all(|lease| lease.id != id) {
            self.leases.push(EtcdLease::without_record(id));
        }
    }
}
