//! The map in etcd. Any member that answers will do.

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use shardlock::tool::{self, ServerUrl};

use super::locations::Leases;
use crate::servers::etcd::{self as members, with_timeout};
use crate::servers::{Connector, ProbeError};

/// Connects to the first member that accepts.
async fn client(servers: &[ServerUrl], connector: &Connector<'_>) -> Result<Client, String> {
    let mut reasons = Vec::new();
    for server in servers {
        match members::connect(server, connector).await {
            Ok(client) => return Ok(client),
            Err(ProbeError { reason, .. }) => reasons.push(format!("{}: {reason}", server.place())),
        }
    }
    Err(reasons.join("; "))
}

pub(super) async fn read(
    servers: &[ServerUrl],
    connector: &Connector<'_>,
    key: &str,
) -> Result<Option<String>, String> {
    let mut client = client(servers, connector).await?;
    let found = with_timeout(connector, client.get(key, None))
        .await
        .map_err(|error| error.reason)?;
    let stored = found.kvs().first();
    Ok(stored.map(|stored| String::from_utf8_lossy(stored.value()).into_owned()))
}

pub(super) async fn swap(
    servers: &[ServerUrl],
    connector: &Connector<'_>,
    key: &str,
    old: Option<&str>,
    new: &str,
) -> Result<bool, String> {
    let mut client = client(servers, connector).await?;
    let unchanged = match old {
        Some(old) => Compare::value(key, CompareOp::Equal, old),
        None => Compare::create_revision(key, CompareOp::Equal, 0),
    };
    let swap = Txn::new().when([unchanged]).and_then([TxnOp::put(key, new, None)]);
    let reply = with_timeout(connector, client.txn(swap))
        .await
        .map_err(|error| error.reason)?;
    Ok(reply.succeeded())
}

/// Finds a key other than the map: each is a cycle that holds or waits, or a note about one.
pub(super) async fn leases(servers: &[ServerUrl], connector: &Connector<'_>) -> Result<Leases, String> {
    let mut client = client(servers, connector).await?;
    let some = GetOptions::new().with_prefix().with_limit(2).with_keys_only();
    let found = with_timeout(connector, client.get(connector.config.namespace.as_str(), Some(some)))
        .await
        .map_err(|error| error.reason)?;
    let map = tool::map_key(connector.config);
    let other = found.kvs().iter().find(|kv| kv.key() != map.as_bytes());
    Ok(other.map_or(Leases::None, |kv| {
        let name = String::from_utf8_lossy(kv.key()).into_owned();
        let owner = name.rsplit('/').next().unwrap_or_default().to_owned();
        Leases::Some { example: name, owner }
    }))
}
