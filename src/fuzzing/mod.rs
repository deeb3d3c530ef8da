//! What must hold for every input of each parser: run on arbitrary bytes by the targets in `fuzz/`, and on their corpora by a test
//! of this crate.
//!
//! No part of the library: it exists in tests and under `cfg(fuzzing)`, which cargo-fuzz sets. Each function takes any bytes and
//! panics if a statement about them is false. `fuzz/README.md` lists which input each covers.
//!
//! The statements about parsers that are private to a store are beside them, in `store/redis/fuzzing.rs` and its like.

// A statement that is false ends the program.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::borrow::Cow;

#[cfg(test)]
mod corpora;
#[cfg(test)]
mod corpus;
mod printable;
mod settings;
mod shard_maps;
mod signatures;
#[cfg(feature = "file")]
mod toml;
mod urls;

#[cfg(feature = "etcd")]
pub use crate::store::etcd::fuzzing::etcd;
pub use crate::store::redis::fuzzing::{names, places, pushes, refusals, replies};
pub use printable::printable;
pub use settings::settings;
pub use shard_maps::shard_maps;
pub use signatures::signatures;
#[cfg(feature = "file")]
pub use toml::toml;
pub use urls::urls;

/// What stands for a password.
pub(crate) const SECRET: &str = "S3CRET";

/// The first `N` bytes, for numbers, with zeros where there are fewer; and the rest.
pub(crate) fn head<const N: usize>(data: &[u8]) -> ([u8; N], &[u8]) {
    let (first, rest) = data.split_at(data.len().min(N));
    let mut head = [0; N];
    head[..first.len()].copy_from_slice(first);
    (head, rest)
}

/// The text of an input. What is not UTF-8 is replaced, as it is in most of what servers say.
pub(crate) fn text(data: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(data)
}

/// The lines of an input, for inputs of several parts; empty ones where there are fewer. The last has what is left.
pub(crate) fn lines<const N: usize>(text: &str) -> [&str; N] {
    let mut parts = text.splitn(N, '\n');
    [(); N].map(|()| parts.next().unwrap_or_default())
}
