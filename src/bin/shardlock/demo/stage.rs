//! What the demo sets up, and how all of it is removed.

use anyhow::{Context, bail};
use shardlock::Endpoint;

use super::DemoArgs;
use super::crew::Crew;
use super::probe;
use super::server::Servers;

/// How many servers are started where none are given.
const SERVERS: usize = 3;

/// What there is to be removed. It is filled step by step, so that a demo which is stopped half-way knows what it has.
#[derive(Debug, Default)]
pub(super) struct Stage {
    servers: Option<Servers>,
    /// Servers of somebody else, on which the keys with the prefix must be removed.
    given: Vec<String>,
    /// What all of the demo's keys begin with: like no other's, so that all keys that begin with it can be removed.
    prefix: String,
    pub(super) crew: Crew,
}

impl Stage {
    /// Starts servers unless some are given.
    pub(super) async fn set_up(&mut self, args: &DemoArgs) -> anyhow::Result<()> {
        self.prefix = format!("demo:{}-{:016x}:", std::process::id(), rand::random::<u64>());
        if args.shards.is_empty() {
            let servers = self.servers.insert(Servers::new()?);
            return servers.start(SERVERS).await;
        }
        for url in &args.shards {
            if !matches!(url.split_once("://"), Some((scheme, _)) if scheme.eq_ignore_ascii_case("redis")) {
                // Says what is wrong with a URL that is none.
                let endpoint = Endpoint::parse(url)?;
                bail!("the demo needs redis:// URLs, since its workers are processes of their own; {endpoint} is none");
            }
        }
        self.given.clone_from(&args.shards);
        Ok(())
    }

    pub(super) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The URLs of the servers, in the order of the shards.
    pub(super) fn shards(&self) -> Vec<String> {
        match &self.servers {
            Some(servers) => servers.urls().collect(),
            None => self.given.clone(),
        }
    }

    /// Stops the workers, then removes the keys from servers that stay and stops those that don't.
    pub(super) async fn clear(mut self) -> anyhow::Result<()> {
        self.crew.kill().await?;
        if let Some(servers) = self.servers.take() {
            servers.stop().await?;
        }
        for url in &self.given {
            probe::remove_keys(url, &self.prefix).await.with_context(|| {
                let server =
                    Endpoint::parse(url).map_or_else(|error| error.to_string(), |endpoint| endpoint.to_string());
                format!("keys that begin with {:?} may be left on {server}", self.prefix)
            })?;
        }
        Ok(())
    }
}
