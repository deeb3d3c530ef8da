//! `shardlock doctor`: checks a configuration against the servers, and says what is wrong and how to mend it.
//!
//! # Implementation details
//!
//! `look` asks one server for all that is of interest and never writes to it; what it learns are `facts`. Each check is a function from facts
//! to a finding, without I/O, in the file of its subject. `server` runs those of a single server; `redlock`, `sentinel`, `cluster` and
//! `etcd` find the servers of a shard and add what concerns the shard as a whole. `report` prints.

mod clock;
mod cluster;
mod connections;
#[cfg(feature = "etcd")]
pub(crate) mod etcd;
mod facts;
mod finding;
mod look;
mod map;
mod memory;
mod permissions;
mod persistence;
mod reach;
mod redlock;
mod replication;
mod report;
mod sentinel;
mod server;
mod timing;

use std::io::{IsTerminal, stdout};

use futures_util::{StreamExt, stream};
use shardlock::{Endpoint, ShardConfig};

use crate::asking::Asking;
use crate::exit::Failure;
use crate::{output, shards};
use finding::{Finding, Level};
use look::look;
use report::{Paint, Report, ShardReport};
use server::{Expected, checked};

/// Check the configuration against the servers, and say what is wrong and how to mend it
///
/// Nothing is written to any server, and a request to one takes no longer than store_timeout.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    #[command(flatten)]
    form: output::Form,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Exit code:
  0  all is well, or there are only notes
  1  there are warnings: locks work, but something can go wrong that need not
  2  there are errors: locks don't work, or can be held twice
  64 the command line is wrong
  78 the environment or the configuration file is wrong

With --json, one object:
  level, exit_code   the worst that was found: ok, note, warning or error
  counts             how many of each level
  settings           findings that concern the settings alone
  shards             name, url, findings of the shard as a whole, and servers: server (host:port), part, findings
Each finding has check (its name), level, found (what there is), why (it matters) and mend (how to); the last two are null where all is well.";

/// How a shard's servers keep locks, as far as checks differ in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Single,
    Sentinel,
    Cluster,
    Redlock,
}

/// How many shards are looked at at a time.
const SHARDS_AT_ONCE: usize = 32;

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    let config = args.shards.load_with_shards()?;
    config.validate().map_err(Failure::config)?;
    let asking = Asking::new(&config).map_err(Failure::config)?;
    let shards = config.shards.iter().enumerate();
    let looking = shards.map(|(index, shard)| examine(shard, config.fingerprints_at(index), &asking));
    let shards: Vec<_> = stream::iter(looking).buffered(SHARDS_AT_ONCE).collect().await;
    let report = Report {
        settings: map::places(&config.shards)
            .into_iter()
            .chain([timing::settings(&config)])
            .collect(),
        shards: shards.into_iter().collect::<Result<_, _>>()?,
    };
    let in_colour = stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let paint = if in_colour { Paint::Colours } else { Paint::Plain };
    args.form.print(&report.as_json(), &report.as_text(paint))?;
    Ok(report.exit_code())
}

async fn examine(shard: &ShardConfig, fingerprints: Vec<String>, asking: &Asking<'_>) -> Result<ShardReport, Failure> {
    let endpoint = Endpoint::parse(&shard.url).map_err(Failure::config)?;
    let fingerprint = fingerprints.first().map_or("", String::as_str);
    let mut report = ShardReport {
        name: shard.name.clone(),
        url: endpoint.to_string(),
        ..ShardReport::default()
    };
    match endpoint.scheme() {
        "redis" | "rediss" | "redis+unix" => examine_single(&endpoint, asking, fingerprint, &mut report).await,
        "redis+sentinel" | "rediss+sentinel" => sentinel::examine(&endpoint, asking, fingerprint, &mut report).await,
        "redis+cluster" | "rediss+cluster" => cluster::examine(&endpoint, asking, fingerprint, &mut report).await,
        "redlock" | "redlocks" => redlock::examine(&endpoint, asking, &fingerprints, &mut report).await,
        #[cfg(feature = "etcd")]
        "etcd" | "etcds" => etcd::examine(&endpoint, asking, fingerprint, &mut report).await,
        "memory" => report.findings.push(memory_only()),
        other => report.findings.push(Finding::note(
            "kind",
            format!("{other}:// is not looked at by this version"),
            "nothing is said of it",
            "look at its servers by hand",
        )),
    }
    Ok(report)
}

async fn examine_single(endpoint: &Endpoint, asking: &Asking<'_>, fingerprint: &str, report: &mut ShardReport) {
    let expected = Expected {
        kind: Kind::Single,
        config: asking.config,
        fingerprint,
        replica_of: None,
        unreachable: Level::Error,
        announced: false,
    };
    for server in endpoint.servers() {
        let server = look(&server, Kind::Single, asking).await;
        report.servers.push(checked(&server, &expected));
    }
}

fn memory_only() -> Finding {
    Finding::note(
        "memory-only",
        "a store inside of one process",
        "other processes do not see these locks, and those of the command line end with it",
        "for more than one process, use a shard on a server: redis://host",
    )
}
