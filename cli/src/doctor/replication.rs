//! Checks the roles of servers and their replication.

use super::ShardKind;
use super::facts::Facts;
use super::finding::Finding;

/// How long a replica may be silent, in seconds. This is the server's default for
/// `min-replicas-max-lag`.
const LAG_MAX: u64 = 10;

/// Checks that the server is a primary.
pub(super) fn role(facts: &Facts, kind: ShardKind) -> Option<Finding> {
    const CHECK: &str = "role";
    match facts.info("role")? {
        "master" => return Some(Finding::ok(CHECK, "primary")),
        "slave" => {}
        other => {
            let why = "locks need a server that accepts writes";
            return Some(Finding::error(CHECK, other, why, "use the URL of a primary"));
        }
    }
    let primary = facts.primary().unwrap_or_else(|| "another server".to_owned());
    let found = format!("replica of {primary}");
    Some(match kind {
        ShardKind::Redlock => Finding::error(
            CHECK,
            found,
            "the nodes of a quorum must be independent: a replica refuses writes and fails with its primary",
            "REPLICAOF NO ONE on this server, or replace it in the URL by an independent server, in every process",
        ),
        _ => Finding::error(
            CHECK,
            found,
            "a replica refuses writes (READONLY), so locks fail",
            format!(
                "use the primary's URL, redis://{primary}; if there are sentinels, redis+sentinel:// follows the primary through failovers"
            ),
        ),
    })
}

/// Checks whether the server accepts writes, if it does not reveal its role.
pub(super) fn writes(facts: &Facts) -> Option<Finding> {
    let reported = facts.write_error.as_ref().filter(|_| facts.info.is_err())?;
    Some(Finding::error(
        "writes",
        reported,
        "the server currently refuses writes, so locks fail",
        "READONLY: this is a replica, use the URL of its primary; OOM: CONFIG SET maxmemory to a higher value; MISCONF: its disk is full \
         or broken; NOREPLICAS: it needs more replicas (min-replicas-to-write)",
    ))
}

/// Checks that a server which should be a replica is one, and is connected to its primary.
pub(super) fn replica(facts: &Facts, expected_primary: &str) -> Option<Finding> {
    const CHECK: &str = "role";
    facts.info("role")?;
    let Some(primary) = facts.primary() else {
        return Some(Finding::error(
            CHECK,
            format!("a primary, although it should be a replica of {expected_primary}"),
            "with two primaries, one key can have two holders; after a failover this should last only moments",
            format!(
                "if this persists: REPLICAOF {} on this server",
                expected_primary.replace(':', " ")
            ),
        ));
    };
    let found = format!("replica of {primary}");
    Some(if facts.info("master_link_status") == Some("up") {
        Finding::ok(CHECK, found)
    } else {
        Finding::warning(
            CHECK,
            format!("{found}, but the link is down"),
            "the replica does not receive new locks; if it were promoted now, they would be lost",
            "check the replica's log; masterauth and masteruser must match the primary, and the primary must be reachable from the replica",
        )
    })
}

/// Checks the number of replicas and how well they keep up.
pub(super) fn replicas(facts: &Facts, kind: ShardKind) -> Option<Finding> {
    const CHECK: &str = "replicas";
    if facts.info("role")? != "master" {
        return None;
    }
    let replicas = facts.replicas();
    if kind == ShardKind::Redlock {
        return (!replicas.is_empty()).then(|| {
            Finding::note(
                CHECK,
                format!("{} connected", replicas.len()),
                "locks do not use replicas of quorum nodes, and a promoted replica would lack some leases",
                "make sure that nothing promotes a replica under the node's address",
            )
        });
    }
    if replicas.is_empty() {
        let (found, why) = ("none connected", "while this server is down, its keys can't be locked");
        return Some(match kind {
            ShardKind::Single | ShardKind::Redlock => Finding::note(
                CHECK,
                found,
                why,
                "no action needed; redis+sentinel://, redis+cluster:// and redlock:// keep working when a server fails",
            ),
            ShardKind::Sentinel | ShardKind::Cluster => Finding::warning(
                CHECK,
                found,
                format!("{why}: there is no replica to promote"),
                "start a replica: REPLICAOF <primary's host> <port>; in a cluster, redis-cli --cluster add-node ... --cluster-slave",
            ),
        });
    }
    let late = replicas
        .iter()
        .find(|replica| replica.state != "online" || replica.lag > LAG_MAX);
    let most = replicas.iter().map(|replica| replica.behind).max().unwrap_or(0);
    Some(match late {
        None => Finding::ok(
            CHECK,
            format!("{} connected, at most {most} bytes behind", replicas.len()),
        ),
        Some(replica) => Finding::warning(
            CHECK,
            format!(
                "{} is {}, was last heard from {} s ago, and is {} bytes behind",
                replica.address, replica.state, replica.lag, replica.behind
            ),
            "if the replica is promoted, locks that it has not received are lost",
            "check the replica's log and load, and the network between the two servers",
        ),
    })
}

/// Checks whether the primary refuses writes without enough replicas.
pub(super) fn min_replicas_to_write(facts: &Facts, kind: ShardKind) -> Option<Finding> {
    const CHECK: &str = "min-replicas-to-write";
    if facts.is_replica() || kind == ShardKind::Redlock {
        return None;
    }
    let least: u64 = facts.setting(CHECK)?.parse().ok()?;
    let good = facts
        .number("min_slaves_good_slaves")
        .unwrap_or(facts.replicas().len() as u64);
    let found = format!("{least}, {good} in step");
    if least > good {
        return Some(Finding::error(
            CHECK,
            found,
            "the server refuses all writes (NOREPLICAS), so locks fail",
            format!("bring {least} replicas in step, or CONFIG SET min-replicas-to-write {good}"),
        ));
    }
    if least == 0 && kind != ShardKind::Single {
        return Some(Finding::note(
            CHECK,
            "0",
            "a primary that is cut off from its replicas keeps granting locks that a promoted replica also grants",
            "CONFIG SET min-replicas-to-write 1 and CONFIG SET min-replicas-max-lag 10 on each server; this narrows the gap but does not close it",
        ));
    }
    (least > 0).then(|| Finding::ok(CHECK, found))
}

/// Checks whether the setting `min_replicas_acked` can be satisfied.
pub(super) fn acknowledgements(facts: &Facts, kind: ShardKind, acked: u32) -> Option<Finding> {
    const CHECK: &str = "min_replicas_acked";
    if acked == 0 || kind == ShardKind::Redlock || facts.info("role")? != "master" {
        return None;
    }
    let online = facts
        .replicas()
        .iter()
        .filter(|replica| replica.state == "online")
        .count();
    let found = format!("{acked}, with {online} replicas online");
    Some(if online as u64 >= u64::from(acked) {
        Finding::ok(CHECK, found)
    } else {
        Finding::error(
            CHECK,
            found,
            "a lock counts as acquired only after this number of replicas have confirmed it, so every lock fails",
            format!(
                "start more replicas, or set min_replicas_acked = {online} (SHARDLOCK_MIN_REPLICAS_ACKED={online})"
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    const REPLICA: &str = "role:slave\nmaster_host:10.0.0.1\nmaster_port:6379\nmaster_link_status:up\n";
    const TWO: &str = "connected_slaves:2\nslave0:ip=a,port=1,state=online,offset=1000,lag=0\n\
                       slave1:ip=b,port=1,state=online,offset=900,lag=1\nmin_slaves_good_slaves:2\n";

    fn facts(info: &str) -> Facts {
        Facts::healthy(info, &[])
    }

    #[test]
    fn a_replica_given_as_shard_is_an_error_that_names_the_primary() {
        assert_eq!(role(&facts(""), ShardKind::Single).unwrap().level, Level::Ok);
        let finding = role(&facts(REPLICA), ShardKind::Single).unwrap();
        assert_eq!(finding.level, Level::Error);
        assert!(finding.fix.unwrap().contains("redis://10.0.0.1:6379"));
        let node = role(&facts(REPLICA), ShardKind::Redlock).unwrap();
        assert!(node.level == Level::Error && node.why.unwrap().contains("independent"));
    }

    #[test]
    fn a_server_that_takes_no_writes_is_known_without_its_role() {
        let mut facts = facts("");
        facts.write_error = Some("READONLY: You can't write".to_owned());
        assert_eq!(writes(&facts), None);
        facts.info = Err("NoPerm".to_owned());
        assert_eq!(writes(&facts).unwrap().level, Level::Error);
    }

    #[test]
    fn a_replica_must_be_connected_to_its_primary() {
        let level = |info: &str| replica(&facts(info), "10.0.0.1:6379").unwrap().level;
        assert_eq!(level(REPLICA), Level::Ok);
        assert_eq!(level(&format!("{REPLICA}master_link_status:down\n")), Level::Warning);
        assert_eq!(level(""), Level::Error);
    }

    #[test]
    fn replicas_are_of_use_where_one_can_be_promoted() {
        let level = |info: &str, kind| replicas(&facts(info), kind).map(|finding| finding.level);
        assert_eq!(level("", ShardKind::Single), Some(Level::Note));
        assert_eq!(level("", ShardKind::Sentinel), Some(Level::Warning));
        assert_eq!(level("", ShardKind::Redlock), None);
        assert_eq!(level(TWO, ShardKind::Cluster), Some(Level::Ok));
        assert_eq!(level(TWO, ShardKind::Redlock), Some(Level::Note));
        assert_eq!(
            level(&TWO.replace("lag=1", "lag=11"), ShardKind::Single),
            Some(Level::Warning)
        );
        assert_eq!(
            level(&TWO.replacen("online", "wait_bgsave", 1), ShardKind::Single),
            Some(Level::Warning)
        );
    }

    #[test]
    fn more_acknowledgements_than_replicas_can_never_be_met() {
        let level = |acked| acknowledgements(&facts(TWO), ShardKind::Single, acked).map(|finding| finding.level);
        assert_eq!(
            (level(0), level(2), level(3)),
            (None, Some(Level::Ok), Some(Level::Error))
        );
        assert_eq!(acknowledgements(&facts(TWO), ShardKind::Redlock, 3), None);
    }

    #[test]
    fn a_primary_that_refuses_writes_for_want_of_replicas_is_an_error() {
        let level = |least, kind| {
            let facts = Facts::healthy(TWO, &[("min-replicas-to-write", least)]);
            min_replicas_to_write(&facts, kind).map(|finding| finding.level)
        };
        assert_eq!(level("3", ShardKind::Single), Some(Level::Error));
        assert_eq!(level("2", ShardKind::Sentinel), Some(Level::Ok));
        assert_eq!(level("0", ShardKind::Sentinel), Some(Level::Note));
        assert_eq!(level("0", ShardKind::Single), None);
    }
}
