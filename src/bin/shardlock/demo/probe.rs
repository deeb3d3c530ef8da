//! What the demo removes from servers itself, apart from what the workers do.

use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::cmd;

use crate::load::usage::connect;

/// How many keys one step of a scan looks at.
const SCAN_COUNT: u32 = 1000;

/// How often a server is searched for keys to remove, at most.
const REMOVAL_PASSES_MAX: u32 = 20;

/// How long to wait between two of these searches.
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);

/// Removes all keys of the demo from a server. `prefix` has no character that is special in a pattern.
///
/// It searches until there is nothing left to be found, since a command that a killed worker had sent may be carried
/// out a moment later.
pub(super) async fn remove_keys(url: &str, prefix: &str) -> anyhow::Result<()> {
    let mut connection = connect(url).await?;
    for _ in 0..REMOVAL_PASSES_MAX {
        if remove_once(&mut connection, prefix).await? == 0 {
            return Ok(());
        }
        tokio::time::sleep(REMOVAL_PAUSE).await;
    }
    anyhow::bail!("new keys keep coming")
}

async fn remove_once(connection: &mut MultiplexedConnection, prefix: &str) -> anyhow::Result<usize> {
    // The queue of a lock begins with a brace: `{prefix...}:q`.
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
