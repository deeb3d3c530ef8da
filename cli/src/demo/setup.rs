//! Sets up the demo and removes everything afterwards.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use shardlock::config::{Builder, Config, Endpoint};

use super::DemoArgs;
use super::classes;
use super::cleanup;
use super::protocol::KeyNames;
use super::targets_file::TargetsFile;
use crate::load;
use crate::load::connection::SERVER_TIMEOUT;
use crate::load::temp_servers::TempServers;
use crate::load::workers::Workers;

/// The number of servers that are started if none are given.
const SERVERS: usize = 3;

/// The number of further servers of the load, the nodes of a quorum.
const NODES: usize = 3;

/// Servers report their uptime in whole seconds.
const VOTE_SLACK: Duration = Duration::from_secs(2);

/// A builder for the demo's managers: settings from the environment, such as certificates, and the
/// demo's own shards and namespace.
pub(super) fn builder(shards: &[String], names: &KeyNames) -> anyhow::Result<Builder> {
    let mut config = Config::default();
    config.apply_env()?;
    let builder = Builder::new().config(config).shards([]).namespace(names.namespace());
    Ok(shards.iter().fold(builder, |builder, url| builder.shard(url)))
}

/// Everything that must be removed. It is filled step by step, so that an interrupted demo removes
/// exactly what it has created.
#[derive(Debug)]
pub(super) struct Setup {
    servers: Option<TempServers>,
    /// Given shards, on which the keys with the prefix must be removed.
    given: Vec<String>,
    /// Whether the given shards are plain servers, which can also store the data.
    are_plain: bool,
    /// The prefix of all keys of the demo: unique, so that all keys with it can be removed.
    prefix: String,
    /// Whether only load is generated, whose keys protect no data.
    is_load: bool,
    targets: Option<TargetsFile>,
    pub(super) workers: Workers,
}

impl Setup {
    pub(super) fn new() -> Self {
        Self {
            servers: None,
            given: Vec::new(),
            are_plain: false,
            prefix: String::new(),
            is_load: false,
            targets: None,
            workers: Workers::new("demo"),
        }
    }

    /// Starts servers: for everything if no shards are given, or for the data if the given ones
    /// can't store it.
    pub(super) async fn start_servers(&mut self, args: &DemoArgs) -> anyhow::Result<()> {
        self.prefix = format!("demo:{}-{:016x}:", std::process::id(), rand::random::<u64>());
        let mut schemes = Vec::new();
        for url in &args.shards {
            let endpoint = Endpoint::parse(url)?;
            let scheme = endpoint.scheme();
            if scheme == "memory" {
                bail!("the demo's workers are separate processes, which can't share {endpoint}");
            }
            schemes.push(scheme.to_owned());
        }
        self.are_plain = schemes.iter().all(|scheme| scheme == "redis" || scheme == "rediss");
        let started = match (args.shards.is_empty(), self.are_plain) {
            (true, _) if args.load => SERVERS + NODES,
            (true, _) => SERVERS,
            (false, true) => 0,
            // The load needs no data.
            (false, false) => usize::from(!args.load),
        };
        self.is_load = args.load;
        if started > 0 {
            self.servers.insert(TempServers::new()?).start(started).await?;
            if args.load {
                // Until then the nodes have no vote, and the load would start with spurious
                // failures.
                tokio::time::sleep(classes::TTL + VOTE_SLACK).await;
            }
        }
        self.given.clone_from(&args.shards);
        Ok(())
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The URLs of the shards, in order.
    pub(super) fn shards(&self) -> Vec<String> {
        if !self.given.is_empty() {
            return self.given.clone();
        }
        let mut shards = self.started();
        if self.is_load {
            let nodes = shards.split_off(SERVERS);
            let nodes: Vec<_> = nodes.iter().filter_map(|url| url.strip_prefix("redis://")).collect();
            shards.push(format!("redlock://{}", nodes.join(",")));
        }
        shards
    }

    /// The URLs of the servers for the data: one per shard, or one for all. Empty for the load.
    pub(super) fn data(&self) -> Vec<String> {
        if self.is_load {
            return Vec::new();
        }
        if self.are_plain && !self.given.is_empty() {
            return self.given.clone();
        }
        self.started()
    }

    fn started(&self) -> Vec<String> {
        self.servers.iter().flat_map(TempServers::urls).collect()
    }

    /// Whether all shards have permits.
    pub(super) fn has_permits(&self) -> bool {
        self.shards().iter().all(|url| !url.starts_with("redlock"))
    }

    /// Whether the servers were started by the demo.
    pub(super) fn owns_servers(&self) -> bool {
        self.given.is_empty()
    }

    /// Writes the metrics addresses of the workers for Prometheus, until [`Self::tear_down`].
    pub(super) fn publish(&mut self, file: &Path, workers: &[SocketAddr]) -> anyhow::Result<()> {
        self.targets = Some(TargetsFile::write(file, workers)?);
        Ok(())
    }

    /// Stops the workers, then erases the keys on given shards or stops the started servers.
    pub(super) async fn tear_down(mut self) -> anyhow::Result<()> {
        drop(self.targets.take());
        self.workers.kill().await?;
        if let Some(servers) = self.servers.take() {
            servers.stop().await?;
        }
        let torn_down = if self.are_plain {
            self.remove_keys().await
        } else {
            self.erase_locks().await
        };
        torn_down.with_context(|| format!("keys that begin with {:?} may be left on the given shards", self.prefix))
    }

    async fn remove_keys(&self) -> anyhow::Result<()> {
        for url in &self.given {
            cleanup::remove_keys(url, &self.prefix).await.with_context(|| {
                Endpoint::parse(url).map_or_else(|error| error.to_string(), |endpoint| endpoint.to_string())
            })?;
        }
        Ok(())
    }

    async fn erase_locks(&self) -> anyhow::Result<()> {
        let builder = builder(&self.given, &KeyNames::new(&self.prefix))?;
        let locks = builder.store_timeout(SERVER_TIMEOUT).connect().await?;
        load::erase(&locks).await
    }
}
