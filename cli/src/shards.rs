//! The options for the shards and the other settings. Every command except `demo` has them.

use std::ffi::OsString;
use std::path::PathBuf;

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use shardlock::config::{Builder, Config, Endpoint, ShardConfig};
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager, tool};

use crate::exit::Failure;
use crate::serve::AGENT_VARIABLE;

/// Sources of settings, besides the environment.
#[derive(Debug, Clone, clap::Args, Serialize, Deserialize)]
#[command(next_help_heading = "Shards")]
#[group(skip)]
pub(crate) struct Options {
    /// A shard; repeat for several, in the same order in every process
    ///
    /// For example redis://10.0.0.1:6379. Other users of this machine can see a password given
    /// here: put it in SHARDLOCK_SHARDS, or into a file that SHARDLOCK_PASSWORD_FILE names.
    #[arg(long = "shard", value_name = "[NAME=]URL")]
    shards: Vec<String>,

    /// The configuration file, in TOML [default: $SHARDLOCK_CONFIG]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Any other setting of the configuration file, such as store_timeout=5s; repeatable
    #[arg(long = "set", value_name = "SETTING=VALUE")]
    pub(crate) settings: Vec<String>,
}

impl Options {
    /// Loads the settings: the file, overridden by the environment, overridden by the command line.
    pub(crate) fn load(&self) -> Result<Config, Failure> {
        let from_env = || std::env::var_os("SHARDLOCK_CONFIG").filter(|path| !path.is_empty());
        let mut config = match self.config.clone().or_else(|| from_env().map(PathBuf::from)) {
            Some(path) => Config::from_file(&path).map_err(Failure::config)?,
            None => Config::default(),
        };
        config.apply_env().map_err(Failure::config)?;
        for (index, setting) in self.settings.iter().enumerate() {
            let (name, value) = setting.split_once('=').ok_or_else(|| {
                Failure::usage(anyhow!(
                    "--set is {setting:?}, but must be SETTING=VALUE, such as store_timeout=5s"
                ))
            })?;
            let is_same_name = |earlier: &String| earlier.split_once('=').is_some_and(|(earlier, _)| earlier == name);
            if self.settings[..index].iter().any(is_same_name) {
                return Err(Failure::usage(anyhow!("--set names {name:?} twice")));
            }
            if name == "shards" && !self.shards.is_empty() {
                return Err(Failure::usage(anyhow!(
                    "the shards are given by --shard and by --set shards; use only one of them"
                )));
            }
            tool::set(&mut config, name, value)?;
        }
        if !self.shards.is_empty() {
            tool::set(&mut config, "shards", &self.shards.join(" "))?;
        }
        Ok(config)
    }

    /// Connects a manager with these settings.
    pub(crate) async fn connect(&self, config: Config) -> Result<LockManager, Failure> {
        let connected = Builder::new().config(config).connect().await;
        connected.map_err(|error| self.connect_failure(&error))
    }

    /// The failure of a manager with these settings to connect. Which of the settings is invalid is
    /// known only then.
    pub(crate) fn connect_failure(&self, error: &LockError) -> Failure {
        let is_on_command_line = !self.shards.is_empty() || !self.settings.is_empty();
        match error.kind() {
            LockErrorKind::Invalid if !is_on_command_line => Failure::config(anyhow!(error.to_string())),
            _ => Failure::from(error),
        }
    }

    /// Whether shards or settings are given on the command line.
    pub(crate) fn is_given(&self) -> bool {
        !self.shards.is_empty() || self.config.is_some() || !self.settings.is_empty()
    }

    /// Like [`Self::load_with_shards`], for commands that connect to servers without a manager: the
    /// login is in the URLs.
    pub(crate) fn load_for_servers(&self) -> Result<Config, Failure> {
        let mut config = self.load_with_shards()?;
        config.validate().map_err(Failure::config)?;
        tool::put_login_into_urls(&mut config).map_err(Failure::config)?;
        Ok(config)
    }

    /// The words of a command line with these options, but with these shards, if there are any, and
    /// these settings.
    pub(crate) fn to_words(&self, shards: &[String], settings: &[(&str, String)]) -> Vec<OsString> {
        let mut words: Vec<OsString> = Vec::new();
        let shards = if shards.is_empty() { &self.shards } else { shards };
        for shard in shards {
            words.extend(["--shard".into(), shard.into()]);
        }
        if let Some(config) = &self.config {
            words.extend(["--config".into(), config.into()]);
        }
        let is_replaced = |setting: &String| {
            let name = setting.split_once('=').map_or(setting.as_str(), |(name, _)| name);
            settings.iter().any(|(replaced, _)| *replaced == name)
        };
        for setting in self.settings.iter().filter(|setting| !is_replaced(setting)) {
            words.extend(["--set".into(), setting.into()]);
        }
        for (name, value) in settings {
            words.extend(["--set".into(), format!("{name}={value}").into()]);
        }
        words
    }

    /// Like [`Self::load`], but fails if there are no shards.
    pub(crate) fn load_with_shards(&self) -> Result<Config, Failure> {
        let config = self.load()?;
        if config.shards.is_empty() {
            let is_nested = std::env::var_os("LOCK_OWNER").is_some();
            let has_agent = std::env::var_os(AGENT_VARIABLE).is_some_and(|socket| !socket.is_empty());
            let hint = if has_agent {
                "; the agent of SHARDLOCK_AGENT is used by `exec` alone, and only without --shard, --config and --set; \
                 `redis-cli -s SOCKET INSPECT KEY` asks it for a key"
            } else if is_nested {
                "; a command run by `shardlock exec` does not inherit a SHARDLOCK_SHARDS that contains a password, \
                 unless exec is given --inherit-password"
            } else {
                ""
            };
            return Err(Failure::usage(anyhow!(
                "no shard is configured; pass --shard redis://HOST:PORT, set SHARDLOCK_SHARDS, or pass a file with \
                 --config{hint}"
            )));
        }
        Ok(config)
    }
}

/// Whether the shard is a store inside one process, which no other process can use.
pub(crate) fn is_in_process(shard: &ShardConfig) -> bool {
    Endpoint::parse(&shard.url).is_ok_and(|endpoint| endpoint.scheme() == "memory")
}

/// The environment variables that may contain a password, and do now. A list of shards that can't
/// be parsed counts as one that does.
pub(crate) fn variables_with_passwords() -> impl Iterator<Item = &'static str> {
    const PASSWORD: &str = "SHARDLOCK_PASSWORD";
    ["SHARDLOCK_SHARDS", PASSWORD].into_iter().filter(|&name| {
        let value = std::env::var_os(name);
        value.is_some_and(|value| name == PASSWORD || value.to_str().is_none_or(has_password))
    })
}

fn has_password(text: &str) -> bool {
    let mut config = Config::default();
    // The debug format replaces each secret with asterisks. A value that can't be parsed may
    // contain a password.
    tool::set(&mut config, "shards", text).is_err() || format!("{:?}", config.shards).contains("***")
}

#[cfg(test)]
mod tests {
    use super::has_password;

    #[test]
    fn a_password_is_found_in_any_shard() {
        for (text, expected) in [
            ("redis://a:1", false),
            ("one=redis://a:1/2, two=redis://b", false),
            ("redis://:s3cret@a", true),
            ("redis://user:s3cret@a", true),
            ("redis://a, redlock://user:s3cret@b,c,d", true),
        ] {
            assert_eq!(has_password(text), expected, "{text}");
        }
    }
}
