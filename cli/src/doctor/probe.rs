//! Queries a Redis server for the facts that the checks need. Nothing is written to the server.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{RedisError, Value, cmd, from_redis_value, pipe};
use shardlock::tool::{self, ServerUrl};

use super::ShardKind;
use super::facts::{Clock, Facts, Info, ProbedServer, RoundTrips};
use super::needs::needs;
use super::permission_probe::{PermissionResults, query_all, try_permissions};
use crate::servers::{Connector, ProbeError, query};

/// How many round trips are measured, if they fit within the time limit.
const PINGS: usize = 20;
/// How often the clock is read. The reading with the shortest round trip counts.
const CLOCK_READINGS: usize = 5;

/// The settings that the checks read.
const SETTINGS: [&str; 12] = [
    "maxmemory-policy",
    "maxmemory",
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "save",
    "acl-pubsub-default",
    "client-output-buffer-limit",
    "timeout",
    "tcp-keepalive",
    "maxclients",
    "min-replicas-to-write",
];

/// Queries one server. Each step has the time limit of a request.
pub(super) async fn probe(server: &ServerUrl, kind: ShardKind, connector: &Connector<'_>) -> ProbedServer {
    ProbedServer {
        address: server.place().to_owned(),
        has_login: server.has_login(),
        encrypted: server.is_encrypted(),
        facts: read_facts(server, kind, connector).await,
    }
}

async fn read_facts(server: &ServerUrl, kind: ShardKind, connector: &Connector<'_>) -> Result<Facts, ProbeError> {
    let mut connection = connector.connect(server).await?;
    let round_trips = match round_trips(&mut connection, connector.timeout()).await {
        Ok(round_trips) => round_trips,
        Err(error) => return Err(connector.classify(&error, server).await),
    };
    let info: Result<String, String> = query(&mut connection, &cmd("INFO")).await;
    let user: Result<String, String> = query(&mut connection, cmd("ACL").arg("WHOAMI")).await;
    let map = query(&mut connection, cmd("GET").arg(tool::map_key(connector.config))).await;
    let settings = settings(&mut connection).await;
    let clock = clock(&mut connection).await;
    // If the server has no ACL, or the user may not run `ACL WHOAMI`, take the user from the URL.
    let user = user.unwrap_or_else(|_| user_of(server));
    let needs = needs(kind, connector.config);
    let PermissionResults {
        denied,
        write_error,
        unknown_commands,
    } = try_permissions(&mut connection, &user, &needs, server, connector).await?;
    let multi_slot_error = match kind {
        ShardKind::Cluster => None,
        _ => multi_slot_error(&mut connection, &connector.config.namespace).await,
    };
    Ok(Facts {
        round_trips,
        info: info.map(|text| Info::parse(&text)),
        settings,
        clock,
        map,
        user,
        denied,
        permissions_tried: needs.len(),
        write_error,
        unknown_commands,
        multi_slot_error,
    })
}

/// Runs a script with the keys of two locks, like a renewal, and returns the error if the server
/// refuses it.
///
/// A missing permission is reported by another check.
async fn multi_slot_error(connection: &mut MultiplexedConnection, namespace: &str) -> Option<String> {
    let mut call = cmd("EVAL");
    call.arg("return 1").arg(4);
    for lock in ["%doctor", "%doctor2"] {
        call.arg(format!("{namespace}{lock}"))
            .arg(format!("{{{namespace}{lock}}}:q"));
    }
    let reply: Result<Value, RedisError> = call.query_async(connection).await;
    let error = reply.err().filter(|error| error.code() != Some("NOPERM"))?;
    Some(error.to_string())
}

fn user_of(server: &ServerUrl) -> String {
    let url = url::Url::parse(server.with_password()).ok();
    let user = url.map(|url| {
        percent_encoding::percent_decode_str(url.username())
            .decode_utf8_lossy()
            .into_owned()
    });
    user.filter(|user| !user.is_empty())
        .unwrap_or_else(|| "default".to_owned())
}

async fn round_trips(connection: &mut MultiplexedConnection, limit: Duration) -> Result<RoundTrips, RedisError> {
    let began = Instant::now();
    let mut times = Vec::with_capacity(PINGS);
    while times.len() < PINGS && (times.is_empty() || began.elapsed() < limit) {
        let sent = Instant::now();
        let reply: Result<Value, _> = cmd("PING").query_async(connection).await;
        match reply {
            // If the user may not PING, the refusal still measures the round trip.
            Err(error) if error.code() != Some("NOPERM") => return Err(error),
            _ => times.push(sent.elapsed()),
        }
    }
    // At least one was measured.
    RoundTrips::of(times).ok_or_else(|| RedisError::from(std::io::Error::other("no round trip was measured")))
}

/// Reads each setting with its own command, because servers before 7.0 accept only one name at a
/// time.
async fn settings(connection: &mut MultiplexedConnection) -> Result<BTreeMap<String, String>, String> {
    let mut commands = pipe();
    for name in SETTINGS {
        commands.cmd("CONFIG").arg("GET").arg(name);
    }
    let replies = query_all(connection, &commands, SETTINGS.len()).await;
    let mut settings = BTreeMap::new();
    for reply in replies.map_err(|error| error.to_string())? {
        let pair: BTreeMap<String, String> = reply
            .and_then(|value| Ok(from_redis_value(value)?))
            .map_err(|error| error.to_string())?;
        settings.extend(pair);
    }
    Ok(settings)
}

async fn clock(connection: &mut MultiplexedConnection) -> Result<Clock, String> {
    let mut best: Option<Clock> = None;
    for _ in 0..CLOCK_READINGS {
        let (before, sent) = (since_epoch(), Instant::now());
        let (seconds, micros): (i64, i64) = query(connection, &cmd("TIME")).await?;
        let round_trip = sent.elapsed();
        let ours_us = (before + round_trip / 2).as_micros() as i64;
        let ahead_us = seconds.saturating_mul(1_000_000).saturating_add(micros) - ours_us;
        let reading = Clock {
            ahead_ms: ahead_us / 1000,
            uncertainty: round_trip / 2,
        };
        if best.is_none_or(|best| reading.uncertainty < best.uncertainty) {
            best = Some(reading);
        }
    }
    best.ok_or_else(|| "the clock was not read".to_owned())
}

fn since_epoch() -> Duration {
    // A local clock before 1970 counts as 1970. The clock check reports the difference.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}
