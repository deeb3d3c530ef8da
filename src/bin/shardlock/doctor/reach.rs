//! Whether a server can be reached and logged in to, is what the URL says, and of a version that will do.

use std::time::Duration;

use super::Kind;
use super::facts::{Seen, Server};
use super::finding::{Finding, Level};
use crate::asking::{Trouble, TroubleKind};

const CHECK: &str = "reachable";

/// The oldest version that the tests run against.
const VERSION_LEAST: (u32, u32) = (7, 0);

pub(super) fn reachable(seen: &Seen) -> Finding {
    let times = seen.round_trips;
    let found = format!(
        "a round trip takes {} (median of {}, from {} to {})",
        short(times.median),
        times.count,
        short(times.least),
        short(times.most)
    );
    Finding::ok(CHECK, found)
}

/// In words, to three digits at most.
pub(super) fn short(time: Duration) -> String {
    let micros = time.as_micros();
    match micros {
        0..1_000 => format!("{micros} us"),
        1_000..100_000 => format!("{:.1} ms", time.as_secs_f64() * 1e3),
        100_000..1_000_000 => format!("{} ms", micros / 1_000),
        _ => format!("{:.1} s", time.as_secs_f64()),
    }
}

/// Why a server could not be looked at. How bad that is depends on what else the shard has.
pub(super) fn unreachable(server: &Server, trouble: &Trouble, level: Level) -> Finding {
    let place = &server.place;
    let Trouble { kind, reason } = trouble;
    let why = "locks whose keys belong to this shard fail while enough of its servers do not answer";
    let redis_cli = match place.rsplit_once(':') {
        Some((host, port)) if !place.starts_with('/') => format!("redis-cli -h {host} -p {port}"),
        _ => format!("redis-cli -s {place}"),
    };
    let other_scheme = match server.encrypted {
        true => "if the port does not speak TLS, write a URL without it (redis:// in place of rediss:// and so on)",
        false => "if the port speaks TLS, write a URL with it (rediss:// in place of redis:// and so on)",
    };
    let (found, mend) = match kind {
        TroubleKind::Unreachable if reason.contains("closes the connection at") => (
            format!("no connection: {reason}"),
            "put the address of the Redis server itself into the URL: twemproxy and proxies like it have no subscriptions".to_owned(),
        ),
        TroubleKind::Unreachable if reason.contains("max number of clients") => (
            format!("no connection: {reason}"),
            "CONFIG SET maxclients to more (each process needs the setting `connections` and two for each shard), or find who leaks connections: CLIENT LIST"
                .to_owned(),
        ),
        TroubleKind::Unreachable => (
            format!("no connection: {reason}"),
            format!(
                "see whether the server runs and listens there (`{redis_cli} ping`; settings bind, port, protected-mode), and \
                 whether a firewall lets this machine through; {other_scheme}"
            ),
        ),
        TroubleKind::Silent => (
            format!("connected or connecting, but no answer in time: {reason}"),
            format!("see whether the server hangs or is overloaded (`{redis_cli} --latency`), or raise store_timeout; {other_scheme}"),
        ),
        TroubleKind::Login if server.has_login => (
            format!("the login was refused: {reason}"),
            "correct the user and the password in the shard's URL (redis://user:password@host; characters such as @ and / as %40 and %2F), or on \
             the server: ACL SETUSER <user> on ><password>"
                .to_owned(),
        ),
        TroubleKind::Login => (
            format!("the server asks for a password, and the URL has none: {reason}"),
            "put it into the shard's URL: redis://:password@host, or redis://user:password@host".to_owned(),
        ),
        TroubleKind::Database => (
            reason.clone(),
            "ACL SETUSER <user> +select, or leave the database out of the URL (redis://host/1); the server's setting databases says how many there are"
                .to_owned(),
        ),
        TroubleKind::Encryption if reason.contains("CaUsedAsEndEntity") => (
            format!("no encrypted connection: the server shows the certificate of an authority (CA:TRUE) as its own: {reason}"),
            "make the certificate anew with `openssl req -x509 ... -addext basicConstraints=critical,CA:FALSE` and set tls_ca to it, or have the authority sign \
             one for the server"
                .to_owned(),
        ),
        TroubleKind::Encryption if reason.contains("UnsupportedCertVersion") => (
            format!("no encrypted connection: the server's certificate is of X.509 version 1: {reason}"),
            "make the certificate anew with extensions, which need version 3: `openssl x509 -req ... -extfile FILE` where FILE has `subjectAltName=DNS:` and \
             the host of the URL"
                .to_owned(),
        ),
        TroubleKind::Encryption => (
            format!("no encrypted connection: {reason}"),
            "set tls_ca to the PEM file of the authority that signed the server's certificate, and name the host in the URL as the certificate \
             does; where the server asks for a certificate, set tls_cert and tls_key"
                .to_owned(),
        ),
        TroubleKind::Answer => (
            format!("an answer that is an error: {reason}"),
            format!("wait if the server is loading its data; else see what listens at {place}; {other_scheme}"),
        ),
    };
    Finding::new(CHECK, level, found, why, mend)
}

/// The same for a server whose address the URL does not name: it may be one that only the other servers can reach.
pub(super) fn announced(server: &Server, trouble: &Trouble, level: Level, kind: Kind) -> Finding {
    let mut finding = unreachable(server, trouble, level);
    let (by, settings) = match kind {
        Kind::Sentinel => (
            "the sentinels",
            "replica-announce-ip and replica-announce-port on the servers (and SENTINEL MONITOR the primary by an address that this machine reaches)",
        ),
        _ => (
            "the nodes of the cluster",
            "cluster-announce-ip (or cluster-announce-hostname) and cluster-announce-port on that node",
        ),
    };
    finding.found = format!("{}; the address is not in the URL: {by} announce it", finding.found);
    let mend = finding.mend.unwrap_or_default();
    finding.mend = Some(format!(
        "if this machine reaches the server only by another address (containers, NAT), set {settings}; else {mend}"
    ));
    finding
}

pub(super) fn version(seen: &Seen) -> Option<Finding> {
    const CHECK: &str = "version";
    // Valkey calls itself Redis 7.2.4 and tells its own version apart.
    let (name, text) = match seen.info("valkey_version") {
        Some(version) => ("Valkey", version),
        None => ("Redis", seen.info("redis_version")?),
    };
    let mut numbers = text.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("{name} {text}");
    if version >= VERSION_LEAST {
        return Some(Finding::ok(CHECK, found));
    }
    let (major, minor) = VERSION_LEAST;
    Some(Finding::warning(
        CHECK,
        found,
        format!("shardlock is tested with {major}.{minor} and later; older ones lack commands that it may use"),
        format!("upgrade the server to {major}.{minor} or later"),
    ))
}

/// Whether it is the kind of server that the URL says.
pub(super) fn mode(seen: &Seen, kind: Kind) -> Option<Finding> {
    const CHECK: &str = "mode";
    let mode = seen.info("redis_mode").or_else(|| seen.info("server_mode"))?;
    let why = "a shard's servers must be what its URL says, or requests fail or go to the wrong server";
    Some(match (mode, kind) {
        ("cluster", Kind::Cluster) => Finding::ok(CHECK, "a node of a cluster"),
        ("standalone", Kind::Cluster) => Finding::error(
            CHECK,
            "a server on its own, no node of a cluster",
            why,
            "use redis:// for this server, or start it with cluster-enabled yes and make it part of a cluster (redis-cli --cluster create)",
        ),
        ("standalone", _) => Finding::ok(CHECK, "a server on its own"),
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
        (other, _) => Finding::note(CHECK, other, why, "see what kind of server this is"),
    })
}

/// What could not be looked at, so that it is not taken for being well.
pub(super) fn not_looked_at(seen: &Seen) -> Vec<Finding> {
    let user = &seen.user;
    let mut findings = Vec::new();
    if let Err(reason) = &seen.info {
        findings.push(Finding::note(
            "info",
            format!("INFO is refused: {reason}"),
            "version, role, replicas and memory can't be looked at, so nothing is said of them",
            format!("ACL SETUSER {user} +info, or look by hand: redis-cli INFO"),
        ));
    }
    if let Err(reason) = &seen.settings {
        findings.push(Finding::note(
            "config",
            format!("CONFIG GET is refused: {reason}"),
            "some of the server's settings can't be looked at, so nothing is said of them",
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

    fn trouble(kind: TroubleKind, has_login: bool, encrypted: bool) -> String {
        let trouble = Trouble {
            kind,
            reason: "the reason".to_owned(),
        };
        let server = Server {
            place: "[::1]:7000".to_owned(),
            has_login,
            encrypted,
            seen: Err(trouble.clone()),
        };
        let finding = unreachable(&server, &trouble, Level::Error);
        assert_eq!(finding.level, Level::Error);
        format!("{} {}", finding.found, finding.mend.unwrap())
    }

    #[test]
    fn each_trouble_has_its_own_way_out() {
        assert!(trouble(TroubleKind::Unreachable, false, false).contains("redis-cli -h [::1] -p 7000 ping"));
        assert!(trouble(TroubleKind::Unreachable, false, false).contains("rediss:// in place of redis://"));
        assert!(trouble(TroubleKind::Silent, false, true).contains("redis:// in place of rediss://"));
        assert!(trouble(TroubleKind::Login, true, false).contains("correct the user and the password"));
        assert!(trouble(TroubleKind::Login, false, false).contains("redis://:password@host"));
        assert!(trouble(TroubleKind::Encryption, false, true).contains("tls_ca"));
    }

    #[test]
    fn old_versions_are_warned_of() {
        let level = |info: &str| version(&Seen::good(info, &[])).unwrap().level;
        assert_eq!(level("redis_version:6.2.9\n"), Level::Warning);
        assert_eq!(level("redis_version:7.0.0\n"), Level::Ok);
        assert_eq!(level("redis_version:7.2.4\nvalkey_version:9.1.2\n"), Level::Ok);
        assert_eq!(level("redis_version:10.0\n"), Level::Ok);
    }

    #[test]
    fn a_server_of_another_kind_is_an_error_with_the_right_url() {
        let found = |info: &str, kind| mode(&Seen::good(info, &[]), kind).unwrap();
        assert_eq!(found("", Kind::Single).level, Level::Ok);
        assert_eq!(found("redis_mode:cluster\n", Kind::Cluster).level, Level::Ok);
        let cluster = found("redis_mode:cluster\n", Kind::Redlock);
        assert!(cluster.level == Level::Error && cluster.mend.unwrap().contains("redis+cluster://"));
        let sentinel = found("redis_mode:sentinel\n", Kind::Single);
        assert!(sentinel.level == Level::Error && sentinel.mend.unwrap().contains("redis+sentinel://"));
        assert_eq!(found("", Kind::Cluster).level, Level::Error);
    }

    #[test]
    fn what_is_refused_is_a_note_and_no_error() {
        let mut seen = Seen::good("", &[]);
        assert!(not_looked_at(&seen).is_empty());
        seen.settings = Err("NOPERM".to_owned());
        seen.info = Err("NOPERM".to_owned());
        let findings = not_looked_at(&seen);
        assert!(findings.len() == 2 && findings.iter().all(|finding| finding.level == Level::Note));
        assert!(
            findings[1]
                .mend
                .as_ref()
                .unwrap()
                .contains("ACL SETUSER default +config|get")
        );
    }

    #[test]
    fn times_are_short() {
        for (micros, text) in [
            (7, "7 us"),
            (1_234, "1.2 ms"),
            (345_678, "345 ms"),
            (2_500_000, "2.5 s"),
        ] {
            assert_eq!(short(Duration::from_micros(micros)), text);
        }
    }
}
