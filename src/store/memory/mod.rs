//! A lease store inside the process: for tests, documentation and single-process programs. It is
//! the reference for all other stores.

mod core;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::mpsc;

pub(crate) use self::core::{MemoryCore, Terms};
use crate::clock::Moment;
use crate::fence::FencingToken;
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Answer, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::store::map::StoredMap;
use crate::store::{Health, KeyState, LeaseStore, MapState, MapStep, Priority, StoreFuture, StoreOptions};

/// The leases of all managers of this process that use the same name.
#[derive(Debug, Default)]
struct Memory {
    core: MemoryCore,
    inboxes: HashMap<String, mpsc::UnboundedSender<Push>>,
    map: Option<String>,
}

impl Memory {
    /// Takes the core's pushes, each with the inbox it goes to.
    fn take_pushes(&mut self) -> Vec<(mpsc::UnboundedSender<Push>, Push)> {
        let outbox = self.core.outbox.drain(..);
        let addressed = outbox.filter_map(|(manager, push)| Some((self.inboxes.get(&manager)?.clone(), push)));
        addressed.collect()
    }
}

/// Delivers pushes. Sending wakes the receiver, so the mutex of the memory must not be held.
fn deliver(pushes: Vec<(mpsc::UnboundedSender<Push>, Push)>) {
    for (inbox, push) in pushes {
        // If the receiver is gone, so is its manager.
        inbox.send(push).ok();
    }
}

/// The memories of this process by name. A memory that no manager uses any more is removed.
fn memories() -> &'static Mutex<HashMap<String, Weak<Mutex<Memory>>>> {
    static MEMORIES: OnceLock<Mutex<HashMap<String, Weak<Mutex<Memory>>>>> = OnceLock::new();
    MEMORIES.get_or_init(Mutex::default)
}

fn shared(name: &str) -> Arc<Mutex<Memory>> {
    let mut memories = memories().lock();
    memories.retain(|_, memory| memory.strong_count() > 0);
    let memory = memories.get(name).and_then(Weak::upgrade).unwrap_or_default();
    memories.insert(name.to_owned(), Arc::downgrade(&memory));
    memory
}

/// One manager's access to a memory.
#[derive(Debug)]
pub(crate) struct MemoryStore {
    memory: Arc<Mutex<Memory>>,
    manager: ManagerId,
    map: StoredMap,
    floor: u64,
}

impl MemoryStore {
    /// Opens the memory `name`, shared by all managers of this process. Without a name, the memory
    /// is the manager's own.
    pub(crate) fn open(name: &str, options: StoreOptions) -> Self {
        let memory = if name.is_empty() { Arc::default() } else { shared(name) };
        Self {
            memory,
            manager: options.manager,
            map: StoredMap::new(options.map, format!("memory://{name}")),
            floor: server_time(),
        }
    }

    fn terms(&self, now: Moment, ttl: Duration, tokens: u32) -> Terms {
        Terms {
            now,
            server_time: server_time(),
            ttl,
            tokens,
            floor: self.floor,
        }
    }
}

/// The system's time as a token. It only ever raises a counter.
fn server_time() -> u64 {
    let time = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    FencingToken::from_server_time(time.as_secs(), u64::from(time.subsec_micros()))
}

/// Requests to memory complete at once; the future is only a formality.
fn done<T: Send + 'static>(reply: T) -> StoreFuture<T> {
    Box::pin(std::future::ready(Ok(reply)))
}

impl LeaseStore for MemoryStore {
    fn connect(&self) -> StoreFuture<()> {
        let checked = self.map.check(self.memory.lock().map.as_deref()).map(drop);
        Box::pin(std::future::ready(checked))
    }

    fn has_map(&self) -> bool {
        self.map.is_set()
    }

    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        let mut memory = self.memory.lock();
        let checked = self.map.check(memory.map.as_deref());
        let checked = match (checked, step) {
            // One step is enough here: nothing can happen between the read and the write, and
            // nothing outlives the process.
            (Ok(MapState::None), MapStep::Confirm) => {
                memory.map = Some(self.map.ours().to_owned());
                self.map.check(memory.map.as_deref())
            }
            (checked, _) => checked,
        };
        Box::pin(std::future::ready(checked))
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let Acquire {
            key,
            cycle,
            kind,
            ttl,
            tokens,
        } = request;
        let now = Moment::now();
        let me = self.manager.owner_tag(cycle).to_string();
        let mut memory = self.memory.lock();
        let terms = self.terms(now, ttl, tokens);
        let reply = match kind {
            AcquireKind::Fast => memory.core.acquire_fast(&key, &me, terms),
            AcquireKind::Enqueue => memory.core.acquire(&key, &me, false, terms),
            AcquireKind::Try => memory.core.acquire(&key, &me, true, terms),
            AcquireKind::Extend => memory.core.acquire_extension(&key, &me, terms),
        };
        let pushes = memory.take_pushes();
        drop(memory);
        deliver(pushes);
        done(Answer {
            sent_at: now,
            ttl,
            floor: self.floor,
            reply,
        })
    }

    fn release(&self, _priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let ttl = request.ttl();
        let now = Moment::now();
        let rest = request.rest(now);
        let Release {
            key,
            cycle,
            requeue,
            nobody_waits: _,
            tokens,
            retire_until: _,
        } = request;
        let next = requeue.map(|cycle| self.manager.owner_tag(cycle).to_string());
        let mut memory = self.memory.lock();
        let terms = self.terms(now, ttl, tokens);
        let me = self.manager.owner_tag(cycle).to_string();
        let is_retired = rest.is_some_and(|rest| {
            let retired = self.manager.owner_tag(cycle.retired()).to_string();
            memory.core.retire(&key, &me, &retired, now, now + rest)
        });
        let reply = match is_retired {
            true => ReleaseReply::HELD,
            false => memory.core.release(&key, &me, next.as_deref(), terms),
        };
        let pushes = memory.take_pushes();
        drop(memory);
        deliver(pushes);
        done(Answer {
            sent_at: now,
            ttl,
            floor: self.floor,
            reply,
        })
    }

    fn break_lease(&self, key: LockKey, owner: String, tokens: u32) -> StoreFuture<bool> {
        let mut memory = self.memory.lock();
        let terms = self.terms(Moment::now(), Duration::ZERO, tokens);
        let reply = memory.core.release(&key, &owner, None, terms);
        let pushes = memory.take_pushes();
        drop(memory);
        deliver(pushes);
        done(reply.held)
    }

    fn renew(&self, batch: Vec<Renewal>, _limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        let now = Moment::now();
        let mut memory = self.memory.lock();
        if let Err(error) = self.map.check(memory.map.as_deref()) {
            return Box::pin(std::future::ready(Err(error)));
        }
        let renew = |renewal: Renewal| {
            let me = self.manager.owner_tag(renewal.cycle).to_string();
            Some(memory.core.renew(&renewal.key, &me, now, renewal.ttl))
        };
        done(batch.into_iter().map(renew).collect())
    }

    fn lacks(&self, _mode: LockMode) -> Option<&'static str> {
        None
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<KeyState> {
        done(self.memory.lock().core.inspect(&key, Moment::now()))
    }

    fn erase(&self) -> StoreFuture<u64> {
        let mut memory = self.memory.lock();
        self.map.forget();
        let had_map = u64::from(memory.map.take().is_some());
        done(had_map + memory.core.flush())
    }

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        // There is no server whose clock could differ.
        Box::pin(std::future::ready(Health {
            reached: self.map.check_or_forget(self.memory.lock().map.as_deref()),
            times: Vec::new(),
        }))
    }

    fn run_subscriber(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let mut memory = self.memory.lock();
        memory.core.set_subscribed(self.manager.as_str(), true);
        let earlier = memory.inboxes.insert(self.manager.as_str().to_owned(), pushes.clone());
        // Dropping the earlier sender and sending below both may wake a receiver.
        drop(memory);
        drop(earlier);
        // A receiver that is already gone needs no pushes.
        pushes.send(Push::Resubscribed { slot: None }).ok();
        Box::pin(std::future::pending())
    }
}

impl Drop for MemoryStore {
    fn drop(&mut self) {
        let mut memory = self.memory.lock();
        memory.core.set_subscribed(self.manager.as_str(), false);
        let inbox = memory.inboxes.remove(self.manager.as_str());
        // Dropping the last sender wakes the receiver.
        drop(memory);
        drop(inbox);
    }
}
