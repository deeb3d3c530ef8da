//! The properties that each parser must have for every input. The targets in `fuzz/` check them on
//! arbitrary bytes, and a test of this crate checks them on the corpora.
//!
//! This is not part of the library: it exists only in tests and under `cfg(fuzzing)`, which
//! cargo-fuzz sets. Each function accepts any bytes and panics if a property is violated.
//! `fuzz/README.md` lists the input that each function covers.
//!
//! Properties of parsers that are private to a store are defined next to them, such as in
//! `store/redis/fuzzing.rs`.

// A violated property panics.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::borrow::Cow;

#[cfg(test)]
mod corpora;
#[cfg(test)]
mod corpus;
mod owner_tags;
mod printable;
mod settings;
mod shard_maps;
#[cfg(feature = "file")]
mod toml;
mod urls;

#[cfg(feature = "etcd")]
pub use crate::store::etcd::fuzzing::etcd;
pub use crate::store::redis::fuzzing::{names, places, pushes, refusals, replies};
pub use owner_tags::owner_tags;
pub use printable::printable;
pub use settings::settings;
pub use shard_maps::shard_maps;
#[cfg(feature = "file")]
pub use toml::toml;
pub use urls::urls;

/// A placeholder for a password.
pub(crate) const SECRET: &str = "S3CRET";

/// The first `N` bytes, for numbers, padded with zeros, and the rest.
pub(crate) fn head<const N: usize>(data: &[u8]) -> ([u8; N], &[u8]) {
    let (first, rest) = data.split_at(data.len().min(N));
    let mut head = [0; N];
    head[..first.len()].copy_from_slice(first);
    (head, rest)
}

/// The text of an input. Invalid UTF-8 is replaced, as in most text from servers.
pub(crate) fn text(data: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(data)
}

/// Splits an input into `N` lines. Missing lines are empty, and the last one contains the rest.
pub(crate) fn lines<const N: usize>(text: &str) -> [&str; N] {
    let mut parts = text.splitn(N, '\n');
    [(); N].map(|()| parts.next().unwrap_or_default())
}
