//! The servers of shards that keep leases now, for commands that ask them for what they did.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow};
use deadpool_redis::redis::aio::MultiplexedConnection;
use shardlock::{Config, Endpoint, ServerUrl};

use super::look::Asking;
use super::{cluster, sentinel};

/// A connection to each: servers that stand alone, nodes of a quorum, primaries that sentinels name, primaries of a cluster with slots.
/// Nothing if a shard is not on Redis.
///
/// # Errors
///
/// One of them can't be found or reached.
pub(crate) async fn connect_to_primaries(config: &Config) -> anyhow::Result<Option<Vec<MultiplexedConnection>>> {
    let asking = Asking::new(config)?;
    // By their addresses, since two shards may be databases of one server.
    let mut servers: BTreeMap<String, ServerUrl> = BTreeMap::new();
    for shard in &config.shards {
        let endpoint = Endpoint::parse(&shard.url)?;
        let found = match endpoint.scheme() {
            "redis" | "rediss" | "redlock" | "redlocks" => endpoint.servers(),
            "redis+sentinel" | "rediss+sentinel" => vec![sentinel::primary(&endpoint, &asking).await?],
            "redis+cluster" | "rediss+cluster" => cluster::primaries(&endpoint, &asking).await?,
            _ => return Ok(None),
        };
        servers.extend(found.into_iter().map(|server| (server.place().to_owned(), server)));
    }
    let mut connections = Vec::new();
    for (place, server) in servers {
        let connected = asking.connect(&server).await;
        connections.push(
            connected
                .map_err(|trouble| anyhow!(trouble.reason))
                .with_context(|| format!("{place} can't be reached"))?,
        );
    }
    Ok(Some(connections))
}
