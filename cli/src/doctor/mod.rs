//! `shardlock doctor`: checks a configuration against the servers, and reports problems with how to
//! fix them.
//!
//! # Implementation details
//!
//! `probe` queries one server and never writes to it; `permission_probe` tries the commands of
//! `needs` there. The result is stored in the types of `facts`. Each check is a function from facts
//! to a finding, without I/O, in the file of its subject.
//! `server` runs the checks of a single server. `redlock`, `sentinel`, `cluster` and `etcd` find
//! the servers of a shard and add the checks of the shard as a whole. `report` formats the
//! findings.

mod clock;
mod cluster;
mod connections;
#[cfg(feature = "etcd")]
mod etcd;
mod facts;
mod finding;
mod format;
mod map;
mod memory;
mod needs;
mod permission_probe;
mod permissions;
mod persistence;
mod probe;
mod reachability;
mod redlock;
mod replication;
mod report;
mod sentinel;
mod server;
mod timing;

use std::io::{IsTerminal, stdout};

use futures_util::{StreamExt, stream};
use shardlock::config::{Endpoint, ShardConfig};
use shardlock::tool;

use crate::exit::Failure;
use crate::servers::Connector;
use crate::{output, shards};
use finding::{Finding, Level};
use probe::probe;
use report::{Colouring, Report, ShardReport};
use server::{Expectations, check_server};

/// Check the configuration against the servers and report problems with how to fix them
///
/// Nothing is written to any server, and each request to a server is limited by store_timeout.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Exit codes:
   0  no problems, or notes only
   1  warnings: locks work, but there is an avoidable risk
   2  errors: locks don't work, or can be held twice
  64  the command line is invalid
  78  the environment or the configuration file is invalid

With --json, prints one object:
  level, exit_code   the worst level found: ok, note, warning or error
  counts             number of findings of each level
  settings           findings about the settings alone
  shards             name, url, findings about the shard as a whole, and servers: server (host:port), part, findings
Each finding has check (its name), level, found (what was found), why (why it matters) and fix (how to fix it).
The last two are null if the level is ok.";

/// The kind of shard on Redis, where checks depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ShardKind {
    Single,
    Sentinel,
    Cluster,
    Redlock,
}

/// How many shards are examined at the same time.
const SHARDS_AT_ONCE: usize = 32;

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    let config = args.shards.load_for_servers()?;
    config.validate().map_err(Failure::config)?;
    let connector = Connector::new(&config).map_err(Failure::config)?;
    let shards = config.shards.iter().enumerate();
    let probes = shards.map(|(index, shard)| examine(shard, tool::fingerprints_at(&config, index), &connector));
    let shards: Vec<_> = stream::iter(probes).buffered(SHARDS_AT_ONCE).collect().await;
    let report = Report {
        settings: map::addresses(&config.shards)
            .into_iter()
            .chain([timing::settings(&config)])
            .collect(),
        shards: shards.into_iter().collect::<Result<_, _>>()?,
    };
    let in_colour = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let colouring = if in_colour {
        Colouring::Colours
    } else {
        Colouring::Plain
    };
    args.format.print(&report.as_json(), &report.as_text(colouring))?;
    Ok(report.exit_code())
}

async fn examine(
    shard: &ShardConfig,
    fingerprints: Vec<String>,
    connector: &Connector<'_>,
) -> Result<ShardReport, Failure> {
    let endpoint = Endpoint::parse(&shard.url).map_err(Failure::config)?;
    let fingerprint = fingerprints.first().map_or("", String::as_str);
    let mut report = ShardReport {
        name: shard.name.clone(),
        url: endpoint.to_string(),
        ..ShardReport::default()
    };
    match endpoint.scheme() {
        "redis" | "rediss" | "redis+unix" => examine_single(&endpoint, connector, fingerprint, &mut report).await,
        "redis+sentinel" | "rediss+sentinel" => sentinel::examine(&endpoint, connector, fingerprint, &mut report).await,
        "redis+cluster" | "rediss+cluster" => cluster::examine(&endpoint, connector, fingerprint, &mut report).await,
        "redlock" | "redlocks" => redlock::examine(&endpoint, connector, &fingerprints, &mut report).await,
        #[cfg(feature = "etcd")]
        "etcd" | "etcds" => etcd::examine(&endpoint, connector, fingerprint, &mut report).await,
        "memory" => report.findings.push(memory_only()),
        other => report.findings.push(Finding::note(
            "kind",
            format!("this version can't check {other}://"),
            "the shard was not checked",
            "check its servers by hand",
        )),
    }
    Ok(report)
}

async fn examine_single(endpoint: &Endpoint, connector: &Connector<'_>, fingerprint: &str, report: &mut ShardReport) {
    let expected = Expectations {
        kind: ShardKind::Single,
        config: connector.config,
        fingerprint,
        replica_of: None,
        unreachable: Level::Error,
        announced: false,
    };
    for server in tool::servers(endpoint) {
        let server = probe(&server, ShardKind::Single, connector).await;
        report.servers.push(check_server(&server, &expected));
    }
}

fn memory_only() -> Finding {
    Finding::note(
        "memory-only",
        "a store inside a single process",
        "other processes do not see these locks, and locks taken by the command-line tool end with it",
        "to lock between processes, use a shard on a server: redis://host",
    )
}
