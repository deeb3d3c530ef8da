//! etcd.

use std::collections::BTreeSet;
use std::time::Instant;

use etcd_client::{AlarmAction, AlarmType, Certificate, Client, ConnectOptions, Identity, TlsOptions};
use futures_util::future::join_all;
use shardlock::{Endpoint, ServerUrl};

use super::finding::{Finding, Level};
use super::look::Asking;
use super::memory::size;
use super::reach::short;
use super::report::{ServerReport, ShardReport};

/// What a member tells.
#[derive(Debug, Clone, Default)]
struct Member {
    round_trip: std::time::Duration,
    version: String,
    /// The id of the leader, or zero if there is none.
    leader: u64,
    bytes: i64,
    members: usize,
    /// Errors and alarms, in words.
    alarms: Vec<String>,
}

pub(super) async fn examine(endpoint: &Endpoint, asking: &Asking<'_>, report: &mut ShardReport) {
    let servers = endpoint.servers();
    let seen = join_all(servers.iter().map(|server| async {
        let looked = tokio::time::timeout(asking.timeout(), look(server, asking)).await;
        looked.unwrap_or_else(|_| Err("no answer in time".to_owned()))
    }))
    .await;
    report.findings.push(majority(&seen));
    report.findings.extend(leader(&seen));
    for (server, member) in servers.iter().zip(&seen) {
        report.servers.push(ServerReport {
            place: server.place().to_owned(),
            part: "member",
            findings: of_member(server.place(), member),
        });
    }
}

async fn look(server: &ServerUrl, asking: &Asking<'_>) -> Result<Member, String> {
    let words = |error: etcd_client::Error| error.to_string();
    let mut options = ConnectOptions::new()
        .with_timeout(asking.timeout())
        .with_connect_timeout(asking.timeout());
    let url = url::Url::parse(server.as_str()).map_err(|error| error.to_string())?;
    let decoded = |text: &str| {
        percent_encoding::percent_decode_str(text)
            .decode_utf8_lossy()
            .into_owned()
    };
    if let Some(password) = url.password() {
        options = options.with_user(decoded(url.username()), decoded(password));
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
    let mut client = Client::connect([address], Some(options)).await.map_err(words)?;
    let sent = Instant::now();
    let status = client.status().await.map_err(words)?;
    let round_trip = sent.elapsed();
    let members = client.member_list().await.map_err(words)?.members().len();
    let mut alarms = status.errors().to_vec();
    // Who may not ask for alarms still sees the member's own errors.
    if let Ok(reply) = client.alarm(AlarmAction::Get, AlarmType::None, None).await {
        alarms.extend(reply.alarms().iter().map(|alarm| format!("alarm {:?}", alarm.alarm())));
    }
    Ok(Member {
        round_trip,
        version: status.version().to_owned(),
        leader: status.leader(),
        bytes: status.db_size(),
        members,
        alarms,
    })
}

fn majority(seen: &[Result<Member, String>]) -> Finding {
    const CHECK: &str = "majority";
    let reached = seen.iter().filter(|member| member.is_ok()).count();
    let all = seen
        .iter()
        .flatten()
        .map(|member| member.members)
        .max()
        .unwrap_or(seen.len());
    let found = format!(
        "{reached} of the URL's {} members answer, {all} are in the cluster",
        seen.len()
    );
    match reached {
        0 => Finding::error(
            CHECK,
            found,
            "no lock of this shard can be had",
            "see whether the members run and can be reached: etcdctl endpoint health",
        ),
        _ if reached < seen.len() => Finding::warning(
            CHECK,
            found,
            "there may be no majority left if more of them fail",
            "see whether the members run and can be reached: etcdctl endpoint health",
        ),
        _ if all < 3 => Finding::note(
            CHECK,
            found,
            "fewer than three members survive no failure",
            "use three or five members: etcdctl member add",
        ),
        _ => Finding::ok(CHECK, found),
    }
}

fn leader(seen: &[Result<Member, String>]) -> Option<Finding> {
    const CHECK: &str = "leader";
    let leaders: BTreeSet<u64> = seen.iter().flatten().map(|member| member.leader).collect();
    if leaders.is_empty() {
        return None;
    }
    Some(match (leaders.len(), leaders.contains(&0)) {
        (1, false) => Finding::ok(CHECK, "all members that answer follow the same one"),
        _ => Finding::error(
            CHECK,
            "there is none, or members follow different ones",
            "without a leader that a majority follows, no lock of this shard can be had",
            "if this does not pass within moments, see whether a majority of the members runs and reach one another: etcdctl endpoint status",
        ),
    })
}

fn of_member(place: &str, member: &Result<Member, String>) -> Vec<Finding> {
    let member = match member {
        Ok(member) => member,
        Err(reason) => {
            return vec![Finding::new(
                "reachable",
                Level::Warning,
                format!("no answer: {reason}"),
                "with a majority of the members down, locks of this shard fail",
                format!(
                    "etcdctl --endpoints {place} endpoint health; see whether the URL needs a user and a password, or TLS (etcds:// and tls_ca)"
                ),
            )];
        }
    };
    let mut findings = vec![Finding::ok(
        "reachable",
        format!("a round trip takes {}", short(member.round_trip)),
    )];
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
    let found = format!("{} on disk", size(member.bytes.max(0) as u64));
    findings.push(if member.alarms.is_empty() {
        Finding::ok("alarms", found)
    } else {
        Finding::error(
            "alarms",
            format!("{}; {found}", member.alarms.join(", ")),
            "etcd takes no writes while it has an alarm (NOSPACE: its quota is used up), so locks fail",
            "etcdctl compact <revision>, etcdctl defrag, then etcdctl alarm disarm; raise --quota-backend-bytes; set --auto-compaction-retention",
        )
    });
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member() -> Member {
        Member {
            version: "3.4.23".to_owned(),
            leader: 7,
            members: 3,
            ..Member::default()
        }
    }

    #[test]
    fn members_must_answer_and_follow_one_leader() {
        let dead = Err("refused".to_owned());
        let level = |seen: &[_]| majority(seen).level;
        assert_eq!(level(&[Ok(member()), Ok(member()), Ok(member())]), Level::Ok);
        assert_eq!(level(&[Ok(member()), dead.clone()]), Level::Warning);
        assert_eq!(level(&[dead]), Level::Error);
        let lost = Member { leader: 0, ..member() };
        assert_eq!(leader(&[Ok(member())]).unwrap().level, Level::Ok);
        assert_eq!(leader(&[Ok(member()), Ok(lost)]).unwrap().level, Level::Error);
    }

    #[test]
    fn alarms_and_old_versions_are_told() {
        let bad = Member {
            version: "3.3.0".to_owned(),
            alarms: vec!["alarm Nospace".to_owned()],
            ..member()
        };
        let levels = |member| -> Vec<_> {
            let findings = of_member("a:1", &Ok(member));
            findings.iter().map(|finding| finding.level).collect()
        };
        assert_eq!(levels(member()), [Level::Ok, Level::Ok, Level::Ok]);
        assert_eq!(levels(bad), [Level::Ok, Level::Warning, Level::Error]);
    }
}
