//! Shared by tests and benches: real servers on free ports, worker processes, and waiting for
//! observable conditions.
//!
//! Nothing here uses the shardlock crate, so that a change of the library does not rebuild it; what
//! needs the library is in `tests/support_locks`. Nothing here skips a test: anything missing is a
//! panic that says how to install it.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

pub mod cluster;
pub mod directory;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod filter;
pub mod other_clock;
pub mod postgres;
pub mod process;
pub mod prometheus;
pub mod proxy;
pub mod quorum;
pub mod rabbitmq;
pub mod resp;
pub mod sentinel;
pub mod server;
pub mod terminal;
pub mod tls;
mod tls_front;
pub mod wait;
pub mod worker;

pub use cluster::Cluster;
pub use directory::{directory, repository};
pub use quorum::Quorum;
pub use resp::RespClient;
pub use server::{ClientType, RedisServer, free_port};
pub use terminal::Terminal;
pub use wait::{PATIENCE, eventually, wait_until};
pub use worker::Worker;
