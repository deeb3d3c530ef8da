//! Checks whether a server can be reached, accepts the login, is of the kind in the URL, and is
//! recent enough.

use super::ShardKind;
use super::facts::{Facts, ProbedServer};
use super::finding::{Finding, Level};
use super::format::duration;
use crate::servers::{ProbeError, ProbeErrorKind};

const CHECK: &str = "reachable";

/// The oldest version that the tests run against.
const VERSION_MIN: (u32, u32) = (7, 0);

pub(super) fn reachable(facts: &Facts) -> Finding {
    let times = facts.round_trips;
    let found = format!(
        "a round trip takes {} (median of {}, from {} to {})",
        duration(times.median),
        times.count,
        duration(times.least),
        duration(times.most)
    );
    Finding::ok(CHECK, found)
}

/// Reports why a server could not be examined. The level depends on the other servers of the shard.
pub(super) fn unreachable(server: &ProbedServer, error: &ProbeError, level: Level) -> Finding {
    let address = &server.address;
    let ProbeError { kind, reason } = error;
    let why = "locks of this shard fail while too many of its servers do not answer";
    let redis_cli = match address.rsplit_once(':') {
        Some((host, port)) if !address.starts_with('/') => format!("redis-cli -h {host} -p {port}"),
        _ => format!("redis-cli -s {address}"),
    };
    let other_scheme = match server.encrypted {
        true => "if the port does not speak TLS, use a URL without TLS (redis:// in place of rediss:// and so on)",
        false => "if the port speaks TLS, use a URL with TLS (rediss:// in place of redis:// and so on)",
    };
    let (found, fix) = match kind {
        ProbeErrorKind::Unreachable if reason.contains("closes the connection on") => (
            format!("no connection: {reason}"),
            "put the address of the Redis server itself into the URL: twemproxy and similar proxies do not support subscriptions".to_owned(),
        ),
        ProbeErrorKind::Unreachable if reason.contains("max number of clients") => (
            format!("no connection: {reason}"),
            "CONFIG SET maxclients to a higher value (for each shard, a process needs the setting `connections` plus two), or find the client that leaks connections: CLIENT LIST"
                .to_owned(),
        ),
        ProbeErrorKind::Unreachable => (
            format!("no connection: {reason}"),
            format!(
                "check that the server runs and listens there (`{redis_cli} ping`; settings bind, port, protected-mode), and \
                 that no firewall blocks this machine; {other_scheme}"
            ),
        ),
        ProbeErrorKind::Timeout => (
            format!("connected or connecting, but no answer in time: {reason}"),
            format!("check whether the server hangs or is overloaded (`{redis_cli} --latency`), or raise store_timeout; {other_scheme}"),
        ),
        ProbeErrorKind::Login if server.has_login => (
            format!("the login was refused: {reason}"),
            "correct the user and the password in the shard's URL (redis://user:password@host; write characters such as @ and / as %40 and \
             %2F) or in password_file, or on the server: ACL SETUSER <user> on ><password>"
                .to_owned(),
        ),
        ProbeErrorKind::Login => (
            format!("the server asks for a password, and the URL has none: {reason}"),
            "put the password into the shard's URL (redis://:password@host, or redis://user:password@host), or set username and \
             password_file"
                .to_owned(),
        ),
        ProbeErrorKind::Database => (
            reason.clone(),
            "ACL SETUSER <user> +select, or remove the database from the URL (redis://host/1); the server setting databases limits their number"
                .to_owned(),
        ),
        ProbeErrorKind::Tls if reason.contains("CaUsedAsEndEntity") => (
            format!("no encrypted connection: the server presents a CA certificate (CA:TRUE) as its own: {reason}"),
            "recreate the certificate with `openssl req -x509 ... -addext basicConstraints=critical,CA:FALSE` and set tls_ca to it, or let the CA sign a \
             certificate for the server"
                .to_owned(),
        ),
        ProbeErrorKind::Tls if reason.contains("UnsupportedCertVersion") => (
            format!("no encrypted connection: the server's certificate is of X.509 version 1: {reason}"),
            "recreate the certificate with extensions, which need version 3: `openssl x509 -req ... -extfile FILE`, where FILE contains \
             `subjectAltName=DNS:` and the host of the URL"
                .to_owned(),
        ),
        ProbeErrorKind::Tls => (
            format!("no encrypted connection: {reason}"),
            "set tls_ca to the PEM file of the CA that signed the server's certificate, and use the host name of the certificate in the URL; \
             if the server asks for a client certificate, set tls_cert and tls_key"
                .to_owned(),
        ),
        ProbeErrorKind::UnexpectedReply => (
            format!("the server replied with an error: {reason}"),
            format!("if the server is loading its data, wait; otherwise check what listens at {address}; {other_scheme}"),
        ),
    };
    Finding::new(CHECK, level, found, why, fix)
}

/// Like [`unreachable()`], for a server whose address is not in the URL: possibly only the other
/// servers can reach the address.
pub(super) fn announced_unreachable(
    server: &ProbedServer,
    error: &ProbeError,
    level: Level,
    kind: ShardKind,
) -> Finding {
    let mut finding = unreachable(server, error, level);
    let (by, settings) = match kind {
        ShardKind::Sentinel => (
            "the sentinels",
            "replica-announce-ip and replica-announce-port on the servers (and SENTINEL MONITOR the primary at an address that this machine can reach)",
        ),
        _ => (
            "the nodes of the cluster",
            "cluster-announce-ip (or cluster-announce-hostname) and cluster-announce-port on that node",
        ),
    };
    finding.found = format!(
        "{}; the address is not in the URL, but was announced by {by}",
        finding.found
    );
    let fix = finding.fix.unwrap_or_default();
    finding.fix = Some(format!(
        "if this machine can reach the server only at another address (containers, NAT), set {settings}; otherwise {fix}"
    ));
    finding
}

pub(super) fn version(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "version";
    // Valkey reports Redis 7.2.4, and its own version in a separate field.
    let (name, text) = match facts.info("valkey_version") {
        Some(version) => ("Valkey", version),
        None => ("Redis", facts.info("redis_version")?),
    };
    let mut numbers = text.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("{name} {text}");
    if version >= VERSION_MIN {
        return Some(Finding::ok(CHECK, found));
    }
    let (major, minor) = VERSION_MIN;
    Some(Finding::warning(
        CHECK,
        found,
        format!("shardlock is tested with {major}.{minor} and later; older versions lack commands that it may use"),
        format!("upgrade the server to {major}.{minor} or later"),
    ))
}

/// Checks that the server is of the kind that the URL names.
pub(super) fn mode(facts: &Facts, kind: ShardKind) -> Option<Finding> {
    const CHECK: &str = "mode";
    let mode = facts.info("redis_mode").or_else(|| facts.info("server_mode"))?;
    let why = "the servers of a shard must match its URL, otherwise requests fail or go to the wrong server";
    Some(match (mode, kind) {
        ("cluster", ShardKind::Cluster) => Finding::ok(CHECK, "a node of a cluster"),
        ("standalone", ShardKind::Cluster) => Finding::error(
            CHECK,
            "a standalone server, not a node of a cluster",
            why,
            "use redis:// for this server, or start it with cluster-enabled yes and make it part of a cluster (redis-cli --cluster create)",
        ),
        ("standalone", _) => Finding::ok(CHECK, "a standalone server"),
        ("cluster", _) => Finding::error(
            CHECK,
            "a node of a cluster",
            why,
            "use redis+cluster://host,host,... with some of the cluster's nodes",
        ),
        ("sentinel", _) => Finding::error(
            CHECK,
            "a sentinel, which keeps no data",
            why,
            "use redis+sentinel://host,host,.../name with the sentinels and the name of their primary",
        ),
        (other, _) => Finding::note(CHECK, other, why, "check what kind of server this is"),
    })
}

/// Reports what could not be checked, so that it does not pass for being fine.
pub(super) fn unchecked(facts: &Facts) -> Vec<Finding> {
    let user = &facts.user;
    let mut findings = Vec::new();
    if let Err(reason) = &facts.info {
        findings.push(Finding::note(
            "info",
            format!("INFO is refused: {reason}"),
            "version, role, replicas and memory were not checked",
            format!("ACL SETUSER {user} +info, or check by hand: redis-cli INFO"),
        ));
    }
    if let Err(reason) = &facts.settings {
        findings.push(Finding::note(
            "config",
            format!("CONFIG GET is refused: {reason}"),
            "some of the server's settings were not checked",
            format!(
                "ACL SETUSER {user} +config|get, or compare by hand with config/redis.conf: maxmemory-policy, appendfsync, save, \
                 client-output-buffer-limit, timeout, tcp-keepalive, min-replicas-to-write"
            ),
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found_and_mend(kind: ProbeErrorKind, has_login: bool, encrypted: bool) -> String {
        let error = ProbeError {
            kind,
            reason: "the reason".to_owned(),
        };
        let server = ProbedServer {
            address: "[::1]:7000".to_owned(),
            has_login,
            encrypted,
            facts: Err(error.clone()),
        };
        let finding = unreachable(&server, &error, Level::Error);
        assert_eq!(finding.level, Level::Error);
        format!("{} {}", finding.found, finding.fix.unwrap())
    }

    #[test]
    fn each_probe_error_has_its_own_fix() {
        assert!(found_and_mend(ProbeErrorKind::Unreachable, false, false).contains("redis-cli -h [::1] -p 7000 ping"));
        assert!(found_and_mend(ProbeErrorKind::Unreachable, false, false).contains("rediss:// in place of redis://"));
        assert!(found_and_mend(ProbeErrorKind::Timeout, false, true).contains("redis:// in place of rediss://"));
        assert!(found_and_mend(ProbeErrorKind::Login, true, false).contains("correct the user and the password"));
        assert!(found_and_mend(ProbeErrorKind::Login, false, false).contains("redis://:password@host"));
        assert!(found_and_mend(ProbeErrorKind::Tls, false, true).contains("tls_ca"));
    }

    #[test]
    fn old_versions_are_warned_of() {
        let level = |info: &str| version(&Facts::healthy(info, &[])).unwrap().level;
        assert_eq!(level("redis_version:6.2.9\n"), Level::Warning);
        assert_eq!(level("redis_version:7.0.0\n"), Level::Ok);
        assert_eq!(level("redis_version:7.2.4\nvalkey_version:9.1.2\n"), Level::Ok);
        assert_eq!(level("redis_version:10.0\n"), Level::Ok);
    }

    #[test]
    fn a_server_of_another_kind_is_an_error_with_the_right_url() {
        let found = |info: &str, kind| mode(&Facts::healthy(info, &[]), kind).unwrap();
        assert_eq!(found("", ShardKind::Single).level, Level::Ok);
        assert_eq!(found("redis_mode:cluster\n", ShardKind::Cluster).level, Level::Ok);
        let cluster = found("redis_mode:cluster\n", ShardKind::Redlock);
        assert!(cluster.level == Level::Error && cluster.fix.unwrap().contains("redis+cluster://"));
        let sentinel = found("redis_mode:sentinel\n", ShardKind::Single);
        assert!(sentinel.level == Level::Error && sentinel.fix.unwrap().contains("redis+sentinel://"));
        assert_eq!(found("", ShardKind::Cluster).level, Level::Error);
    }

    #[test]
    fn refused_query_is_a_note_and_no_error() {
        let mut facts = Facts::healthy("", &[]);
        assert!(unchecked(&facts).is_empty());
        facts.settings = Err("NOPERM".to_owned());
        facts.info = Err("NOPERM".to_owned());
        let findings = unchecked(&facts);
        assert!(findings.len() == 2 && findings.iter().all(|finding| finding.level == Level::Note));
        assert!(
            findings[1]
                .fix
                .as_ref()
                .unwrap()
                .contains("ACL SETUSER default +config|get")
        );
    }
}
