//! The admin endpoint of a command that runs for long: metrics for Prometheus, health, hot keys, held locks.

use std::net::SocketAddr;

use anyhow::{Context, Result, anyhow};
use shardlock::LockManager;
use shardlock::admin::{Admin, AdminError, AdminServer};

use crate::output;

/// Where a command that runs for long serves its metrics.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Options {
    /// Serve metrics for Prometheus at this address, such as 127.0.0.1:9187; port 0 takes a free one
    ///
    /// The same address has /healthz, /readyz, and /hot, /held and /shards for `shardlock top`. It shows the names of locks to whoever can
    /// reach it. SHARDLOCK_METRICS names an address, too; if that can't be served, for example since another command on this machine
    /// has it, there is a warning and no endpoint.
    #[arg(long = "metrics", value_name = "ADDR")]
    address: Option<SocketAddr>,
}

/// The variable that stands for the option. A command that is run under a lock must not inherit it: the port is taken.
pub(crate) const VARIABLE: &str = "SHARDLOCK_METRICS";

impl Options {
    /// Takes the address if one is wanted, and reports what is there. Call it before a manager connects.
    ///
    /// # Errors
    ///
    /// The address of the command line can't be taken. One of the environment is there for many commands, and none of
    /// them must fail for it.
    pub(crate) fn bind(&self) -> Result<Option<Admin>> {
        let admin = match self.address {
            Some(address) => Some(bind(address).context("give --metrics another address")?),
            None => from_environment().unwrap_or_else(|error| {
                output::complain(format_args!(
                    "{}; continuing without metrics ({VARIABLE})",
                    output::in_one_line(&error)
                ));
                None
            }),
        };
        if let Some(admin) = &admin {
            output::complain(format_args!("metrics are at http://{}/metrics", admin.address()));
        }
        Ok(admin)
    }

    /// Starts to serve, until the result is dropped.
    ///
    /// # Errors
    ///
    /// As for [`Self::bind`].
    pub(crate) fn serve(&self, admin: Admin, locks: &LockManager) -> Result<Option<AdminServer>> {
        match admin.serve(locks) {
            Ok(server) => Ok(Some(server)),
            Err(error) if self.address.is_some() => Err(error.into()),
            Err(error) => {
                output::complain(format_args!("{error}; continuing without metrics ({VARIABLE})"));
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

/// Takes this address, or a free port of it if it says port 0, for metrics and all else that the admin endpoint shows.
///
/// Call it before a manager connects: handles that were made without a recorder count nothing.
///
/// # Errors
///
/// The address can't be bound, or there is a recorder already.
pub(crate) fn bind(address: SocketAddr) -> Result<Admin> {
    Admin::bind(address).map_err(|error| match error {
        AdminError::Bind { address, source } => anyhow!("metrics can't be served at {address}: {source}"),
        other => other.into(),
    })
}
