//! Checks whether a server may evict locks or run out of memory.

use super::facts::Facts;
use super::finding::Finding;
use super::format::bytes;

/// From what share of `maxmemory` in use, in percent, memory counts as short.
const FULL_PERCENT: u64 = 90;

pub(super) fn policy(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "maxmemory-policy";
    let policy = facts.value("maxmemory-policy", "maxmemory_policy")?;
    if policy == "noeviction" {
        return Some(Finding::ok(CHECK, policy));
    }
    let limit = facts
        .value("maxmemory", "maxmemory")
        .and_then(|limit| limit.parse().ok());
    let fix = "CONFIG SET maxmemory-policy noeviction, then CONFIG REWRITE or the same in redis.conf; preferably use a server for locks only";
    Some(match limit {
        Some(0) => Finding::note(
            CHECK,
            format!("{policy}, without a limit (maxmemory 0)"),
            "without a limit nothing is evicted; with one, locks that are held could be deleted",
            fix,
        ),
        limit => Finding::error(
            CHECK,
            format!(
                "{policy}, with maxmemory {}",
                limit.map_or_else(|| "unknown".to_owned(), bytes)
            ),
            "when memory runs short, the server deletes keys: a deleted lease lets in a second holder, a deleted queue loses its waiters",
            fix,
        ),
    })
}

/// Checks whether memory is nearly full, or keys were already evicted.
pub(super) fn usage(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(evicted) = facts.number("evicted_keys").filter(|&evicted| evicted > 0) {
        findings.push(Finding::warning(
            "evicted-keys",
            format!("{evicted} keys were evicted since the server started or its statistics were reset"),
            "locks may have been among them",
            "see maxmemory-policy; after fixing it, reset the count with CONFIG RESETSTAT",
        ));
    }
    let limit = facts
        .value("maxmemory", "maxmemory")
        .and_then(|limit| limit.parse::<u64>().ok());
    if let (Some(limit @ 1..), Some(used)) = (limit, facts.number("used_memory")) {
        let found = format!("{} of {} are in use", bytes(used), bytes(limit));
        findings.push(if used.saturating_mul(100) < limit.saturating_mul(FULL_PERCENT) {
            Finding::ok("memory", found)
        } else {
            Finding::warning(
                "memory",
                found,
                "at the limit the server refuses writes (OOM) or evicts keys, and locks fail",
                "CONFIG SET maxmemory to a higher value, or move other data to another server",
            )
        });
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    #[test]
    fn a_policy_that_evicts_is_an_error_where_there_is_a_limit() {
        let found =
            |name, limit| policy(&Facts::healthy("", &[("maxmemory-policy", name), ("maxmemory", limit)])).unwrap();
        assert_eq!(found("noeviction", "100").level, Level::Ok);
        assert_eq!(found("allkeys-lru", "0").level, Level::Note);
        for name in ["allkeys-lru", "volatile-ttl", "volatile-lru"] {
            let finding = found(name, "104857600");
            assert_eq!(finding.level, Level::Error);
            assert_eq!(finding.found, format!("{name}, with maxmemory 100.0 MB"));
            assert!(
                finding
                    .fix
                    .unwrap()
                    .starts_with("CONFIG SET maxmemory-policy noeviction")
            );
        }
    }

    #[test]
    fn the_policy_is_known_without_config_get_too() {
        let mut facts = Facts::healthy("maxmemory_policy:volatile-lru\nmaxmemory:1000\n", &[]);
        facts.settings = Err("NOPERM".to_owned());
        assert_eq!(policy(&facts).unwrap().level, Level::Error);
        facts.info = Err("NOPERM".to_owned());
        assert_eq!(policy(&facts), None);
    }

    #[test]
    fn short_memory_and_evictions_are_warned_of() {
        let levels = |info: &str| -> Vec<_> {
            let facts = Facts::healthy(info, &[("maxmemory", "1000")]);
            usage(&facts)
                .into_iter()
                .map(|finding| (finding.check, finding.level))
                .collect()
        };
        assert_eq!(levels("used_memory:500\n"), [("memory", Level::Ok)]);
        assert_eq!(levels("used_memory:900\n"), [("memory", Level::Warning)]);
        assert_eq!(levels("evicted_keys:3\n"), [("evicted-keys", Level::Warning)]);
    }
}
