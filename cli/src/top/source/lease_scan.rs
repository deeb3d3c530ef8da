//! Finds leases on Redis servers with little load: by SCAN in small steps, never by KEYS, and never
//! more keys of a server at a time than the budget. The next search continues where the previous
//! one stopped.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use deadpool_redis::redis::cmd;
use shardlock::LockKey;
use shardlock::config::{Config, Endpoint};
use shardlock::tool::{self, ServerUrl};

use crate::servers::{Connector, ServerPools, escape_glob, primaries, query};

/// The keys that a server scans in one step, well under a millisecond of its time.
const KEYS_PER_STEP: u64 = 200;
/// The time limit of a search, per server.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(2);

/// Where each server's next search starts, and the connections to the servers.
#[derive(Debug, Default)]
pub(super) struct Cursors {
    next: BTreeMap<(String, String), u64>,
    pools: ServerPools,
}

/// The result of searching one shard.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) keys: Vec<LockKey>,
    /// Whether keys are left for the next search.
    pub(super) more: bool,
}

/// Why a shard can't be searched.
pub(super) type SearchError = String;

/// Scans about `budget` keys of each server of the shard that stores leases.
pub(super) async fn search(
    shard: &str,
    endpoint: &Endpoint,
    config: &Config,
    cursors: &mut Cursors,
    budget: u64,
) -> Result<Found, SearchError> {
    let connector = Connector::with_pools(config, cursors.pools.clone()).map_err(|error| format!("{error:#}"))?;
    let servers = primaries(endpoint, &connector)
        .await
        .map_err(|error| format!("{error:#}"))?;
    let Some(servers) = servers else {
        let kind = endpoint.scheme();
        return Err(format!("keys of {kind}:// can't be searched; name them with --key"));
    };
    let mut found = Found::default();
    for server in servers {
        let cursor = cursors
            .next
            .entry((shard.to_owned(), server.place().to_owned()))
            .or_default();
        search_server(&server, &connector, config, cursor, budget, &mut found)
            .await
            .map_err(|reason| format!("{}: {reason}", server.place()))?;
    }
    Ok(found)
}

async fn search_server(
    server: &ServerUrl,
    connector: &Connector<'_>,
    config: &Config,
    cursor: &mut u64,
    budget: u64,
    found: &mut Found,
) -> Result<(), SearchError> {
    let mut connection = connector.connect(server).await.map_err(|error| error.reason)?;
    let (pattern, began) = (pattern(&config.namespace), Instant::now());
    for _ in 0..budget.div_ceil(KEYS_PER_STEP) {
        let mut step = cmd("SCAN");
        step.arg(*cursor)
            .arg("MATCH")
            .arg(&pattern)
            .arg("COUNT")
            .arg(KEYS_PER_STEP);
        let (next, names): (u64, Vec<Vec<u8>>) = query(&mut connection, &step).await?;
        let names = names.iter().filter_map(|name| std::str::from_utf8(name).ok());
        found
            .keys
            .extend(names.filter_map(|name| tool::key_of_lease(config, name)));
        *cursor = next;
        if next == 0 {
            return Ok(());
        }
        if began.elapsed() >= SEARCH_TIME_MAX {
            break;
        }
    }
    found.more = true;
    Ok(())
}

/// A glob pattern that matches all leases of a namespace.
fn pattern(namespace: &str) -> String {
    format!("{}*", escape_glob(namespace))
}

#[cfg(test)]
mod tests {
    use super::pattern;

    #[test]
    fn a_namespace_is_matched_as_it_stands() {
        assert_eq!(pattern("lock:"), "lock:*");
        assert_eq!(pattern("a*[b]?\\"), "a\\*\\[b\\]\\?\\\\*");
    }
}
