use deadpool_redis::redis::{ConnectionInfo, IntoConnectionInfo};

use super::{SECRET, lines, text};
use crate::config::ShardConfig;
use crate::endpoint::{Endpoint, EndpointKind, ServerUrl, redact};
use crate::text::must_be_escaped;

/// The maximum length of a URL that is parsed.
const BYTES_MAX: usize = 2048;

/// URLs of shards. The input is a URL. Its lines are also used as the parts of further URLs with a
/// password: the scheme, the user, the text around the password, and the part after the `@`.
pub fn urls(data: &[u8]) {
    let text = text(data);
    assert!(!redact(&text).contains(must_be_escaped));
    parsed(&text);
    if !text.contains(SECRET) {
        let [scheme, user, before, after, rest] = lines(&text);
        // With a slash, it could be the path of a socket.
        if scheme.contains('/') || user.contains('/') {
            return;
        }
        shown_without_password(&format!("{scheme}://{user}:{before}{SECRET}{after}@{rest}"));
        // Otherwise it is part of another value.
        if !rest.contains(['?', '#']) && (before.is_empty() || before.ends_with('&')) {
            for name in ["pass", "sentinel_password"] {
                shown_without_password(&format!("{scheme}://{rest}?{before}{name}={SECRET}{after}"));
            }
        }
    }
}

fn parsed(text: &str) {
    let endpoint = match Endpoint::parse(text) {
        Ok(endpoint) => endpoint,
        Err(error) => {
            assert!(!error.to_string().contains(must_be_escaped), "{error}");
            return;
        }
    };
    assert!(text.len() <= BYTES_MAX);
    let shown = endpoint.to_string();
    assert!(!shown.contains(must_be_escaped), "{shown}");
    assert!(shown.starts_with(&format!("{}://", endpoint.scheme())));
    // The shown URL contains the default ports and may be longer.
    if shown.len() <= BYTES_MAX {
        let again = Endpoint::parse(&shown);
        assert_eq!(
            again.map(|again| again.to_string()),
            Ok(shown.clone()),
            "shown of {text:?}"
        );
    }
    let servers = endpoint.servers();
    let count = match endpoint.kind() {
        EndpointKind::Memory { .. } => 0..=0,
        EndpointKind::Redis(_) => 1..=1,
        EndpointKind::Redlock { .. } => 3..=15,
        EndpointKind::Sentinel { .. } | EndpointKind::Cluster { .. } | EndpointKind::Etcd { .. } => 1..=32,
    };
    assert!(count.contains(&servers.len()), "{} servers in {shown}", servers.len());
    let is_etcd = matches!(endpoint.kind(), EndpointKind::Etcd { .. });
    let mut places: Vec<&str> = servers.iter().map(ServerUrl::place).collect();
    for server in &servers {
        let place = server.place();
        // The path of a socket may itself contain asterisks.
        let is_shown = format!("{server:?}").contains("***");
        assert!(!is_shown || place.contains("***"), "a place has no login");
        if !server.is_socket() {
            let (host, port) = place.rsplit_once(':').unwrap();
            assert!(
                !host.is_empty() && port.parse::<u16>().is_ok_and(|port| port > 0),
                "{place}"
            );
        }
        if is_etcd {
            assert_eq!(server.at("h:1").at(place), *server);
            continue;
        }
        let info = taken(server);
        assert!(info.redis_settings().db() >= 0);
        if server.is_socket() {
            assert_eq!(info.addr().to_string(), place);
        } else {
            assert_eq!(info.addr().to_string(), place.replace(['[', ']'], ""));
            assert_eq!(server.at("h:1").at(place), *server);
        }
        elsewhere(&server.at("[::1]:7"), &info);
    }
    if let Some(server) = endpoint.server_at("h:1").filter(|_| !is_etcd) {
        assert_eq!(
            (server.place(), taken(&server).addr().to_string().as_str()),
            ("h:1", "h:1")
        );
    }
    places.sort_unstable();
    places.dedup();
    assert_eq!(places.len(), servers.len(), "each server once in {shown}");
}

/// The URL as parsed by the client library.
fn taken(server: &ServerUrl) -> ConnectionInfo {
    let info = server.with_password().into_connection_info();
    info.unwrap_or_else(|error| panic!("the client rejects the URL of {server:?}: {error}"))
}

/// Checks that the server at the other address has the same login and database.
fn elsewhere(server: &ServerUrl, like: &ConnectionInfo) {
    let info = taken(server);
    let (settings, like) = (info.redis_settings(), like.redis_settings());
    assert_eq!(info.addr().to_string(), "::1:7");
    assert_eq!(settings.username(), like.username());
    assert_eq!(settings.password(), like.password());
    assert_eq!(settings.db(), like.db());
}

fn shown_without_password(url: &str) {
    let shown = match Endpoint::parse(url) {
        Ok(endpoint) => {
            let at = endpoint.server_at("h:1");
            format!("{endpoint} {endpoint:?} {:?} {at:?}", endpoint.servers())
        }
        Err(error) => format!("{error} {error:?}"),
    };
    assert!(!shown.contains(SECRET), "{url:?} is shown as {shown}");
    let config = format!("{:?}", ShardConfig::new("a", url));
    assert!(!config.contains(SECRET), "{url:?} is shown as {config}");
}
