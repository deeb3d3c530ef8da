//! Queries a member for the facts that the checks need. Nothing is written to the member.

use std::time::Instant;

use etcd_client::{AlarmAction, AlarmType, Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use shardlock::tool::{self, ServerUrl};

use super::super::facts::RoundTrips;
use crate::servers::etcd::{connect, credentials, with_timeout};
use crate::servers::{Connector, ProbeError, ProbeErrorKind};

/// The facts that a member reported. A query that the member refused is an `Err` with its error.
#[derive(Debug, Clone)]
pub(super) struct Member {
    pub(super) round_trips: RoundTrips,
    pub(super) version: String,
    /// The id of the leader, or 0 if there is none.
    pub(super) leader: u64,
    pub(super) bytes: i64,
    /// The number of members in the cluster, or 0 if the member did not report it.
    pub(super) members: usize,
    /// Descriptions of errors and alarms.
    pub(super) alarms: Vec<String>,
    /// The user name in the URL.
    pub(super) user: Option<String>,
    /// Whether a client certificate is configured, to be presented if the member asks for one.
    pub(super) shows_certificate: bool,
    /// The stored fingerprint of the shard map, if there is one. A member returns it only if it has
    /// a majority behind it.
    pub(super) map: Result<Option<String>, String>,
    /// The error, if the user lacks permissions that locks need.
    pub(super) denied: Option<String>,
}

/// How many round trips are measured, if they fit within the time limit.
const READS: usize = 20;

/// Error texts for a connection closed by the peer. Which one occurs depends on when it is noticed.
const CLOSED: [&str; 4] = ["connection closed", "stream closed", "broken pipe", "reset by peer"];

pub(super) async fn probe(server: &ServerUrl, connector: &Connector<'_>) -> Result<Member, ProbeError> {
    let user = credentials(server)?;
    // A member that requires a client certificate may close the connection without an error
    // message.
    let tls_if_closed = |error: ProbeError| match error.kind {
        ProbeErrorKind::Unreachable | ProbeErrorKind::UnexpectedReply
            if server.is_encrypted() && CLOSED.iter().any(|text| error.reason.contains(text)) =>
        {
            ProbeError {
                kind: ProbeErrorKind::Tls,
                ..error
            }
        }
        _ => error,
    };
    let mut client = connect(server, connector).await.map_err(tls_if_closed)?;
    let began = Instant::now();
    let status = with_timeout(connector, client.status()).await.map_err(tls_if_closed)?;
    let mut round_trips = vec![began.elapsed()];
    // If the user may not list members or alarms, the member's own errors are still reported.
    let members = with_timeout(connector, client.member_list()).await;
    let mut alarms = status.errors().to_vec();
    if let Ok(reply) = with_timeout(connector, client.alarm(AlarmAction::Get, AlarmType::None, None)).await {
        alarms.extend(reply.alarms().iter().map(|alarm| format!("alarm {:?}", alarm.alarm())));
    }
    let map_key = tool::map_key(connector.config);
    let map = with_timeout(connector, client.get(map_key.as_str(), None)).await;
    let map = map.map(|found| {
        let stored = found.kvs().first();
        stored.map(|stored| String::from_utf8_lossy(stored.value()).into_owned())
    });
    let denied = match &map {
        // Only a member with a majority behind it can answer the next query.
        Ok(_) => may_lock(&mut client, connector).await,
        Err(error) => Some(error).filter(|error| error.kind == ProbeErrorKind::Login).cloned(),
    };
    if map.is_ok() {
        round_trips.clear();
        while round_trips.len() < READS && (round_trips.is_empty() || began.elapsed() < connector.timeout()) {
            let sent = Instant::now();
            let keys = Some(GetOptions::new().with_keys_only());
            with_timeout(connector, client.get(map_key.as_str(), keys)).await?;
            round_trips.push(sent.elapsed());
        }
    }
    Ok(Member {
        // At least one was measured.
        round_trips: RoundTrips::of(round_trips).ok_or_else(|| ProbeError {
            kind: ProbeErrorKind::UnexpectedReply,
            reason: "no round trip was measured".to_owned(),
        })?,
        version: status.version().to_owned(),
        leader: status.leader(),
        bytes: status.db_size(),
        members: members.map_or(0, |list| list.members().len()),
        alarms,
        user: user.map(|(name, _)| name),
        shows_certificate: server.is_encrypted() && connector.identity().is_some(),
        map: map.map_err(|error| error.reason),
        denied: denied.map(|error| error.reason),
    })
}

/// Tries a transaction whose condition is never true, so it changes nothing. etcd checks
/// permissions before the condition.
async fn may_lock(client: &mut Client, connector: &Connector<'_>) -> Option<ProbeError> {
    let key = format!("{}%doctor", connector.config.namespace);
    let never = Compare::create_revision(key.as_str(), CompareOp::Less, 0);
    let all = GetOptions::new().with_prefix().with_limit(1).with_keys_only();
    let request = Txn::new().when([never]).and_then([
        TxnOp::put(key.as_str(), "", None),
        TxnOp::get(connector.config.namespace.as_str(), Some(all)),
    ]);
    let error = with_timeout(connector, client.txn(request)).await.err()?;
    Some(error).filter(|error| error.kind == ProbeErrorKind::Login)
}
