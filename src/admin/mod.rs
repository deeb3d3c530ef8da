//! An optional HTTP endpoint for operators: metrics for Prometheus, health, the hottest keys, the
//! locks that are held.
//!
//! - `/metrics`: all metrics ([`METRICS`](crate::metrics::METRICS)) in the text format of
//!   Prometheus
//! - `/healthz`: `ok`, the process is alive
//! - `/readyz`: 200 if the manager is not shut down and any shard answered its last request and
//!   accepts locks, else 503; with [`ReadyWhen::AllShardsUp`](crate::config::ReadyWhen) all of them
//!   must. JSON with the state of each shard, and why it is down
//! - `/hot`: the keys with the most contention, as JSON ([`HotKey`](crate::introspect::HotKey))
//! - `/held`: the outstanding guards, oldest first, at most 1000, as JSON
//!   ([`HeldLock`](crate::introspect::HeldLock))
//! - `/shards`: the state of each shard, as JSON ([`ShardState`](crate::introspect::ShardState))
//!
//! The endpoint shows **keys and fencing tokens to anyone who can reach it** and does not ask for a
//! password. Keep it on the loopback address ([`DEFAULT_ADDRESS`]), or on a network that only
//! operators can reach. It changes nothing, and shows neither URLs nor passwords; the reason why a
//! shard is down may name a server.
//!
//! ```no_run
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use shardlock::admin::{Admin, DEFAULT_ADDRESS};
//!
//! // Bind first: a manager that connected earlier records no metrics.
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

use metrics_exporter_prometheus::PrometheusBuilder;

use crate::manager::LockManager;
use crate::telemetry::Histograms;
pub use server::AdminServer;

/// The default address of the endpoint: port 9187 of 127.0.0.1.
pub const DEFAULT_ADDRESS: SocketAddr = SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 9187));

/// Why the endpoint could not be started.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AdminError {
    /// The endpoint can't listen on the address. Use another one, or stop the process that uses it.
    #[error("the admin endpoint can't listen on {address}; use another address")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// The error of the system.
        source: std::io::Error,
    },
    /// The process already has a metrics recorder. Pass its rendered output to
    /// [`Admin::bind_with`].
    #[error("this process already has a metrics recorder; pass its rendered output to Admin::bind_with")]
    RecorderTaken,
    /// The system could not provide a thread.
    #[error("the admin endpoint could not start its thread")]
    Thread(#[source] std::io::Error),
}

/// Renders the metrics, and does the regular upkeep that keeps the recorder from growing.
#[derive(Clone)]
pub(crate) struct Renderer {
    render: Arc<dyn Fn() -> String + Send + Sync>,
    upkeep: Arc<dyn Fn() + Send + Sync>,
}

/// A page that the program adds.
struct AddedPage {
    path: &'static str,
    render: Box<dyn Fn() -> String + Send + Sync>,
}

/// An endpoint that listens but does not answer requests yet.
pub struct Admin {
    listener: TcpListener,
    address: SocketAddr,
    renderer: Renderer,
    added: Vec<AddedPage>,
}

impl Admin {
    /// Listens on the address (on a free port if the port is 0) and installs a metrics recorder for
    /// this process: that of `metrics-exporter-prometheus`, with [`Histograms`] in front of it.
    /// Call it before a manager connects: a manager that connected earlier records no metrics.
    ///
    /// An address other than loopback is allowed, but everyone who can reach it sees keys and
    /// tokens.
    ///
    /// # Errors
    ///
    /// [`AdminError::Bind`] if the address is not available, [`AdminError::RecorderTaken`] if the
    /// process already has a recorder.
    pub fn bind(address: SocketAddr) -> Result<Self, AdminError> {
        let listener = listen(address)?;
        let exporter = PrometheusBuilder::new().build_recorder();
        let handle = exporter.handle();
        let histograms = Histograms::default();
        metrics::set_global_recorder(histograms.in_front_of(exporter)).map_err(|_| AdminError::RecorderTaken)?;
        let upkeep = handle.clone();
        let renderer = Renderer {
            render: Arc::new(move || handle.render() + &histograms.render()),
            upkeep: Arc::new(move || upkeep.run_upkeep()),
        };
        Self::new(listener, address, renderer)
    }

    /// Like [`bind`](Self::bind), for a process with its own recorder: `render` returns its page in
    /// the text format of Prometheus. Above 20,000 values per second its histograms have an even
    /// sample of the values, unless [`Histograms`] counts them in front of the recorder.
    ///
    /// # Errors
    ///
    /// [`AdminError::Bind`] if the address is not available.
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
            crate::log::warn!(address = %bound, "the admin endpoint is not on a loopback address: anyone who can reach it sees the keys of all locks");
        }
        Ok(Self {
            listener,
            address: bound,
            renderer,
            added: Vec::new(),
        })
    }

    /// Adds a page of the program: at `path`, such as `/jobs`, the JSON document that `render`
    /// returns. The pages of the endpoint itself can't be replaced.
    ///
    /// `render` runs on the thread of the endpoint, for each request of the page. Bound the size of
    /// the document: it is sent from memory, and to at most 32 clients at a time.
    ///
    /// ```no_run
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use shardlock::admin::{Admin, DEFAULT_ADDRESS};
    /// let admin = Admin::bind(DEFAULT_ADDRESS)?;
    /// let admin = admin.json_page("/version", || r#"{"version":7}"#.to_owned());
    /// let locks = shardlock::LockManager::connect("redis://127.0.0.1:6379").await?;
    /// let server = admin.serve(&locks)?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn json_page(mut self, path: &'static str, render: impl Fn() -> String + Send + Sync + 'static) -> Self {
        let render = Box::new(render);
        self.added.push(AddedPage { path, render });
        self
    }

    /// Returns the address on which it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Returns a function that renders the metrics page, for programs that read their own metrics.
    pub fn renderer(&self) -> impl Fn(&LockManager) -> String + Send + Sync + use<> {
        let renderer = self.renderer.clone();
        move |locks| pages::metrics(&renderer, Some(&locks.inner))
    }

    /// Serves this manager, on a separate thread, until the returned server is dropped. It does not
    /// keep the manager alive.
    ///
    /// # Errors
    ///
    /// [`AdminError::Thread`] if the system could not provide a thread.
    pub fn serve(self, locks: &LockManager) -> Result<AdminServer, AdminError> {
        let manager = Arc::downgrade(&locks.inner);
        server::start(self.listener, self.address, self.renderer, self.added, manager)
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
