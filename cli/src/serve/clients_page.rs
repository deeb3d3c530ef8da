//! The page `/clients` of the admin endpoint: which processes use the agent, what they hold, and
//! for what they wait.
//!
//! Its size is bounded: the page lists the processes with the oldest locks and waits, and of these
//! the oldest. The totals count all.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use shardlock::LockMode;

use super::agent::Agent;
use super::clients::{ClientId, Names, Peer, Wait};
use super::held::HeldView;

/// The most processes on the page.
const PROCESSES_MAX: usize = 1_000;
/// The most locks on the page, and the most waits.
const LOCKS_MAX: usize = 1_000;

/// The clients of an agent. Times are in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClientsPage {
    /// How many client processes there are. `clients` may contain fewer.
    pub(crate) total: usize,
    pub(crate) connections: usize,
    /// `--max-connections`.
    pub(crate) connections_max: u64,
    pub(crate) locks: usize,
    pub(crate) waiting: usize,
    /// Those with the oldest lock or wait first, then those with the most connections.
    pub(crate) clients: Vec<ClientProcess>,
}

/// A process, as the kernel reported it when it connected, or a connection over TCP.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClientProcess {
    /// Unknown over TCP, and for a process that the agent's namespace does not show.
    pub(crate) pid: Option<i32>,
    pub(crate) uid: Option<u32>,
    pub(crate) gid: Option<u32>,
    /// Of a connection over TCP.
    pub(crate) address: Option<String>,
    /// The name that the client gave to its oldest connection that has one.
    pub(crate) name: String,
    /// Its client library with the version, in the same way.
    pub(crate) library: String,
    pub(crate) connections: usize,
    /// Since its oldest connection.
    pub(crate) age_ms: f64,
    /// How many locks it holds. `held` may contain fewer.
    pub(crate) locks: usize,
    /// How many of its connections wait. `waits` may contain fewer.
    pub(crate) waiting: usize,
    /// Oldest first.
    pub(crate) held: Vec<ClientLock>,
    /// Longest first.
    pub(crate) waits: Vec<ClientWait>,
}

/// A lock of a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClientLock {
    pub(crate) key: String,
    pub(crate) mode: LockMode,
    pub(crate) token: u64,
    pub(crate) age_ms: f64,
    /// How long it is certainly held if no further renewal succeeds.
    pub(crate) remaining_ms: f64,
    /// The number of the connection, as in log lines and `CLIENT ID`.
    pub(crate) connection: u64,
}

/// A connection of a client that waits for a lock.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ClientWait {
    pub(crate) key: String,
    pub(crate) mode: LockMode,
    pub(crate) waited_ms: f64,
    pub(crate) connection: u64,
}

/// A process, and what decides about its place on the page.
struct Process {
    view: ClientProcess,
    first_connection: Instant,
    /// Since when it has held its oldest lock, or waited for longest.
    busy_since: Option<Instant>,
}

/// The page as JSON.
pub(super) fn render(agent: &Agent) -> String {
    let page = ClientsPage::of(agent);
    serde_json::to_string(&page).unwrap_or_else(|error| {
        tracing::error!(%error, "the clients can't be written as JSON");
        "{}".to_owned()
    })
}

impl ClientsPage {
    fn of(agent: &Agent) -> Self {
        let now = Instant::now();
        let connected = agent.clients.all();
        let held = agent.held.snapshot(LOCKS_MAX);
        let mut page = Self {
            connections: connected.len(),
            connections_max: agent.limits.max_connections,
            locks: held.total,
            ..Self::default()
        };

        let mut processes: HashMap<Peer, Process> = HashMap::new();
        let mut waits: Vec<(Peer, ClientId, Wait)> = Vec::new();
        let mut peers: HashMap<ClientId, Peer> = HashMap::with_capacity(connected.len());
        // Oldest first.
        for client in &connected {
            peers.insert(client.id, client.peer);
            let process = processes
                .entry(client.peer)
                .or_insert_with(|| Process::new(client.peer, client.since));
            process.view.connections += 1;
            process.add_names(&client.names());
            if let Some(of_client) = held.of_client.get(&client.id) {
                process.view.locks += of_client.count;
                process.was_busy_at(of_client.oldest);
            }
            if let Some(wait) = client.wait() {
                process.view.waiting += 1;
                process.was_busy_at(wait.since);
                waits.push((client.peer, client.id, wait));
            }
        }
        page.total = processes.len();
        page.waiting = waits.len();

        let mut listed: Vec<(Peer, Process)> = processes.into_iter().collect();
        listed.sort_by_key(|(_, process)| {
            let is_idle = process.busy_since.is_none();
            let connections = Reverse(process.view.connections);
            (is_idle, process.busy_since, connections, process.first_connection)
        });
        listed.truncate(PROCESSES_MAX);
        let places: HashMap<Peer, usize> = listed
            .iter()
            .enumerate()
            .map(|(place, (peer, _))| (*peer, place))
            .collect();
        page.clients = listed
            .into_iter()
            .map(|(_, process)| ClientProcess {
                age_ms: millis(now.saturating_duration_since(process.first_connection)),
                ..process.view
            })
            .collect();

        for lock in held.oldest {
            // A client that has connected or ended since is missing in one of the two.
            let peer = peers.get(&lock.client);
            if let Some(&place) = peer.and_then(|peer| places.get(peer)) {
                page.clients[place].held.push(ClientLock::new(lock, now));
            }
        }
        waits.sort_by_key(|(_, _, wait)| wait.since);
        for (peer, client, wait) in waits.into_iter().take(LOCKS_MAX) {
            if let Some(&place) = places.get(&peer) {
                page.clients[place].waits.push(ClientWait::new(client, wait, now));
            }
        }
        page
    }
}

impl Process {
    fn new(peer: Peer, since: Instant) -> Self {
        let mut view = ClientProcess::default();
        match peer {
            Peer::Process { pid, uid, gid } => (view.pid, view.uid, view.gid) = (pid, Some(uid), Some(gid)),
            Peer::Address(address) => view.address = Some(address.to_string()),
        }
        Self {
            view,
            first_connection: since,
            busy_since: None,
        }
    }

    fn add_names(&mut self, names: &Names) {
        if self.view.name.is_empty() {
            self.view.name.clone_from(&names.name);
        }
        if self.view.library.is_empty() {
            let library = format!("{} {}", names.library, names.library_version);
            library.trim().clone_into(&mut self.view.library);
        }
    }

    fn was_busy_at(&mut self, time: Instant) {
        let since = self.busy_since.map_or(time, |since| since.min(time));
        self.busy_since = Some(since);
    }
}

impl ClientLock {
    fn new(lock: HeldView, now: Instant) -> Self {
        Self {
            key: lock.id.key.as_str().to_owned(),
            mode: lock.mode,
            token: lock.id.token,
            age_ms: millis(now.saturating_duration_since(lock.since)),
            remaining_ms: millis(lock.remaining),
            connection: lock.client,
        }
    }
}

impl ClientWait {
    fn new(client: ClientId, wait: Wait, now: Instant) -> Self {
        Self {
            key: wait.key.as_str().to_owned(),
            mode: wait.mode,
            waited_ms: millis(now.saturating_duration_since(wait.since)),
            connection: client,
        }
    }
}

/// With the digits that mean something.
fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}
