//! An HTTP endpoint for operators, off unless asked for: metrics for Prometheus, health, the hottest keys, the locks that are held.
//!
//! | path | what it gives |
//! |---|---|
//! | `/metrics` | all metrics ([`METRICS`]) as Prometheus reads them |
//! | `/healthz` | `ok`: the process lives |
//! | `/readyz` | 200 if all shards answered when last asked and take locks, else 503; JSON that says which do |
//! | `/hot` | the keys with the most contention, as JSON ([`HotKey`](crate::HotKey)) |
//! | `/held` | the guards that are out, the oldest first, at most 1000, as JSON ([`HeldLock`](crate::HeldLock)) |
//! | `/shards` | the shards and how they are, as JSON ([`ShardState`](crate::ShardState)) |
//!
//! It shows **keys and fencing tokens to whoever can reach it**, and asks for no password: keep it on the loopback address
//! ([`DEFAULT_ADDRESS`]), or on a network that only operators reach. It changes nothing, and shows neither URLs nor passwords.
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use shardlock::admin::{Admin, DEFAULT_ADDRESS};
//!
//! // First: metrics count nothing for a manager that connected before.
//! let admin = Admin::bind(DEFAULT_ADDRESS)?;
//! let locks = shardlock::LockManager::connect("redis://127.0.0.1:6379").await?;
//! let server = admin.serve(&locks)?;
//! println!("http://{}/metrics", server.address());
//! # Ok(()) }
//! ```

mod pages;
mod server;

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener};
use std::sync::Arc;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder};

use crate::manager::LockManager;
use crate::telemetry::METRICS;
pub use server::AdminServer;

/// Where the endpoint is unless something else is asked for: port 9187 of 127.0.0.1.
pub const DEFAULT_ADDRESS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9187));

/// Why there is no endpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The address can't be listened at. Give another one, or end what has it.
    #[error("the admin endpoint can't listen at {address}; give it another address")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: std::io::Error,
    },
    /// The process has a recorder of metrics already. Give [`Admin::bind_with`] what it renders.
    #[error(
        "the metrics of this process have another recorder already; use Admin::bind_with and give it what that one renders"
    )]
    RecorderTaken,
    /// The system gives no thread for it.
    #[error("the admin endpoint has no thread")]
    Thread(#[source] std::io::Error),
}

/// What renders the metrics, and what it needs now and then so that it does not grow.
#[derive(Clone)]
pub(crate) struct Renderer {
    render: Arc<dyn Fn() -> String + Send + Sync>,
    upkeep: Arc<dyn Fn() + Send + Sync>,
}

/// An endpoint that listens but does not answer yet.
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    renderer: Renderer,
}

impl Admin {
    /// Listens at the address, a free port of it if it says port 0, and installs a recorder for the metrics of this process. Call it before
    /// a manager connects: the metrics of one that connected before count nothing.
    ///
    /// An address that is not a loopback address is allowed, since it was asked for; everybody who reaches it sees keys and tokens.
    ///
    /// # Errors
    ///
    /// [`AdminError::Bind`] if the address can't be had, [`AdminError::RecorderTaken`] if the process has a recorder already.
    pub fn bind(address: SocketAddr) -> Result<Self, AdminError> {
        let listener = listen(address)?;
        let mut builder = PrometheusBuilder::new();
        for metric in METRICS.iter().filter(|metric| !metric.buckets().is_empty()) {
            let name = Matcher::Full(metric.name.to_owned());
            // It fails for an empty list only.
            builder = builder
                .set_buckets_for_metric(name, metric.buckets())
                .map_err(|_| AdminError::RecorderTaken)?;
        }
        let handle = builder.install_recorder().map_err(|_| AdminError::RecorderTaken)?;
        let upkeep = handle.clone();
        let renderer = Renderer {
            render: Arc::new(move || handle.render()),
            upkeep: Arc::new(move || upkeep.run_upkeep()),
        };
        Self::new(listener, address, renderer)
    }

    /// The same for a process that has a recorder of its own: `render` gives its page in the text format of Prometheus.
    ///
    /// # Errors
    ///
    /// [`AdminError::Bind`] if the address can't be had.
    pub fn bind_with(
        address: SocketAddr,
        render: impl Fn() -> String + Send + Sync + 'static,
    ) -> Result<Self, AdminError> {
        let renderer = Renderer {
            render: Arc::new(render),
            upkeep: Arc::new(|| {}),
        };
        Self::new(listen(address)?, address, renderer)
    }

    fn new(listener: TcpListener, address: SocketAddr, renderer: Renderer) -> Result<Self, AdminError> {
        let bound = listener
            .local_addr()
            .map_err(|source| AdminError::Bind { address, source })?;
        if !bound.ip().is_loopback() {
            tracing::warn!(address = %bound, "the admin endpoint is not on a loopback address: whoever reaches it sees the keys of all locks");
        }
        Ok(Self {
            listener,
            address: bound,
            renderer,
        })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The page of metrics, for programs that read their own.
    pub fn renderer(&self) -> impl Fn(&LockManager) -> String + Send + Sync + use<> {
        let renderer = self.renderer.clone();
        move |locks| pages::metrics(&renderer, Some(&locks.inner))
    }

    /// Answers for this manager, on a thread of its own, until what is returned is dropped. It does not keep the manager alive.
    ///
    /// # Errors
    ///
    /// [`AdminError::Thread`] if the system gives no thread.
    pub fn serve(self, locks: &LockManager) -> Result<AdminServer, AdminError> {
        server::start(self.listener, self.address, self.renderer, Arc::downgrade(&locks.inner))
    }
}

fn listen(address: SocketAddr) -> Result<TcpListener, AdminError> {
    TcpListener::bind(address).map_err(|source| AdminError::Bind { address, source })
}

impl fmt::Debug for Admin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Admin")
            .field("address", &self.address)
            .finish_non_exhaustive()
    }
}
