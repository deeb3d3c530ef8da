//! Direct requests to the servers of shards, for commands that inspect them without a manager.

mod cluster_nodes;
mod connector;
#[cfg(feature = "etcd")]
pub(crate) mod etcd;
mod glob;
pub(crate) mod lease_scan;
mod pools;
mod primaries;
mod probe_error;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, FromRedisValue};

pub(crate) use cluster_nodes::{ClusterNode, cluster_nodes};
pub(crate) use connector::Connector;
pub(crate) use glob::escape_glob;
pub(crate) use pools::{ServerPools, pool};
pub(crate) use primaries::{pools_of_primaries, primaries, primary_named};
pub(crate) use probe_error::{ProbeError, ProbeErrorKind};

/// Sends a command. The server's error is returned as text.
pub(crate) async fn query<T: FromRedisValue>(
    connection: &mut MultiplexedConnection,
    command: &Cmd,
) -> Result<T, String> {
    command.query_async(connection).await.map_err(|error| error.to_string())
}

/// `host:port`, with brackets around an IPv6 address.
pub(crate) fn host_port(host: &str, port: &str) -> String {
    if host.contains(':') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}
