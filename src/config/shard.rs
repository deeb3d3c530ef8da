//! A shard of a configuration.

use std::fmt;

use crate::endpoint::redact;

/// One shard: its name, which appears in errors and metrics, and its URL.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShardConfig {
    /// The name: 1 to 32 letters, digits, dots, `_` and `-`, unique among the shards. It stays the
    /// same when the shard moves to another address.
    pub name: String,
    /// The URL, in the form accepted by [`Endpoint::parse`](crate::config::Endpoint::parse). It may
    /// contain a password, which `Debug` hides.
    pub url: String,
}

impl ShardConfig {
    /// Creates a shard with this name and URL, unchecked.
    pub fn new(name: impl Into<String>, url: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            url: url.into(),
        }
    }

    /// A shard named after its position in the list.
    pub(crate) fn unnamed(position: usize, url: impl Into<String>) -> Self {
        Self::new(format!("shard-{position}"), url)
    }

    /// Parses `url` or `name=url`.
    pub(super) fn from_text(position: usize, text: &str) -> Self {
        match text.split_once('=') {
            // A `=` may also be part of a password, but a name contains none of the characters that
            // precede it then.
            Some((name, url)) if !name.contains([':', '/', '@']) => Self::new(name, url),
            _ => Self::unnamed(position, text),
        }
    }
}

impl fmt::Debug for ShardConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ShardConfig")
            .field("name", &self.name)
            .field("url", &redact(&self.url))
            .finish()
    }
}
