//! Releasing a key, or a place in its queue.

use std::sync::Arc;

use etcd_client::{DeleteOptions, Txn, TxnOp, TxnOpResponse};

use super::Shared;
use super::acquire::{Contender, judge, under_a_lease};
use super::cycles::EtcdLease;
use super::error::EtcdError;
use super::link::Link;
use super::queue::{Queue, first_in};
use crate::clock::Moment;
use crate::protocol::{Answer, Release, ReleaseReply};
use crate::store::StoreError;

/// Revokes the leases of a cycle when its release has ended, however it ended. Every key needs its
/// lease, so nothing that was sent for the cycle can take effect afterwards. Not earlier, because
/// the release must still find the cycle's key.
struct RevokeAtTheEnd<'a> {
    shared: &'a Shared,
    leases: Vec<EtcdLease>,
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
    let Release {
        key,
        cycle,
        requeue,
        nobody_waits: _,
        tokens,
    } = request;
    // From now on, what the server reports about the cycle no longer matters.
    shared.waits.remove(cycle);
    let mut end = RevokeAtTheEnd {
        leases: shared.cycles.close(cycle),
        shared: &shared,
    };
    let floor = shared.floor();
    let leaving = Contender::new(&shared, &key, cycle, cycle.ttl(), tokens);
    let released = match requeue {
        None => leave(&shared, &link, &leaving, &mut end).await,
        Some(next) => {
            let next = Contender::new(&shared, &key, next, next.ttl(), tokens);
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

async fn leave(
    shared: &Shared,
    link: &Link,
    leaving: &Contender,
    end: &mut RevokeAtTheEnd<'_>,
) -> Result<(Moment, ReleaseReply), EtcdError> {
    let sent_at = Moment::now();
    let send = async |mut client: etcd_client::Client| {
        client
            .txn(Txn::new().and_then([Queue::read_first(&leaving.prefix), delete(leaving)]))
            .await
    };
    let (reply, repeated) = link.request(send).await?;
    shared.observe_revision(reply.header());
    let replies = reply.op_responses();
    let first_is_ours = first_in(replies.first()).is_some_and(|first| first.is(&leaving.name));
    end.also(replies.get(1));
    let reply = ReleaseReply {
        // An earlier attempt, whose reply was lost, may have deleted the key. Then a missing key is
        // no loss.
        held: first_is_ours || repeated,
        requeued: None,
    };
    Ok((sent_at, reply))
}

async fn leave_and_join(
    shared: &Shared,
    link: &Link,
    leaving: &Contender,
    next: &Contender,
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
                Queue::read(&next.prefix),
            ]
        };
        Txn::new()
            .when([next.is_new()])
            .and_then(beside(next.put(lease)))
            .or_else(beside(next.put_again()))
    })
    .await?;
    let replies = ran.reply.op_responses();
    let first_is_ours = first_in(replies.first()).is_some_and(|first| first.is(&leaving.name));
    end.also(replies.get(1));
    let queue = Queue::in_reply(&ran.reply)?;
    let requeued = judge(shared, link, next, &queue, ran.lease).await?;
    let sent_at = ran.counted_from(&requeued);
    let reply = ReleaseReply {
        held: first_is_ours || ran.repeated,
        requeued: Some(requeued),
    };
    Ok((sent_at, reply))
}

fn delete(leaving: &Contender) -> TxnOp {
    let options = DeleteOptions::new().with_prev_key();
    TxnOp::delete(leaving.name.as_str(), Some(options))
}

impl RevokeAtTheEnd<'_> {
    /// Adds the lease of the deleted key if there was no record of it.
    fn also(&mut self, deleted: Option<&TxnOpResponse>) {
        let Some(TxnOpResponse::Delete(deleted)) = deleted else {
            return;
        };
        let ids = deleted.prev_kvs().iter().map(etcd_client::KeyValue::lease);
        for id in ids.filter(|&id| id != 0) {
            if self.leases.iter().all(|lease| lease.id != id) {
                self.leases.push(EtcdLease::without_record(id));
            }
        }
    }
}
