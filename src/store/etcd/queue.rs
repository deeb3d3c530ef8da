//! The queue of a key: its cycles in the order in which their keys were created, the holders first.
//!
//! # Implementation details
//!
//! Those members hold the key that can hold it beside all members before them, up to the first that
//! can't: nobody passes a member that waits. The mode of a member is part of its name, so every
//! manager finds the same holders in the same queue. New members come last, and the end of a member
//! makes room for those behind it. So a member that holds the key once does so until its own key is
//! gone.

use etcd_client::{GetOptions, GetResponse, KeyValue, SortOrder, SortTarget, TxnOp, TxnOpResponse, TxnResponse};

use super::error::EtcdError;
use crate::fence::TokenBlock;
use crate::identity::parse_owner_tag;
use crate::mode::LockMode;
use crate::store::StoreError;

/// The tokens per revision. A revision serves one request only, and so do its tokens.
const TOKENS_PER_REVISION: u64 = 1 << 16;
/// How many members a request in another mode than exclusive reads: the first ones. A cycle behind
/// them is refused.
pub(super) const MEMBERS_MAX: usize = 10_000;

/// The queue as one transaction saw it.
#[derive(Debug)]
pub(super) struct Queue {
    /// The members that were read: the first ones.
    pub(super) members: Vec<Member>,
    /// How many members there are.
    pub(super) count: usize,
    pub(super) revision: i64,
}

#[derive(Debug)]
pub(super) struct Member {
    pub(super) name: Vec<u8>,
    pub(super) create_revision: i64,
    /// The id of its lease; zero for none.
    pub(super) lease: i64,
}

/// What a waiting member waits for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Blocker {
    /// The member waits at least until this key is gone.
    Key(Vec<u8>),
    /// No exclusive member is before it: it waits until enough of these permits are returned. In
    /// the order of the queue.
    Permits(Permits),
}

/// The permits of the members before one that waits, and its own mode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Permits {
    before: Vec<(Vec<u8>, LockMode)>,
    mode: LockMode,
}

impl Permits {
    /// The key with this name is gone. Returns whether the waiting member holds the lock because of
    /// that.
    pub(super) fn without(&mut self, name: &[u8]) -> bool {
        let Some(at) = self.before.iter().position(|(other, _)| other == name) else {
            return false;
        };
        self.before.remove(at);
        let modes = self.before.iter().map(|&(_, mode)| mode).chain([self.mode]);
        let is_admitted = holders_among(modes) > self.before.len();
        if is_admitted {
            // That does not change any more.
            self.before.clear();
        }
        is_admitted
    }
}

/// The members at the front of a queue that hold the key together.
#[derive(Debug, Default)]
struct Together {
    count: usize,
    has_exclusive: bool,
    used: u32,
    /// Each holder of permits states a limit, and the smallest one counts.
    limit: Option<u32>,
}

impl Together {
    /// Adds the next member if it can hold the key beside the others.
    fn admit(&mut self, mode: LockMode) -> bool {
        let limit = self.limit.map_or(mode.limit(), |limit| limit.min(mode.limit()));
        let fits = match mode {
            LockMode::Exclusive => self.count == 0,
            LockMode::Shared => !self.has_exclusive,
            LockMode::Permits { .. } => !self.has_exclusive && self.used + mode.weight() <= limit,
        };
        if fits {
            self.count += 1;
            self.has_exclusive = mode.is_exclusive();
            self.used += mode.weight();
            self.limit = Some(limit);
        }
        fits
    }
}

/// How many members, from the first, hold the key, in a queue of these modes.
fn holders_among(modes: impl IntoIterator<Item = LockMode>) -> usize {
    let mut together = Together::default();
    modes.into_iter().take_while(|&mode| together.admit(mode)).count()
}

impl Queue {
    /// Reads the queue for a member in this mode. An exclusive one reads all members.
    pub(super) fn read(prefix: &str, mode: LockMode) -> TxnOp {
        TxnOp::get(prefix, Some(for_mode(mode)))
    }

    /// Reads the first members, at most this many.
    pub(super) fn read_some(prefix: &str, count: usize) -> TxnOp {
        TxnOp::get(prefix, Some(in_order().with_limit(in_i64(count))))
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
            Some(TxnOpResponse::Get(found)) => Ok(Self::of(&found, revision(reply)?)),
            _ => Err(unexpected()),
        }
    }

    /// The queue in the reply to a read, which was made at this revision.
    pub(super) fn of(found: &GetResponse, revision: i64) -> Self {
        let members: Vec<_> = found.kvs().iter().map(Member::of).collect();
        Self {
            count: usize::try_from(found.count()).unwrap_or(0).max(members.len()),
            members,
            revision,
        }
    }

    /// The position of a member, counted from the first.
    pub(super) fn position(&self, name: &str) -> Result<usize, EtcdError> {
        let position = self.members.iter().position(|member| member.is(name));
        position.ok_or_else(|| match self.count > self.members.len() {
            true => too_many(),
            false => unexpected(),
        })
    }

    /// How many members, from the first, hold the key.
    pub(super) fn holders(&self) -> usize {
        holders_among(self.members.iter().map(Member::mode))
    }

    /// How many members wait.
    pub(super) fn waiting(&self) -> u64 {
        self.count.saturating_sub(self.holders()) as u64
    }

    /// Whether a new member in this mode would hold the key at once.
    pub(super) fn admits(&self, mode: LockMode) -> Result<bool, EtcdError> {
        let modes = self.members.iter().map(Member::mode).chain([mode]);
        match holders_among(modes) > self.members.len() {
            true if self.count > self.members.len() => Err(too_many()),
            admits => Ok(admits),
        }
    }

    /// What the member at this position, which waits, waits for.
    pub(super) fn blocker(&self, position: usize, mode: LockMode) -> Result<Blocker, EtcdError> {
        let before = self.members.get(..position).ok_or_else(unexpected)?;
        let key = match mode {
            // It waits until all are gone, so for the last of them in any case.
            LockMode::Exclusive => before.last(),
            LockMode::Shared | LockMode::Permits { .. } => before.iter().rfind(|member| member.mode().is_exclusive()),
        };
        if let Some(key) = key {
            return Ok(Blocker::Key(key.name.clone()));
        }
        // A shared member takes no permits, and waits only if one that wants permits does.
        let permits = before.iter().map(|member| (member, member.mode()));
        let permits = permits.filter(|(_, mode)| *mode != LockMode::Shared);
        Ok(Blocker::Permits(Permits {
            before: permits.map(|(member, mode)| (member.name.clone(), mode)).collect(),
            mode,
        }))
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

    /// The mode of its cycle; exclusive if no manager wrote it. No owner tag contains a slash.
    pub(super) fn mode(&self) -> LockMode {
        let tag = self.name.rsplit(|&byte| byte == b'/').next().unwrap_or_default();
        let cycle = std::str::from_utf8(tag).ok().and_then(parse_owner_tag);
        cycle.map_or(LockMode::Exclusive, |(_, cycle)| cycle.mode())
    }
}

/// Reads the members of a queue for one in this mode.
pub(super) fn for_mode(mode: LockMode) -> GetOptions {
    match mode {
        LockMode::Exclusive => in_order(),
        LockMode::Shared | LockMode::Permits { .. } => in_order().with_limit(in_i64(MEMBERS_MAX)),
    }
}

pub(super) fn in_i64(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Reads the members of a queue without their values, the first first.
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

fn too_many() -> EtcdError {
    EtcdError::Other(StoreError::Refused(
        format!(
            "{MEMBERS_MAX} managers or more hold this key or wait for it, and etcd shards have no more shared locks \
             and permits per key; use several keys"
        )
        .into(),
    ))
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

    const fn permits(weight: u16, limit: u16) -> LockMode {
        LockMode::Permits { weight, limit }
    }

    const EXCLUSIVE: LockMode = LockMode::Exclusive;
    const SHARED: LockMode = LockMode::Shared;

    /// A queue of cycles in these modes, numbered from 0.
    fn queue(modes: &[LockMode]) -> Queue {
        let member = |(number, mode): (usize, &LockMode)| Member {
            name: name(number, *mode),
            create_revision: number as i64 + 1,
            lease: 0,
        };
        Queue {
            members: modes.iter().enumerate().map(member).collect(),
            count: modes.len(),
            revision: 100,
        }
    }

    fn name(number: usize, mode: LockMode) -> Vec<u8> {
        let suffix = mode.suffix();
        format!("lock:k/h-1-0000000000000001:{number}-1000-00000000{suffix}").into_bytes()
    }

    #[test]
    fn members_compatible_with_all_before_them_hold_the_key() {
        let foreign = Member {
            name: b"lock:k/x".to_vec(),
            create_revision: 1,
            lease: 0,
        };
        assert_eq!(foreign.mode(), EXCLUSIVE);
        for (modes, holders) in [
            (vec![], 0),
            (vec![EXCLUSIVE, EXCLUSIVE, SHARED], 1),
            (vec![EXCLUSIVE, SHARED, permits(1, 5)], 1),
            (vec![SHARED, SHARED, EXCLUSIVE, SHARED], 2),
            (
                vec![permits(2, 4), SHARED, permits(2, 4), SHARED, permits(1, 4), SHARED],
                4,
            ),
            // Nobody passes a request for many permits.
            (vec![permits(1, 4), permits(4, 4), permits(1, 4), SHARED], 1),
            // The smallest limit of all holders counts.
            (vec![permits(1, 2), permits(1, 10), permits(1, 10)], 2),
            (vec![permits(1, 10), permits(1, 10), permits(1, 2)], 2),
        ] {
            assert_eq!(queue(&modes).holders(), holders, "{modes:?}");
            assert_eq!(queue(&modes).waiting(), (modes.len() - holders) as u64);
        }
        assert!(queue(&[SHARED]).admits(permits(3, 3)).unwrap());
        assert!(!queue(&[SHARED]).admits(EXCLUSIVE).unwrap());
        assert!(!queue(&[SHARED, EXCLUSIVE]).admits(SHARED).unwrap());
        assert!(queue(&[]).admits(EXCLUSIVE).unwrap());
        let more = Queue {
            count: 2,
            ..queue(&[SHARED])
        };
        assert!(more.admits(SHARED).is_err() && more.position("lock:k/other").is_err());
    }

    /// All queues of few modes: the end of a member takes the lock from no holder.
    #[test]
    fn holder_stays_a_holder_when_another_member_leaves() {
        let modes = [EXCLUSIVE, SHARED, permits(1, 3), permits(2, 3), permits(1, 2)];
        for number in 0..modes.len().pow(5) {
            let digits = (0..5).map(|digit| number / modes.len().pow(digit) % modes.len());
            let of: Vec<LockMode> = digits.map(|digit| modes[digit]).collect();
            let holders = queue(&of).holders();
            for leaving in 0..of.len() {
                let mut rest = of.clone();
                rest.remove(leaving);
                let stayed = holders - usize::from(leaving < holders);
                assert!(queue(&rest).holders() >= stayed, "{of:?} without {leaving}");
            }
        }
    }

    /// All queues of few modes: what blocks a member is gone if, and only if, it holds the lock.
    #[test]
    fn waiter_is_notified_when_nothing_blocks_it() {
        let modes = [EXCLUSIVE, SHARED, permits(1, 3), permits(2, 3), permits(1, 2)];
        for number in 0..modes.len().pow(5) {
            let digits = (0..5).map(|digit| number / modes.len().pow(digit) % modes.len());
            let of: Vec<LockMode> = digits.map(|digit| modes[digit]).collect();
            let last = of.len() - 1;
            let before = queue(&of);
            if before.holders() == of.len() {
                continue;
            }
            for first_to_leave in 0..last {
                let mut blocker = before.blocker(last, of[last]).unwrap();
                let mut rest = queue(&of);
                // All others leave, one after the other, beginning with each of them.
                for step in 0..last {
                    let name = name((first_to_leave + step) % last, of[(first_to_leave + step) % last]);
                    rest.members.retain(|member| member.name != name);
                    let is_told = match &mut blocker {
                        Blocker::Key(key) => *key == name,
                        Blocker::Permits(permits) => permits.without(&name),
                    };
                    let holds = rest.holders() == rest.members.len();
                    assert!(
                        is_told || !holds,
                        "{of:?} is not notified after {step} from {first_to_leave}"
                    );
                    if holds {
                        break;
                    }
                    if is_told {
                        // It asks again and finds what blocks it now.
                        assert!(matches!(blocker, Blocker::Key(_)), "{of:?} is notified too early");
                        blocker = rest.blocker(rest.members.len() - 1, of[last]).unwrap();
                    }
                }
            }
        }
    }

    #[test]
    fn tokens_of_later_revisions_are_larger_for_any_number_of_tokens() {
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
