//! The queue of a key: its cycles in the order in which their keys were created, the owner first.

use etcd_client::{GetOptions, GetResponse, KeyValue, SortOrder, SortTarget, TxnOp, TxnOpResponse, TxnResponse};

use super::error::EtcdError;
use crate::fence::TokenBlock;
use crate::store::StoreError;

/// The tokens per revision. A revision serves one request only, and so do its tokens.
const TOKENS_PER_REVISION: u64 = 1 << 16;

/// The queue as one transaction saw it.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) members: Vec<Member>,
    pub(super) revision: i64,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    pub(super) create_revision: i64,
    /// The id of its lease; zero for none.
    pub(super) lease: i64,
}

impl Queue {
    /// Reads the whole queue.
    pub(super) fn read(prefix: &str) -> TxnOp {
        TxnOp::get(prefix, Some(in_order()))
    }

    /// Reads the first member.
    pub(super) fn read_first(prefix: &str) -> TxnOp {
        TxnOp::get(prefix, Some(in_order().with_limit(1)))
    }

    /// Reads one member.
    pub(super) fn read_one(name: &str) -> TxnOp {
        TxnOp::get(name, Some(GetOptions::new().with_keys_only()))
    }

    /// The queue in the last reply of a transaction.
    pub(super) fn in_reply(reply: &TxnResponse) -> Result<Self, EtcdError> {
        match reply.op_responses().pop() {
            Some(TxnOpResponse::Get(found)) => Ok(Self {
                members: found.kvs().iter().map(Member::of).collect(),
                revision: revision(reply)?,
            }),
            _ => Err(unexpected()),
        }
    }

    /// The position of a member, counted from the owner.
    pub(super) fn position(&self, name: &str) -> Option<usize> {
        self.members.iter().position(|member| member.name == name.as_bytes())
    }
}

impl Member {
    pub(super) fn of(kv: &KeyValue) -> Self {
        Self {
            name: kv.key().to_vec(),
            create_revision: kv.create_revision(),
            lease: kv.lease(),
        }
    }

    pub(super) fn is(&self, name: &str) -> bool {
        self.name == name.as_bytes()
    }
}

/// Reads the members of a queue without their values, the owner first.
pub(super) fn in_order() -> GetOptions {
    GetOptions::new()
        .with_prefix()
        .with_keys_only()
        .with_sort(SortTarget::Create, SortOrder::Ascend)
}

/// The first member in one of a transaction's replies.
pub(super) fn first_in(reply: Option<&TxnOpResponse>) -> Option<Member> {
    match reply {
        Some(TxnOpResponse::Get(found)) => first(found),
        _ => None,
    }
}

/// The first member in a reply.
pub(super) fn first(found: &GetResponse) -> Option<Member> {
    found.kvs().first().map(Member::of)
}

pub(super) fn revision(reply: &TxnResponse) -> Result<i64, EtcdError> {
    reply.header().map(|header| header.revision()).ok_or_else(unexpected)
}

pub(super) fn unexpected() -> EtcdError {
    EtcdError::Other(StoreError::Refused(
        "etcd's reply to a transaction has an unexpected form".into(),
    ))
}

/// The first `count` tokens of a revision.
pub(super) fn tokens_of(revision: i64, count: u32) -> Result<TokenBlock, EtcdError> {
    let count = count.clamp(1, TOKENS_PER_REVISION as u32);
    let below = u64::try_from(revision)
        .ok()
        .and_then(|revision| revision.checked_mul(TOKENS_PER_REVISION))
        .and_then(|below| below.checked_add(u64::from(count)))
        // No block may end there.
        .filter(|&last| last < u64::MAX);
    match below {
        Some(last) => Ok(TokenBlock::ending_at(last, count)),
        None => Err(EtcdError::Other(StoreError::Refused(
            format!("etcd's revision {revision} is too large to derive tokens from").into(),
        ))),
    }
}

/// Every token of a later revision is larger than this.
pub(super) const fn floor_of(revision: u64) -> u64 {
    revision.saturating_add(1).saturating_mul(TOKENS_PER_REVISION)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_of_later_revisions_are_larger_however_many_there_are() {
        let full = tokens_of(7, u32::MAX).unwrap();
        assert_eq!(full.remaining(), TOKENS_PER_REVISION);
        assert_eq!(full.last(), floor_of(7));
        assert!(tokens_of(8, 1).unwrap().first() > full.last());
        assert_eq!(tokens_of(8, 0).unwrap().remaining(), 1);
        assert_eq!(tokens_of(8, 3).unwrap().first(), tokens_of(8, 1).unwrap().first());
        assert!(tokens_of(i64::MAX, 1).is_err() && tokens_of(-1, 1).is_err());
        assert!(tokens_of((1 << 48) - 1, 65_535).is_err());
        // A double represents the tokens of a hundred billion revisions exactly.
        assert!(floor_of(100_000_000_000) < 1 << 53);
    }
}
