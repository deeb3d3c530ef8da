//! Shared by tests and benches: real servers on free ports, worker processes, and waiting for
//! observable conditions.
//!
//! Integration tests include this with `mod support;`, the crate's unit tests and the benches with
//! `#[path = "../tests/support/mod.rs"] mod support;`. Nothing here uses the shardlock crate, so
//! the crate's own tests can include it. Nothing here skips a test: anything missing is a panic
//! that says how to install it.

// Each test uses only a part, and the lints see each test's copy in isolation.
#![allow(dead_code, unreachable_pub, unused_imports)]
// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

pub mod cluster;
pub mod directory;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod filter;
pub mod other_clock;
pub mod process;
pub mod prometheus;
pub mod proxy;
pub mod quorum;
pub mod sentinel;
pub mod server;
pub mod terminal;
pub mod tls;
#[cfg(feature = "tls")]
mod tls_front;
pub mod wait;
pub mod worker;

pub use cluster::Cluster;
pub use directory::{directory, repository};
pub use quorum::Quorum;
pub use server::{ClientType, RedisServer, free_port};
pub use terminal::Terminal;
pub use wait::{PATIENCE, eventually, wait_until};
pub use worker::Worker;
