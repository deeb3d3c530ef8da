//! Finds the servers that currently store a shard's leases.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail};
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cmd;
use shardlock::{Config, Endpoint, ServerUrl};

use super::{Asking, ask, nodes, place};

/// The servers of one shard: a single server, the nodes of a quorum, the primary that a sentinel
/// names, or the primaries of a cluster that have slots. `None` if the shard is not on Redis.
///
/// # Errors
///
/// If no server of the URL could name them. The error is that of the last one asked.
pub(crate) async fn primaries(endpoint: &Endpoint, asking: &Asking<'_>) -> anyhow::Result<Option<Vec<ServerUrl>>> {
    match endpoint.scheme() {
        "redis" | "rediss" | "redis+unix" | "redlock" | "redlocks" => return Ok(Some(endpoint.servers())),
        "redis+sentinel" | "rediss+sentinel" | "redis+cluster" | "rediss+cluster" => {}
        _ => return Ok(None),
    }
    let mut trouble = "the URL names no server".to_owned();
    // The first server that answers decides.
    for server in endpoint.servers() {
        let places = match endpoint.primary_name() {
            Some(name) => of_sentinel(&server, name, asking).await.map(|place| vec![place]),
            None => of_cluster(&server, asking).await,
        };
        match places {
            Ok(places) => {
                let servers = places.iter().filter_map(|place| endpoint.server_at(place));
                return Ok(Some(servers.collect()));
            }
            Err(reason) => trouble = format!("{}: {reason}", server.place()),
        }
    }
    bail!("{trouble}")
}

/// The address of the primary that this sentinel knows by the name.
async fn of_sentinel(sentinel: &ServerUrl, name: &str, asking: &Asking<'_>) -> Result<String, String> {
    let mut connection = asking.connect(sentinel).await.map_err(|trouble| trouble.reason)?;
    primary_named(&mut connection, name)
        .await?
        .ok_or_else(|| format!("{} knows no primary called {name}", sentinel.place()))
}

/// Asks a sentinel for the address of a primary. Returns `None` if the sentinel does not know the
/// name.
pub(crate) async fn primary_named(sentinel: &mut MultiplexedConnection, name: &str) -> Result<Option<String>, String> {
    let question = cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(name).to_owned();
    let address: Option<(String, String)> = ask(sentinel, &question).await?;
    Ok(address.map(|(host, port)| place(&host, &port)))
}

/// The addresses of the cluster's primaries that have slots and are not marked as failed, as this
/// node knows them.
async fn of_cluster(node: &ServerUrl, asking: &Asking<'_>) -> Result<Vec<String>, String> {
    let mut connection = asking.connect(node).await.map_err(|trouble| trouble.reason)?;
    let known = nodes(&mut connection, node)
        .await
        .map_err(|reason| format!("CLUSTER NODES is refused: {reason}"))?;
    let primaries = known
        .into_iter()
        .filter(|node| node.has("master") && !node.has("fail") && node.slots > 0);
    Ok(primaries.map(|node| node.place).collect())
}

/// A connection to each of these servers of all shards, or `None` if a shard is not on Redis.
///
/// # Errors
///
/// If a server can't be found or reached.
pub(crate) async fn connect_to_primaries(config: &Config) -> anyhow::Result<Option<Vec<MultiplexedConnection>>> {
    let asking = Asking::new(config)?;
    // Keyed by address, since two shards may be databases of one server.
    let mut servers: BTreeMap<String, ServerUrl> = BTreeMap::new();
    for shard in &config.shards {
        let endpoint = Endpoint::parse(&shard.url)?;
        let Some(found) = primaries(&endpoint, &asking).await? else {
            return Ok(None);
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
