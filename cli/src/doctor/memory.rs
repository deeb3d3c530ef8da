//! Checks whether a server may evict locks or run out of memory.

use super::facts::Seen;
use super::finding::Finding;

/// From what share of `maxmemory` in use, in percent, memory counts as short.
const FULL_PERCENT: u64 = 90;

pub(super) fn policy(seen: &Seen) -> Option<Finding> {
    const CHECK: &str = "maxmemory-policy";
    let policy = seen.value("maxmemory-policy", "maxmemory_policy")?;
    if policy == "noeviction" {
        return Some(Finding::ok(CHECK, policy));
    }
    let limit = seen
        .value("maxmemory", "maxmemory")
        .and_then(|limit| limit.parse().ok());
    let mend = "CONFIG SET maxmemory-policy noeviction, then CONFIG REWRITE or the same in redis.conf; preferably use a server for locks only";
    Some(match limit {
        Some(0) => Finding::note(
            CHECK,
            format!("{policy}, without a limit (maxmemory 0)"),
            "without a limit nothing is evicted; with one, locks that are held could be deleted",
            mend,
        ),
        limit => Finding::error(
            CHECK,
            format!(
                "{policy}, with maxmemory {}",
                limit.map_or_else(|| "unknown".to_owned(), size)
            ),
            "when memory runs short, the server deletes keys: a deleted lease lets in a second holder, a deleted queue loses its waiters",
            mend,
        ),
    })
}

/// Checks whether memory is nearly full, or keys were already evicted.
pub(super) fn room(seen: &Seen) -> Vec<Finding> {
    let mut findings = Vec::new();
    if let Some(evicted) = seen.number("evicted_keys").filter(|&evicted| evicted > 0) {
        findings.push(Finding::warning(
            "evicted-keys",
            format!("{evicted} keys were evicted since the server started or its statistics were reset"),
            "locks may have been among them",
            "see maxmemory-policy; after fixing it, reset the count with CONFIG RESETSTAT",
        ));
    }
    let limit = seen
        .value("maxmemory", "maxmemory")
        .and_then(|limit| limit.parse::<u64>().ok());
    if let (Some(limit @ 1..), Some(used)) = (limit, seen.number("used_memory")) {
        let found = format!("{} of {} are in use", size(used), size(limit));
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

/// Formats a number of bytes.
pub(super) fn size(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["kB", "MB", "GB", "TB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let (mut value, mut unit) = (bytes as f64 / 1024.0, 0);
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    #[test]
    fn a_policy_that_evicts_is_an_error_where_there_is_a_limit() {
        let found = |name, limit| policy(&Seen::good("", &[("maxmemory-policy", name), ("maxmemory", limit)])).unwrap();
        assert_eq!(found("noeviction", "100").level, Level::Ok);
        assert_eq!(found("allkeys-lru", "0").level, Level::Note);
        for name in ["allkeys-lru", "volatile-ttl", "volatile-lru"] {
            let finding = found(name, "104857600");
            assert_eq!(finding.level, Level::Error);
            assert_eq!(finding.found, format!("{name}, with maxmemory 100.0 MB"));
            assert!(
                finding
                    .mend
                    .unwrap()
                    .starts_with("CONFIG SET maxmemory-policy noeviction")
            );
        }
    }

    #[test]
    fn the_policy_is_known_without_config_get_too() {
        let mut seen = Seen::good("maxmemory_policy:volatile-lru\nmaxmemory:1000\n", &[]);
        seen.settings = Err("NOPERM".to_owned());
        assert_eq!(policy(&seen).unwrap().level, Level::Error);
        seen.info = Err("NOPERM".to_owned());
        assert_eq!(policy(&seen), None);
    }

    #[test]
    fn short_memory_and_evictions_are_warned_of() {
        let levels = |info: &str| -> Vec<_> {
            let seen = Seen::good(info, &[("maxmemory", "1000")]);
            room(&seen)
                .into_iter()
                .map(|finding| (finding.check, finding.level))
                .collect()
        };
        assert_eq!(levels("used_memory:500\n"), [("memory", Level::Ok)]);
        assert_eq!(levels("used_memory:900\n"), [("memory", Level::Warning)]);
        assert_eq!(levels("evicted_keys:3\n"), [("evicted-keys", Level::Warning)]);
    }
}
