//! The map in etcd. Any member that answers will do.

use etcd_client::{Client, Compare, CompareOp, GetOptions, Txn, TxnOp};
use shardlock::ServerUrl;

use super::places::Leases;
use crate::asking::{Asking, Trouble};
use crate::doctor::etcd as members;
use crate::doctor::etcd::in_time;

/// Connects to the first member that accepts.
async fn client(servers: &[ServerUrl], asking: &Asking<'_>) -> Result<Client, String> {
    let mut reasons = Vec::new();
    for server in servers {
        match members::client(server, asking).await {
            Ok(client) => return Ok(client),
            Err(Trouble { reason, .. }) => reasons.push(format!("{}: {reason}", server.place())),
        }
    }
    Err(reasons.join("; "))
}

pub(super) async fn read(servers: &[ServerUrl], asking: &Asking<'_>, key: &str) -> Result<Option<String>, String> {
    let mut client = client(servers, asking).await?;
    let found = in_time(asking, client.get(key, None))
        .await
        .map_err(|trouble| trouble.reason)?;
    let stored = found.kvs().first();
    Ok(stored.map(|stored| String::from_utf8_lossy(stored.value()).into_owned()))
}

pub(super) async fn swap(
    servers: &[ServerUrl],
    asking: &Asking<'_>,
    key: &str,
    old: Option<&str>,
    new: &str,
) -> Result<bool, String> {
    let mut client = client(servers, asking).await?;
    let unchanged = match old {
        Some(old) => Compare::value(key, CompareOp::Equal, old),
        None => Compare::create_revision(key, CompareOp::Equal, 0),
    };
    let swap = Txn::new().when([unchanged]).and_then([TxnOp::put(key, new, None)]);
    let reply = in_time(asking, client.txn(swap))
        .await
        .map_err(|trouble| trouble.reason)?;
    Ok(reply.succeeded())
}

/// Finds a key other than the map: each is a cycle that holds or waits, or a note about one.
pub(super) async fn leases(servers: &[ServerUrl], asking: &Asking<'_>) -> Result<Leases, String> {
    let mut client = client(servers, asking).await?;
    let some = GetOptions::new().with_prefix().with_limit(2).with_keys_only();
    let found = in_time(asking, client.get(asking.config.namespace.as_str(), Some(some)))
        .await
        .map_err(|trouble| trouble.reason)?;
    let map = asking.config.map_key();
    let other = found.kvs().iter().find(|kv| kv.key() != map.as_bytes());
    Ok(other.map_or(Leases::None, |kv| {
        let name = String::from_utf8_lossy(kv.key()).into_owned();
        let owner = name.rsplit('/').next().unwrap_or_default().to_owned();
        Leases::Some { example: name, owner }
    }))
}
