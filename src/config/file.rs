//! Settings from a TOML file.

use std::collections::BTreeMap;
use std::path::Path;

use toml::{Spanned, Table, Value};

use super::bounds::{Problem, echo};
use super::fields::Field;
use super::{Config, ShardConfig};
use crate::error::InvalidSetting;

/// The source in errors about text that did not come from a file.
const NO_FILE: &str = "TOML";

impl Config {
    /// Returns the defaults, overridden by a TOML file. `config/shardlock.example.toml` in the
    /// repository shows all settings.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`], with the file and line, if the file can't be read or is not TOML, if a
    /// name is unknown, or if a value is outside its bounds. Passwords are not shown.
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, InvalidSetting> {
        let path = path.as_ref();
        let text = std::fs::read_to_string(path).map_err(|error| {
            let field = format!("configuration file {}", path.display());
            InvalidSetting::new(field, format!("unreadable ({error})"), "a readable TOML file")
        })?;
        Self::read(&text, &path.display().to_string())
    }

    /// Returns the defaults, overridden by TOML text.
    ///
    /// # Errors
    ///
    /// The errors of [`Config::from_file`].
    pub fn from_toml(text: &str) -> Result<Self, InvalidSetting> {
        Self::read(text, NO_FILE)
    }

    fn read(text: &str, source: &str) -> Result<Self, InvalidSetting> {
        let place = |at: usize| {
            let line = 1 + text.bytes().take(at).filter(|&byte| byte == b'\n').count();
            format!("{source} line {line}")
        };
        // The `Display` of the error quotes the line, which may contain a password; its message
        // does not.
        let entries: BTreeMap<Spanned<String>, Spanned<Value>> = toml::from_str(text).map_err(|error| {
            let field = place(error.span().map_or(0, |span| span.start));
            let value = format!("malformed ({})", error.message());
            InvalidSetting::new(field, value, "valid TOML")
        })?;
        let mut config = Self::default();
        for (name, value) in entries {
            let place = place(name.span().start);
            config
                .set_value(name.get_ref(), value.into_inner())
                .map_err(|invalid| {
                    let field = format!("{} ({place})", invalid.field);
                    InvalidSetting::new(field, invalid.value, invalid.bound)
                })?;
        }
        Ok(config)
    }

    fn set_value(&mut self, name: &str, value: Value) -> Result<(), InvalidSetting> {
        match value {
            Value::String(text) => self.set(name, &text),
            Value::Integer(number) => self.set(name, &number.to_string()),
            Value::Float(number) => self.set(name, &number.to_string()),
            Value::Boolean(on) if matches!(name, "hot_key_metrics" | "check_role" | "log_keys") => {
                self.set(name, &on.to_string())
            }
            Value::Array(items) if name == "shards" => self
                .change(|config| {
                    config.shards = items
                        .into_iter()
                        .enumerate()
                        .map(|(position, item)| shard(position, item))
                        .collect::<Result<_, _>>()?;
                    Field::named(name).map_or(Ok(()), |field| (field.check)(config))
                })
                .map_err(|problem| problem.of(name)),
            // If the name is unknown too, report that rather than the type.
            _ if Field::named(name).is_none() => self.set(name, ""),
            other => Err(InvalidSetting::new(
                name,
                format!("of type {}", other.type_str()),
                "a string or a number",
            )),
        }
    }
}

/// Parses `"url"`, `"name=url"` or `{ name = "...", url = "..." }`.
fn shard(position: usize, item: Value) -> Result<ShardConfig, Problem> {
    const FORM: &str = "a URL, or a table with the strings url and, optionally, name";
    let part = format!("[{position}]");
    match item {
        Value::String(text) => Ok(ShardConfig::from_text(position, &text)),
        Value::Table(table) => from_table(position, table).map_err(|value| Problem::new(value, FORM).at(part)),
        other => Err(Problem::new(format!("of type {}", other.type_str()), FORM).at(part)),
    }
}

/// Parses the table. The error describes what it is instead.
fn from_table(position: usize, mut table: Table) -> Result<ShardConfig, String> {
    let mut text = |name: &str| match table.remove(name) {
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(format!("a table with a {name} of type {}", other.type_str())),
        None => Ok(None),
    };
    let (name, url) = (text("name")?, text("url")?);
    if let Some(unknown) = table.keys().next() {
        return Err(format!("a table with the unknown name {}", echo(unknown)));
    }
    match (name, url) {
        (Some(name), Some(url)) => Ok(ShardConfig::new(name, url)),
        (None, Some(url)) => Ok(ShardConfig::unnamed(position, url)),
        (_, None) => Err("a table without a url".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(text: &str) -> String {
        Config::from_toml(text).unwrap_err().to_string()
    }

    #[test]
    fn shards_are_given_as_texts_or_as_tables() {
        let expected = [
            ShardConfig::new("a", "redis://a"),
            ShardConfig::new("shard-1", "redis://b"),
        ];
        for text in [
            "shards = ['a=redis://a', 'redis://b']",
            "shards = 'a=redis://a, redis://b'",
            "shards = [{ name = 'a', url = 'redis://a' }, { url = 'redis://b' }]",
            "shards = [{ name = 'a', url = 'redis://a' }, 'redis://b']",
            "[[shards]]\nname = 'a'\nurl = 'redis://a'\n[[shards]]\nurl = 'redis://b'\n",
        ] {
            assert_eq!(Config::from_toml(text).unwrap().shards, expected, "{text}");
        }
    }

    #[test]
    fn errors_name_the_field_and_the_line() {
        for (text, expected) in [
            (
                "class = 'a'\nttl = '5ms'",
                "ttl (TOML line 2) is 5ms, but must be from 50ms to 1d",
            ),
            (
                "ttl = 10",
                "ttl (TOML line 1) is \"10\", but must be a duration such as",
            ),
            (
                "\n\ntll = '10s'",
                "setting (TOML line 3) is \"tll\", but must be a known one; did you mean ttl?",
            ),
            (
                "tll = true",
                "setting (TOML line 1) is \"tll\", but must be a known one; did you mean ttl?",
            ),
            (
                "ttl = true",
                "ttl (TOML line 1) is of type boolean, but must be a string or a number",
            ),
            (
                "ttl = ['1s']",
                "ttl (TOML line 1) is of type array, but must be a string or a number",
            ),
            (
                "ttl = '1s'\nttl = '2s'",
                "TOML line 2 is malformed (duplicate key), but must be valid TOML",
            ),
            ("a = 1\n\nb = = 2", "TOML line 3 is malformed ("),
            (
                "shards = [1]",
                "shards[0] (TOML line 1) is of type integer, but must be a URL, or a table",
            ),
            (
                "shards = []",
                "shards (TOML line 1) is empty, but must be a list of 1 to 1024 shards",
            ),
            (
                "shards = ['memory://', 'x']",
                "shards[1].url (TOML line 1) is x, but must be a URL",
            ),
            (
                "[[shards]]\nurl = 'memory://'\nuser = 'x'",
                "shards[0] (TOML line 1) is a table with the unknown name",
            ),
            (
                "[[shards]]\nurl = 1",
                "shards[0] (TOML line 1) is a table with a url of type integer",
            ),
            (
                "[[shards]]\nname = 'a'",
                "shards[0] (TOML line 1) is a table without a url",
            ),
        ] {
            let message = refusal(text);
            assert!(message.starts_with(expected), "{text}\n{message}");
        }
    }

    #[test]
    fn no_message_shows_a_password() {
        for text in [
            "shards = redis://:s3cret@host",
            "shards = 'redis://:s3cret@host",
            "shards = ['redis://:s3cret@host'",
            "shards = ['redis://:s3cret@host']\nshards = ['redis://:s3cret@host']",
            "shards = ['redis://:s3cret@host:99999']",
            "shards = [{ name = 'redis://:s3cret@host', url = 'a' }]",
            "shards = [{ 'redis://:s3cret@host' = 'a' }]",
            "'redis://:s3cret@host' = 'a'",
            "'redis://:s3cret@host' = 'a'\n'redis://:s3cret@host' = 'a'",
            "redis://:s3cret@host",
            "[redis://:s3cret@host]",
            "[[redis://:s3cret@host]]",
            "shards = \"\\s3cret\"",
            "shards.s3cret = 1\nshards.s3cret.s3cret = 1",
        ] {
            let error = Config::from_toml(text).unwrap_err();
            assert!(!format!("{error} {error:?}").contains("s3cret"), "{text}\n{error}");
        }
    }
}
