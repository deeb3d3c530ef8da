//! Queries a member for the facts that the checks need. Nothing is written to the member.

use std::time::Instant;

use etcd_client::{
    AlarmAction, AlarmType, Certificate, Client, Compare, CompareOp, ConnectOptions, Error, GetOptions, Identity,
    TlsOptions, Txn, TxnOp,
};
use shardlock::ServerUrl;

use super::super::facts::RoundTrips;
use crate::asking::{Asking, Trouble, TroubleKind};

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

/// The gRPC status code PERMISSION_DENIED.
const PERMISSION_DENIED: i32 = 7;

pub(super) async fn look(server: &ServerUrl, asking: &Asking<'_>) -> Result<Member, Trouble> {
    let user = user(server)?;
    // A member that requires a client certificate may close the connection without an error
    // message.
    let without_a_word = |trouble: Trouble| match trouble.kind {
        TroubleKind::Unreachable | TroubleKind::Answer
            if server.is_encrypted() && CLOSED.iter().any(|words| trouble.reason.contains(words)) =>
        {
            Trouble {
                kind: TroubleKind::Encryption,
                ..trouble
            }
        }
        _ => trouble,
    };
    let connected = in_time(asking, connect(server, user.as_ref(), asking)).await;
    let mut client = connected.map_err(without_a_word)?;
    let began = Instant::now();
    let status = in_time(asking, client.status()).await.map_err(without_a_word)?;
    let mut round_trips = vec![began.elapsed()];
    // If the user may not list members or alarms, the member's own errors are still reported.
    let members = in_time(asking, client.member_list()).await;
    let mut alarms = status.errors().to_vec();
    if let Ok(reply) = in_time(asking, client.alarm(AlarmAction::Get, AlarmType::None, None)).await {
        alarms.extend(reply.alarms().iter().map(|alarm| format!("alarm {:?}", alarm.alarm())));
    }
    let map_key = asking.config.map_key();
    let map = in_time(asking, client.get(map_key.as_str(), None)).await;
    let map = map.map(|found| {
        let stored = found.kvs().first();
        stored.map(|stored| String::from_utf8_lossy(stored.value()).into_owned())
    });
    let denied = match &map {
        // Only a member with a majority behind it can answer the next query.
        Ok(_) => may_lock(&mut client, asking).await,
        Err(trouble) => Some(trouble)
            .filter(|trouble| trouble.kind == TroubleKind::Login)
            .cloned(),
    };
    if map.is_ok() {
        round_trips.clear();
        while round_trips.len() < READS && (round_trips.is_empty() || began.elapsed() < asking.timeout()) {
            let sent = Instant::now();
            let keys = Some(GetOptions::new().with_keys_only());
            in_time(asking, client.get(map_key.as_str(), keys)).await?;
            round_trips.push(sent.elapsed());
        }
    }
    Ok(Member {
        // At least one was measured.
        round_trips: RoundTrips::of(round_trips).ok_or_else(|| Trouble {
            kind: TroubleKind::Answer,
            reason: "no round trip was measured".to_owned(),
        })?,
        version: status.version().to_owned(),
        leader: status.leader(),
        bytes: status.db_size(),
        members: members.map_or(0, |list| list.members().len()),
        alarms,
        user: user.map(|(name, _)| name),
        shows_certificate: server.is_encrypted() && asking.identity().is_some(),
        map: map.map_err(|trouble| trouble.reason),
        denied: denied.map(|trouble| trouble.reason),
    })
}

/// Tries a transaction whose condition is never true, so it changes nothing. etcd checks
/// permissions before the condition.
async fn may_lock(client: &mut Client, asking: &Asking<'_>) -> Option<Trouble> {
    let key = format!("{}%doctor", asking.config.namespace);
    let never = Compare::create_revision(key.as_str(), CompareOp::Less, 0);
    let all = GetOptions::new().with_prefix().with_limit(1).with_keys_only();
    let question = Txn::new().when([never]).and_then([
        TxnOp::put(key.as_str(), "", None),
        TxnOp::get(asking.config.namespace.as_str(), Some(all)),
    ]);
    let trouble = in_time(asking, client.txn(question)).await.err()?;
    Some(trouble).filter(|trouble| trouble.kind == TroubleKind::Login)
}

/// The user name and the password in the URL.
fn user(server: &ServerUrl) -> Result<Option<(String, String)>, Trouble> {
    let url = url::Url::parse(server.as_str()).map_err(|error| Trouble {
        kind: TroubleKind::Answer,
        // None of these errors contains the URL itself.
        reason: error.to_string(),
    })?;
    let decoded = |text: &str| {
        percent_encoding::percent_decode_str(text)
            .decode_utf8_lossy()
            .into_owned()
    };
    Ok(url
        .password()
        .map(|password| (decoded(url.username()), decoded(password))))
}

/// Connects to a member. Other commands use this too.
pub(crate) async fn client(server: &ServerUrl, asking: &Asking<'_>) -> Result<Client, Trouble> {
    let user = user(server)?;
    in_time(asking, connect(server, user.as_ref(), asking)).await
}

async fn connect(
    server: &ServerUrl,
    user: Option<&(String, String)>,
    asking: &Asking<'_>,
) -> Result<Client, etcd_client::Error> {
    let mut options = ConnectOptions::new().with_connect_timeout(asking.timeout());
    if let Some((name, password)) = user {
        options = options.with_user(name, password);
    }
    let scheme = if server.is_encrypted() { "https" } else { "http" };
    if server.is_encrypted() {
        let mut tls = TlsOptions::new();
        if let Some(ca) = asking.authorities() {
            tls = tls.ca_certificate(Certificate::from_pem(ca));
        }
        if let Some((certificate, key)) = asking.identity() {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        options = options.with_tls(tls);
    }
    let address = format!("{scheme}://{}", server.place());
    Client::connect([address], Some(options)).await
}

/// Runs one query, limited by the time limit of a request.
pub(crate) async fn in_time<T>(
    asking: &Asking<'_>,
    question: impl Future<Output = Result<T, Error>>,
) -> Result<T, Trouble> {
    let limit = asking.timeout();
    match tokio::time::timeout(limit, question).await {
        Ok(answer) => answer.map_err(|error| trouble(&error)),
        Err(_) => Err(Trouble {
            kind: TroubleKind::Silent,
            reason: format!("no answer within {limit:?}"),
        }),
    }
}

fn trouble(error: &Error) -> Trouble {
    let mut reason = match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    // The client library does not expose its inner error as a source, but that error has the
    // reason.
    let mut cause = match error {
        Error::GRpcStatus(status) => std::error::Error::source(status),
        Error::TransportError(error) => std::error::Error::source(error),
        other => std::error::Error::source(other),
    };
    while let Some(error) = cause {
        let words = error.to_string();
        if !reason.contains(&words) {
            reason = format!("{reason}: {words}");
        }
        cause = error.source();
    }
    let about_users = [
        "authentication failed",
        "user name is empty",
        "authentication is not enabled",
        "invalid auth token",
    ];
    let kind = match error {
        Error::GRpcStatus(status) if i32::from(status.code()) == PERMISSION_DENIED => TroubleKind::Login,
        _ if about_users.iter().any(|words| reason.contains(words)) => TroubleKind::Login,
        _ if ["ertificate", "fatal alert", "UnknownIssuer"]
            .iter()
            .any(|words| reason.contains(words)) =>
        {
            TroubleKind::Encryption
        }
        Error::GRpcStatus(_) => TroubleKind::Answer,
        _ => TroubleKind::Unreachable,
    };
    Trouble { kind, reason }
}
