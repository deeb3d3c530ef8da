//! What a run sets up, and how all of it is removed.

use anyhow::{Context, anyhow, bail};
use shardlock::{Builder, Config, Endpoint};

use crate::exit::Failure;
use crate::load::crew::Crew;
use crate::load::server::Servers;

/// How often the namespace is erased, at most, until there is nothing left in it.
const ERASURES_MAX: u32 = 20;

/// What there is to be removed. It is filled step by step, so that a run which is stopped half-way knows what it has.
#[derive(Debug)]
pub(super) struct Stage {
    servers: Option<Servers>,
    /// What erases the namespace on shards of somebody else, once workers have begun to write there.
    erases: Option<Config>,
    /// Like no other's, so that all of it can be removed.
    pub(super) namespace: String,
    /// What the run is called in words.
    pub(super) shards: String,
    pub(super) crew: Crew,
}

impl Stage {
    /// # Errors
    ///
    /// Shards that these processes can't use.
    pub(super) fn new(config: &Config, processes: u32) -> Result<Self, Failure> {
        let mut shown = Vec::new();
        for shard in &config.shards {
            let endpoint = Endpoint::parse(&shard.url)?;
            if endpoint.scheme() == "memory" && processes > 1 {
                return Err(Failure::usage(anyhow!(
                    "{endpoint} is inside one process, so {processes} processes can't share it; say --processes 1, or give a shard on a server"
                )));
            }
            shown.push(endpoint.to_string());
        }
        Ok(Self {
            servers: None,
            erases: None,
            namespace: format!("bench:{}-{:016x}:", std::process::id(), rand::random::<u64>()),
            shards: shown.join(" and "),
            crew: Crew::of("bench"),
        })
    }

    /// Starts a server if no shard is given, and says where.
    pub(super) async fn set_up(&mut self, config: &mut Config) -> anyhow::Result<Vec<String>> {
        config.namespace.clone_from(&self.namespace);
        if !config.shards.is_empty() {
            let is_shared = config.shards.iter().any(|shard| !shard.url.starts_with("memory:"));
            self.erases = is_shared.then(|| config.clone());
            return Ok(Vec::new());
        }
        let servers = self.servers.insert(Servers::new()?);
        servers.start(1).await?;
        let started: Vec<String> = servers.urls().collect();
        config.set("shards", &started.join(" "))?;
        "a throw-away Redis server".clone_into(&mut self.shards);
        Ok(started)
    }

    /// Stops the workers, then removes the keys from servers that stay and stops those that don't.
    pub(super) async fn clear(mut self) -> anyhow::Result<()> {
        self.crew.kill().await?;
        if let Some(servers) = self.servers.take() {
            servers.stop().await?;
        }
        let Some(config) = self.erases.take() else {
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

/// Until there is nothing left, since a command that a killed worker had sent may be carried out a moment later.
async fn erase(config: Config) -> anyhow::Result<()> {
    let locks = Builder::new().config(config).connect().await?;
    for _ in 0..ERASURES_MAX {
        if locks.erase_namespace().await? == 0 {
            return Ok(());
        }
    }
    bail!("new keys keep coming")
}
