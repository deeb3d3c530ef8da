//! Variables that Kubernetes adds to every container for each Service of its namespace.
//!
//! The variables of a Service called `shardlock` or `shardlock-redis` start with our prefix.

use std::net::{IpAddr, SocketAddr};

const PROTOCOLS: [&str; 3] = ["tcp", "udp", "sctp"];

/// Whether this is such a variable, by its name and by its value: `SHARDLOCK_PORT` with any other
/// value is a mistake of the user.
///
/// The names are `*_SERVICE_HOST`, `*_SERVICE_PORT` and `*_SERVICE_PORT_<NAME>`. For Docker-style
/// links they are `*_PORT`, `*_PORT_<NUMBER>_<PROTOCOL>` and the latter with `_PROTO`, `_PORT` and
/// `_ADDR`.
pub(super) fn is_service_variable(name: &str, value: &str) -> bool {
    let is_address = || value.parse::<IpAddr>().is_ok();
    let is_port = || value.parse::<u16>().is_ok();
    if name.ends_with("_SERVICE_HOST") {
        return is_address();
    }
    if name.ends_with("_SERVICE_PORT") || name.contains("_SERVICE_PORT_") {
        return is_port();
    }
    if let Some(link) = name.strip_suffix("_PROTO") {
        return is_link(link) && PROTOCOLS.contains(&value);
    }
    if let Some(link) = name.strip_suffix("_ADDR") {
        return is_link(link) && is_address();
    }
    match name.strip_suffix("_PORT") {
        Some(link) if is_link(link) => is_port(),
        Some(_) => is_url(value),
        None => is_link(name) && is_url(value),
    }
}

/// Whether it ends as in `SHARDLOCK_PORT_9187_TCP`.
fn is_link(name: &str) -> bool {
    let is_number = |text: &str| text.parse::<u16>().is_ok();
    name.rsplit_once('_')
        .filter(|(_, protocol)| PROTOCOLS.iter().any(|known| known.to_ascii_uppercase() == *protocol))
        .and_then(|(name, _)| name.rsplit_once("_PORT_"))
        .is_some_and(|(_, number)| is_number(number))
}

/// Whether it has the form `tcp://10.96.0.12:9187`.
fn is_url(value: &str) -> bool {
    value
        .split_once("://")
        .is_some_and(|(protocol, address)| PROTOCOLS.contains(&protocol) && address.parse::<SocketAddr>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::is_service_variable;

    #[test]
    fn only_the_shapes_of_kubernetes_are_recognized() {
        for (name, value) in [
            ("SHARDLOCK_SERVICE_HOST", "10.96.0.12"),
            ("SHARDLOCK_SERVICE_PORT", "9187"),
            ("SHARDLOCK_SERVICE_PORT_METRICS", "9187"),
            ("SHARDLOCK_PORT", "tcp://10.96.0.12:9187"),
            ("SHARDLOCK_PORT_9187_TCP", "tcp://10.96.0.12:9187"),
            ("SHARDLOCK_PORT_9187_TCP_PROTO", "tcp"),
            ("SHARDLOCK_PORT_9187_TCP_PORT", "9187"),
            ("SHARDLOCK_PORT_9187_TCP_ADDR", "10.96.0.12"),
            ("SHARDLOCK_REDIS_PORT_53_UDP", "udp://[fd00::1]:53"),
            ("SHARDLOCK_REDIS_MASTER_SERVICE_HOST", "fd00::1"),
        ] {
            assert!(is_service_variable(name, value), "{name}={value}");
        }
        for (name, value) in [
            ("SHARDLOCK_PORT", "9187"),
            ("SHARDLOCK_PORT", "tcp://metrics:9187"),
            ("SHARDLOCK_SERVICE_HOST", "redis"),
            ("SHARDLOCK_SERVICE_PORT", "metrics"),
            ("SHARDLOCK_PORT_TCP", "tcp://10.96.0.12:9187"),
            ("SHARDLOCK_PORT_9187_TCP_PROTO", "http"),
            ("SHARDLOCK_TTL", "10s"),
        ] {
            assert!(!is_service_variable(name, value), "{name}={value}");
        }
    }
}
