//! The admin endpoint of a command that runs for long: metrics for Prometheus, health, hot keys, held locks.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use shardlock::admin::Admin;

/// Where a command that runs for long serves its metrics.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Options {
    /// Serve metrics for Prometheus at this address, such as 127.0.0.1:9187; port 0 takes a free one
    ///
    /// The same address has /healthz, /readyz, and /hot, /held and /shards for `shardlock top`. It shows the names of locks to whoever can
    /// reach it.
    #[arg(long = "metrics", value_name = "ADDR", env = VARIABLE)]
    address: Option<SocketAddr>,
}

/// The variable that stands for the option. A command that is run under a lock must not inherit it: the port is taken.
pub(crate) const VARIABLE: &str = "SHARDLOCK_METRICS";

impl Options {
    /// Takes the address if one is wanted, and says what is there. Call it before a manager connects.
    pub(crate) fn bind(&self) -> Result<Option<Admin>> {
        let Some(address) = self.address else {
            return Ok(None);
        };
        let admin = bind(address)?;
        crate::output::complain(format_args!("metrics are at http://{}/metrics", admin.address()));
        Ok(Some(admin))
    }
}

/// Takes this address, or a free port of it if it says port 0, for metrics and all else that the admin endpoint shows.
///
/// Call it before a manager connects: handles that were made without a recorder count nothing.
///
/// # Errors
///
/// The address can't be bound, or there is a recorder already.
pub(crate) fn bind(address: SocketAddr) -> Result<Admin> {
    Admin::bind(address)
        .with_context(|| format!("metrics can't be served at {address}; give --metrics another address"))
}
