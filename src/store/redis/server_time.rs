//! Reads a server's clock.

use std::sync::Arc;
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{RedisResult, Value, cmd};

use super::reply::{server_time, unexpected};
use crate::clock::Moment;
use crate::store::{ServerTime, StoreError};

/// Asks `server` for its time on this connection, whose generation is `number`.
pub(super) async fn read(
    connection: &mut MultiplexedConnection,
    server: Arc<str>,
    number: u64,
) -> RedisResult<Result<ServerTime, StoreError>> {
    let sent_at = Moment::now();
    let reply: Value = cmd("TIME").query_async(connection).await?;
    let received_at = Moment::now();
    let time = server_time(&reply).map(|(seconds, micros)| ServerTime {
        server,
        connection: number,
        since_epoch: Duration::from_secs(seconds) + Duration::from_micros(micros),
        sent_at,
        received_at,
    });
    Ok(time.ok_or_else(|| unexpected("TIME", &reply)))
}
