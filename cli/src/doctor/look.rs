//! Queries a Redis server for the facts that the checks need. Nothing is written to the server.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, Pipeline, RedisError, Value, cmd, from_redis_value, pipe};
use shardlock::ServerUrl;

use super::Kind;
use super::facts::{Clock, Denied, Info, RoundTrips, Seen, Server};
use super::permissions::{self, Need};
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
pub(super) async fn look(server: &ServerUrl, kind: Kind, connector: &Connector<'_>) -> Server {
    Server {
        place: server.place().to_owned(),
        has_login: server.has_login(),
        encrypted: server.is_encrypted(),
        seen: see(server, kind, connector).await,
    }
}

async fn see(server: &ServerUrl, kind: Kind, connector: &Connector<'_>) -> Result<Seen, ProbeError> {
    let mut connection = connector.connect(server).await?;
    let round_trips = match round_trips(&mut connection, connector.timeout()).await {
        Ok(round_trips) => round_trips,
        Err(error) => return Err(connector.classify(&error, server).await),
    };
    let info: Result<String, String> = query(&mut connection, &command("INFO")).await;
    let user: Result<String, String> = query(&mut connection, cmd("ACL").arg("WHOAMI")).await;
    let map = query(&mut connection, cmd("GET").arg(connector.config.map_key())).await;
    let settings = settings(&mut connection).await;
    let clock = clock(&mut connection).await;
    // If the server has no ACL, or the user may not run `ACL WHOAMI`, take the user from the URL.
    let user = user.unwrap_or_else(|_| user_of(server));
    let needs = permissions::needs(kind, connector.config);
    let Tried {
        denied,
        refuses_writes,
        lacking,
    } = denied(&mut connection, &user, &needs, server, connector).await?;
    let refuses_several_slots = match kind {
        Kind::Cluster => None,
        _ => refuses_several_slots(&mut connection, &connector.config.namespace).await,
    };
    Ok(Seen {
        round_trips,
        info: info.map(|text| Info::parse(&text)),
        settings,
        clock,
        map,
        user,
        denied,
        tried: needs.len(),
        refuses_writes,
        lacking,
        refuses_several_slots,
    })
}

/// Runs a script with the keys of two locks, like a renewal, and returns the error if the server
/// refuses it.
///
/// A missing permission is reported by another check.
async fn refuses_several_slots(connection: &mut MultiplexedConnection, namespace: &str) -> Option<String> {
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
    let url = url::Url::parse(server.as_str()).ok();
    let user = url.map(|url| {
        percent_encoding::percent_decode_str(url.username())
            .decode_utf8_lossy()
            .into_owned()
    });
    user.filter(|user| !user.is_empty())
        .unwrap_or_else(|| "default".to_owned())
}

fn command(name: &str) -> Cmd {
    cmd(name)
}

/// Sends a pipeline and returns one result for each command.
async fn ask_all(
    connection: &mut MultiplexedConnection,
    commands: &Pipeline,
    count: usize,
) -> Result<Vec<Result<Value, RedisError>>, RedisError> {
    let replies = connection.send_packed_commands(commands, 0, count).await?;
    Ok(replies.into_iter().map(Value::extract_error).collect())
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
    let replies = ask_all(connection, &commands, SETTINGS.len()).await;
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
        let (seconds, micros): (i64, i64) = query(connection, &command("TIME")).await?;
        let round_trip = sent.elapsed();
        let ours_us = (before + round_trip / 2).as_micros() as i64;
        let ahead_us = seconds.saturating_mul(1_000_000).saturating_add(micros) - ours_us;
        let reading = Clock {
            ahead_ms: ahead_us / 1000,
            unsure: round_trip / 2,
        };
        if best.is_none_or(|best| reading.unsure < best.unsure) {
            best = Some(reading);
        }
    }
    best.ok_or_else(|| "the clock was not read".to_owned())
}

fn since_epoch() -> Duration {
    // A local clock before 1970 counts as 1970. The clock check reports the difference.
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The error codes of a server that refuses writes.
///
/// The server checks for this after the ACL and before the arguments.
const NO_WRITES: [&str; 4] = ["READONLY", "OOM", "MISCONF", "NOREPLICAS"];

/// The result of trying all needs.
struct Tried {
    denied: Vec<Denied>,
    refuses_writes: Option<String>,
    lacking: Vec<String>,
}

/// Tries all needs.
///
/// Returns the ones that the user is not permitted, the ones that the server does not know, and the
/// server's error if it refuses writes.
async fn denied(
    connection: &mut MultiplexedConnection,
    user: &str,
    needs: &[Need],
    server: &ServerUrl,
    connector: &Connector<'_>,
) -> Result<Tried, ProbeError> {
    let failed = |error: RedisError| ProbeError::classify(&error, server);
    let dry_run = |words: &[String]| {
        let mut command = cmd("ACL");
        command.arg("DRYRUN").arg(user).arg(words);
        command
    };
    let may_rehearse: Result<Value, _> = query(connection, &dry_run(&["PING".to_owned()])).await;
    let mut commands = pipe();
    if may_rehearse.is_ok() {
        for need in needs {
            commands.add_command(dry_run(&need.words));
        }
        let replies = ask_all(connection, &commands, needs.len()).await.map_err(failed)?;
        let pairs = needs.iter().zip(&replies);
        let denied = pairs.clone().filter_map(|(need, reply)| need.rehearsed(reply));
        return Ok(Tried {
            denied: denied.collect(),
            refuses_writes: None,
            lacking: pairs.filter_map(|(need, reply)| need.unknown(reply)).collect(),
        });
    }
    let (alone, together): (Vec<&Need>, Vec<&Need>) = needs.iter().partition(|need| need.subscribes());
    for need in &together {
        commands.add_command(in_words(need));
    }
    let replies = ask_all(connection, &commands, together.len()).await.map_err(failed)?;
    let errors = replies.iter().filter_map(|reply| reply.as_ref().err());
    let refuses_writes = errors
        .filter_map(|error| Some((error.code()?, error)))
        .find(|(code, _)| NO_WRITES.contains(code))
        .map(|(code, error)| format!("{code}: {}", error.detail().unwrap_or_default()));
    let pairs = together.iter().zip(&replies);
    let mut denied: Vec<_> = pairs.clone().filter_map(|(need, reply)| need.tried(reply)).collect();
    let mut lacking: Vec<_> = pairs.filter_map(|(need, reply)| need.unknown(reply)).collect();
    for need in alone {
        // A connection that has subscribed can't be used for other commands.
        let mut connection = connector.connect(server).await?;
        let reply = connection.send_packed_command(&in_words(need)).await;
        let reply = reply.and_then(Value::extract_error);
        denied.extend(need.tried(&reply));
        lacking.extend(need.unknown(&reply));
    }
    Ok(Tried {
        denied,
        refuses_writes,
        lacking,
    })
}

fn in_words(need: &Need) -> Cmd {
    let mut command = Cmd::new();
    command.arg(&need.words);
    command
}
