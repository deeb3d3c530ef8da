//! Metrics for Prometheus, served over HTTP.

use std::net::{SocketAddr, TcpListener};

use anyhow::{Context, Result};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};

/// Where a command that runs for long serves its metrics.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Options {
    /// Serve metrics for Prometheus at this address, such as 127.0.0.1:9187; port 0 takes a free one
    #[arg(long = "metrics", value_name = "ADDR", env = VARIABLE)]
    address: Option<SocketAddr>,
}

/// The variable that stands for the option. A command that is run under a lock must not inherit it: the port is taken.
pub(crate) const VARIABLE: &str = "SHARDLOCK_METRICS";

impl Options {
    /// Serves metrics if they are wanted, and says where. Call it before a manager connects.
    pub(crate) fn install(&self) -> Result<Option<SocketAddr>> {
        let Some(address) = self.address else {
            return Ok(None);
        };
        let bound = install(address)?;
        crate::output::complain(format_args!("metrics are at http://{bound}/metrics"));
        Ok(Some(bound))
    }
}

/// Upper bounds of the buckets of all durations, in seconds: from a round trip on loopback to a wait that is a scandal.
const BUCKETS: [f64; 21] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];

/// How often a port that was free may turn out to be taken a moment later.
const PORTS_TRIED_MAX: usize = 10;

/// Serves metrics at this address, or at a free port of it if it says port 0, and returns the address.
///
/// Call it before a manager connects: handles that were made without a recorder count nothing. Where a runtime runs, it
/// serves them; else a thread does.
///
/// # Errors
///
/// The address can't be bound, or there is a recorder already.
pub(crate) fn install(address: SocketAddr) -> Result<SocketAddr> {
    let failed = || format!("metrics can't be served at {address}; give --metrics another address");
    let mut tries = 1;
    loop {
        let chosen = if address.port() == 0 {
            free_port(address).with_context(failed)?
        } else {
            address
        };
        let builder = PrometheusBuilder::new()
            .with_http_listener(chosen)
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &BUCKETS)?;
        match builder.install() {
            Ok(()) => return Ok(chosen),
            Err(BuildError::FailedToCreateHTTPListener(_)) if chosen != address && tries < PORTS_TRIED_MAX => {
                tries += 1
            }
            Err(error) => return Err(error).with_context(failed),
        }
    }
}

/// The exporter binds the address itself and does not tell what it got, so a port is found for it.
fn free_port(address: SocketAddr) -> std::io::Result<SocketAddr> {
    TcpListener::bind(address)?.local_addr()
}
