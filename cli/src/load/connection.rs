//! Connections to the Redis servers under load, apart from those of the locks.

use std::time::Duration;

use anyhow::Context;
use deadpool_redis::{Connection, Pool};
use shardlock::config::Endpoint;

/// The time limit for a reply: much longer than usual, since the load saturates the machine.
pub(crate) const SERVER_TIMEOUT: Duration = Duration::from_secs(5);

/// How many connections are opened to a server at most.
const CONNECTIONS_MAX: usize = 16;

/// A pool of plain connections to a server that answers.
pub(crate) async fn connect(url: &str) -> anyhow::Result<Pool> {
    let endpoint = Endpoint::parse(url)?;
    // The client library's error may quote the URL, and with it the password.
    let pool = crate::servers::pool(url, CONNECTIONS_MAX, SERVER_TIMEOUT)
        .ok()
        .with_context(|| format!("{endpoint} is not a redis:// URL, which worker processes need"))?;
    let connected = pool.get().await;
    connected.with_context(|| format!("{endpoint} can't be reached"))?;
    Ok(pool)
}

/// A connection that has just answered. It returns to the pool when it is dropped.
pub(crate) async fn get(pool: &Pool) -> anyhow::Result<Connection> {
    pool.get().await.context("no connection for the data")
}
