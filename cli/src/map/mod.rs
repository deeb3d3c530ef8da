//! `shardlock map`: shows and replaces the shard map that is stored on the servers.
//!
//! # Implementation details
//!
//! Servers are queried directly rather than through a manager: a manager is refused if a different
//! map is stored, which is when this command is needed. `locations` finds the servers that store a
//! shard's map, and reads and swaps it there; `etcd` does so for etcd. A swap names the map that it
//! replaces, so it fails if the map has changed in the meantime.

#[cfg(feature = "etcd")]
mod etcd;
mod locations;
mod set;
mod show;

use clap::Subcommand;
use shardlock::config::Config;
use shardlock::tool;

use crate::exit::Failure;
use crate::servers::Connector;
use crate::{output, shards};
use locations::Location;

/// Show or replace the shard map that is stored on the servers
///
/// Every shard stores which slots all shards have. It refuses managers with a different map, since
/// two maps would lock one key in two places.
#[derive(Debug, clap::Args)]
#[command(arg_required_else_help = true)]
pub(crate) struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    Show(ShowArgs),
    Set(SetArgs),
}

/// Show what is stored, and what this configuration would store
///
/// Nothing is written. The exit code is 0 if all servers answered, whatever they have stored.
#[derive(Debug, clap::Args)]
struct ShowArgs {
    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

/// Replace the stored map with that of this configuration
///
/// Stop all managers first, run this with the new shards, then start the managers with the new
/// shards. It refuses, and writes nothing, if a server has a map that is neither expected nor the
/// new one, or while a manager listens or holds a lease. Servers without a map, or with the new
/// one, are accepted, so the command can be repeated.
#[derive(Debug, clap::Args)]
struct SetArgs {
    /// The map to replace, as `map show` prints it, with or without its here=...; "none" if none is
    /// stored; repeat it for several
    #[arg(long = "expect", value_name = "OLD", required = true)]
    expected: Vec<String>,

    /// Replace it even though managers listen or hold leases; they lose all their locks on these
    /// shards at their next renewal
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

/// Stands for no map.
const NONE: &str = "none";

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    match args.action {
        Action::Show(args) => show::run(args).await,
        Action::Set(args) => set::run(args).await,
    }
}

/// A location that stores the map of a shard, and what it stores.
struct StoredMap<'a> {
    shard: &'a str,
    location: Location,
    /// The map that this configuration would store there.
    configured: String,
    /// The stored map, or why it is unknown.
    stored: Result<Option<String>, String>,
    /// The managers that listen there, as far as the server reports them.
    listeners: Result<Vec<String>, String>,
}

impl StoredMap<'_> {
    fn agrees(&self) -> bool {
        matches!(&self.stored, Ok(Some(stored)) if shardlock::tool::maps_agree(&self.configured, stored))
    }
}

/// Reads the map from all servers of all shards.
async fn read_all<'a>(config: &'a Config, connector: &Connector<'_>) -> Result<Vec<StoredMap<'a>>, Failure> {
    let mut all = Vec::new();
    for (index, shard) in config.shards.iter().enumerate() {
        let fingerprints = tool::fingerprints_at(config, index);
        for (number, location) in locations::find(shard, connector).await?.into_iter().enumerate() {
            // One for each node of a quorum, otherwise a single one.
            let configured = fingerprints
                .get(number)
                .or(fingerprints.first())
                .cloned()
                .unwrap_or_default();
            let stored = location.read(connector).await;
            let listeners = location.listeners(connector).await;
            all.push(StoredMap {
                shard: &shard.name,
                location,
                configured,
                stored,
                listeners,
            });
        }
    }
    Ok(all)
}

/// The option of `map set` that expects the stored map, for an operator to copy. A value that no
/// manager would store is not repeated: it might be shell code.
pub(crate) fn expect_option(stored: &str) -> String {
    let is_usual = |char: char| char.is_ascii_alphanumeric() || " .:,;_-=".contains(char);
    match without_shard(stored) {
        map if !map.is_empty() && map.chars().all(is_usual) => format!("--expect '{map}'"),
        _ => "--expect OLD".to_owned(),
    }
}

/// The map without the part that names the shard storing it.
fn without_shard(stored: &str) -> &str {
    stored.split_once(" here=").map_or(stored, |(map, _)| map)
}

#[cfg(test)]
mod tests {
    use super::expect_option;

    #[test]
    fn command_to_copy_has_nothing_that_a_shell_would_run() {
        assert_eq!(
            expect_option("v2 a:0-8191,b:8192-16383 here=a; node 1 of 3"),
            "--expect 'v2 a:0-8191,b:8192-16383'"
        );
        for hostile in ["", "x'; reboot; '", "$(reboot) here=a", "a\nreboot", "`reboot`"] {
            assert_eq!(expect_option(hostile), "--expect OLD", "{hostile}");
        }
    }
}
