//! All checks of one server that stores locks.

use shardlock::{Config, ServerUrl};

use super::facts::{Seen, Server};
use super::finding::{Finding, Level};
use super::report::ServerReport;
use super::{Kind, clock, connections, map, memory, permissions, persistence, reach, replication, timing};
use crate::servers::ProbeError;

/// The expectations on a server.
#[derive(Debug, Clone)]
pub(super) struct Expected<'a> {
    pub(super) kind: Kind,
    pub(super) config: &'a Config,
    /// The fingerprint of the shard map that the shard must have stored.
    pub(super) fingerprint: &'a str,
    /// The address of the primary, if the server must be a replica.
    pub(super) replica_of: Option<String>,
    /// The level to report if the server can't be reached.
    pub(super) unreachable: Level,
    /// Whether the address is not in the URL but was announced by other servers.
    pub(super) announced: bool,
}

impl<'a> Expected<'a> {
    /// A server of a shard with several servers: a primary, or a replica of the primary at
    /// `replica_of`.
    ///
    /// An unreachable replica is only a warning.
    pub(super) fn one_of(kind: Kind, config: &'a Config, fingerprint: &'a str, replica_of: Option<String>) -> Self {
        let unreachable = match replica_of {
            Some(_) => Level::Warning,
            None => Level::Error,
        };
        Self {
            kind,
            config,
            fingerprint,
            replica_of,
            unreachable,
            announced: false,
        }
    }
}

/// The report on a server that could not be asked for the other servers of the shard.
pub(super) fn unreachable(server: &ServerUrl, part: &'static str, error: &ProbeError, level: Level) -> ServerReport {
    let server = Server {
        place: server.place().to_owned(),
        has_login: server.has_login(),
        encrypted: server.is_encrypted(),
        seen: Err(error.clone()),
    };
    let findings = vec![reach::unreachable(&server, error, level)];
    ServerReport {
        place: server.place,
        part,
        findings,
    }
}

pub(super) fn checked(server: &Server, expected: &Expected<'_>) -> ServerReport {
    let findings = match &server.seen {
        Err(error) if expected.announced => {
            vec![reach::announced(server, error, expected.unreachable, expected.kind)]
        }
        Err(error) => vec![reach::unreachable(server, error, expected.unreachable)],
        Ok(seen) => findings(server, seen, expected),
    };
    let part = match (&expected.replica_of, expected.kind) {
        (Some(_), _) => "replica",
        (None, Kind::Redlock) => "node",
        (None, _) => "primary",
    };
    ServerReport {
        place: server.place.clone(),
        part,
        findings,
    }
}

fn findings(server: &Server, seen: &Seen, expected: &Expected<'_>) -> Vec<Finding> {
    let &Expected {
        kind,
        config,
        fingerprint,
        ..
    } = expected;
    let role = match &expected.replica_of {
        Some(primary) => replication::replica(seen, primary),
        None => replication::role(seen, kind),
    };
    let mut findings = vec![reach::reachable(seen), timing::measured(&seen.round_trips, config)];
    findings.extend(reach::version(seen));
    findings.extend(reach::mode(seen, kind));
    findings.extend(role);
    if expected.replica_of.is_none() {
        findings.extend(replication::writes(seen));
    }
    findings.extend(permissions::access(&server.place, server.has_login, seen));
    findings.push(permissions::permitted(seen));
    findings.extend(permissions::channels_of_others(seen));
    findings.extend(permissions::known(seen));
    findings.extend(permissions::several_slots(seen));
    findings.extend(map::fingerprint(&seen.map, fingerprint));
    findings.extend(memory::policy(seen));
    findings.extend(memory::room(seen));
    findings.extend(persistence::persistence(seen, kind));
    findings.extend(persistence::disk(seen));
    findings.extend(connections::pubsub_limits(seen));
    findings.extend(connections::idle_timeout(seen));
    findings.extend(connections::keepalive(seen));
    findings.extend(connections::clients(seen));
    if expected.replica_of.is_none() {
        findings.extend(replication::replicas(seen, kind));
        findings.extend(replication::min_replicas_to_write(seen, kind));
        findings.extend(replication::acknowledgements(seen, kind, config.min_replicas_acked));
    }
    findings.extend(clock::against_ours(seen));
    findings.extend(reach::not_looked_at(seen));
    findings
}
