//! Checks what a server forgets when it restarts.

use super::ShardKind;
use super::facts::Facts;
use super::finding::Finding;

const CHECK: &str = "persistence";
const MEND: &str = "CONFIG SET appendonly yes, CONFIG SET appendfsync everysec (or always), then CONFIG REWRITE or the same in redis.conf";

pub(super) fn persistence(facts: &Facts, kind: ShardKind) -> Option<Finding> {
    let file = match facts.setting("appendonly") {
        Some(value) => value == "yes",
        None => facts.info("aof_enabled")? == "1",
    };
    if !file {
        let (found, forgets) = match facts.setting("save") {
            Some("") => (
                "appendonly no, no snapshots".to_owned(),
                "a restart forgets all locks, so held keys can be acquired a second time",
            ),
            Some(save) => (
                format!("appendonly no, snapshots (save {save})"),
                "a restart forgets the locks acquired since the last snapshot, so held keys can be acquired a second time",
            ),
            // CONFIG GET is not allowed, and INFO does not say it.
            None => (
                "appendonly no, snapshots unknown".to_owned(),
                "a restart forgets all locks, or at least those acquired since the last snapshot, so held keys can be acquired a second time",
            ),
        };
        return Some(match kind {
            // The rule that a restarted node has no vote exists for this case.
            ShardKind::Redlock => Finding::note(
                CHECK,
                found,
                format!(
                    "{forgets}; a restarted node therefore has no vote until redlock_max_ttl has passed, so this is safe here"
                ),
                format!("no action needed; so that a restarted node knows its leases sooner: {MEND}"),
            ),
            _ => Finding::warning(
                CHECK,
                found,
                format!("{forgets} (tokens still keep growing)"),
                format!("{MEND}; otherwise keep a crashed server down for longer than the longest TTL"),
            ),
        });
    }
    let Some(sync) = facts.setting("appendfsync") else {
        return Some(Finding::ok(CHECK, "appendonly yes; appendfsync is unknown"));
    };
    let found = format!("appendonly yes, appendfsync {sync}");
    let pauses = facts.setting("no-appendfsync-on-rewrite") == Some("yes");
    Some(match (sync, pauses) {
        ("always", _) | ("everysec", false) if kind == ShardKind::Redlock || sync == "always" => {
            Finding::ok(CHECK, found)
        }
        ("everysec", false) => Finding::ok(
            CHECK,
            format!("{found}: a crash of the machine loses about a second of writes, a crash of the server none"),
        ),
        _ if kind == ShardKind::Redlock => Finding::note(
            CHECK,
            found,
            "a crash of the machine loses leases; a restarted node has no vote until redlock_max_ttl has passed, so this is safe here",
            "no action needed",
        ),
        ("everysec", true) => Finding::warning(
            CHECK,
            format!("{found}, no-appendfsync-on-rewrite yes"),
            "nothing is synced while the file is rewritten, so a crash of the machine may lose half a minute of locks",
            "CONFIG SET no-appendfsync-on-rewrite no",
        ),
        _ => Finding::warning(
            CHECK,
            found,
            "the operating system decides when to write to disk, so a crash of the machine may lose half a minute of locks",
            "CONFIG SET appendfsync everysec (or always)",
        ),
    })
}

/// Checks whether writing to disk fails, which makes the server refuse commands.
pub(super) fn disk(facts: &Facts) -> Option<Finding> {
    let failed = [
        ("aof_last_write_status", "the append-only file can't be written"),
        ("rdb_last_bgsave_status", "the last snapshot failed"),
    ];
    let (_, what) = failed
        .into_iter()
        .find(|(name, _)| facts.info(name).is_some_and(|status| status != "ok"))?;
    Some(Finding::error(
        "disk",
        what,
        "the server refuses writes until the disk works again (MISCONF), so locks fail",
        "check the server's log, and whether the disk is full or broken; BGSAVE retries the snapshot",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    fn found(kind: ShardKind, settings: &[(&str, &str)]) -> Finding {
        persistence(&Facts::healthy("", settings), kind).unwrap()
    }

    #[test]
    fn a_single_server_without_a_file_is_warned_of_and_a_node_of_a_quorum_is_not() {
        let off = &[("appendonly", "no")][..];
        let finding = found(ShardKind::Single, off);
        assert_eq!(finding.level, Level::Warning);
        assert!(finding.why.unwrap().contains("a restart forgets all locks"));
        assert!(finding.fix.unwrap().contains("CONFIG SET appendonly yes"));
        let snapshots = found(ShardKind::Sentinel, &[("appendonly", "no"), ("save", "3600 1")]);
        assert!(snapshots.level == Level::Warning && snapshots.why.unwrap().contains("since the last snapshot"));
        assert_eq!(found(ShardKind::Redlock, off).level, Level::Note);
    }

    #[test]
    fn level_depends_on_how_the_file_is_synced() {
        for (sync, pause, level) in [
            ("always", "no", Level::Ok),
            ("everysec", "no", Level::Ok),
            ("everysec", "yes", Level::Warning),
            ("no", "no", Level::Warning),
        ] {
            let settings = [("appendfsync", sync), ("no-appendfsync-on-rewrite", pause)];
            assert_eq!(found(ShardKind::Single, &settings).level, level, "{sync} {pause}");
            assert!(
                found(ShardKind::Redlock, &settings).level <= Level::Note,
                "{sync} {pause}"
            );
        }
    }

    #[test]
    fn a_disk_that_fails_is_an_error() {
        assert_eq!(disk(&Facts::healthy("aof_last_write_status:ok\n", &[])), None);
        assert_eq!(
            disk(&Facts::healthy("rdb_last_bgsave_status:err\n", &[]))
                .unwrap()
                .level,
            Level::Error
        );
    }
}
