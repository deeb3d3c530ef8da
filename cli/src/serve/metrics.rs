//! The metrics of the agent, beside those of its manager.

use metrics::{Counter, Gauge, counter, gauge};
use shardlock::tool::agent_metrics as names;

use super::command_table::{self, COMMANDS};
use super::requests::Malformed;

/// Handles of all metrics. They record nothing if no recorder was installed before.
pub(super) struct AgentMetrics {
    pub(super) connections: Gauge,
    pub(super) connections_refused: Counter,
    pub(super) locks: Gauge,
    pub(super) waiters: Gauge,
    pub(super) disconnect_releases: Counter,
    /// In the order of [`COMMANDS`].
    requests: [Counter; COMMANDS.len()],
    unknown_requests: Counter,
    malformed: Counter,
    too_long: Counter,
}

impl AgentMetrics {
    pub(super) fn new(connections_max: u64) -> Self {
        shardlock::tool::describe_agent_metrics();
        let request = |command: &'static str| counter!(names::AGENT_REQUESTS, "command" => command);
        let protocol_error = |kind: &'static str| counter!(names::PROTOCOL_ERRORS, "kind" => kind);
        // At most a million, by the range of the option.
        gauge!(names::CONNECTIONS_LIMIT).set(connections_max as f64);
        Self {
            connections: zero(gauge!(names::CONNECTIONS)),
            connections_refused: counter!(names::CONNECTIONS_REFUSED),
            locks: zero(gauge!(names::AGENT_LOCKS)),
            waiters: zero(gauge!(names::AGENT_WAITERS)),
            disconnect_releases: counter!(names::DISCONNECT_RELEASES),
            requests: COMMANDS.each_ref().map(|command| request(command.name)),
            unknown_requests: request("unknown"),
            malformed: protocol_error("malformed"),
            too_long: protocol_error("too_long"),
        }
    }

    /// Counts a request by its first word.
    pub(super) fn count_request(&self, name: &[u8]) {
        let counter = match command_table::index_of(name) {
            Some(index) => &self.requests[index],
            None => &self.unknown_requests,
        };
        counter.increment(1);
    }

    pub(super) fn count_protocol_error(&self, error: &Malformed) {
        match error {
            Malformed::Protocol(_) => self.malformed.increment(1),
            Malformed::TooLong(_) => self.too_long.increment(1),
        }
    }
}

/// A series exists once it has a value.
fn zero(gauge: Gauge) -> Gauge {
    gauge.set(0.0);
    gauge
}
