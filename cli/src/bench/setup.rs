//! Sets up a run and removes everything afterwards.

use std::path::PathBuf;

use anyhow::{Context, anyhow};
use shardlock::config::{Builder, Config, Endpoint};
use shardlock::tool;

use super::Args;
use super::figures::HandOffs;
use super::temp_agent::TempAgent;
use crate::exit::Failure;
use crate::load;
use crate::load::temp_servers::TempServers;
use crate::load::workers::Workers;
use crate::output::eprint;
use crate::shards;

/// Everything that must be removed. It is filled step by step, so that an interrupted run removes
/// exactly what it has created.
#[derive(Debug)]
pub(super) struct Setup {
    servers: Option<TempServers>,
    agent: Option<TempAgent>,
    /// The settings to erase the namespace with on given shards, once workers may have written
    /// there.
    erase_config: Option<Config>,
    /// Unique, so that all of it can be erased.
    pub(super) namespace: String,
    /// The description of the shards in the result.
    pub(super) shards: String,
    pub(super) workers: Workers,
}

impl Setup {
    /// # Errors
    ///
    /// If these processes can't share the shards.
    pub(super) fn new(config: &Config, processes: u32) -> Result<Self, Failure> {
        let mut shown = Vec::new();
        for shard in &config.shards {
            let endpoint = Endpoint::parse(&shard.url)?;
            if endpoint.scheme() == "memory" && processes > 1 {
                return Err(Failure::usage(anyhow!(
                    "{endpoint} is inside one process, so {processes} processes can't share it; use --processes 1, or a shard on a server"
                )));
            }
            shown.push(endpoint.to_string());
        }
        Ok(Self {
            servers: None,
            agent: None,
            erase_config: None,
            namespace: format!("bench:{}-{:016x}:", std::process::id(), rand::random::<u64>()),
            shards: shown.join(" and "),
            workers: Workers::new("bench"),
        })
    }

    /// Starts a server if no shard is given. Returns its URL.
    pub(super) async fn start_server(&mut self, config: &mut Config) -> anyhow::Result<Vec<String>> {
        config.namespace.clone_from(&self.namespace);
        if !config.shards.is_empty() {
            let is_shared = !config.shards.iter().all(shards::is_in_process);
            self.erase_config = is_shared.then(|| config.clone());
            return Ok(Vec::new());
        }
        let servers = self.servers.insert(TempServers::new()?);
        servers.start(1).await?;
        let started: Vec<String> = servers.urls().collect();
        tool::set(config, "shards", &started.join(" "))?;
        "a throw-away Redis server".clone_into(&mut self.shards);
        Ok(started)
    }

    /// Starts an agent for the shards. Returns the path of its socket.
    pub(super) async fn start_agent(&mut self, args: &Args, started: &[String]) -> anyhow::Result<PathBuf> {
        let agent = TempAgent::start(args, started, &self.namespace).await?;
        self.shards.push_str(", through an agent");
        Ok(self.agent.insert(agent).socket.clone())
    }

    /// The number of locks that the agent's workers have acquired so far, by path.
    pub(super) async fn agent_counts(&self) -> Option<HandOffs> {
        let counted = self.agent.as_ref()?.counts().await;
        counted
            .inspect_err(|error| eprint(format_args!("the agent does not report its counts: {error:#}")))
            .ok()
    }

    /// Stops the workers, then erases the keys on given shards or stops the servers that were
    /// started.
    pub(super) async fn tear_down(mut self) -> anyhow::Result<()> {
        self.workers.kill().await?;
        if let Some(agent) = self.agent.take() {
            agent.stop().await?;
        }
        if let Some(servers) = self.servers.take() {
            servers.stop().await?;
        }
        let Some(config) = self.erase_config.take() else {
            return Ok(());
        };
        erase(config).await.with_context(|| {
            format!(
                "keys of the namespace {:?} may be left on the given shards",
                self.namespace
            )
        })
    }
}

async fn erase(config: Config) -> anyhow::Result<()> {
    let locks = Builder::new().config(config).connect().await?;
    load::erase(&locks).await
}
