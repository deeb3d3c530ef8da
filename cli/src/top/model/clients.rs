//! The rows of the clients of agents: one per process of an agent.

use std::cmp::Ordering;
use std::time::Duration;

use super::sort::{ColumnId, Sortable};
use super::source_state::SourceState;
use crate::serve::ClientProcess;

/// How many keys of a client are shown in its row.
const KEYS_SHOWN_MAX: usize = 3;

#[derive(Debug, Clone, PartialEq)]
pub(in crate::top) struct ClientRow {
    /// The process id, or what is known instead.
    pub(in crate::top) label: String,
    /// The first keys that it holds, then those for which it waits.
    pub(in crate::top) keys: String,
    /// How long it has held its oldest lock.
    pub(in crate::top) oldest: Option<Duration>,
    /// How long it has waited for longest.
    pub(in crate::top) longest_wait: Option<Duration>,
    pub(in crate::top) process: ClientProcess,
    /// The endpoint of the agent.
    pub(in crate::top) agent: String,
    pub(in crate::top) stale: bool,
}

/// Processes of different agents are never merged, even if they have the same id: they may be on
/// different hosts.
pub(super) fn clients(sources: &[SourceState]) -> Vec<ClientRow> {
    let of_source = |source: &SourceState| {
        let pages = source.sample().into_iter().filter_map(|sample| sample.clients.as_ref());
        let processes = pages.flat_map(|page| &page.clients);
        let rows = processes.map(|process| ClientRow::new(process, source));
        rows.collect::<Vec<_>>()
    };
    sources.iter().flat_map(of_source).collect()
}

impl ClientRow {
    fn new(process: &ClientProcess, source: &SourceState) -> Self {
        Self {
            label: label(process),
            keys: keys(process),
            oldest: process.held.first().map(|lock| from_millis(lock.age_ms)),
            longest_wait: process.waits.first().map(|wait| from_millis(wait.waited_ms)),
            process: process.clone(),
            agent: source.label.clone(),
            stale: source.is_stale(),
        }
    }

    /// Its name, or else its library.
    pub(in crate::top) fn name(&self) -> &str {
        let process = &self.process;
        if process.name.is_empty() {
            &process.library
        } else {
            &process.name
        }
    }
}

fn label(process: &ClientProcess) -> String {
    match (process.pid, &process.address) {
        (Some(pid), _) => pid.to_string(),
        (None, Some(address)) => address.clone(),
        (None, None) => "unknown".to_owned(),
    }
}

fn keys(process: &ClientProcess) -> String {
    let list = |keys: Vec<&str>, total: usize| {
        let shown = &keys[..keys.len().min(KEYS_SHOWN_MAX)];
        let more = match total - shown.len().min(total) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("{}{more}", shown.join(", "))
    };
    let held: Vec<&str> = process.held.iter().map(|lock| lock.key.as_str()).collect();
    let waits: Vec<&str> = process.waits.iter().map(|wait| wait.key.as_str()).collect();
    let mut parts = Vec::new();
    if !held.is_empty() {
        parts.push(list(held, process.locks));
    }
    if !waits.is_empty() {
        parts.push(format!("waits for {}", list(waits, process.waiting)));
    }
    parts.join("; ")
}

/// Invalid durations, such as negative ones, become zero.
fn from_millis(millis: f64) -> Duration {
    Duration::try_from_secs_f64(millis / 1e3).unwrap_or_default()
}

impl Sortable for ClientRow {
    fn compare(&self, other: &Self, by: ColumnId) -> Ordering {
        let (one, two) = (&self.process, &other.process);
        match by {
            ColumnId::Name => (one.pid, &one.address).cmp(&(two.pid, &two.address)),
            ColumnId::Label => self.name().cmp(other.name()),
            ColumnId::Uid => one.uid.cmp(&two.uid),
            ColumnId::Connections => one.connections.cmp(&two.connections),
            ColumnId::Locks => one.locks.cmp(&two.locks),
            ColumnId::Waiters => one.waiting.cmp(&two.waiting),
            ColumnId::Wait => self.longest_wait.cmp(&other.longest_wait),
            ColumnId::Keys => self.keys.cmp(&other.keys),
            _ => self.oldest.cmp(&other.oldest),
        }
    }

    fn tie(one: &Self, other: &Self) -> Ordering {
        let longer = other.longest_wait.cmp(&one.longest_wait);
        let by_process =
            || (&one.agent, one.process.pid, &one.label).cmp(&(&other.agent, other.process.pid, &other.label));
        longer.then_with(by_process)
    }

    fn texts(&self) -> [&str; 3] {
        [&self.label, self.name(), &self.keys]
    }
}
