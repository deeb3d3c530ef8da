//! Removes the demo's keys from servers.

use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cmd;

use crate::load::connection::{connect, get};

/// How many keys one step of a scan covers.
const SCAN_COUNT: u32 = 1000;

/// How often a server is scanned for keys to remove, at most.
const REMOVAL_PASSES_MAX: u32 = 20;

/// The pause between two scans.
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);

/// Removes all keys of the demo from a server. `prefix` must not contain characters that are
/// special in a pattern.
///
/// Repeats until nothing is found, since a command that a killed worker had already sent may still
/// be executed.
pub(super) async fn remove_keys(url: &str, prefix: &str) -> anyhow::Result<()> {
    let pool = connect(url).await?;
    let mut connection = get(&pool).await?;
    for _ in 0..REMOVAL_PASSES_MAX {
        if remove_once(&mut connection, prefix).await? == 0 {
            return Ok(());
        }
        tokio::time::sleep(REMOVAL_PAUSE).await;
    }
    anyhow::bail!("new keys keep appearing")
}

async fn remove_once(connection: &mut MultiplexedConnection, prefix: &str) -> anyhow::Result<usize> {
    // The name of a lock's queue starts with a brace: `{prefix...}:q`.
    let pattern = format!("*{prefix}*");
    let (mut cursor, mut removed) = (0_u64, 0);
    loop {
        let mut scan = cmd("SCAN");
        scan.arg(cursor).arg("MATCH").arg(&pattern).arg("COUNT").arg(SCAN_COUNT);
        let (next, found): (u64, Vec<Vec<u8>>) = scan.query_async(connection).await?;
        let is_ours = |key: &&Vec<u8>| key.strip_prefix(b"{").unwrap_or(key).starts_with(prefix.as_bytes());
        let ours: Vec<_> = found.iter().filter(is_ours).collect();
        if !ours.is_empty() {
            removed += cmd("DEL").arg(ours).query_async::<usize>(connection).await?;
        }
        if next == 0 {
            return Ok(removed);
        }
        cursor = next;
    }
}
