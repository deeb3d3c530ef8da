//! Finds keys with leases on the servers of a shard, with little load: on Redis by SCAN in small
//! steps, never by KEYS, on etcd by ranges of names, and never more than the limits. The next
//! search continues where the previous one stopped.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use deadpool_redis::redis::cmd;
use shardlock::LockKey;
use shardlock::config::{Config, Endpoint};
use shardlock::tool::{self, ServerUrl};

use super::{Connector, ServerPools, escape_glob, primaries, query};

/// The keys that a server scans in one step, well under a millisecond of its time.
const KEYS_PER_STEP: u64 = 200;

/// What is searched for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Search<'a> {
    pub(crate) config: &'a Config,
    /// How the found keys begin.
    pub(crate) prefix: &'a str,
    pub(crate) limits: SearchLimits,
}

/// When a search of a server stops, although not all of its keys were searched.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SearchLimits {
    /// About how many keys are scanned.
    pub(crate) scanned_max: u64,
    pub(crate) time_max: Duration,
    /// How many keys are found in all, but for one step.
    pub(crate) found_max: usize,
}

/// Where each server's next search starts, and the connections to the servers.
#[derive(Debug, Default)]
pub(crate) struct Cursors {
    redis: BTreeMap<(String, String), u64>,
    #[cfg(feature = "etcd")]
    etcd: BTreeMap<String, Vec<u8>>,
    pools: ServerPools,
}

/// The result of searching one shard.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// The keys, and how many servers of the shard have each.
    pub(crate) keys: BTreeMap<LockKey, usize>,
    /// Whether keys are left for the next search.
    pub(crate) more: bool,
    /// Why servers could not be searched, one message each.
    pub(crate) failures: Vec<String>,
}

/// Searches each server of the shard that stores leases. The error is the reason why no server can
/// be searched.
pub(crate) async fn search(
    shard: &str,
    endpoint: &Endpoint,
    search: Search<'_>,
    cursors: &mut Cursors,
) -> Result<Found, String> {
    let connector =
        Connector::with_pools(search.config, cursors.pools.clone()).map_err(|error| format!("{error:#}"))?;
    let servers = primaries(endpoint, &connector)
        .await
        .map_err(|error| format!("{error:#}"))?;
    let Some(servers) = servers else {
        return search_other(shard, endpoint, search, &connector, cursors).await;
    };
    let mut found = Found::default();
    for server in servers {
        let cursor = cursors
            .redis
            .entry((shard.to_owned(), server.place().to_owned()))
            .or_default();
        let searched = search_server(&server, &connector, search, cursor, &mut found).await;
        if let Err(reason) = searched {
            found.failures.push(format!("{}: {reason}", server.place()));
        }
    }
    Ok(found)
}

/// Searches a shard that is not on Redis.
async fn search_other(
    shard: &str,
    endpoint: &Endpoint,
    search: Search<'_>,
    connector: &Connector<'_>,
    cursors: &mut Cursors,
) -> Result<Found, String> {
    match endpoint.scheme() {
        #[cfg(feature = "etcd")]
        "etcd" | "etcds" => {
            let cursor = cursors.etcd.entry(shard.to_owned()).or_default();
            etcd::search(endpoint, connector, search, cursor).await
        }
        kind => {
            let _ = (shard, search, connector, cursors);
            Err(format!("keys of {kind}:// can't be searched"))
        }
    }
}

async fn search_server(
    server: &ServerUrl,
    connector: &Connector<'_>,
    search: Search<'_>,
    cursor: &mut u64,
    found: &mut Found,
) -> Result<(), String> {
    let Search { config, prefix, limits } = search;
    let mut connection = connector.connect(server).await.map_err(|error| error.reason)?;
    let (pattern, began) = (pattern(&config.namespace, prefix), Instant::now());
    // SCAN may return a key twice.
    let mut here = BTreeSet::new();
    let mut is_complete = false;
    let mut result = Ok(());
    for _ in 0..limits.scanned_max.div_ceil(KEYS_PER_STEP) {
        let mut step = cmd("SCAN");
        step.arg(*cursor)
            .arg("MATCH")
            .arg(&pattern)
            .arg("COUNT")
            .arg(KEYS_PER_STEP);
        let (next, names): (u64, Vec<Vec<u8>>) = match query(&mut connection, &step).await {
            Ok(reply) => reply,
            Err(reason) => {
                result = Err(if reason.contains("NoPerm") {
                    format!("{reason}; grant it with +scan to list keys")
                } else {
                    reason
                });
                break;
            }
        };
        let names = names.iter().filter_map(|name| std::str::from_utf8(name).ok());
        let keys = names.filter_map(|name| tool::key_of_lease(config, name));
        here.extend(keys.filter(|key| key.as_str().starts_with(prefix)));
        *cursor = next;
        if next == 0 {
            is_complete = true;
            break;
        }
        if began.elapsed() >= limits.time_max || here.len() >= limits.found_max {
            break;
        }
    }
    // A server that fails is in the errors.
    found.more |= !is_complete && result.is_ok();
    for key in here {
        *found.keys.entry(key).or_default() += 1;
    }
    result
}

/// A glob pattern that matches all leases of a namespace whose keys begin with the prefix, and
/// perhaps others.
fn pattern(namespace: &str, prefix: &str) -> String {
    // These characters may be encoded in a name.
    let plain = prefix.split(['%', '{', '}']).next().unwrap_or_default();
    format!("{}{}*", escape_glob(namespace), escape_glob(plain))
}

/// Names in etcd.
#[cfg(feature = "etcd")]
mod etcd {
    use std::time::Instant;

    use etcd_client::GetOptions;
    use shardlock::config::Endpoint;
    use shardlock::tool;

    use super::{Found, Search};
    use crate::servers::Connector;
    use crate::servers::etcd::{connect, with_timeout};

    /// The names in one reply.
    const NAMES_PER_STEP: i64 = 1000;

    /// Reads names from the first member that answers: all members have the same.
    pub(super) async fn search(
        endpoint: &Endpoint,
        connector: &Connector<'_>,
        search: Search<'_>,
        cursor: &mut Vec<u8>,
    ) -> Result<Found, String> {
        let mut last_error = "the URL names no member".to_owned();
        for member in tool::servers(endpoint) {
            match connect(&member, connector).await {
                Ok(client) => {
                    let found = search_member(client, connector, search, cursor).await;
                    return found.map_err(|reason| format!("{}: {reason}", member.place()));
                }
                Err(error) => last_error = format!("{}: {}", member.place(), error.reason),
            }
        }
        Err(last_error)
    }

    async fn search_member(
        mut client: etcd_client::Client,
        connector: &Connector<'_>,
        search: Search<'_>,
        cursor: &mut Vec<u8>,
    ) -> Result<Found, String> {
        let Search { config, prefix, limits } = search;
        let (mut found, began, mut scanned) = (Found::default(), Instant::now(), 0);
        let namespace = config.namespace.as_bytes();
        let end = end_of(namespace);
        if cursor.is_empty() {
            *cursor = namespace.to_vec();
        }
        loop {
            let options = GetOptions::new()
                .with_range(end.clone())
                .with_keys_only()
                .with_limit(NAMES_PER_STEP);
            let page = with_timeout(connector, client.get(cursor.as_slice(), Some(options)))
                .await
                .map_err(|error| error.reason)?;
            let keys = page
                .kvs()
                .iter()
                .filter_map(|entry| tool::key_of_etcd_entry(config, entry.key()));
            let keys = keys.filter(|key| key.as_str().starts_with(prefix));
            found.keys.extend(keys.map(|key| (key, 1)));
            scanned += page.kvs().len() as u64;
            let Some(last) = page.kvs().last().filter(|_| page.more()) else {
                cursor.clear();
                return Ok(found);
            };
            *cursor = [last.key(), &[0]].concat();
            if scanned >= limits.scanned_max
                || began.elapsed() >= limits.time_max
                || found.keys.len() >= limits.found_max
            {
                found.more = true;
                return Ok(found);
            }
        }
    }

    /// The end of the range of all names that begin with this one. `\0` is the end of all names.
    fn end_of(prefix: &[u8]) -> Vec<u8> {
        let mut end = prefix.to_vec();
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                return end;
            }
        }
        vec![0]
    }
}

#[cfg(test)]
mod tests {
    use super::pattern;

    #[test]
    fn a_namespace_and_a_prefix_are_matched_as_they_stand() {
        assert_eq!(pattern("lock:", ""), "lock:*");
        assert_eq!(pattern("a*[b]?\\", "c*"), "a\\*\\[b\\]\\?\\\\c\\**");
        assert_eq!(pattern("lock:", "user:{7}"), "lock:user:*");
    }
}
