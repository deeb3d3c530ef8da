//! From the URL of a server to what the client library takes.

use std::time::Duration;

use deadpool_redis::redis::io::tcp::TcpSettings;
use deadpool_redis::redis::io::tcp::socket2::TcpKeepalive;
use deadpool_redis::redis::{ConnectionInfo, IntoConnectionInfo};

use crate::endpoint::ServerUrl;
use crate::error::Invalid;
use crate::store::TlsFiles;

/// How long a connection is silent before the system asks whether the other machine is still there, how often it asks then, and
/// after how many questions without an answer the connection is broken. A connection that only listens would not notice otherwise.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(10);
const KEEPALIVE_EVERY: Duration = Duration::from_secs(3);
const KEEPALIVE_PROBES: u32 = 3;

/// How a connection to that server is made, of whatever kind its shard is.
pub(in crate::store) fn connection_info(server: &ServerUrl, _tls: &TlsFiles) -> Result<ConnectionInfo, Invalid> {
    let info = server.as_str().into_connection_info();
    // The error of the client library may quote the URL, and with it the password.
    let info = info.map_err(|_| Invalid::new("url", server.place(), "a server that the client library can use"))?;
    let keepalive = TcpKeepalive::new()
        .with_time(KEEPALIVE_AFTER)
        .with_interval(KEEPALIVE_EVERY)
        .with_retries(KEEPALIVE_PROBES);
    // Requests are small and wait for their replies: nothing is gained by holding them back to fill a packet.
    Ok(info.set_tcp_settings(TcpSettings::default().set_nodelay(true).set_keepalive(keepalive)))
}
