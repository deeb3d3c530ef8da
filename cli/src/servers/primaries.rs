//! Finds the servers that currently store a shard's leases.

use std::collections::BTreeMap;

use anyhow::{Context, anyhow, bail};
use deadpool_redis::Pool;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cmd;
use shardlock::config::{Config, Endpoint};
use shardlock::tool::{self, ServerUrl};

use super::{Connector, ProbeError, cluster_nodes, host_port, query};

/// The servers of one shard: a single server, the nodes of a quorum, the primary that a sentinel
/// names, or the primaries of a cluster that have slots. `None` if the shard is not on Redis.
///
/// # Errors
///
/// If no server of the URL could name them. The error is that of the last one queried.
pub(crate) async fn primaries(
    endpoint: &Endpoint,
    connector: &Connector<'_>,
) -> anyhow::Result<Option<Vec<ServerUrl>>> {
    match endpoint.scheme() {
        "redis" | "rediss" | "redis+unix" | "redlock" | "redlocks" => return Ok(Some(tool::servers(endpoint))),
        "redis+sentinel" | "rediss+sentinel" | "redis+cluster" | "rediss+cluster" => {}
        _ => return Ok(None),
    }
    let mut last_error = "the URL names no server".to_owned();
    // The first server that answers decides.
    for server in tool::servers(endpoint) {
        let addresses = match tool::primary_name(endpoint) {
            Some(name) => primary_from_sentinel(&server, name, connector)
                .await
                .map(|address| vec![address]),
            None => primaries_from_node(&server, connector).await,
        };
        match addresses {
            Ok(addresses) => {
                let servers = addresses
                    .iter()
                    .filter_map(|address| tool::server_at(endpoint, address));
                return Ok(Some(servers.collect()));
            }
            Err(reason) => last_error = format!("{}: {reason}", server.place()),
        }
    }
    bail!("{last_error}")
}

/// The address of the primary that this sentinel knows by the name.
async fn primary_from_sentinel(sentinel: &ServerUrl, name: &str, connector: &Connector<'_>) -> Result<String, String> {
    let mut connection = connector.connect(sentinel).await.map_err(|error| error.reason)?;
    primary_named(&mut connection, name)
        .await?
        .ok_or_else(|| format!("{} knows no primary called {name}", sentinel.place()))
}

/// Queries a sentinel for the address of a primary. Returns `None` if the sentinel does not know
/// the name.
pub(crate) async fn primary_named(sentinel: &mut MultiplexedConnection, name: &str) -> Result<Option<String>, String> {
    let command = cmd("SENTINEL").arg("GET-MASTER-ADDR-BY-NAME").arg(name).to_owned();
    let address: Option<(String, String)> = query(sentinel, &command).await?;
    Ok(address.map(|(host, port)| host_port(&host, &port)))
}

/// The addresses of the cluster's primaries that have slots and are not marked as failed, as this
/// node knows them.
async fn primaries_from_node(node: &ServerUrl, connector: &Connector<'_>) -> Result<Vec<String>, String> {
    let mut connection = connector.connect(node).await.map_err(|error| error.reason)?;
    let known = cluster_nodes(&mut connection, node)
        .await
        .map_err(|reason| format!("CLUSTER NODES is refused: {reason}"))?;
    let primaries = known
        .into_iter()
        .filter(|node| node.has_flag("master") && !node.has_flag("fail") && node.slots > 0);
    Ok(primaries.map(|node| node.address).collect())
}

/// A pool for each of these servers of all shards, or `None` if a shard is not on Redis.
///
/// # Errors
///
/// If a server can't be found or reached.
pub(crate) async fn pools_of_primaries(config: &Config) -> anyhow::Result<Option<Vec<Pool>>> {
    let connector = Connector::new(config)?;
    // Keyed by address, since two shards may be databases of one server.
    let mut servers: BTreeMap<String, ServerUrl> = BTreeMap::new();
    for shard in &config.shards {
        let endpoint = Endpoint::parse(&shard.url)?;
        let Some(found) = primaries(&endpoint, &connector).await? else {
            return Ok(None);
        };
        servers.extend(found.into_iter().map(|server| (server.place().to_owned(), server)));
    }
    let mut pools = Vec::new();
    for (address, server) in servers {
        let reason = |error: ProbeError| anyhow!(error.reason);
        let unreachable = || format!("{address} can't be reached");
        connector
            .connect(&server)
            .await
            .map_err(reason)
            .with_context(unreachable)?;
        pools.push(connector.pool(&server).map_err(reason).with_context(unreachable)?);
    }
    Ok(Some(pools))
}
