//! The behaviour of a lease store in plain code: the reference that the Lua scripts are compared
//! with.
//!
//! Reads no clock. `now` decides when leases end; `server_time`, in the unit of tokens, is only
//! used to raise a counter that was lost.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use crate::clock::Moment;
#[cfg(test)]
use crate::engine::Flaw;
use crate::fence::{FencingToken, TokenBlock};
use crate::identity::parse_owner_tag;
use crate::key::{LockKey, Slot};
use crate::protocol::{AcquireReply, Cycle, Grant, Push, QueuePosition, ReleaseReply, RenewReply};
use crate::store::{Holder, INSPECTED_QUEUE_MAX, KeyState};

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
    /// Replaces [`UNNOTIFIED_LEASE`] in tests in which no time may pass.
    #[cfg(test)]
    pub(crate) unnotified_lease: Option<Duration>,
    /// Pushes to deliver, each with the manager it goes to.
    pub(crate) outbox: Vec<(String, Push)>,
}

#[derive(Debug, Default, Clone)]
struct Lock {
    lease: Option<LeaseRecord>,
    queue: BTreeSet<Member>,
}

/// A cycle in a queue. Ordered by the counter when it joined.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    joined_at: u64,
    owner: String,
    /// Whether its manager's inbox was subscribed here when the cycle last sent a request.
    is_subscribed: bool,
}

/// The longest TTL of a lease whose new owner can't be notified, and learns of it by its next
/// request.
const UNNOTIFIED_LEASE: Duration = Duration::from_secs(1);

#[derive(Debug, Clone)]
struct LeaseRecord {
    owner: String,
    ends: Option<Moment>,
}

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

    /// The fast path: `SET NX` and `INCRBY`.
    pub(crate) fn acquire_fast(&mut self, key: &LockKey, me: &str, terms: Terms) -> AcquireReply {
        let taken = self.owner(key, terms.now).is_some();
        let counter = self.counters.entry(key.slot()).or_default();
        *counter += u64::from(terms.tokens);
        let tokens = TokenBlock::ending_at(*counter, terms.tokens);
        if taken {
            return AcquireReply::Taken;
        }
        self.set_owner(key, me, terms);
        AcquireReply::Granted {
            tokens,
            queued: 0,
            extended: false,
        }
    }

    /// Takes the lease, extends it, or joins the queue; a try does not join.
    pub(crate) fn acquire(&mut self, key: &LockKey, me: &str, try_only: bool, terms: Terms) -> AcquireReply {
        match self.owner(key, terms.now) {
            Some(owner) if owner == me => {
                let tokens = self.reserve(key, terms);
                self.extend(key, terms.now + terms.ttl);
                AcquireReply::Granted {
                    tokens,
                    queued: self.queue_length(key),
                    extended: true,
                }
            }
            Some(_) if try_only => AcquireReply::Busy,
            Some(owner) => {
                let (mark, ahead, new, is_subscribed) = self.join(key, me, terms);
                if (ahead == 0 || !new)
                    && let Some((manager, cycle)) = parse_owner_tag(&owner)
                    && !cycle.expects_rivals()
                {
                    self.notify(
                        manager,
                        Push::RemoteWaiter {
                            key: key.clone(),
                            cycle,
                        },
                    );
                }
                self.queued(key, mark, ahead, is_subscribed, terms.now)
            }
            None => self.acquire_unowned(key, me, try_only, terms),
        }
    }

    /// Extends a lease that the cycle has, and reserves more tokens.
    pub(crate) fn acquire_extension(&mut self, key: &LockKey, me: &str, terms: Terms) -> AcquireReply {
        if self.owner(key, terms.now).is_none_or(|owner| owner != me) {
            return AcquireReply::Busy;
        }
        self.acquire(key, me, false, terms)
    }

    fn acquire_unowned(&mut self, key: &LockKey, me: &str, try_only: bool, terms: Terms) -> AcquireReply {
        let head = self
            .locks
            .get(key)
            .and_then(|lock| lock.queue.first())
            .map(|member| member.owner.clone());
        if head.as_deref().is_none_or(|head| head == me) {
            let tokens = self.reserve(key, terms);
            self.leave(key, me);
            self.set_owner(key, me, terms);
            return AcquireReply::Granted {
                tokens,
                queued: self.queue_length(key),
                extended: false,
            };
        }
        if try_only {
            if self.pass_on(key, None, terms).is_some() {
                return AcquireReply::Busy;
            }
            let tokens = self.reserve(key, terms);
            self.set_owner(key, me, terms);
            return AcquireReply::Granted {
                tokens,
                queued: 0,
                extended: false,
            };
        }
        let (.., is_subscribed) = self.join(key, me, terms);
        self.passed_on(key, me, is_subscribed, terms)
    }

    /// Releases the lease or leaves the queue. If there is a `next`, it joins the tail first.
    pub(crate) fn release(&mut self, key: &LockKey, me: &str, next: Option<&str>, terms: Terms) -> ReleaseReply {
        let owner = self.owner(key, terms.now);
        let held = owner.as_deref() == Some(me);
        if !held {
            self.leave(key, me);
        }
        let requeued = match (held, next) {
            (false, None) => {
                if owner.is_none() {
                    self.pass_on(key, None, terms);
                }
                None
            }
            (false, Some(next)) => Some(self.acquire(key, next, false, terms)),
            (true, None) => {
                self.pass_on(key, None, terms);
                None
            }
            (true, Some(next)) => {
                let (.., is_subscribed) = self.join(key, next, terms);
                Some(self.passed_on(key, next, is_subscribed, terms))
            }
        };
        self.forget_if_unused(key);
        ReleaseReply { held, requeued }
    }

    pub(crate) fn renew(&mut self, key: &LockKey, me: &str, now: Moment, ttl: Duration) -> RenewReply {
        if self.owner(key, now).is_none_or(|owner| owner != me) {
            return RenewReply::NotOurs;
        }
        self.extend(key, now + ttl);
        RenewReply::Extended {
            wanted: self.queue_length(key) > 0,
        }
    }

    pub(crate) fn inspect(&mut self, key: &LockKey, now: Moment) -> KeyState {
        let holder = self.owner(key, now).map(|owner| Holder {
            is_manager: parse_owner_tag(&owner).is_some(),
            owner,
            remaining: self.remaining(key, now),
        });
        let queue = self.locks.get(key).map(|lock| &lock.queue);
        KeyState {
            holder,
            queue_length: self.queue_length(key),
            queue: queue
                .into_iter()
                .flatten()
                .take(INSPECTED_QUEUE_MAX)
                .map(|member| member.owner.clone())
                .collect(),
            last_token: self.counters.get(&key.slot()).copied().and_then(FencingToken::new),
        }
    }

    /// Stores a lease as an administrator or another library would.
    pub(crate) fn put(&mut self, key: &LockKey, owner: &str, ends: Option<Moment>) {
        self.locks.entry(key.clone()).or_default().lease = Some(LeaseRecord {
            owner: owner.to_owned(),
            ends,
        });
    }

    /// Deletes a lease as an administrator or another library would.
    pub(crate) fn delete(&mut self, key: &LockKey) {
        if let Some(lock) = self.locks.get_mut(key) {
            lock.lease = None;
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
            let ended = lock
                .lease
                .as_ref()
                .is_some_and(|lease| lease.ends.is_some_and(|ends| ends <= now));
            lock.lease.is_some() && !ended || !lock.queue.is_empty()
        });
        self.locks.len()
    }

    /// The owner at `now`. A lease that has ended is removed.
    pub(crate) fn owner(&mut self, key: &LockKey, now: Moment) -> Option<String> {
        let lock = self.locks.get_mut(key)?;
        if lock.lease.as_ref()?.ends.is_some_and(|ends| ends <= now) {
            lock.lease = None;
        }
        lock.lease.as_ref().map(|lease| lease.owner.clone())
    }

    fn remaining(&self, key: &LockKey, now: Moment) -> Option<Duration> {
        Some(self.locks.get(key)?.lease.as_ref()?.ends?.since(now))
    }

    fn queue_length(&self, key: &LockKey) -> u64 {
        self.locks.get(key).map_or(0, |lock| lock.queue.len() as u64)
    }

    fn set_owner(&mut self, key: &LockKey, owner: &str, terms: Terms) {
        self.put(key, owner, Some(terms.now + terms.ttl));
    }

    /// Moves the end of a lease later, never earlier: its owner relies on earlier replies, whatever
    /// TTL those requests had.
    fn extend(&mut self, key: &LockKey, ends: Moment) {
        if let Some(lease) = self.locks.get_mut(key).and_then(|lock| lock.lease.as_mut()) {
            lease.ends = Some(lease.ends.map_or(ends, |before| before.max(ends)));
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

    /// Joins the queue if not in it yet. Returns the mark, the number of members ahead, whether the
    /// member is new, and whether a grant would reach it.
    fn join(&mut self, key: &LockKey, me: &str, terms: Terms) -> (u64, u64, bool, bool) {
        let mark = self.reserve(key, Terms { tokens: 1, ..terms }).last();
        let is_subscribed = parse_owner_tag(me).is_some_and(|(manager, _)| self.subscribed.contains(manager));
        let queue = &mut self.locks.entry(key.clone()).or_default().queue;
        let place = queue.iter().enumerate().find(|(_, member)| member.owner == me);
        match place.map(|(ahead, member)| (ahead, member.clone())) {
            Some((ahead, member)) => {
                if !is_subscribed && member.is_subscribed {
                    queue.remove(&member);
                    queue.insert(Member {
                        is_subscribed,
                        ..member
                    });
                }
                (mark, ahead as u64, false, is_subscribed)
            }
            None => {
                queue.insert(Member {
                    joined_at: mark,
                    owner: me.to_owned(),
                    is_subscribed,
                });
                (mark, queue.len() as u64 - 1, true, is_subscribed)
            }
        }
    }

    fn leave(&mut self, key: &LockKey, me: &str) {
        if let Some(lock) = self.locks.get_mut(key) {
            lock.queue.retain(|member| member.owner != me);
        }
        self.forget_if_unused(key);
    }

    fn forget_if_unused(&mut self, key: &LockKey) {
        if self
            .locks
            .get(key)
            .is_some_and(|lock| lock.lease.is_none() && lock.queue.is_empty())
        {
            self.locks.remove(key);
        }
    }

    /// Passes the lease on to the head of the queue, which contains `me`, and returns the reply to
    /// `me`.
    fn passed_on(&mut self, key: &LockKey, me: &str, is_subscribed: bool, terms: Terms) -> AcquireReply {
        match self.pass_on(key, Some(me), terms) {
            Some((heir, tokens)) if heir == me => AcquireReply::Granted {
                tokens,
                queued: self.queue_length(key),
                extended: false,
            },
            Some((_, tokens)) => {
                let ahead = self
                    .locks
                    .get(key)
                    .and_then(|lock| lock.queue.iter().position(|member| member.owner == me));
                let ahead = ahead.unwrap_or_default() as u64;
                self.queued(key, tokens.last(), ahead, is_subscribed, terms.now)
            }
            None => AcquireReply::Busy,
        }
    }

    /// Makes the head of the queue the owner and notifies it. A member whose inbox is no longer
    /// subscribed is skipped, and nothing is sent to it. A member whose inbox was not subscribed
    /// when it last asked gets a short lease instead, which it learns of by its next request. `me`
    /// learns of its grant by the reply and has the TTL of its request; any other member has the
    /// TTL of its cycle.
    fn pass_on(&mut self, key: &LockKey, me: Option<&str>, terms: Terms) -> Option<(String, TokenBlock)> {
        while let Some(heir) = self.locks.get_mut(key).and_then(|lock| lock.queue.pop_first()) {
            let owner_tag = heir.owner.clone();
            let Some((manager, cycle)) = parse_owner_tag(&owner_tag) else {
                continue;
            };
            if me == Some(heir.owner.as_str()) {
                let tokens = self.reserve(key, terms);
                self.set_owner(key, &heir.owner, terms);
                return Some((heir.owner, tokens));
            }
            let own_terms = Terms {
                ttl: cycle.ttl(),
                ..terms
            };
            #[cfg(test)]
            if self.counts_receivers {
                if let Some(tokens) = self.grant_and_count(key, manager, cycle, own_terms) {
                    return Some((heir.owner, tokens));
                }
                continue;
            }
            if self.subscribed.contains(manager) {
                let tokens = self.reserve(key, terms);
                self.set_owner(key, &heir.owner, own_terms);
                self.notify_of_grant(key, manager, cycle, tokens);
                return Some((heir.owner, tokens));
            }
            if !heir.is_subscribed {
                let ttl = own_terms.ttl.min(self.unnotified_lease());
                self.set_owner(key, &heir.owner, Terms { ttl, ..terms });
                let tokens = self.reserve(key, Terms { tokens: 1, ..terms });
                return Some((heir.owner, tokens));
            }
        }
        self.delete(key);
        None
    }

    fn unnotified_lease(&self) -> Duration {
        #[cfg(test)]
        if let Some(longer) = self.unnotified_lease {
            return longer;
        }
        UNNOTIFIED_LEASE
    }

    fn notify_of_grant(&mut self, key: &LockKey, manager: &str, cycle: Cycle, tokens: TokenBlock) {
        let grant = Grant {
            cycle,
            tokens,
            queued: self.queue_length(key),
        };
        let key = key.clone();
        self.notify(manager, Push::Granted { key, grant });
    }

    /// The bug of [`counts_receivers`](Self::counts_receivers).
    #[cfg(test)]
    fn grant_and_count(&mut self, key: &LockKey, manager: &str, cycle: Cycle, terms: Terms) -> Option<TokenBlock> {
        let counter = self.counters.get(&key.slot()).copied().unwrap_or_default();
        let tokens = self.reserve(key, terms);
        let owner = format!("{manager}:{cycle}");
        self.set_owner(key, &owner, terms);
        self.notify_of_grant(key, manager, cycle, tokens);
        if self.subscribed.contains(manager) {
            return Some(tokens);
        }
        // The next member gets the same tokens.
        self.counters.insert(key.slot(), counter);
        None
    }

    fn queued(&self, key: &LockKey, mark: u64, ahead: u64, is_subscribed: bool, now: Moment) -> AcquireReply {
        let lease = self.locks.get(key).and_then(|lock| lock.lease.as_ref());
        AcquireReply::Queued(QueuePosition {
            enqueue_token: mark,
            owner_ttl: lease.and_then(|lease| lease.ends).map(|ends| ends.since(now)),
            owner_foreign: lease.is_some_and(|lease| parse_owner_tag(&lease.owner).is_none()),
            ahead,
            is_subscribed,
        })
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
