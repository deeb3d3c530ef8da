//! The connected clients: who they are, and what they report about themselves.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use shardlock::LockKey;

/// The number of a connection. Numbers are not used again.
pub(super) type ClientId = u64;

/// All connections.
#[derive(Debug, Default)]
pub(super) struct Clients {
    connected: Mutex<BTreeMap<ClientId, Arc<Client>>>,
    last_id: AtomicU64,
}

/// A connected client.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) id: ClientId,
    pub(super) peer: Peer,
    pub(super) since: Instant,
    /// What the client reports about itself. Boxed, as most report nothing.
    names: Mutex<Option<Box<Names>>>,
    /// The key for which it waits.
    waiting: Mutex<Option<LockKey>>,
}

/// What a client reports about itself when it connects.
#[derive(Debug, Clone, Default)]
pub(super) struct Names {
    pub(super) name: String,
    pub(super) library: String,
    pub(super) library_version: String,
}

/// The other end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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
        Ok(client)
    }

    pub(super) fn remove(&self, id: ClientId) {
        // Dropped after the mutex was unlocked.
        let _removed = self.connected.lock().remove(&id);
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

    /// Records that the client waits for a key, until the result is dropped.
    pub(super) fn waits_for(&self, key: &LockKey) -> Waiting<'_> {
        *self.waiting.lock() = Some(key.clone());
        Waiting(self)
    }
}

/// See [`Client::waits_for`].
#[derive(Debug)]
pub(super) struct Waiting<'a>(&'a Client);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        *self.0.waiting.lock() = None;
    }
}
