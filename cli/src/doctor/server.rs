//! All checks of one server that stores locks.

use shardlock::config::Config;
use shardlock::tool::ServerUrl;

use super::facts::{Facts, ProbedServer};
use super::finding::{Finding, Level};
use super::report::ServerReport;
use super::{ShardKind, clock, connections, map, memory, permissions, persistence, reachability, replication, timing};
use crate::servers::ProbeError;

/// The expectations on a server.
#[derive(Debug, Clone)]
pub(super) struct Expectations<'a> {
    pub(super) kind: ShardKind,
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

impl<'a> Expectations<'a> {
    /// A server of a shard with several servers: a primary, or a replica of the primary at
    /// `replica_of`.
    ///
    /// An unreachable replica is only a warning.
    pub(super) fn member_of(
        kind: ShardKind,
        config: &'a Config,
        fingerprint: &'a str,
        replica_of: Option<String>,
    ) -> Self {
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

/// The report on a server that could not be queried for the other servers of the shard.
pub(super) fn unreachable_server(
    server: &ServerUrl,
    part: &'static str,
    error: &ProbeError,
    level: Level,
) -> ServerReport {
    let server = ProbedServer {
        address: server.place().to_owned(),
        has_login: server.has_login(),
        encrypted: server.is_encrypted(),
        facts: Err(error.clone()),
    };
    let findings = vec![reachability::unreachable(&server, error, level)];
    ServerReport {
        address: server.address,
        part,
        findings,
    }
}

pub(super) fn check_server(server: &ProbedServer, expected: &Expectations<'_>) -> ServerReport {
    let findings = match &server.facts {
        Err(error) if expected.announced => {
            vec![reachability::announced_unreachable(
                server,
                error,
                expected.unreachable,
                expected.kind,
            )]
        }
        Err(error) => vec![reachability::unreachable(server, error, expected.unreachable)],
        Ok(facts) => findings(server, facts, expected),
    };
    let part = match (&expected.replica_of, expected.kind) {
        (Some(_), _) => "replica",
        (None, ShardKind::Redlock) => "node",
        (None, _) => "primary",
    };
    ServerReport {
        address: server.address.clone(),
        part,
        findings,
    }
}

fn findings(server: &ProbedServer, facts: &Facts, expected: &Expectations<'_>) -> Vec<Finding> {
    let &Expectations {
        kind,
        config,
        fingerprint,
        ..
    } = expected;
    let role = match &expected.replica_of {
        Some(primary) => replication::replica(facts, primary),
        None => replication::role(facts, kind),
    };
    let mut findings = vec![
        reachability::reachable(facts),
        timing::measured(&facts.round_trips, config),
    ];
    findings.extend(reachability::version(facts));
    findings.extend(reachability::mode(facts, kind));
    findings.extend(role);
    if expected.replica_of.is_none() {
        findings.extend(replication::writes(facts));
    }
    findings.extend(permissions::access(&server.address, server.has_login, facts));
    findings.push(permissions::permitted(facts));
    findings.extend(permissions::channels_of_others(facts));
    findings.extend(permissions::known(facts));
    findings.extend(permissions::several_slots(facts));
    findings.extend(map::fingerprint(&facts.map, fingerprint));
    findings.extend(memory::policy(facts));
    findings.extend(memory::usage(facts));
    findings.extend(persistence::persistence(facts, kind));
    findings.extend(persistence::disk(facts));
    findings.extend(connections::pubsub_limits(facts));
    findings.extend(connections::idle_timeout(facts));
    findings.extend(connections::keepalive(facts));
    findings.extend(connections::clients(facts));
    if expected.replica_of.is_none() {
        findings.extend(replication::replicas(facts, kind));
        findings.extend(replication::min_replicas_to_write(facts, kind));
        findings.extend(replication::acknowledgements(facts, kind, config.min_replicas_acked));
    }
    findings.extend(clock::compare_with_local(facts));
    findings.extend(reachability::unchecked(facts));
    findings
}
