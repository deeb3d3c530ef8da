//! Connections to the Redis servers under load.

use std::time::Duration;

use anyhow::Context;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{AsyncConnectionConfig, Client};
use shardlock::config::Endpoint;

/// The time limit for a reply: much longer than usual, since the load saturates the machine.
pub(crate) const SERVER_TIMEOUT: Duration = Duration::from_secs(5);

/// A plain connection to a server.
pub(crate) async fn connect(url: &str) -> anyhow::Result<MultiplexedConnection> {
    let endpoint = Endpoint::parse(url)?;
    // The client library's error may quote the URL, and with it the password.
    let client = Client::open(url)
        .ok()
        .with_context(|| format!("{endpoint} is not a redis:// URL, which worker processes need"))?;
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(SERVER_TIMEOUT))
        .set_response_timeout(Some(SERVER_TIMEOUT));
    client
        .get_multiplexed_async_connection_with_config(&config)
        .await
        .with_context(|| format!("{endpoint} can't be reached"))
}
