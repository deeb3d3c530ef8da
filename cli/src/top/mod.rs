//! `shardlock top`: a live view of contention, from the admin endpoints of processes or from the
//! shards themselves.
//!
//! # Implementation details
//!
//! | file | what it does |
//! |---|---|
//! | `source/` | polls endpoints or shards, each in its own task |
//! | `model/` | merges samples into rows, computes rates, sorts, filters; no terminal, no clock |
//! | `draw/` | draws the model into a buffer of any size |
//! | `keys` | maps key presses to actions |
//! | `screen` | takes over the terminal and restores it |
//! | `live`, `once` | the interactive view; a single frame of plain text or JSON |
//! | `json` | the model as one JSON document |

mod draw;
mod json;
mod keys;
mod live;
mod model;
mod once;
mod screen;
mod source;

use std::io::{IsTerminal, stderr, stdout};
use std::time::Duration;

use anyhow::anyhow;
use shardlock::LockKey;
use shardlock::tool;

use crate::exit::Failure;
use crate::shards;
use draw::DisplaySettings;
use model::{Model, View};
use source::{Address, Endpoint, KeySelection, Poller, Shards, Source};

/// Watch contention live: hot keys, held locks, shards, and the clients of agents
///
/// Reads the admin endpoints of running processes, which `--metrics` and the library's `Admin`
/// serve. Without an endpoint, it reads the shards directly and shows who holds which keys and how
/// many processes wait, but no rates and no wait times.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The admin endpoint of a process, as HOST:PORT; several are merged into one view
    #[arg(value_name = "ADDR", conflicts_with = "shards")]
    addresses: Vec<Address>,

    /// An admin endpoint, like ADDR; repeat the option for several
    #[arg(long = "admin", value_name = "ADDR", conflicts_with = "shards")]
    admin: Vec<Address>,

    /// How long to wait between two samples
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    interval: Duration,

    /// Print one frame of plain text and exit; the default if standard output is not a terminal
    #[arg(long)]
    once: bool,

    /// With --once: print the frame as one line of JSON
    #[arg(long, requires = "once")]
    json: bool,

    /// The view to show first, or the only one with --once
    #[arg(long, value_enum)]
    view: Option<View>,

    /// With shards: a key to show, whether in use or not; repeat it for several. Without it, the
    /// servers are searched for keys
    #[arg(long = "key", value_name = "KEY", value_parser = parse_key)]
    keys: Vec<LockKey>,

    /// With shards: how many keys of a server a search may scan, by SCAN; 0 for none [default:
    /// 10000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(..=10_000_000))]
    scan: Option<u64>,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Without ADDR, top reads the shards of --shard, --config or the environment; if there are none, the
endpoint at 127.0.0.1:9187.

Keys:
  tab, 1, 2, 3  hot keys, held locks, shards
  4             the clients of an agent (shardlock serve)
  s, r          sort by the next column, reverse
  /             filter rows by text; esc clears the filter
  space         pause
  n             with shards: search for more keys
  ?             what the columns mean
  q, ctrl-c     quit

With shards, Redis servers are searched for keys at the start and on n only: in steps of 200 keys,
at most --scan keys and two seconds per server and search. Each sample then reads the keys that
were found, at most 1000; a key that is unused for a minute is dropped. On etcd, the names of keys are
read in steps of 1000. WAITERS are processes, and AGE counts from when top first saw the same holder.

Exit code, with --once or if the view could not start:
  0   the view was shown
  64  the command line is invalid
  69  an endpoint is unreachable, or a shard is down
  78  the environment or the configuration file is invalid";

fn parse_interval(text: &str) -> anyhow::Result<Duration> {
    let interval = humantime::parse_duration(text)?;
    let bounds = Duration::from_millis(100)..=Duration::from_secs(3600);
    anyhow::ensure!(bounds.contains(&interval), "from 100ms to 1h");
    Ok(interval)
}

fn parse_key(text: &str) -> Result<LockKey, shardlock::error::InvalidSetting> {
    LockKey::new(text)
}

/// How many keys of a server a search scans unless `--scan` is given.
const SCAN_DEFAULT: u64 = 10_000;

/// The maximum number of endpoints.
const ENDPOINTS_MAX: usize = 256;

impl Args {
    /// Whether log lines would overwrite the screen.
    pub(crate) fn owns_stderr(&self) -> bool {
        self.is_live() && stderr().is_terminal()
    }

    fn is_live(&self) -> bool {
        !self.once && stdout().is_terminal()
    }

    async fn sources(&self) -> Result<Vec<Source>, Failure> {
        let mut addresses: Vec<Address> = Vec::new();
        for address in self.addresses.iter().chain(&self.admin) {
            // Reading a process twice would count its locks twice.
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        if addresses.is_empty() {
            let mut config = self.shards.load()?;
            tool::put_login_into_urls(&mut config).map_err(Failure::config)?;
            if !config.shards.is_empty() {
                let selection = KeySelection {
                    named: self.keys.clone(),
                    budget: self.scan.unwrap_or(SCAN_DEFAULT),
                };
                let shards = Shards::connect(config, selection).await?;
                return Ok(vec![Source::Shards(Box::new(shards))]);
            }
            addresses.push(Address::default_address());
        }
        if addresses.len() > ENDPOINTS_MAX {
            return Err(Failure::usage(anyhow!(
                "{} endpoints are given, but the maximum is {ENDPOINTS_MAX}",
                addresses.len()
            )));
        }
        if !self.keys.is_empty() {
            return Err(Failure::usage(anyhow!(
                "--key is for looking at shards; with an endpoint, leave it out and filter with /"
            )));
        }
        if self.scan.is_some() {
            return Err(Failure::usage(anyhow!(
                "--scan is for looking at shards; with an endpoint, leave it out"
            )));
        }
        Ok(addresses
            .into_iter()
            .map(|address| Source::Endpoint(Endpoint::new(address)))
            .collect())
    }
}

pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    let sources = args.sources().await?;
    let view = args.view.unwrap_or(View::Hot);
    let model = Model::new(sources.iter().map(Source::label), view);
    let poller = Poller::start(sources, args.interval);
    if !args.is_live() {
        return once::print(model, poller, args.view, args.json).await;
    }
    let settings = DisplaySettings {
        interval: args.interval,
        colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
    };
    live::show(model, poller, settings).await
}
