//! Checks an etcd cluster.

mod probe;

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;
use shardlock::config::{Config, Endpoint};
use shardlock::tool;

use super::finding::{Finding, Level};
use super::format::{bytes, duration};
use super::permissions::is_loopback;
use super::report::{ServerReport, ShardReport};
use super::{map, timing};
use crate::servers::{Connector, ProbeError, ProbeErrorKind};
use probe::{Member, probe};

/// etcd's shortest lease, unless its election timeout was changed. Shorter leases are extended to
/// this.
const LEASE_MIN: Duration = Duration::from_secs(2);

type ProbedMember = Result<Member, ProbeError>;

pub(super) async fn examine(
    endpoint: &Endpoint,
    connector: &Connector<'_>,
    fingerprint: &str,
    report: &mut ShardReport,
) {
    let servers = tool::servers(endpoint);
    let probed = join_all(servers.iter().map(|server| probe(server, connector))).await;
    report.findings.push(majority(&probed));
    report.findings.extend(leader(&probed));
    report.findings.extend(shard_map(&probed, fingerprint));
    report.findings.push(lease(connector.config));
    let all_are_silent = probed.iter().all(Result::is_err);
    for (server, member) in servers.iter().zip(&probed) {
        let level = if all_are_silent { Level::Error } else { Level::Warning };
        let findings = match member {
            Ok(member) => check_member(server.place(), member, connector.config),
            Err(error) => vec![unreachable(server.place(), error, level)],
        };
        report.servers.push(ServerReport {
            address: server.place().to_owned(),
            part: "member",
            findings,
        });
    }
}

/// Checks whether a majority of the members answers, and whether more members may fail.
fn majority(probed: &[ProbedMember]) -> Finding {
    const CHECK: &str = "majority";
    let reached = probed.iter().filter(|member| member.is_ok()).count();
    let reported = probed.iter().flatten().map(|member| member.members).max();
    let all = reported.filter(|&all| all > 0).unwrap_or(probed.len());
    let found = format!(
        "{reached} of the URL's {} members answer, {all} are in the cluster",
        probed.len()
    );
    let health = "check that the members run and can be reached: etcdctl endpoint health";
    // A member that denies access has also reached a majority.
    let is_answered = |member: &Member| member.map.is_ok() || member.denied.is_some();
    if reached == 0 {
        return Finding::error(CHECK, found, "no lock of this shard can be acquired", health);
    }
    if !probed.iter().flatten().any(is_answered) {
        return Finding::error(
            CHECK,
            format!("{found}, and none of them has a majority behind it"),
            "no lock of this shard can be acquired",
            health,
        );
    }
    if reached < probed.len() {
        return Finding::warning(
            CHECK,
            found,
            "if more members fail, there may be no majority left",
            health,
        );
    }
    if all < 3 {
        return Finding::note(
            CHECK,
            found,
            "with fewer than three members, etcd does not survive any failure",
            "use three or five members: etcdctl member add",
        );
    }
    Finding::ok(CHECK, found)
}

fn leader(probed: &[ProbedMember]) -> Option<Finding> {
    const CHECK: &str = "leader";
    let leaders: BTreeSet<u64> = probed.iter().flatten().map(|member| member.leader).collect();
    if leaders.is_empty() {
        return None;
    }
    Some(match (leaders.len(), leaders.contains(&0)) {
        (1, false) => Finding::ok(CHECK, "all members that answer follow the same leader"),
        _ => Finding::error(
            CHECK,
            "there is no leader, or members follow different ones",
            "without a leader that a majority follows, no lock of this shard can be acquired",
            "if this persists, check that a majority of the members run and can reach each other: etcdctl endpoint status",
        ),
    })
}

/// Checks the shard map. All members store the same one, so the first successful answer is enough.
fn shard_map(probed: &[ProbedMember], fingerprint: &str) -> Option<Finding> {
    let member = probed.iter().flatten().find(|member| member.map.is_ok())?;
    map::fingerprint(&member.map, fingerprint)
}

/// Checks whether etcd grants leases as short as the configured TTL.
fn lease(config: &Config) -> Finding {
    const CHECK: &str = "lease-ttl";
    let found = format!("ttl {:?}", config.ttl);
    if config.ttl >= LEASE_MIN {
        return Finding::ok(CHECK, found);
    }
    Finding::warning(
        CHECK,
        found,
        format!(
            "etcd grants no lease shorter than 1.5 times its election timeout, {LEASE_MIN:?} unless that was changed: the locks of a \
             process that died stay taken for that time"
        ),
        format!("set ttl to {LEASE_MIN:?} or more; a shorter --election-timeout of etcd allows shorter leases"),
    )
}

/// Reports why a member could not be examined.
fn unreachable(address: &str, error: &ProbeError, level: Level) -> Finding {
    let ProbeError { kind, reason } = error;
    let health = format!("etcdctl --endpoints {address} endpoint health");
    let (found, fix) = match kind {
        ProbeErrorKind::Login if reason.contains("not enabled") => (
            format!("the login was refused: {reason}"),
            "leave the user and the password out of the URL, or run etcdctl auth enable".to_owned(),
        ),
        ProbeErrorKind::Login => (
            format!("the login was refused: {reason}"),
            "correct the user and the password in the shard's URL (etcd://user:password@host; write characters such as @ and / as %40 and \
             %2F), or run etcdctl user passwd <user>"
                .to_owned(),
        ),
        ProbeErrorKind::Tls => (
            format!("no encrypted connection: {reason}"),
            "set tls_ca to the PEM file of the CA that signed etcd's certificate, and use the host name of the certificate in the URL; if etcd \
             asks for a client certificate, set tls_cert and tls_key"
                .to_owned(),
        ),
        ProbeErrorKind::Timeout => (
            format!("connected or connecting, but no answer in time: {reason}"),
            format!("check whether the member hangs or is overloaded ({health}), or raise store_timeout"),
        ),
        ProbeErrorKind::Unreachable | ProbeErrorKind::Database | ProbeErrorKind::UnexpectedReply => (
            format!("no answer: {reason}"),
            format!("{health}; check whether the URL needs TLS (etcds:// and tls_ca)"),
        ),
    };
    let why = "if a majority of the members is down, locks of this shard fail";
    Finding::new("reachable", level, found, why, fix)
}

fn check_member(address: &str, member: &Member, config: &Config) -> Vec<Finding> {
    let mut findings = vec![
        Finding::ok(
            "reachable",
            format!("a round trip takes {}", duration(member.round_trips.median)),
        ),
        timing::measured(&member.round_trips, config),
    ];
    let mut numbers = member.version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    findings.push(if version >= (3, 4) {
        Finding::ok("version", format!("etcd {}", member.version))
    } else {
        Finding::warning(
            "version",
            format!("etcd {}", member.version),
            "shardlock is tested with 3.4 and later",
            "upgrade etcd to 3.4 or later",
        )
    });
    findings.push(access(address, member));
    findings.extend(permitted(member, &config.namespace));
    let found = format!("{} on disk", bytes(member.bytes.max(0) as u64));
    findings.push(if member.alarms.is_empty() {
        Finding::ok("alarms", found)
    } else {
        Finding::error(
            "alarms",
            format!("{}; {found}", member.alarms.join(", ")),
            "etcd refuses writes while it has an alarm (NOSPACE: its quota is used up), so locks fail",
            "etcdctl compact <revision>, etcdctl defrag, then etcdctl alarm disarm; raise --quota-backend-bytes; set --auto-compaction-retention",
        )
    });
    findings
}

/// Checks whether a password or a client certificate protects the locks.
fn access(address: &str, member: &Member) -> Finding {
    const CHECK: &str = "access";
    let why = "anyone who can reach the member can release and take every lock";
    let fix = "run etcdctl auth enable and put a user into the URL: etcd://user:password@host; or use --client-cert-auth with etcds://, tls_cert and tls_key";
    match (&member.user, member.shows_certificate) {
        (Some(user), _) => Finding::ok(CHECK, format!("as user {user} with a password")),
        (None, true) => Finding::ok(CHECK, "with a certificate"),
        (None, false) if is_loopback(address) => Finding::note(CHECK, "no password and no certificate", why, fix),
        (None, false) => Finding::warning(CHECK, "no password and no certificate", why, fix),
    }
}

/// Checks whether the user has the permissions that locks need. Without a majority, this is
/// unknown.
fn permitted(member: &Member, namespace: &str) -> Option<Finding> {
    const CHECK: &str = "acl";
    let user = member.user.as_deref().unwrap_or("without a name");
    let Some(refusal) = &member.denied else {
        let found = format!("user {user} may read and write all keys that start with {namespace:?}");
        return member.map.is_ok().then(|| Finding::ok(CHECK, found));
    };
    let fix = match member.user {
        Some(_) => format!("etcdctl role grant-permission <role of {user}> --prefix=true readwrite {namespace}"),
        None => "put a user and its password into the shard's URL: etcd://user:password@host".to_owned(),
    };
    Some(Finding::error(
        CHECK,
        format!("user {user} may not read and write all keys that start with {namespace:?}: {refusal}"),
        "locks fail",
        fix,
    ))
}

#[cfg(test)]
mod tests {
    use super::super::facts::RoundTrips;
    use super::*;

    fn member() -> Member {
        let times = vec![Duration::from_millis(1)];
        Member {
            round_trips: RoundTrips::of(times).unwrap(),
            version: "3.4.23".to_owned(),
            leader: 7,
            bytes: 0,
            members: 3,
            alarms: Vec::new(),
            user: None,
            shows_certificate: false,
            map: Ok(None),
            denied: None,
        }
    }

    fn dead(kind: ProbeErrorKind, reason: &str) -> ProbeError {
        ProbeError {
            kind,
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn members_must_answer_and_follow_one_leader() {
        let refused = Err(dead(ProbeErrorKind::Unreachable, "refused"));
        let level = |probed: &[_]| majority(probed).level;
        assert_eq!(level(&[Ok(member()), Ok(member()), Ok(member())]), Level::Ok);
        assert_eq!(level(&[Ok(member()), refused.clone()]), Level::Warning);
        let alone = Member {
            map: Err("no answer".to_owned()),
            ..member()
        };
        assert_eq!(level(&[Ok(alone), refused.clone(), refused.clone()]), Level::Error);
        assert_eq!(level(&[refused]), Level::Error);
        let lost = Member { leader: 0, ..member() };
        assert_eq!(leader(&[Ok(member())]).unwrap().level, Level::Ok);
        assert_eq!(leader(&[Ok(member()), Ok(lost)]).unwrap().level, Level::Error);
    }

    #[test]
    fn alarms_and_old_versions_are_reported() {
        let bad = Member {
            version: "3.3.0".to_owned(),
            alarms: vec!["alarm Nospace".to_owned()],
            ..member()
        };
        let levels = |member| -> Vec<_> {
            let findings = check_member("127.0.0.1:1", &member, &Config::default()).into_iter();
            let bad = findings.filter(|finding| finding.level > Level::Note);
            bad.map(|finding| (finding.check, finding.level)).collect()
        };
        assert_eq!(levels(member()), []);
        assert_eq!(levels(bad), [("version", Level::Warning), ("alarms", Level::Error)]);
    }

    #[test]
    fn each_probe_error_has_its_own_fix() {
        let fix = |kind, reason| unreachable("a:1", &dead(kind, reason), Level::Error).fix.unwrap();
        assert!(fix(ProbeErrorKind::Login, "authentication failed").contains("correct the user"));
        assert!(fix(ProbeErrorKind::Login, "authentication is not enabled").contains("leave the user"));
        assert!(fix(ProbeErrorKind::Tls, "UnknownIssuer").contains("tls_ca"));
        assert!(fix(ProbeErrorKind::Unreachable, "refused").contains("etcds://"));
    }
}
