//! The options that say which shards there are and how to use them; every command but `demo` has them.

use std::path::PathBuf;

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use shardlock::Config;

use crate::exit::Failure;

/// Where the settings come from, besides the environment.
#[derive(Debug, Clone, clap::Args, Serialize, Deserialize)]
#[command(next_help_heading = "Shards")]
#[group(skip)]
pub(crate) struct Options {
    /// A shard, as URL or NAME=URL; repeat it for several, in the same order everywhere
    ///
    /// For example redis://10.0.0.1:6379. Other users of this machine can see a password that stands here: put it into
    /// SHARDLOCK_SHARDS or a file.
    #[arg(long = "shard", value_name = "[NAME=]URL")]
    shards: Vec<String>,

    /// A configuration file in TOML
    #[arg(long, value_name = "FILE", env = "SHARDLOCK_CONFIG")]
    config: Option<PathBuf>,

    /// Any other setting of a configuration file, such as store_timeout=5s
    #[arg(long = "set", value_name = "SETTING=VALUE")]
    pub(crate) settings: Vec<String>,
}

impl Options {
    /// The settings: the file's, overridden by the environment's, overridden by those of the command line.
    pub(crate) fn load(&self) -> Result<Config, Failure> {
        let mut config = match &self.config {
            Some(path) => Config::from_file(path).map_err(Failure::config)?,
            None => Config::default(),
        };
        config.apply_env().map_err(Failure::config)?;
        for (index, setting) in self.settings.iter().enumerate() {
            let (name, value) = setting.split_once('=').ok_or_else(|| {
                Failure::usage(anyhow!(
                    "--set is {setting:?}, but must be SETTING=VALUE, such as store_timeout=5s"
                ))
            })?;
            let is_again = |earlier: &String| earlier.split_once('=').is_some_and(|(earlier, _)| earlier == name);
            if self.settings[..index].iter().any(is_again) {
                return Err(Failure::usage(anyhow!("--set names {name:?} twice")));
            }
            if name == "shards" && !self.shards.is_empty() {
                return Err(Failure::usage(anyhow!(
                    "the shards are given by --shard and by --set shards; use one of them"
                )));
            }
            config.set(name, value)?;
        }
        if !self.shards.is_empty() {
            config.set("shards", &self.shards.join(" "))?;
        }
        Ok(config)
    }

    /// The same for a command that needs shards to talk to.
    pub(crate) fn load_with_shards(&self) -> Result<Config, Failure> {
        let config = self.load()?;
        if config.shards.is_empty() {
            return Err(Failure::usage(anyhow!(
                "no shard is given; say --shard redis://HOST:PORT, or set SHARDLOCK_SHARDS, or name a file with \
                 --config"
            )));
        }
        Ok(config)
    }
}
