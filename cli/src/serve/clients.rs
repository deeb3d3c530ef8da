//! The connected clients: who they are, and what they report about themselves.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use metrics::Gauge;
use parking_lot::Mutex;
use shardlock::{LockKey, LockMode};

use super::command::Lock;

/// The number of a connection. Numbers are not used again.
pub(super) type ClientId = u64;

/// All connections.
pub(super) struct Clients {
    connected: Mutex<BTreeMap<ClientId, Arc<Client>>>,
    last_id: AtomicU64,
    /// How many there are.
    gauge: Gauge,
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: ClientId,
    pub(super) peer: Peer,
    pub(super) since: Instant,
    /// What the client reports about itself. Boxed, as most report nothing.
    names: Mutex<Option<Box<Names>>>,
    /// The lock for which it waits.
    waiting: Mutex<Option<Wait>>,
}

/// A request of a client that waits for a lock.
#[derive(Debug, Clone)]
pub(super) struct Wait {
    pub(super) key: LockKey,
    pub(super) mode: LockMode,
    pub(super) since: Instant,
}

/// What a client reports about itself when it connects.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    pub(super) name: String,
    pub(super) library: String,
    pub(super) library_version: String,
}

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Peer {
    /// A process on this host, as the kernel reported it when it connected. Without a process id
    /// on systems that report none.
    Process {
        pid: Option<i32>,
        uid: u32,
        gid: u32,
    },
    Address(SocketAddr),
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Process {
                pid: Some(pid),
                uid,
                gid,
            } => write!(f, "pid={pid} uid={uid} gid={gid}"),
            Self::Process { pid: None, uid, gid } => write!(f, "uid={uid} gid={gid}"),
            Self::Address(address) => write!(f, "addr={address}"),
        }
    }
}

/// Why a connection is refused.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooManyConnections;

impl Clients {
    pub(super) fn new(gauge: Gauge) -> Self {
        Self {
            connected: Mutex::default(),
            last_id: AtomicU64::new(0),
            gauge,
        }
    }

    /// Registers a connection, unless there are `most` already.
    pub(super) fn add(&self, peer: Peer, most: u64) -> Result<Arc<Client>, TooManyConnections> {
        let mut connected = self.connected.lock();
        if connected.len() as u64 >= most {
            return Err(TooManyConnections);
        }
        let client = Arc::new(Client {
            id: self.last_id.fetch_add(1, Ordering::Relaxed) + 1,
            peer,
            since: Instant::now(),
            names: Mutex::default(),
            waiting: Mutex::default(),
        });
        connected.insert(client.id, Arc::clone(&client));
        self.gauge.set(connected.len() as f64);
        Ok(client)
    }

    pub(super) fn remove(&self, id: ClientId) {
        let mut connected = self.connected.lock();
        let removed = connected.remove(&id);
        self.gauge.set(connected.len() as f64);
        drop(connected);
        drop(removed);
    }

    /// All clients, in the order in which they have connected.
    pub(super) fn all(&self) -> Vec<Arc<Client>> {
        self.connected.lock().values().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.connected.lock().len()
    }

    /// How many clients wait for a lock.
    pub(super) fn waiting(&self) -> usize {
        let connected = self.connected.lock();
        connected
            .values()
            .filter(|client| client.waiting.lock().is_some())
            .count()
    }
}

impl Client {
    pub(super) fn names(&self) -> Names {
        self.names.lock().as_deref().cloned().unwrap_or_default()
    }

    pub(super) fn change_names(&self, change: impl FnOnce(&mut Names)) {
        change(self.names.lock().get_or_insert_default());
    }

    /// The lock for which it waits.
    pub(super) fn wait(&self) -> Option<Wait> {
        self.waiting.lock().clone()
    }

    /// Records that the client waits for a lock, until the result is dropped. The gauge counts
    /// those that wait.
    pub(super) fn waits_for<'a>(&'a self, lock: &Lock, gauge: &'a Gauge) -> Waiting<'a> {
        *self.waiting.lock() = Some(Wait {
            key: lock.key.clone(),
            mode: lock.mode.into(),
            since: Instant::now(),
        });
        gauge.increment(1.0);
        Waiting { client: self, gauge }
    }
}

/// See [`Client::waits_for`].
pub(super) struct Waiting<'a> {
    client: &'a Client,
    gauge: &'a Gauge,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.client.waiting.lock() = None;
        self.gauge.decrement(1.0);
    }
}
