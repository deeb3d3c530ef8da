//! `shardlock ls`: the held keys of all shards.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

use futures_util::{StreamExt, stream};
use serde::Serialize;
use serde_json::json;
use shardlock::config::{Config, Endpoint};
use shardlock::introspect::{Holder, KeyState};
use shardlock::tool::printable;
use shardlock::{LockError, LockKey, LockManager};

use crate::exit::{self, Failure};
use crate::held_mode::HeldMode;
use crate::servers::lease_scan::{self, Cursors, Found, Search, SearchLimits};
use crate::{output, shards};

/// List the held keys of all shards, with their holders and how many processes wait
///
/// The servers are searched in small steps, and each key that is found is then read. The list is
/// not a snapshot: keys that are acquired or released meanwhile may be missing or listed.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// List only keys that begin with this text
    prefix: Option<String>,

    /// The maximum number of keys to list
    #[arg(long, value_name = "COUNT", default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    limit: u32,

    /// About how many keys of a server may be searched, held or not
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000, value_parser = clap::value_parser!(u64).range(1..=1_000_000_000))]
    scan: u64,

    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Redis servers are searched by SCAN in steps of 200 keys, on every primary of a cluster, for at most
a minute each; etcd is searched by ranges of names. On redlock:// shards, a key is listed if a
majority of the nodes has a lease of it. If keys may be missing, the list ends with the reason
(\"more\" in JSON).

Exit code:
  0   the list was printed, and all shards were read
  64  the command line is invalid
  69  a shard or one of its servers could not be read; the others are listed
  78  the environment, the configuration file or the shard map is wrong";

/// The time limit of a search, per server.
const SEARCH_TIME_MAX: Duration = Duration::from_secs(60);
/// How many keys are read concurrently.
const CONCURRENT_READS_MAX: usize = 64;
/// How many keys of each node of a quorum are compared.
const QUORUM_KEYS_MAX: usize = 1_000_000;
/// How many holders of a key the text output lists. JSON has all that the library returns.
const HOLDERS_SHOWN: usize = 10;
/// How many errors are reported.
const ERRORS_MAX: usize = 20;

/// A held key. The names in JSON are those of `inspect`.
#[derive(Debug, Serialize)]
struct Row {
    key: String,
    slot: u16,
    shard: String,
    mode: &'static str,
    #[serde(skip)]
    held: HeldMode,
    permits_in_use: u32,
    /// The smallest limit that a holder of permits states.
    permits_limit: Option<u16>,
    /// The exclusive holder, or the first of those that hold the key together.
    holders: Vec<Holder>,
    holder_count: u64,
    queue_length: u64,
}

#[derive(Debug, Default)]
struct Listing {
    rows: Vec<Row>,
    /// Why held keys may be missing although all servers answered.
    more: Option<String>,
    errors: BTreeSet<String>,
}

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    let config = args.shards.load_with_shards()?;
    let locks = args.shards.connect(config.clone()).await?;
    let mut listing = Listing::default();
    let keys = find(&args, &config, &locks, &mut listing).await;
    read(&args, &locks, keys, &mut listing).await;
    let json = json!({
        "keys": listing.rows,
        "more": listing.more.is_some(),
        "errors": listing.errors,
    });
    args.format.print(&json, &as_text(&listing, args.prefix.as_deref()))?;
    listing.errors.iter().take(ERRORS_MAX).for_each(output::eprint);
    Ok(if listing.errors.is_empty() {
        exit::OK
    } else {
        exit::UNAVAILABLE
    })
}

/// Searches all shards for keys that may be held.
async fn find(args: &Args, config: &Config, locks: &LockManager, listing: &mut Listing) -> BTreeSet<LockKey> {
    let (map, mut cursors, mut keys) = (locks.shard_map(), Cursors::default(), BTreeSet::new());
    for shard in &config.shards {
        // The manager has already parsed it.
        let Ok(endpoint) = Endpoint::parse(&shard.url) else {
            continue;
        };
        let is_quorum = endpoint.scheme().starts_with("redlock");
        let search = Search {
            config,
            prefix: args.prefix.as_deref().unwrap_or_default(),
            limits: SearchLimits {
                scanned_max: args.scan,
                time_max: SEARCH_TIME_MAX,
                // The nodes of a quorum have different orders.
                found_max: if is_quorum {
                    QUORUM_KEYS_MAX
                } else {
                    args.limit as usize + 1
                },
            },
        };
        let Found {
            keys: found,
            more,
            failures,
        } = match lease_scan::search(&shard.name, &endpoint, search, &mut cursors).await {
            Ok(found) => found,
            Err(reason) => Found {
                failures: vec![reason],
                ..Found::default()
            },
        };
        let needed = if is_quorum {
            shardlock::tool::servers(&endpoint).len() / 2 + 1
        } else {
            1
        };
        let failures = failures.into_iter().take(ERRORS_MAX);
        listing
            .errors
            .extend(failures.map(|reason| format!("shard {}: {reason}", shard.name)));
        let is_here = |key: &LockKey| map.name(key.slot()) == Some(&*shard.name);
        keys.extend(
            found
                .into_iter()
                .filter(|(key, servers)| *servers >= needed && is_here(key))
                .map(|(key, _)| key),
        );
        if more {
            let reason = "not all keys of the servers were searched; give a prefix, or a larger --limit or --scan";
            listing.more = Some(reason.to_owned());
        }
    }
    keys
}

/// Reads the keys in their order, and lists those that are held.
async fn read(args: &Args, locks: &LockManager, keys: BTreeSet<LockKey>, listing: &mut Listing) {
    let mut states = stream::iter(keys)
        .map(|key| async move {
            let state = locks.inspect(&key).await;
            (key, state)
        })
        .buffered(CONCURRENT_READS_MAX);
    while let Some((key, state)) = states.next().await {
        let state = match state {
            Ok(state) => state,
            Err(error) => {
                if !is_no_lease(&error) && listing.errors.len() < ERRORS_MAX {
                    listing.errors.insert(error.to_string());
                }
                continue;
            }
        };
        // It was released meanwhile.
        if state.holder.is_none() && state.holder_count == 0 {
            continue;
        }
        if listing.rows.len() >= args.limit as usize {
            listing.more = Some(format!(
                "more keys are held than --limit ({}); give a prefix, or a larger limit",
                args.limit
            ));
            break;
        }
        // A connected manager has shards.
        let shard = locks.shard_map().name(key.slot()).unwrap_or_default().to_owned();
        listing.rows.push(row(&key, shard, state));
    }
}

/// Whether the server has a value of another type under the name of the lease, such as a list.
fn is_no_lease(error: &LockError) -> bool {
    error.to_string().contains("WRONGTYPE")
}

fn row(key: &LockKey, shard: String, state: KeyState) -> Row {
    let held = HeldMode::of_state(&state);
    Row {
        key: key.to_string(),
        slot: key.slot().number(),
        shard,
        mode: held.kind(),
        held,
        permits_in_use: state.permits_in_use,
        permits_limit: held.permits_limit(),
        holder_count: state.holder_count.max(1),
        holders: state.holder.into_iter().chain(state.holders).collect(),
        queue_length: state.queue_length,
    }
}

fn as_text(listing: &Listing, prefix: Option<&str>) -> String {
    let header = ["KEY", "SHARD", "MODE", "LEFT", "WAITING", "HOLDER"].map(str::to_owned);
    let rows = listing.rows.iter().map(|row| {
        [
            printable(&row.key).into_owned(),
            printable(&row.shard).into_owned(),
            row.held.to_string(),
            left(&row.holders),
            row.queue_length.to_string(),
            holders(row),
        ]
    });
    let lines: Vec<[String; 6]> = std::iter::once(header).chain(rows).collect();
    let mut widths = [0; 6];
    for line in &lines {
        for (width, text) in widths.iter_mut().zip(line) {
            *width = text.chars().count().max(*width);
        }
    }
    // The last column is not padded.
    widths[5] = 0;
    let mut text = String::new();
    if listing.rows.is_empty() {
        let is_all = listing.more.is_none() && listing.errors.is_empty();
        text.push_str(&match (prefix, is_all) {
            (None, true) => "no key is held\n".to_owned(),
            (None, false) => "no held key was found\n".to_owned(),
            (Some(prefix), true) => format!("no held key begins with {prefix:?}\n"),
            (Some(prefix), false) => format!("no held key that begins with {prefix:?} was found\n"),
        });
    } else {
        for line in &lines {
            let cells = line.iter().zip(widths).map(|(text, width)| format!("{text:<width$}"));
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
    }
    if let Some(reason) = &listing.more {
        // Writing to a string can't fail.
        writeln!(text, "the list may be incomplete: {reason}").ok();
    }
    text
}

/// The remaining time of the last lease: the key is free after that.
fn left(holders: &[Holder]) -> String {
    match holders.last().map(|holder| holder.remaining) {
        Some(Some(remaining)) => format!("{:.1}s", remaining.as_secs_f64()),
        Some(None) => "no end".to_owned(),
        None => "-".to_owned(),
    }
}

fn holders(row: &Row) -> String {
    let shown = row.holders.iter().take(HOLDERS_SHOWN);
    let mut text = shown
        .map(|holder| printable(&holder.owner))
        .collect::<Vec<_>>()
        .join(" ");
    if row.holder_count > HOLDERS_SHOWN as u64 {
        // Writing to a string can't fail.
        write!(text, " and {} more", row.holder_count - HOLDERS_SHOWN as u64).ok();
    }
    text
}
