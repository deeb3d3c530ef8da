//! Etcd as a lease store.
//!
//! # Implementation details
//!
//! A cycle that wants a key puts an etcd key of its own under the lock's prefix, attached to an
//! etcd lease of its own. The keys in the order of their create revisions are the queue, so it is
//! first come, first served. The mode is part of a key's name. The first key is a holder, and so is
//! each further one that can hold the lock beside all before it, up to the first that can't
//! ([`queue`]). A waiter watches what blocks it: an exclusive one the key directly before its own,
//! so the end of one key wakes one manager ([`watch`]). A process has one key in the queue for each
//! mode, however many of its tasks wait.
//!
//! Every reply that makes a cycle a holder, or extends what it holds, comes from a transaction that
//! has put the cycle's key (again), and so has a revision of its own. Its tokens are the 65,536
//! numbers of that revision. A revision is never used twice and later owners have later ones, so
//! tokens grow. An etcd that was restored from an old backup has smaller revisions than this
//! manager has seen: every acquire then fails until the managers are restarted.
//!
//! An etcd lease lasts for whole seconds, and never less than etcd's minimum, which is about one
//! and a half election timeouts. Validity is counted by the requested TTL, which is never longer.
//! So a dead holder's key stays for a moment longer than its TTL.
//!
//! What may go wrong, and why it does no harm:
//! - A request that executes after the release of its cycle finds that the lease is gone, since
//!   every release revokes it, and puts nothing.
//! - A lease that ends takes its key along. A recreated key has another create revision, so neither
//!   a renewal nor an extension takes it for the old one.
//! - A deposed leader that does not know it yet renews leases that its successor may already have
//!   ended. A renewal counts only if a majority confirms its term ([`term`]).
//!
//! Connections: those of the application's tasks are driven by the application's runtime, the
//! background's by its own thread. Each leads to one of the servers and is replaced by one to the
//! next when it breaks or gives no answer ([`link`]).

mod acquire;
mod cycles;
mod error;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzzing;
mod inspect;
mod keep_alive;
mod link;
mod map;
mod names;
mod options;
mod queue;
mod release;
mod renew;
mod term;
#[cfg(test)]
mod tests;
mod waits;
mod watch;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use etcd_client::DeleteOptions;
use tokio::sync::mpsc;

use crate::error::LockError;
use crate::key::{LockKey, Slot};
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireReply, Answer, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::rate_limit::RateLimit;
use crate::store::map::StoredMap;
use crate::store::{Health, KeyState, LeaseStore, MapState, MapStep, Priority, StoreError, StoreFuture, StoreOptions};
use crate::telemetry::ShardMetrics;
use cycles::CycleLeases;
use error::EtcdError;
use keep_alive::Revokes;
use link::{Link, Servers};
use names::Names;
pub(crate) use names::key_of_entry;
use waits::Waits;

/// See the module documentation.
pub(crate) struct EtcdStore {
    callers: Vec<Arc<Link>>,
    shared: Arc<Shared>,
}

/// The state that a store's requests share.
struct Shared {
    names: Names,
    /// The name of the shard, for logs.
    shard: Arc<str>,
    servers: Arc<Servers>,
    timeout: Duration,
    background: Arc<Link>,
    cycles: CycleLeases,
    waits: Waits,
    revokes: Revokes,
    metrics: Arc<ShardMetrics>,
    /// Rate limits for log lines: about watches that ended, and about leases that could not be
    /// revoked.
    ended_watches: RateLimit,
    failed_revokes: RateLimit,
}

impl Shared {
    /// Every token issued from now on is larger than this.
    fn floor(&self) -> u64 {
        match self.servers.revision.load(Ordering::Acquire) {
            0 => 0,
            revision => queue::floor_of(revision),
        }
    }

    fn observe_revision(&self, header: Option<&etcd_client::ResponseHeader>) {
        self.servers
            .observe_revision(header.map_or(0, etcd_client::ResponseHeader::revision));
    }
}

impl EtcdStore {
    /// Creates a store; nothing is sent yet.
    ///
    /// # Errors
    ///
    /// A file for TLS connections can't be read or used.
    pub(crate) fn new(
        hosts: &[String],
        login: Option<&(String, String)>,
        tls: bool,
        options: StoreOptions,
    ) -> Result<Self, LockError> {
        options.login.check()?;
        let names = Names::new(&options.namespace, options.manager);
        let scheme = if tls { "https" } else { "http" };
        let servers = Arc::new(Servers {
            endpoints: hosts.iter().map(|host| format!("{scheme}://{host}")).collect(),
            addresses: hosts.to_vec(),
            options: options::connect_options(login, tls, &options.tls, options.timeout)?,
            login: options.login,
            shows_no_certificate: tls && options.tls.client.is_none(),
            namespace: options.namespace,
            map: StoredMap::new(options.map, names.map()),
            timeout: options.timeout,
            metrics: Arc::clone(&options.metrics),
            revision: AtomicU64::new(0),
        });
        let link = |runtimes| Link::new(&servers, runtimes);
        let shared = Arc::new(Shared {
            names,
            shard: options.shard,
            timeout: options.timeout,
            background: link(None),
            cycles: CycleLeases::new(),
            waits: Waits::default(),
            revokes: Revokes::default(),
            metrics: options.metrics,
            ended_watches: RateLimit::default(),
            failed_revokes: RateLimit::default(),
            servers: Arc::clone(&servers),
        });
        let callers = (0..options.connections.max(1))
            .map(|_| link(Some(Arc::clone(&options.runtimes))))
            .collect();
        Ok(Self { callers, shared })
    }

    fn link(&self, priority: Priority, slot: Slot) -> Arc<Link> {
        match priority {
            Priority::Foreground => Arc::clone(&self.callers[usize::from(slot.number()) % self.callers.len()]),
            Priority::Background => Arc::clone(&self.shared.background),
        }
    }
}

impl LeaseStore for EtcdStore {
    fn connect(&self) -> StoreFuture<()> {
        let callers = self.callers.clone();
        Box::pin(async move {
            for link in &callers {
                link.get().await?;
            }
            Ok(())
        })
    }

    fn connect_background(&self) -> StoreFuture<()> {
        let link = Arc::clone(&self.shared.background);
        Box::pin(async move { link.get().await.map(drop) })
    }

    fn has_map(&self) -> bool {
        self.shared.servers.map.is_set()
    }

    fn map(&self, step: MapStep) -> StoreFuture<MapState> {
        let link = Arc::clone(&self.callers[0]);
        Box::pin(async move {
            let live = link.get().await?;
            map::step(&link.servers, &live.client, step).await
        })
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let link = self.link(Priority::Foreground, request.key.slot());
        Box::pin(acquire::acquire(Arc::clone(&self.shared), link, request))
    }

    fn release(&self, priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let link = self.link(priority, request.key.slot());
        Box::pin(release::release(Arc::clone(&self.shared), link, request))
    }

    fn break_lease(&self, _key: LockKey, _owner: String, _tokens: u32) -> StoreFuture<bool> {
        let reason = "on etcd a lock ends with the etcd lease of its holder, of which only the holder's process knows \
                      all that use it; end that process, or use `etcdctl lease revoke` with the lease of the key";
        Box::pin(std::future::ready(Err(StoreError::Refused(reason.into()))))
    }

    fn lacks(&self, _: LockMode) -> Option<&'static str> {
        None
    }

    fn renew(&self, batch: Vec<Renewal>, limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        Box::pin(renew::renew(Arc::clone(&self.shared), batch, limit))
    }

    fn inspect(&self, key: LockKey) -> StoreFuture<KeyState> {
        let link = self.link(Priority::Foreground, key.slot());
        Box::pin(inspect::inspect(Arc::clone(&self.shared), link, key))
    }

    fn erase(&self) -> StoreFuture<u64> {
        let shared = Arc::clone(&self.shared);
        let link = Arc::clone(&self.callers[0]);
        Box::pin(async move {
            let all = || Some(DeleteOptions::new().with_prefix());
            let delete = async |mut client: etcd_client::Client| client.delete(shared.names.namespace(), all()).await;
            shared.servers.map.forget();
            let (deleted, _) = link.request(delete).await.map_err(EtcdError::into_store_error)?;
            Ok(u64::try_from(deleted.deleted()).unwrap_or(0))
        })
    }

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let read = map::read(&shared.background).await;
            if matches!(read, Ok(MapState::None | MapState::Reserved)) {
                // The next lock stores it again, after reading all shards.
                shared.servers.map.forget();
            }
            Health {
                reached: read.map(drop),
                // Etcd does not report its time, and counts leases by a monotonic clock.
                times: Vec::new(),
            }
        })
    }

    fn drain(&self) -> StoreFuture<()> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            shared.revokes.drain().await;
            Ok(())
        })
    }

    fn run_subscriber(&self, pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        let shared = Arc::clone(&self.shared);
        Box::pin(async move {
            let receiver = pushes.clone();
            tokio::select! {
                () = watch::watch(Arc::clone(&shared), pushes.clone()) => {}
                () = keep_alive::keep_waiting(Arc::clone(&shared), pushes) => {}
                () = keep_alive::revoke_all(shared) => {}
                () = receiver.closed() => {}
            }
        })
    }

    fn leave_app_runtime(&self) {
        self.callers.iter().for_each(|link| link.leave());
    }
}
