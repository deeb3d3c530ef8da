//! The admin endpoint of a long-running command: metrics for Prometheus, health, hot keys and held
//! locks.

use std::net::SocketAddr;

use anyhow::{Context, Result, anyhow};
use shardlock::LockManager;
use shardlock::admin::{Admin, AdminError, AdminServer};

use crate::output;

/// Where a long-running command serves its metrics.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Options {
    /// Serve Prometheus metrics on this address, such as 127.0.0.1:9187; port 0 picks a free port
    ///
    /// The same address serves /healthz, /readyz, and /hot, /held and /shards for `shardlock top`.
    /// It shows the names of locks to anyone who can reach it. The address can also be set with
    /// SHARDLOCK_METRICS; then, if the address is unavailable, for example because another command
    /// uses it, the tool warns and runs without the endpoint.
    #[arg(long = "metrics", value_name = "ADDR")]
    address: Option<SocketAddr>,
}

/// The environment variable for the option.
///
/// A command that runs under a lock must not inherit the variable, because the port is already
/// taken.
pub(crate) const VARIABLE: &str = "SHARDLOCK_METRICS";

impl Options {
    /// Whether an address is given on the command line.
    pub(crate) const fn is_given(&self) -> bool {
        self.address.is_some()
    }

    /// Binds the address, if one is configured, and prints the URL of the metrics.
    ///
    /// Call this before a manager connects.
    ///
    /// # Errors
    ///
    /// The address from the command line can't be bound. An address from the environment applies to
    /// many commands and must not make one fail, so for that one there is only a warning.
    pub(crate) fn bind(&self) -> Result<Option<Admin>> {
        let admin = match self.address {
            Some(address) => Some(bind(address).context("give --metrics another address")?),
            None => from_environment().unwrap_or_else(|error| {
                output::eprint(format_args!(
                    "{}; continuing without metrics ({VARIABLE})",
                    output::one_line(&error)
                ));
                None
            }),
        };
        if let Some(admin) = &admin {
            output::eprint(format_args!("serving metrics at http://{}/metrics", admin.address()));
        }
        Ok(admin)
    }

    /// Serves the endpoint until the returned server is dropped.
    ///
    /// # Errors
    ///
    /// Serving fails and the address is from the command line. Otherwise there is only a warning.
    pub(crate) fn serve(&self, admin: Admin, locks: &LockManager) -> Result<Option<AdminServer>> {
        match admin.serve(locks) {
            Ok(server) => Ok(Some(server)),
            Err(error) if self.address.is_some() => Err(error.into()),
            Err(error) => {
                output::eprint(format_args!("{error}; continuing without metrics ({VARIABLE})"));
                Ok(None)
            }
        }
    }
}

fn from_environment() -> Result<Option<Admin>> {
    let Some(text) = std::env::var_os(VARIABLE).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let address = text.to_str().and_then(|text| text.parse().ok());
    let address = address.ok_or_else(|| {
        anyhow!("{VARIABLE} is {text:?}, but must be an IP address and a port, such as 127.0.0.1:9187")
    })?;
    bind(address).map(Some)
}

/// Binds the admin endpoint to this address. Port 0 picks a free port.
///
/// Call this before a manager connects: metric handles created without a recorder count nothing.
///
/// # Errors
///
/// The address can't be bound, or a recorder is already installed.
pub(crate) fn bind(address: SocketAddr) -> Result<Admin> {
    Admin::bind(address).map_err(|error| match error {
        AdminError::Bind { address, source } => anyhow!("metrics can't be served at {address}: {source}"),
        other => other.into(),
    })
}
