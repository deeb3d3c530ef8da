//! Checks a primary that sentinels watch.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use deadpool_redis::redis::cmd;
use futures_util::future::join_all;
use shardlock::config::{Config, Endpoint};
use shardlock::tool::{self, ServerUrl};

use super::finding::{Finding, Level};
use super::probe::probe;
use super::report::{ServerReport, ShardReport};
use super::server::{Expectations, check_server, unreachable_server};
use super::{ShardKind, clock};
use crate::servers::{Connector, ProbeError, host_port, primary_named, query};

/// The primary as one sentinel sees it. A query that the sentinel refused is an `Err` with its
/// error.
#[derive(Debug, Clone)]
struct SentinelView {
    /// The address of the primary, or `None` if the sentinel does not know the name.
    primary: Result<Option<String>, String>,
    /// The fields of `SENTINEL MASTER`.
    fields: BTreeMap<String, String>,
    replicas: Vec<String>,
    /// Whether enough sentinels can agree on a failover.
    quorum: Result<String, String>,
}

/// With fewer than three sentinels, the others can't outvote one that is cut off.
const SENTINELS_MIN: usize = 3;

/// How many replicas are examined at most.
const REPLICAS_MAX: usize = 16;

pub(super) async fn examine(
    endpoint: &Endpoint,
    connector: &Connector<'_>,
    fingerprint: &str,
    report: &mut ShardReport,
) {
    let name = tool::primary_name(endpoint).unwrap_or_default();
    let sentinels = tool::servers(endpoint);
    let views = join_all(sentinels.iter().map(|sentinel| view(sentinel, name, connector))).await;
    let answers = views.iter().filter(|view| view.is_ok()).count();
    for (sentinel, view) in sentinels.iter().zip(&views) {
        let level = if answers == 0 { Level::Error } else { Level::Warning };
        report.servers.push(match view {
            Ok(view) => ServerReport {
                address: sentinel.place().to_owned(),
                part: "sentinel",
                findings: check_sentinel(view, name, sentinels.len()),
            },
            Err(error) => unreachable_server(sentinel, "sentinel", error, level),
        });
    }
    let views: Vec<SentinelView> = views.into_iter().flatten().collect();
    report.findings.extend(agreement(&views, name));
    report.findings.extend(failover_time(&views, connector.config));
    let Some(primary) = views.iter().find_map(|view| view.primary.clone().ok().flatten()) else {
        return;
    };
    let replicas: BTreeSet<&String> = views
        .iter()
        .flat_map(|view| &view.replicas)
        .take(REPLICAS_MAX)
        .collect();
    let addresses =
        std::iter::once((&primary, None)).chain(replicas.into_iter().map(|address| (address, Some(primary.clone()))));
    let probes = addresses.filter_map(|(address, replica_of)| {
        let server = tool::server_at(endpoint, address)?;
        Some(async move { (probe(&server, ShardKind::Sentinel, connector).await, replica_of) })
    });
    let servers = join_all(probes).await;
    report
        .findings
        .extend(clock::compare_servers(servers.iter().map(|(server, _)| server)));
    for (server, replica_of) in servers {
        let mut expected = Expectations::member_of(ShardKind::Sentinel, connector.config, fingerprint, replica_of);
        expected.announced = true;
        report.servers.push(check_server(&server, &expected));
    }
}

async fn view(sentinel: &ServerUrl, name: &str, connector: &Connector<'_>) -> Result<SentinelView, ProbeError> {
    let mut connection = connector.connect(sentinel).await?;
    let question = |what: &str| {
        let mut command = cmd("SENTINEL");
        command.arg(what).arg(name);
        command
    };
    let primary = primary_named(&mut connection, name).await;
    // If the sentinel does not know the name, `primary` already reports that. Ignore errors here.
    let fields = query(&mut connection, &question("MASTER")).await.unwrap_or_default();
    let replicas: Vec<BTreeMap<String, String>> =
        query(&mut connection, &question("REPLICAS")).await.unwrap_or_default();
    let quorum = query(&mut connection, &question("CKQUORUM")).await;
    Ok(SentinelView {
        primary,
        fields,
        replicas: replicas
            .iter()
            .filter_map(|replica| Some(host_port(replica.get("ip")?, replica.get("port")?)))
            .collect(),
        quorum,
    })
}

/// Checks one sentinel that answers. `named` is the number of sentinels in the URL.
fn check_sentinel(view: &SentinelView, name: &str, named: usize) -> Vec<Finding> {
    const CHECK: &str = "primary";
    let primary = match &view.primary {
        Ok(Some(primary)) => primary,
        Ok(None) => {
            return vec![Finding::error(
                CHECK,
                format!("the sentinel knows no primary called {name:?}"),
                "the shard's primary can't be found",
                "correct the name in the URL (redis+sentinel://host,.../name; SENTINEL MASTERS lists the names), or run SENTINEL MONITOR <name> \
                 <host> <port> <quorum> on this sentinel",
            )];
        }
        Err(reason) => {
            return vec![Finding::error(
                CHECK,
                format!("the sentinel did not report the primary: {reason}"),
                "the shard's primary can't be found",
                "if the sentinel asks for a password, put it into the URL: ?sentinel_user=...&sentinel_password=...; if this is not a sentinel, \
                 use the address of one (port 26379)",
            )];
        }
    };
    let mut findings = Vec::new();
    let flags = view.fields.get("flags").map_or("", String::as_str);
    findings.push(if flags.contains("down") {
        Finding::error(
            CHECK,
            format!("{primary}, which this sentinel considers down ({flags})"),
            "a failover is due or in progress; until it is complete, locks of this shard fail",
            "check that the primary runs and can be reached from the sentinel; if no failover happens, see quorum",
        )
    } else {
        Finding::ok(CHECK, primary)
    });
    findings.push(match &view.quorum {
        Ok(reply) => Finding::ok("quorum", reply),
        Err(reason) if not_permitted(reason) => Finding::note(
            "quorum",
            format!("SENTINEL CKQUORUM is refused: {reason}"),
            "the replicas, and whether a failover is possible, were not checked",
            "ACL SETUSER <user> +sentinel|ckquorum +sentinel|master +sentinel|replicas on the sentinel, or check by hand",
        ),
        Err(reason) => Finding::error(
            "quorum",
            reason,
            "too few sentinels can agree on a failover, so a primary that fails stays down",
            "start the sentinels that are missing, or SENTINEL SET <name> quorum <fewer>",
        ),
    });
    let others = view
        .fields
        .get("num-other-sentinels")
        .and_then(|others| others.parse::<usize>().ok());
    if let Some(all) = others.map(|others| others + 1) {
        findings.push(if all < SENTINELS_MIN {
            Finding::warning(
                "sentinels",
                format!("{all} watch this primary"),
                "if one of them fails, no majority is left for a failover",
                "run three or more, on machines that do not fail together",
            )
        } else if all > named {
            Finding::note(
                "sentinels",
                format!("{all} watch this primary, {named} are in the URL"),
                "a process that starts while the sentinels in the URL are down does not find the primary",
                "name all of them in the URL",
            )
        } else {
            Finding::ok("sentinels", format!("{all} watch this primary"))
        });
    }
    findings
}

fn not_permitted(reason: &str) -> bool {
    reason.starts_with("NoPerm")
}

/// Checks that all sentinels that answer name the same primary.
fn agreement(views: &[SentinelView], name: &str) -> Option<Finding> {
    const CHECK: &str = "sentinels-agree";
    let named: BTreeSet<&String> = views
        .iter()
        .filter_map(|view| view.primary.as_ref().ok()?.as_ref())
        .collect();
    let mut iter = named.iter();
    let first = iter.next()?;
    Some(if iter.next().is_none() {
        Finding::ok(CHECK, format!("{name} is at {first}"))
    } else {
        let all: Vec<_> = named.iter().map(|address| address.as_str()).collect();
        Finding::error(
            CHECK,
            format!("the sentinels disagree on {name}: {}", all.join(" or ")),
            "processes that ask different sentinels lock one key on two servers",
            "if this persists: make sure that the sentinels can reach each other, watch the same primary, and announce addresses that all can \
             reach (sentinel announce-ip)",
        )
    })
}

/// Checks whether a lease outlasts the time after which a failover starts.
fn failover_time(views: &[SentinelView], config: &Config) -> Option<Finding> {
    const CHECK: &str = "down-after";
    let longest = views
        .iter()
        .filter_map(|view| view.fields.get("down-after-milliseconds")?.parse::<u64>().ok())
        .max()?;
    let down_after = Duration::from_millis(longest);
    let found = format!("down-after-milliseconds {longest}, ttl {:?}", config.ttl);
    Some(if down_after < config.ttl {
        Finding::ok(CHECK, found)
    } else {
        Finding::note(
            CHECK,
            found,
            "a failover takes longer than a lease lasts, so all locks of this shard are lost during a failover",
            format!(
                "SENTINEL SET <name> down-after-milliseconds {} on each sentinel, or set ttl to more than {down_after:?} plus the seconds that a \
                 failover takes",
                (config.ttl.as_millis() / 2).max(1)
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(primary: Option<&str>, fields: &[(&str, &str)]) -> SentinelView {
        let fields = [
            ("flags", "master"),
            ("num-other-sentinels", "2"),
            ("down-after-milliseconds", "5000"),
        ]
        .iter()
        .chain(fields)
        .map(|&(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
        SentinelView {
            primary: Ok(primary.map(str::to_owned)),
            fields,
            replicas: Vec::new(),
            quorum: Ok("OK 3 usable Sentinels.".to_owned()),
        }
    }

    fn levels(view: &SentinelView, named: usize) -> Vec<(&'static str, Level)> {
        let findings = check_sentinel(view, "m", named);
        findings
            .into_iter()
            .map(|finding| (finding.check, finding.level))
            .collect()
    }

    #[test]
    fn a_sentinel_must_know_the_primary_and_hold_it_to_be_up() {
        let good = [("primary", Level::Ok), ("quorum", Level::Ok), ("sentinels", Level::Ok)];
        assert_eq!(levels(&view(Some("a:1"), &[]), 3), good);
        assert_eq!(levels(&view(None, &[]), 3), [("primary", Level::Error)]);
        let down = view(Some("a:1"), &[("flags", "s_down,o_down,master")]);
        assert_eq!(levels(&down, 3)[0], ("primary", Level::Error));
        let refused = SentinelView {
            primary: Err("NOAUTH".to_owned()),
            ..view(None, &[])
        };
        let finding = check_sentinel(&refused, "m", 3).remove(0);
        assert!(finding.fix.unwrap().contains("sentinel_password"));
    }

    #[test]
    fn a_failover_needs_a_quorum_and_three_sentinels() {
        let few = SentinelView {
            quorum: Err("NOQUORUM 1 usable Sentinels.".to_owned()),
            ..view(Some("a:1"), &[("num-other-sentinels", "1")])
        };
        assert_eq!(
            levels(&few, 2)[1..],
            [("quorum", Level::Error), ("sentinels", Level::Warning)]
        );
        assert_eq!(levels(&view(Some("a:1"), &[]), 1)[2], ("sentinels", Level::Note));
        let refused = SentinelView {
            quorum: Err("NoPerm: this user has no permissions".to_owned()),
            ..view(Some("a:1"), &[])
        };
        assert_eq!(levels(&refused, 3)[1], ("quorum", Level::Note));
    }

    #[test]
    fn sentinels_must_agree() {
        let level = |addresses: &[&str]| {
            let views: Vec<_> = addresses.iter().map(|address| view(Some(address), &[])).collect();
            agreement(&views, "m").map(|finding| finding.level)
        };
        assert_eq!(level(&["a:1", "a:1"]), Some(Level::Ok));
        assert_eq!(level(&["a:1", "b:1"]), Some(Level::Error));
        assert_eq!(level(&[]), None);
    }

    #[test]
    fn a_failover_that_takes_longer_than_a_lease_is_told() {
        let level = |millis| {
            let views = [view(Some("a:1"), &[("down-after-milliseconds", millis)])];
            failover_time(&views, &Config::default()).unwrap().level
        };
        assert_eq!((level("5000"), level("30000")), (Level::Ok, Level::Note));
    }
}
