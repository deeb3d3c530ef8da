//! The behaviour of a lease store in plain code: the reference that the Lua scripts are compared
//! with.
//!
//! Reads no clock. `now` decides when leases end; `server_time`, in the unit of tokens, is only
//! used to raise a counter that was lost.

#[cfg(test)]
mod claim;
mod lock;
mod queue;

use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::clock::Moment;
#[cfg(test)]
use crate::engine::Flaw;
use crate::fence::{FencingToken, TokenBlock};
use crate::identity::parse_owner_tag;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::{AcquireReply, Push, ReleaseReply, RenewReply};
use crate::store::{Holder, INSPECTED_MAX, KeyState};
use lock::{HolderRecord, LeaseRecord, Lock, Member, mode_of};

/// Leases, queues, counters and subscribed inboxes.
#[derive(Debug, Default, Clone)]
pub(crate) struct MemoryCore {
    locks: HashMap<LockKey, Lock>,
    counters: HashMap<Slot, u64>,
    /// The managers whose inboxes are subscribed here.
    subscribed: HashSet<String>,
    /// The managers whose inboxes are subscribed at a replica: messages reach them without being
    /// counted.
    subscribed_at_replica: HashSet<String>,
    /// A deliberate bug: takes a message that was counted for no receiver as received by none.
    #[cfg(test)]
    pub(crate) counts_receivers: bool,
    /// A deliberate bug.
    #[cfg(test)]
    flaw: Option<Flaw>,
    /// Replaces [`UNNOTIFIED_LEASE`] in tests in which no time may pass.
    #[cfg(test)]
    pub(crate) unnotified_lease: Option<Duration>,
    /// Pushes to deliver, each with the manager it goes to.
    pub(crate) outbox: Vec<(String, Push)>,
}

/// How many waiting cycles get a message when a lease is retired.
const NOTIFIED_MAX: usize = 10;

/// The parameters of a request besides the key.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) now: Moment,
    pub(crate) server_time: u64,
    pub(crate) ttl: Duration,
    pub(crate) tokens: u32,
    pub(crate) floor: u64,
}

impl MemoryCore {
    /// Records whether a manager's inbox is subscribed here.
    pub(crate) fn set_subscribed(&mut self, manager: &str, is_subscribed: bool) {
        if is_subscribed {
            self.subscribed.insert(manager.to_owned());
        } else {
            self.subscribed.remove(manager);
        }
    }

    /// Drops all subscriptions, as on a server that has just taken over.
    #[cfg(test)]
    pub(crate) fn drop_subscriptions(&mut self) {
        self.subscribed.clear();
        self.outbox.clear();
    }

    #[cfg(test)]
    pub(crate) fn with_flaw(flaw: Option<Flaw>) -> Self {
        Self {
            counts_receivers: flaw == Some(Flaw::CountsReceivers),
            flaw,
            ..Self::default()
        }
    }

    /// Records whether a manager's inbox is subscribed at a replica.
    #[cfg(test)]
    pub(crate) fn set_subscribed_at_replica(&mut self, manager: &str, is_subscribed: bool) {
        if is_subscribed {
            self.subscribed_at_replica.insert(manager.to_owned());
        } else {
            self.subscribed_at_replica.remove(manager);
        }
    }

    /// The fast path of an exclusive lock: `SET NX` and `INCRBY`.
    pub(crate) fn acquire_fast(&mut self, key: &LockKey, me: &str, terms: Terms) -> AcquireReply {
        let is_free = self.lock(key, terms.now).admits(LockMode::Exclusive);
        let counter = self.counters.entry(key.slot()).or_default();
        *counter += u64::from(terms.tokens);
        let tokens = TokenBlock::ending_at(*counter, terms.tokens);
        if !is_free {
            return AcquireReply::Taken;
        }
        self.admit(key, me, terms);
        AcquireReply::Granted {
            tokens,
            queued: 0,
            extended: false,
        }
    }

    /// Takes the lease, extends it, or joins the queue; a try does not join.
    pub(crate) fn acquire(&mut self, key: &LockKey, me: &str, try_only: bool, terms: Terms) -> AcquireReply {
        let lock = self.lock(key, terms.now);
        if lock.is_held_by(me) {
            let tokens = self.reserve(key, terms);
            self.extend(key, me, terms.now + terms.ttl);
            return AcquireReply::Granted {
                tokens,
                queued: self.queue_length(key),
                extended: true,
            };
        }
        let is_first = lock.queue.first().is_none_or(|head| head.owner == me);
        #[cfg(test)]
        let is_first = is_first || mode_of(me) == LockMode::Shared && self.flaw == Some(Flaw::LetsReadersPass);
        let lock = self.lock(key, terms.now);
        let reply = if is_first && lock.admits(mode_of(me)) {
            let tokens = self.reserve(key, terms);
            self.leave(key, me);
            self.admit(key, me, terms);
            // Others may be admissible beside it.
            self.advance(key, None, terms);
            AcquireReply::Granted {
                tokens,
                queued: self.queue_length(key),
                extended: false,
            }
        } else if try_only {
            self.try_after_others(key, me, terms)
        } else {
            self.enqueue(key, me, terms)
        };
        self.forget_if_unused(key);
        reply
    }

    /// Serves the waiters that can be served now. Takes the lease if none is left and it is free.
    fn try_after_others(&mut self, key: &LockKey, me: &str, terms: Terms) -> AcquireReply {
        self.advance(key, None, terms);
        let lock = self.lock(key, terms.now);
        // It may have been in the queue itself, and was served from there.
        if !lock.queue.is_empty() || lock.is_held_by(me) || !lock.admits(mode_of(me)) {
            return AcquireReply::Busy;
        }
        let tokens = self.reserve(key, terms);
        self.admit(key, me, terms);
        AcquireReply::Granted {
            tokens,
            queued: 0,
            extended: false,
        }
    }

    /// Joins the queue, serves those at its head that can be served, and replies to `me`.
    fn enqueue(&mut self, key: &LockKey, me: &str, terms: Terms) -> AcquireReply {
        let (mark, _, is_new, is_subscribed) = self.join(key, me, terms);
        let advanced = self.advance(key, Some(me), terms);
        if let Some(tokens) = advanced.mine {
            return AcquireReply::Granted {
                tokens,
                queued: self.queue_length(key),
                extended: false,
            };
        }
        let lock = self.lock(key, terms.now);
        let ahead = lock
            .queue
            .iter()
            .position(|member| member.owner == me)
            .unwrap_or_default() as u64;
        // Who was admitted just now knows how many wait.
        if advanced.last.is_none() && (ahead == 0 || !is_new) {
            self.notify_holders(key);
        }
        self.queued(key, advanced.last.unwrap_or(mark), ahead, is_subscribed, terms.now)
    }

    /// Extends a lease that the cycle has, and reserves more tokens.
    pub(crate) fn acquire_extension(&mut self, key: &LockKey, me: &str, terms: Terms) -> AcquireReply {
        if !self.lock(key, terms.now).is_held_by(me) {
            self.forget_if_unused(key);
            return AcquireReply::Busy;
        }
        self.acquire(key, me, false, terms)
    }

    /// Releases the lease or leaves the queue. If there is a `next`, it joins the tail first.
    pub(crate) fn release(&mut self, key: &LockKey, me: &str, next: Option<&str>, terms: Terms) -> ReleaseReply {
        let held = self.lock(key, terms.now).is_held_by(me);
        if !held {
            self.leave(key, me);
        }
        self.remove(key, me);
        let requeued = match next {
            None => {
                self.advance(key, None, terms);
                None
            }
            Some(next) if self.lock(key, terms.now).is_held_by(next) => {
                // An earlier attempt had it join, and it was served since. It is in no queue now.
                self.advance(key, None, terms);
                Some(self.acquire(key, next, false, terms))
            }
            // Through the queue, so that a cycle never passes those that were there before.
            Some(next) if held => Some(self.enqueue(key, next, terms)),
            Some(next) => Some(self.acquire(key, next, false, terms)),
        };
        self.forget_if_unused(key);
        ReleaseReply { held, requeued }
    }

    /// Releases a lease whose `min_hold` lasts until `until`: it stays until then or until its own
    /// end, under an owner tag that no cycle has. The first cycles in the queue expect a later end,
    /// so a message makes them ask again. Returns whether the lease was ours; if not, nothing was
    /// done.
    pub(crate) fn retire(&mut self, key: &LockKey, me: &str, retired: &str, now: Moment, until: Moment) -> bool {
        let Some(lock) = self.locks.get_mut(key) else {
            return false;
        };
        lock.expire(now);
        let Some(lease) = lock.lease.as_mut().filter(|lease| lease.owner == me) else {
            return false;
        };
        *lease = LeaseRecord {
            owner: retired.to_owned(),
            ends: Some(lease.ends.map_or(until, |ends| ends.min(until))),
        };
        let notified: Vec<Member> = lock.queue.iter().take(NOTIFIED_MAX).cloned().collect();
        for member in notified {
            if let Some((manager, cycle)) = parse_owner_tag(&member.owner) {
                self.notify(
                    manager,
                    Push::YourTurn {
                        key: key.clone(),
                        cycle,
                    },
                );
            }
        }
        true
    }

    pub(crate) fn renew(&mut self, key: &LockKey, me: &str, now: Moment, ttl: Duration) -> RenewReply {
        let is_ours = self.lock(key, now).is_held_by(me);
        if !is_ours {
            self.forget_if_unused(key);
            return RenewReply::NotOurs;
        }
        self.extend(key, me, now + ttl);
        RenewReply::Extended {
            has_waiters: self.queue_length(key) > 0,
        }
    }

    pub(crate) fn inspect(&mut self, key: &LockKey, now: Moment) -> KeyState {
        let last_token = self.counters.get(&key.slot()).copied().and_then(FencingToken::new);
        let lock = self.lock(key, now);
        let holder = lock.lease.as_ref().map(|lease| Holder {
            is_manager: parse_owner_tag(&lease.owner).is_some(),
            owner: lease.owner.clone(),
            mode: LockMode::Exclusive,
            remaining: lease.ends.map(|ends| ends.since(now)),
        });
        let mut holders: Vec<Holder> = lock
            .holders
            .iter()
            .map(|holder| Holder {
                is_manager: true,
                owner: holder.owner.clone(),
                mode: holder.mode,
                remaining: Some(holder.ends.since(now)),
            })
            .collect();
        holders.sort_by(|a, b| (a.remaining, &a.owner).cmp(&(b.remaining, &b.owner)));
        holders.truncate(INSPECTED_MAX);
        let state = KeyState {
            holder,
            holder_count: lock.holders.len() as u64,
            permits_in_use: lock.holders.iter().map(|holder| holder.mode.weight()).sum(),
            holders,
            queue_length: lock.queue.len() as u64,
            queue: lock
                .queue
                .iter()
                .take(INSPECTED_MAX)
                .map(|member| member.owner.clone())
                .collect(),
            last_token,
        };
        self.forget_if_unused(key);
        state
    }

    /// Stores a lease as an administrator or another library would.
    #[cfg(test)]
    pub(crate) fn put(&mut self, key: &LockKey, owner: &str, ends: Option<Moment>) {
        let lock = self.locks.entry(key.clone()).or_default();
        lock.holders.clear();
        lock.lease = Some(LeaseRecord {
            owner: owner.to_owned(),
            ends,
        });
    }

    /// Deletes the leases as an administrator or another library would.
    #[cfg(test)]
    pub(crate) fn delete(&mut self, key: &LockKey) {
        if let Some(lock) = self.locks.get_mut(key) {
            lock.lease = None;
            lock.holders.clear();
        }
        self.forget_if_unused(key);
    }

    /// Deletes everything, as a FLUSHALL does, and returns how much that was.
    pub(crate) fn flush(&mut self) -> u64 {
        let count = self.locks.len() + self.counters.len();
        self.locks.clear();
        self.counters.clear();
        count as u64
    }

    /// The number of keys with a lease or a queue.
    #[cfg(test)]
    pub(crate) fn keys_in_use(&mut self, now: Moment) -> usize {
        self.locks.retain(|_, lock| {
            lock.expire(now);
            !lock.is_unused()
        });
        self.locks.len()
    }

    /// The holders at `now`, of any mode.
    #[cfg(test)]
    pub(crate) fn owners(&mut self, key: &LockKey, now: Moment) -> Vec<String> {
        let Some(lock) = self.locks.get_mut(key) else {
            return Vec::new();
        };
        lock.expire(now);
        let exclusive = lock.lease.iter().map(|lease| lease.owner.clone());
        exclusive
            .chain(lock.holders.iter().map(|holder| holder.owner.clone()))
            .collect()
    }

    /// The exclusive owner at `now`.
    #[cfg(test)]
    pub(crate) fn owner(&mut self, key: &LockKey, now: Moment) -> Option<String> {
        let lock = self.locks.get_mut(key)?;
        lock.expire(now);
        lock.lease.as_ref().map(|lease| lease.owner.clone())
    }

    /// The key at `now`, without what has ended.
    fn lock(&mut self, key: &LockKey, now: Moment) -> &mut Lock {
        #[cfg(test)]
        let flaw = self.flaw;
        let lock = self.locks.entry(key.clone()).or_default();
        #[cfg(test)]
        if flaw == Some(Flaw::NeverEndsHolders) {
            lock.holders
                .iter_mut()
                .for_each(|holder| holder.ends = holder.ends.max(now + Duration::from_secs(1)));
        }
        #[cfg(test)]
        lock.marked_until.take_if(|until| *until <= now);
        lock.expire(now);
        lock
    }

    /// The request comes from a client whose clock is ahead by that much.
    #[cfg(test)]
    pub(crate) fn comes_from_ahead(&mut self, key: &LockKey, now: Moment, ahead: Duration) {
        if self.flaw == Some(Flaw::EndsByClientsClock)
            && let Some(lock) = self.locks.get_mut(key)
        {
            lock.holders.retain(|holder| holder.ends > now + ahead);
        }
    }

    /// The members of the queue, in order.
    #[cfg(test)]
    pub(crate) fn queue(&self, key: &LockKey) -> Vec<String> {
        let queue = self.locks.get(key).map(|lock| lock.queue.iter());
        queue.into_iter().flatten().map(|member| member.owner.clone()).collect()
    }

    fn queue_length(&self, key: &LockKey) -> u64 {
        self.locks.get(key).map_or(0, |lock| lock.queue.len() as u64)
    }

    /// Gives a lease to a cycle in its mode.
    fn admit(&mut self, key: &LockKey, owner: &str, terms: Terms) {
        let ends = terms.now + terms.ttl;
        let lock = self.locks.entry(key.clone()).or_default();
        let owner = owner.to_owned();
        match mode_of(&owner) {
            LockMode::Exclusive => {
                lock.lease = Some(LeaseRecord {
                    owner,
                    ends: Some(ends),
                })
            }
            mode => lock.holders.push(HolderRecord { owner, mode, ends }),
        }
    }

    /// Ends the lease of a cycle, if it has one.
    fn remove(&mut self, key: &LockKey, owner: &str) {
        if let Some(lock) = self.locks.get_mut(key) {
            lock.lease.take_if(|lease| lease.owner == owner);
            #[cfg(test)]
            if self.flaw == Some(Flaw::KeepsMarker)
                && let [holder] = &lock.holders[..]
                && holder.owner == owner
            {
                lock.marked_until = Some(holder.ends);
            }
            lock.holders.retain(|holder| holder.owner != owner);
        }
    }

    /// Moves the end of a lease later, never earlier: its owner relies on earlier replies, whatever
    /// TTL those requests had.
    fn extend(&mut self, key: &LockKey, owner: &str, ends: Moment) {
        let Some(lock) = self.locks.get_mut(key) else { return };
        if let Some(lease) = lock.lease.as_mut().filter(|lease| lease.owner == owner) {
            lease.ends = Some(lease.ends.map_or(ends, |before| before.max(ends)));
        }
        for holder in lock.holders.iter_mut().filter(|holder| holder.owner == owner) {
            holder.ends = holder.ends.max(ends);
        }
    }

    /// Reserves a block of tokens. A counter below the caller's floor was lost, so it is raised
    /// first.
    fn reserve(&mut self, key: &LockKey, terms: Terms) -> TokenBlock {
        let counter = self.counters.entry(key.slot()).or_default();
        if *counter < terms.floor {
            *counter = terms.floor.max(terms.server_time);
        }
        *counter += u64::from(terms.tokens);
        TokenBlock::ending_at(*counter, terms.tokens)
    }

    fn forget_if_unused(&mut self, key: &LockKey) {
        if self.locks.get(key).is_some_and(Lock::is_unused) {
            self.locks.remove(key);
        }
    }

    /// Sends a message to a manager, wherever its inbox is subscribed.
    fn notify(&mut self, manager: &str, push: Push) {
        if self.subscribed.contains(manager) || self.subscribed_at_replica.contains(manager) {
            self.outbox.push((manager.to_owned(), push));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A guard with a TTL of one second was handed off to a task that wanted 100 ms. The renewal
    /// for that task ended the lease in the store after 100 ms, while the manager, which had been
    /// promised a second, still relied on that. If it paused for a moment, there were two holders.
    /// The same happens if the grant came from a manager with a longer TTL.
    const OWNER: &str = "h-1-0000000000000000:2-1000-00000000";

    #[test]
    fn a_shorter_ttl_does_not_shorten_a_lease() {
        let mut core = MemoryCore::default();
        let key = LockKey::new("k").unwrap();
        let terms = |ttl| Terms {
            now: Moment::from_nanos(0),
            server_time: 0,
            ttl: Duration::from_millis(ttl),
            tokens: 1,
            floor: 0,
        };
        let at = |millis: u64| Moment::from_nanos(millis * 1_000_000);
        core.acquire(&key, OWNER, false, terms(1_000));

        core.renew(&key, OWNER, at(50), Duration::from_millis(100));
        core.acquire(&key, OWNER, false, terms(100));
        assert!(core.owner(&key, at(999)).is_some());

        core.renew(&key, OWNER, at(999), Duration::from_millis(100));
        assert!(core.owner(&key, at(1_098)).is_some());
        assert!(core.owner(&key, at(1_099)).is_none());
    }
}
