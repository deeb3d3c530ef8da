//! What the demo asks the servers itself, apart from what the workers do.

use std::time::Duration;

use anyhow::Context;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{AsyncConnectionConfig, Client, cmd};
use shardlock::Endpoint;

/// How long a server may take to answer: much longer than it should, since the demo fills the machine.
pub(super) const SERVER_TIMEOUT: Duration = Duration::from_secs(5);

/// How many keys one step of a scan looks at.
const SCAN_COUNT: u32 = 1000;

/// How often a server is searched for keys to remove, at most.
const REMOVAL_PASSES_MAX: u32 = 20;

/// How long to wait between two of these searches.
const REMOVAL_PAUSE: Duration = Duration::from_millis(20);

/// A plain connection.
pub(super) async fn connect(url: &str) -> anyhow::Result<MultiplexedConnection> {
    let endpoint = Endpoint::parse(url)?;
    // The error of the client library may quote the URL, and with it the password.
    let client = Client::open(url)
        .ok()
        .with_context(|| format!("{endpoint} is no redis:// URL, and the workers are processes of their own"))?;
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(SERVER_TIMEOUT))
        .set_response_timeout(Some(SERVER_TIMEOUT));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
        .with_context(|| format!("{endpoint} can't be reached"))
}

/// How often a server was called by the lock, since its start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Calls {
    pub(super) scripts: u64,
    pub(super) publishes: u64,
}

impl Calls {
    /// The sum over the servers. The demo's own data need neither scripts nor messages, so all calls are the lock's.
    pub(super) async fn count(connections: &[MultiplexedConnection]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for connection in connections {
            let mut info = cmd("INFO");
            info.arg("commandstats");
            let stats: String = info.query_async(&mut connection.clone()).await?;
            let of = |name| calls_in(&stats, name);
            sum.scripts += of("eval") + of("evalsha");
            sum.publishes += of("publish") + of("spublish");
        }
        Ok(sum)
    }

    pub(super) const fn since(self, earlier: Self) -> Self {
        Self {
            scripts: self.scripts.saturating_sub(earlier.scripts),
            publishes: self.publishes.saturating_sub(earlier.publishes),
        }
    }
}

/// The calls of one command, from a line such as `cmdstat_evalsha:calls=12,usec=345,...`.
fn calls_in(stats: &str, command: &str) -> u64 {
    let calls = stats.lines().find_map(|line| {
        let rest = line.strip_prefix("cmdstat_")?.strip_prefix(command)?;
        rest.strip_prefix(":calls=")?.split(',').next()?.parse().ok()
    });
    calls.unwrap_or(0)
}

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_those_of_exactly_this_command() {
        let stats = "# Commandstats\r\ncmdstat_evalsha:calls=12,usec=345\r\ncmdstat_eval:calls=3,usec=1\r\n";
        assert_eq!(calls_in(stats, "eval"), 3);
        assert_eq!(calls_in(stats, "evalsha"), 12);
        assert_eq!(calls_in(stats, "publish"), 0);
    }
}
