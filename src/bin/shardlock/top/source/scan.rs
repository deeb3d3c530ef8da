//! Finds leases at servers of the Redis family, without harm to them: by SCAN in small steps, never by KEYS, and never more of a server's
//! keys at a time than was allowed. The next search goes on where this one ended.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use deadpool_redis::redis::cmd;
use shardlock::{Config, Endpoint, LockKey, ServerUrl};

use crate::asking::{Asking, ask, primaries};

/// How many of its keys a server looks at in one step, which takes it well under a millisecond.
const STEP: u64 = 200;
/// How long one server is searched at a time.
const TIME_MAX: Duration = Duration::from_secs(2);

/// Where each server's next search begins.
#[derive(Debug, Default)]
pub(super) struct Cursors(BTreeMap<(String, String), u64>);

/// What one search of one shard came to.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub(super) keys: Vec<LockKey>,
    /// Whether keys were left out, which the next search may find.
    pub(super) more: bool,
}

/// What makes a search of a shard impossible, in words.
pub(super) type Trouble = String;

/// Looks at about `budget` keys of each server of the shard that has leases.
pub(super) async fn search(
    shard: &str,
    endpoint: &Endpoint,
    config: &Config,
    cursors: &mut Cursors,
    budget: u64,
) -> Result<Found, Trouble> {
    let asking = Asking::new(config).map_err(|error| format!("{error:#}"))?;
    let servers = primaries(endpoint, &asking)
        .await
        .map_err(|error| format!("{error:#}"))?;
    let Some(servers) = servers else {
        let kind = endpoint.scheme();
        return Err(format!("keys of {kind}:// can't be searched; name them with --key"));
    };
    let mut found = Found::default();
    for server in servers {
        let cursor = cursors
            .0
            .entry((shard.to_owned(), server.place().to_owned()))
            .or_default();
        search_server(&server, &asking, config, cursor, budget, &mut found)
            .await
            .map_err(|reason| format!("{}: {reason}", server.place()))?;
    }
    Ok(found)
}

async fn search_server(
    server: &ServerUrl,
    asking: &Asking<'_>,
    config: &Config,
    cursor: &mut u64,
    budget: u64,
    found: &mut Found,
) -> Result<(), Trouble> {
    let mut connection = asking.connect(server).await.map_err(|trouble| trouble.reason)?;
    let (pattern, began) = (pattern(&config.namespace), Instant::now());
    for _ in 0..budget.div_ceil(STEP) {
        let mut step = cmd("SCAN");
        step.arg(*cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(STEP);
        let (next, names): (u64, Vec<Vec<u8>>) = ask(&mut connection, &step).await?;
        let names = names.iter().filter_map(|name| std::str::from_utf8(name).ok());
        found.keys.extend(names.filter_map(|name| config.key_of_lease(name)));
        *cursor = next;
        if next == 0 {
            return Ok(());
        }
        if began.elapsed() >= TIME_MAX {
            break;
        }
    }
    found.more = true;
    Ok(())
}

/// What all leases of a namespace are called like, in the server's glob style.
fn pattern(namespace: &str) -> String {
    let mut pattern = String::with_capacity(namespace.len() + 1);
    for char in namespace.chars() {
        if matches!(char, '*' | '?' | '[' | ']' | '\\' | '^') {
            pattern.push('\\');
        }
        pattern.push(char);
    }
    pattern.push('*');
    pattern
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
