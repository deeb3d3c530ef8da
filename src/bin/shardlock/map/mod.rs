//! `shardlock map`: the shard map that is stored at the servers, and replacing it.
//!
//! # Implementation details
//!
//! Servers are asked directly, not through a manager: a manager is refused where another map is stored, which is where this command is needed.
//! `places` finds the servers that store the map of a shard, reads and swaps it there; `etcd` does so for etcd. A swap names what it replaces, so a
//! map that was changed meanwhile stays as it is.

#[cfg(feature = "etcd")]
mod etcd;
mod places;
mod set;
mod show;

use clap::Subcommand;
use shardlock::{Config, ShardMap};

use crate::asking::Asking;
use crate::exit::Failure;
use crate::{output, shards};
use places::Place;

/// Show or replace the shard map that is stored at the servers
///
/// Every shard stores which slots all shards have. Managers with another map are refused there, since two maps would lock one key in two places.
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
/// Nothing is written. The exit code is 0 if all servers could be asked, whatever they have stored.
#[derive(Debug, clap::Args)]
struct ShowArgs {
    #[command(flatten)]
    form: output::Form,

    #[command(flatten)]
    shards: shards::Options,
}

/// Replace what is stored by the map of this configuration
///
/// Stop all managers first, then run it with the new shards, then start the managers with the new shards. It refuses, and writes nothing, if a
/// server has another map than the expected one, or while a manager listens or holds a lease. Servers that have no map or the new one already are
/// no obstacle, so it can be repeated.
#[derive(Debug, clap::Args)]
struct SetArgs {
    /// The map that is to be replaced, as `map show` prints it, with or without its here=...; "none" where none is stored; repeat it for several
    #[arg(long = "expect", value_name = "OLD", required = true)]
    expected: Vec<String>,

    /// Replace it although managers listen or hold leases; they lose all their locks on these shards at their next renewal
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    form: output::Form,

    #[command(flatten)]
    shards: shards::Options,
}

/// How none is called.
const NONE: &str = "none";

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    match args.action {
        Action::Show(args) => show::run(args).await,
        Action::Set(args) => set::run(args).await,
    }
}

/// A place where the map of a shard is stored, and what is there.
struct Seen<'a> {
    shard: &'a str,
    place: Place,
    ours: String,
    /// What is stored, or why that is not known.
    stored: Result<Option<String>, String>,
    /// Who listens there, as far as the server tells.
    listeners: Result<Vec<String>, String>,
}

impl Seen<'_> {
    fn agrees(&self) -> bool {
        matches!(&self.stored, Ok(Some(stored)) if ShardMap::agree(&self.ours, stored))
    }
}

/// Asks all servers of all shards.
async fn look<'a>(config: &'a Config, asking: &Asking<'_>) -> Result<Vec<Seen<'a>>, Failure> {
    let mut all = Vec::new();
    for (index, shard) in config.shards.iter().enumerate() {
        let fingerprints = config.fingerprints_at(index);
        for (number, place) in places::find(shard, asking).await?.into_iter().enumerate() {
            // One for each node of a quorum, otherwise one in all.
            let ours = fingerprints
                .get(number)
                .or(fingerprints.first())
                .cloned()
                .unwrap_or_default();
            let stored = place.read(asking).await;
            let listeners = place.listeners(asking).await;
            all.push(Seen {
                shard: &shard.name,
                place,
                ours,
                stored,
                listeners,
            });
        }
    }
    Ok(all)
}

/// The option for `map set` that expects what is stored, for an operator to copy. What no manager would store stays out of it: it
/// might be meant for the shell.
pub(crate) fn expectation(stored: &str) -> String {
    let is_usual = |char: char| char.is_ascii_alphanumeric() || " .:,;_-=".contains(char);
    match whole(stored) {
        map if !map.is_empty() && map.chars().all(is_usual) => format!("--expect '{map}'"),
        _ => "--expect OLD".to_owned(),
    }
}

/// The map without which of the shards it is that stores it.
fn whole(stored: &str) -> &str {
    stored.split_once(" here=").map_or(stored, |(map, _)| map)
}

#[cfg(test)]
mod tests {
    use super::expectation;

    #[test]
    fn command_to_copy_has_nothing_that_a_shell_would_run() {
        assert_eq!(
            expectation("v2 a:0-8191,b:8192-16383 here=a; node 1 of 3"),
            "--expect 'v2 a:0-8191,b:8192-16383'"
        );
        for hostile in ["", "x'; reboot; '", "$(reboot) here=a", "a\nreboot", "`reboot`"] {
            assert_eq!(expectation(hostile), "--expect OLD", "{hostile}");
        }
    }
}
