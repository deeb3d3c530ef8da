//! The queue of a key: joining it, leaving it, and what happens when the key gets free.

use std::time::Duration;

use super::lock::{Member, mode_of};
use super::{MemoryCore, Terms};
use crate::clock::Moment;
use crate::fence::TokenBlock;
use crate::identity::parse_owner_tag;
use crate::key::LockKey;
use crate::protocol::{AcquireReply, Cycle, Grant, Push, QueuePosition};

/// The longest TTL of a lease whose new owner can't be notified, and learns of it by its next
/// request.
const UNNOTIFIED_LEASE: Duration = Duration::from_secs(1);

/// What [`MemoryCore::advance`] did.
#[derive(Debug, Default)]
pub(super) struct Advanced {
    /// The tokens granted to the cycle that sent the request, if it was admitted.
    pub(super) mine: Option<TokenBlock>,
    /// The last token that was reserved, if any cycle was admitted.
    pub(super) last: Option<u64>,
}

impl MemoryCore {
    /// Joins the queue if not in it yet. Returns the mark, the number of members ahead, whether the
    /// member is new, and whether a grant would reach it.
    pub(super) fn join(&mut self, key: &LockKey, me: &str, terms: Terms) -> (u64, u64, bool, bool) {
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

    pub(super) fn leave(&mut self, key: &LockKey, me: &str) {
        if let Some(lock) = self.locks.get_mut(key) {
            lock.queue.retain(|member| member.owner != me);
        }
    }

    /// Admits the head of the queue and those that follow it, for as long as each can hold the key
    /// beside those before it, and notifies them. Nobody passes a member that has to wait, unless
    /// its inbox is no longer subscribed while others hold the key together.
    ///
    /// A member whose inbox is no longer subscribed is skipped, and nothing is sent to it. A member
    /// whose inbox was not subscribed when it last asked gets a short lease instead, which it
    /// learns of by its next request. `me` learns of its grant by the reply and has the TTL of its
    /// request; any other member has the TTL of its cycle.
    pub(super) fn advance(&mut self, key: &LockKey, me: Option<&str>, terms: Terms) -> Advanced {
        let mut advanced = Advanced::default();
        let mut granted: Vec<(String, Cycle, TokenBlock)> = Vec::new();
        while let Some(lock) = self.locks.get_mut(key)
            && let Some(head) = lock.queue.first()
        {
            let is_admissible = lock.admits(mode_of(&head.owner));
            if !is_admissible {
                let is_reached = |(manager, _): (&str, Cycle)| self.subscribed.contains(manager);
                let may_ask = me == Some(head.owner.as_str()) || !head.is_subscribed;
                if lock.lease.is_some() || may_ask || parse_owner_tag(&head.owner).is_some_and(is_reached) {
                    break;
                }
            }
            let Some(heir) = lock.queue.pop_first() else { break };
            let Some((manager, cycle)) = parse_owner_tag(&heir.owner).filter(|_| is_admissible) else {
                continue;
            };
            let own_terms = Terms {
                ttl: cycle.ttl(),
                ..terms
            };
            #[cfg(test)]
            if self.counts_receivers && me != Some(heir.owner.as_str()) {
                if let Some(tokens) = self.grant_and_count(key, manager, cycle, own_terms) {
                    advanced.last = Some(tokens.last());
                }
                continue;
            }
            let tokens = if me == Some(heir.owner.as_str()) {
                let tokens = self.reserve(key, terms);
                self.admit(key, &heir.owner, terms);
                advanced.mine = Some(tokens);
                tokens
            } else if self.subscribed.contains(manager) {
                let tokens = self.reserve(key, own_terms);
                self.admit(key, &heir.owner, own_terms);
                granted.push((manager.to_owned(), cycle, tokens));
                tokens
            } else if !heir.is_subscribed {
                let ttl = own_terms.ttl.min(self.unnotified_lease());
                self.admit(key, &heir.owner, Terms { ttl, ..terms });
                self.reserve(key, Terms { tokens: 1, ..terms })
            } else {
                continue;
            };
            advanced.last = Some(tokens.last());
        }
        // Only now is it known how many are left.
        for (manager, cycle, tokens) in granted {
            self.notify_of_grant(key, &manager, cycle, tokens);
        }
        advanced
    }

    pub(super) fn unnotified_lease(&self) -> Duration {
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

    /// Tells the holders that asked for it that somebody waits.
    pub(super) fn notify_holders(&mut self, key: &LockKey) {
        let Some(lock) = self.locks.get(key) else { return };
        let exclusive = lock.lease.iter().map(|lease| lease.owner.as_str());
        let owners = exclusive.chain(lock.holders.iter().map(|holder| holder.owner.as_str()));
        let notified: Vec<(String, Cycle)> = owners
            .filter_map(parse_owner_tag)
            .filter(|(_, cycle)| !cycle.expects_remote_waiters())
            .map(|(manager, cycle)| (manager.to_owned(), cycle))
            .collect();
        for (manager, cycle) in notified {
            let key = key.clone();
            self.notify(&manager, Push::RemoteWaiter { key, cycle });
        }
    }

    /// The bug of [`counts_receivers`](Self::counts_receivers).
    #[cfg(test)]
    fn grant_and_count(&mut self, key: &LockKey, manager: &str, cycle: Cycle, terms: Terms) -> Option<TokenBlock> {
        let counter = self.counters.get(&key.slot()).copied().unwrap_or_default();
        let tokens = self.reserve(key, terms);
        let owner = format!("{manager}:{cycle}");
        self.admit(key, &owner, terms);
        self.notify_of_grant(key, manager, cycle, tokens);
        if self.subscribed.contains(manager) {
            return Some(tokens);
        }
        // The next member gets the same tokens.
        self.remove(key, &owner);
        self.counters.insert(key.slot(), counter);
        None
    }

    pub(super) fn queued(
        &self,
        key: &LockKey,
        mark: u64,
        ahead: u64,
        is_subscribed: bool,
        now: Moment,
    ) -> AcquireReply {
        let lock = self.locks.get(key);
        let lease = lock.and_then(|lock| lock.lease.as_ref());
        let first_end = lock.and_then(|lock| lock.holders.iter().map(|holder| holder.ends).min());
        AcquireReply::Queued(QueuePosition {
            enqueue_token: mark,
            owner_ttl: lease.map_or(first_end, |lease| lease.ends).map(|ends| ends.since(now)),
            owner_foreign: lease.is_some_and(|lease| parse_owner_tag(&lease.owner).is_none()),
            ahead,
            is_subscribed,
        })
    }
}
