//! The client of etcd's members.

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use shardlock::tool::ServerUrl;

use super::{Connector, ProbeError, ProbeErrorKind};

/// The gRPC status code PERMISSION_DENIED.
const PERMISSION_DENIED: i32 = 7;

/// The user name and the password in the URL.
pub(crate) fn credentials(server: &ServerUrl) -> Result<Option<(String, String)>, ProbeError> {
    let url = url::Url::parse(server.with_password()).map_err(|error| ProbeError {
        kind: ProbeErrorKind::UnexpectedReply,
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

/// Connects to a member with the credentials of its URL, limited by the time limit of a request.
pub(crate) async fn connect(server: &ServerUrl, connector: &Connector<'_>) -> Result<Client, ProbeError> {
    let user = credentials(server)?;
    with_timeout(connector, open(server, user.as_ref(), connector)).await
}

async fn open(server: &ServerUrl, user: Option<&(String, String)>, connector: &Connector<'_>) -> Result<Client, Error> {
    let mut options = ConnectOptions::new().with_connect_timeout(connector.timeout());
    if let Some((name, password)) = user {
        options = options.with_user(name, password);
    }
    let scheme = if server.is_encrypted() { "https" } else { "http" };
    if server.is_encrypted() {
        let mut tls = TlsOptions::new();
        if let Some(ca) = connector.authorities() {
            tls = tls.ca_certificate(Certificate::from_pem(ca));
        }
        if let Some((certificate, key)) = connector.identity() {
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        options = options.with_tls(tls);
    }
    let address = format!("{scheme}://{}", server.place());
    Client::connect([address], Some(options)).await
}

/// Runs one request, limited by the time limit of a request.
pub(crate) async fn with_timeout<T>(
    connector: &Connector<'_>,
    request: impl Future<Output = Result<T, Error>>,
) -> Result<T, ProbeError> {
    let limit = connector.timeout();
    match tokio::time::timeout(limit, request).await {
        Ok(reply) => reply.map_err(|error| classify(&error)),
        Err(_) => Err(ProbeError {
            kind: ProbeErrorKind::Timeout,
            reason: format!("no answer within {limit:?}"),
        }),
    }
}

fn classify(error: &Error) -> ProbeError {
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
        let text = error.to_string();
        if !reason.contains(&text) {
            reason = format!("{reason}: {text}");
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
        Error::GRpcStatus(status) if i32::from(status.code()) == PERMISSION_DENIED => ProbeErrorKind::Login,
        _ if about_users.iter().any(|text| reason.contains(text)) => ProbeErrorKind::Login,
        _ if ["ertificate", "fatal alert", "UnknownIssuer"]
            .iter()
            .any(|text| reason.contains(text)) =>
        {
            ProbeErrorKind::Tls
        }
        Error::GRpcStatus(_) => ProbeErrorKind::UnexpectedReply,
        _ => ProbeErrorKind::Unreachable,
    };
    ProbeError { kind, reason }
}
