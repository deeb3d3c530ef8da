//! Stores that are made of Redis (or Valkey) servers.
//!
//! Every change of a lock's state is one Lua script, or the two plain commands of the free path, so that it is atomic on
//! the server; `scripts/*.lua` hold the protocol. All are idempotent for a cycle. What is said to a server and what it says is the same
//! whichever way a server is found: `names`, `commands`, `script` and `reply`.

mod client;
mod commands;
pub(crate) mod names;
mod permission;
pub(crate) mod primary;
mod reply;
mod script;
