//! Settings from the environment.

use super::kubernetes::is_service_variable;
use super::nearest::{a_known_one, did_you_mean};
use super::{Config, bounds};
use crate::error::InvalidSetting;

const PREFIX: &str = "SHARDLOCK_";

/// Variables with our prefix that are not settings of a manager but belong to the command-line tool
/// and its tests.
const NOT_SETTINGS: [&str; 13] = [
    "SHARDLOCK_AGENT",
    "SHARDLOCK_AGENT_PASSWORD",
    "SHARDLOCK_AGENT_PASSWORD_FILE",
    "SHARDLOCK_CLIENTS",
    "SHARDLOCK_CONFIG",
    "SHARDLOCK_ETCD_SERVER",
    "SHARDLOCK_LOG",
    "SHARDLOCK_METRICS",
    "SHARDLOCK_POSTGRES",
    "SHARDLOCK_PROMETHEUS",
    "SHARDLOCK_PYTHON",
    "SHARDLOCK_RABBITMQ",
    "SHARDLOCK_REDIS_SERVER",
];

impl Config {
    /// Returns the defaults, overridden by the environment.
    ///
    /// # Errors
    ///
    /// The errors of [`Config::apply_env`].
    pub fn from_env() -> Result<Self, InvalidSetting> {
        let mut config = Self::default();
        config.apply_env()?;
        Ok(config)
    }

    /// Applies the settings in the environment: `SHARDLOCK_` and the name of a setting in upper
    /// case, as in `SHARDLOCK_TTL=10s`.
    ///
    /// Durations are written like `500ms`, `10s` or `2m`. `timeout`, `max_hold`, `slow_wait`,
    /// `long_hold`, `username`, `password`, `password_file` and the `tls_` files may be `none`.
    /// `SHARDLOCK_SHARDS` is a list of `url` or `name=url`, separated by commas or spaces; it
    /// replaces the previous shards.
    ///
    /// `SHARDLOCK_AGENT`, `SHARDLOCK_AGENT_PASSWORD`, `SHARDLOCK_AGENT_PASSWORD_FILE`,
    /// `SHARDLOCK_CONFIG`, `SHARDLOCK_LOG`, `SHARDLOCK_METRICS`, `SHARDLOCK_REDIS_SERVER`,
    /// `SHARDLOCK_ETCD_SERVER`, `SHARDLOCK_POSTGRES`, `SHARDLOCK_PROMETHEUS`, `SHARDLOCK_PYTHON`,
    /// `SHARDLOCK_RABBITMQ` and `SHARDLOCK_CLIENTS` belong to the command-line tool and the tests
    /// and are ignored. Also ignored are variables without a value, as in `SHARDLOCK_TTL=`, and
    /// those that Kubernetes adds for Services with such a name, as in
    /// `SHARDLOCK_PORT=tcp://10.96.0.12:9187` or
    /// `SHARDLOCK_REDIS_SERVICE_HOST=10.96.0.13`.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`], with the name of the variable, if a value can't be parsed or is outside
    /// its bounds, or if any other variable starts with `SHARDLOCK_`: it is most likely misspelt,
    /// and the nearest known name is suggested. Nothing has been changed in that case.
    pub fn apply_env(&mut self) -> Result<(), InvalidSetting> {
        let mut variables = Vec::new();
        for (name, value) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if !name.starts_with(PREFIX) || NOT_SETTINGS.contains(&&*name) {
                continue;
            }
            let value = value
                .into_string()
                .map_err(|_| InvalidSetting::new(&*name, "not UTF-8", "UTF-8"))?;
            variables.push((name.into_owned(), value));
        }
        self.apply_variables(variables)
    }

    /// Like [`apply_env`](Self::apply_env), with variables from another source. Variables that do
    /// not start with `SHARDLOCK_` are ignored.
    ///
    /// # Errors
    ///
    /// The errors of [`Config::apply_env`].
    pub(crate) fn apply_variables(
        &mut self,
        variables: impl IntoIterator<Item = (String, String)>,
    ) -> Result<(), InvalidSetting> {
        let mut ours: Vec<_> = variables
            .into_iter()
            .filter(|(name, value)| name.starts_with(PREFIX) && !NOT_SETTINGS.contains(&&**name) && !value.is_empty())
            .collect();
        // The environment has no order; sort so that the same mistake is reported each time.
        ours.sort();
        let mut changed = self.clone();
        for (variable, value) in &ours {
            let Some(name) = setting(variable) else {
                if is_service_variable(variable, value) {
                    continue;
                }
                let known: Vec<_> = Self::fields().map(|(name, _)| variable_of(name)).collect();
                let all = known.iter().map(String::as_str).chain(NOT_SETTINGS);
                // Compare without the prefix, which would make all names look similar.
                let meant = did_you_mean(&variable[PREFIX.len()..], all.map(|name| &name[PREFIX.len()..]));
                let meant = meant.replacen("mean ", &format!("mean {PREFIX}"), 1);
                let bound = a_known_one(&meant, &known);
                return Err(InvalidSetting::new(
                    "environment variable",
                    bounds::echo(variable),
                    bound,
                ));
            };
            changed.set(name, value).map_err(|invalid| {
                // The rest of the field is its part, as in `shards[1].url`.
                let part = &invalid.field[name.len()..];
                InvalidSetting::new(format!("{variable}{part}"), invalid.value, invalid.bound)
            })?;
        }
        *self = changed;
        Ok(())
    }
}

fn setting(variable: &str) -> Option<&'static str> {
    let mut names = Config::fields().map(|(name, _)| name);
    names.find(|name| variable_of(name) == variable)
}

fn variable_of(name: &str) -> String {
    format!("{PREFIX}{}", name.to_ascii_uppercase())
}
