//! Checks the shard map: whether the stored one matches this configuration.

use std::collections::BTreeMap;

use shardlock::config::{Endpoint, ShardConfig};

use super::finding::Finding;
use crate::map::expect_option;

/// Compares the `stored` fingerprint with `ours`, which a manager of this configuration would
/// store.
pub(super) fn fingerprint(stored: &Result<Option<String>, String>, ours: &str) -> Option<Finding> {
    const CHECK: &str = "shard-map";
    let theirs = match stored {
        Ok(Some(theirs)) => theirs,
        Ok(None) => return Some(Finding::ok(CHECK, "none stored yet; the first lock stores it")),
        // A missing permission is reported by another check. In a cluster, another node has the
        // key.
        Err(_) => return None,
    };
    if shardlock::tool::maps_agree(ours, theirs) {
        return Some(Finding::ok(CHECK, format!("as configured: {theirs}")));
    }
    let version = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
    if version(theirs) != version(ours) {
        return Some(Finding::error(
            CHECK,
            format!("stored by another version of shardlock: {theirs:?}; this version stores {ours:?}"),
            "versions that store locks differently would not see each other's locks, so managers of this version are refused",
            "use the same version everywhere, or a separate namespace for this one (the setting namespace)",
        ));
    }
    Some(Finding::error(
        CHECK,
        format!("{theirs:?} is stored, but this configuration has {ours:?}"),
        "with different maps, one key could be locked in two places at a time, so managers of this configuration are refused",
        format!(
            "configure the same shards in the same order in every process, or another namespace; if the change is intended, stop all \
             processes that lock here, then run `shardlock map set {}`",
            expect_option(theirs)
        ),
    ))
}

/// Checks from the URLs alone that no two shards have the same address.
pub(super) fn addresses(shards: &[ShardConfig]) -> Option<Finding> {
    const CHECK: &str = "shards";
    let mut by_address: BTreeMap<String, &str> = BTreeMap::new();
    for shard in shards {
        let endpoint = Endpoint::parse(&shard.url).ok()?;
        // Compare without the scheme and the user: they do not change the address.
        let shown = endpoint.to_string();
        let address = shown.split_once("://").map_or("", |(_, rest)| rest);
        let address = address
            .rsplit_once('@')
            .map_or(address, |(_, address)| address)
            .to_owned();
        if let Some(other) = by_address.insert(address, &shard.name) {
            return Some(Finding::error(
                CHECK,
                format!("{other} and {} have the same address, {shown}", shard.name),
                "each shard needs its own server, or its own database: managers are refused because of the other shard's map",
                "correct one of the two URLs, or remove one of the shards, in every process",
            ));
        }
    }
    (shards.len() > 1).then(|| Finding::ok(CHECK, format!("{} shards, each with its own address", shards.len())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    const OURS: &str = "v2 a:0-8191,b:8192-16383 here=a";

    fn found(theirs: Option<&str>) -> Finding {
        let stored = Ok(theirs.map(str::to_owned));
        fingerprint(&stored, OURS).unwrap()
    }

    #[test]
    fn another_map_is_an_error_that_shows_both() {
        assert_eq!(found(None).level, Level::Ok);
        assert_eq!(found(Some(OURS)).level, Level::Ok);
        assert_eq!(found(Some("v2 x:0-8191,y:8192-16383 here=x")).level, Level::Ok);
        let other = found(Some("v2 a:0-16383 here=a"));
        assert_eq!(other.level, Level::Error);
        assert!(other.found.contains("a:0-16383") && other.found.contains("b:8192-16383"));
        assert!(other.fix.unwrap().contains("map set --expect 'v2 a:0-16383'"));
    }

    #[test]
    fn another_version_is_told_apart() {
        let finding = found(Some("v3 a:0-8191,b:8192-16383 here=a"));
        assert!(finding.level == Level::Error && finding.found.contains("another version"));
    }

    #[test]
    fn two_shards_must_not_be_the_same_place() {
        let level = |urls: &[&str]| {
            let shards: Vec<_> = urls.iter().map(|url| ShardConfig::new("a", *url)).collect();
            addresses(&shards).map(|finding| finding.level)
        };
        assert_eq!(level(&["redis://a"]), None);
        assert_eq!(level(&["redis://a", "redis://b", "redis://a/1"]), Some(Level::Ok));
        assert_eq!(level(&["redis://a", "redis://u:s3cret@a:6379/0"]), Some(Level::Error));
    }
}
