//! The options of `shardlock serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::limits::Limits;
use crate::{metrics, shards};

/// Run an agent: one manager for all workers of this host, which talk to it in the Redis protocol
///
/// Workers in any language connect to a Unix socket with a Redis client and send LOCK, UNLOCK,
/// HELD and INSPECT. A lock belongs to the connection that took it and ends with it, so the lock of
/// a worker that is killed is free within milliseconds. docs/agent.md describes the commands.
///
/// TERM and INT drain the agent: no lock is granted any more, and the agent exits when the last one
/// was released, or after --drain. A second TERM or INT ends it immediately. HUP reads the
/// password and the defaults for requests again. Sockets that systemd passes are used instead of
/// --socket and --listen.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(super) listen: ListenOptions,

    #[command(flatten)]
    pub(super) limits: Limits,

    /// How long to wait for the holders of locks after TERM, such as 20s
    #[arg(long, value_name = "DURATION", default_value = "20s", value_parser = drain_limit)]
    pub(super) drain: Duration,

    /// The number of threads; one serves tens of thousands of locks per second
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=64))]
    pub(super) threads: u16,

    #[command(flatten)]
    pub(super) metrics: metrics::Options,

    #[command(flatten)]
    pub(super) shards: shards::Options,
}

/// Where the agent listens, and who may connect.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Listening")]
#[group(skip)]
pub(super) struct ListenOptions {
    /// The path of the Unix socket [default: $SHARDLOCK_AGENT, or /run/shardlock/agent.sock]
    #[arg(long, value_name = "PATH")]
    pub(super) socket: Option<PathBuf>,

    /// The mode of the socket file; who may write to it may connect
    #[arg(long, value_name = "MODE", default_value = "0660", value_parser = mode)]
    pub(super) socket_mode: u32,

    /// The owner of the socket file, such as shardlock:workers or :workers
    #[arg(long, value_name = "[USER][:GROUP]")]
    pub(super) socket_owner: Option<String>,

    /// Also listen on this TCP address; an address other than loopback needs --password-file
    ///
    /// The connection is not encrypted: passwords and the names of locks are readable on the
    /// network.
    #[arg(long, value_name = "ADDR")]
    pub(super) listen: Option<SocketAddr>,

    /// A file whose first line is the password that clients must send with AUTH or HELLO
    #[arg(long, value_name = "FILE")]
    pub(super) password_file: Option<PathBuf>,
}

fn mode(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777);
    mode.ok_or_else(|| "must be an octal number such as 0660".to_owned())
}

const DRAIN_MAX: Duration = Duration::from_secs(24 * 3600);

fn drain_limit(text: &str) -> Result<Duration, String> {
    let limit = humantime::parse_duration(text).ok().filter(|&limit| limit <= DRAIN_MAX);
    limit.ok_or_else(|| "must be a duration such as 500ms or 20s, from 0s to 1day".to_owned())
}
