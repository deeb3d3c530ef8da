//! `shardlock top`: a live view of contention, from the admin endpoints of processes or from the shards themselves.
//!
//! # Implementation details
//!
//! | file | what it does |
//! |---|---|
//! | `source/` | asks endpoints, or shards, each in a task of its own, and says what they said as a `Look` |
//! | `model/` | merges looks into rows, computes rates, sorts, filters; knows no terminal and no clock |
//! | `draw/` | the model as lines in a buffer of any size |
//! | `keys` | what typed keys mean |
//! | `screen` | takes the terminal and gives it back |
//! | `live`, `once` | the view on a terminal; the same once, as plain text |

mod draw;
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

use crate::exit::Failure;
use crate::shards;
use draw::Setting;
use model::{Model, View};
use source::{Address, Asking, Endpoint, Shards, Source, Wanted};

/// Watch contention live: hot keys, held locks and shards
///
/// Asks the admin endpoints of running processes, those that `--metrics` and the library's `Admin` serve. Where there are none, it looks at the
/// shards themselves, and shows who holds which keys and how many processes wait, but no rates and no waits.
#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The admin endpoint of a process, as HOST:PORT; several are shown as one
    #[arg(value_name = "ADDR", conflicts_with = "shards")]
    addresses: Vec<Address>,

    /// The same, as an option
    #[arg(long = "admin", value_name = "ADDR", conflicts_with = "shards")]
    admin: Vec<Address>,

    /// How long to wait between two looks
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    interval: Duration,

    /// Print one frame of plain text instead; so it is also where standard output is no terminal
    #[arg(long)]
    once: bool,

    /// What to show first, or with --once alone
    #[arg(long, value_enum)]
    view: Option<View>,

    /// At the shards: a key to look at, whether it is used or not; repeat it for several. Without it, keys are searched
    #[arg(long = "key", value_name = "KEY", value_parser = parse_key)]
    keys: Vec<LockKey>,

    /// At the shards: of how many of a server's keys a search looks at the names, by SCAN; 0 for none [default: 10000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(..=10_000_000))]
    scan: Option<u64>,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Without ADDR, the shards of --shard, --config or the environment are looked at; where there are none, the endpoint at 127.0.0.1:9187.

Keys:
  tab, 1, 2, 3  hot keys, held locks, shards
  s, r          sort by the next column, reverse
  /             show only what has a text in it; esc shows everything
  space         pause
  n             at the shards: look for more keys
  ?             what the columns mean
  q, ctrl-c     quit

At the shards, keys are searched at the start and with n only, at servers of Redis: in steps of 200 keys, never more than --scan and two seconds of
a server at a time. Each look then asks for the keys that were found, 1000 at most; one that nobody uses for a minute is forgotten. In
etcd only the keys of --key are seen. WAITERS are processes there, and AGE is since this view has seen the same holder.

Exit code, where it is printed once or could not begin:
  0   the view was shown
  64  the command line is wrong
  69  an endpoint or a shard can't be reached
  78  the environment or the configuration file is wrong";

fn parse_interval(text: &str) -> anyhow::Result<Duration> {
    let interval = humantime::parse_duration(text)?;
    let bounds = Duration::from_millis(100)..=Duration::from_secs(3600);
    anyhow::ensure!(bounds.contains(&interval), "from 100ms to 1h");
    Ok(interval)
}

fn parse_key(text: &str) -> Result<LockKey, shardlock::Invalid> {
    LockKey::new(text)
}

/// Of how many keys of a server a search looks at the names unless it is told otherwise.
const SCAN_DEFAULT: u64 = 10_000;

/// How many endpoints are asked at most.
const ENDPOINTS_MAX: usize = 256;

impl Args {
    /// Whether logging would write over the screen.
    pub(crate) fn owns_stderr(&self) -> bool {
        self.is_live() && stderr().is_terminal()
    }

    fn is_live(&self) -> bool {
        !self.once && stdout().is_terminal()
    }

    async fn sources(&self) -> Result<Vec<Source>, Failure> {
        let mut addresses: Vec<Address> = Vec::new();
        for address in self.addresses.iter().chain(&self.admin) {
            // Twice the same process would count twice.
            if !addresses.contains(address) {
                addresses.push(address.clone());
            }
        }
        if addresses.is_empty() {
            let config = self.shards.load()?;
            if !config.shards.is_empty() {
                let wanted = Wanted {
                    named: self.keys.clone(),
                    budget: self.scan.unwrap_or(SCAN_DEFAULT),
                };
                let shards = Shards::connect(config, wanted).await?;
                return Ok(vec![Source::Shards(Box::new(shards))]);
            }
            addresses.push(Address::usual());
        }
        if addresses.len() > ENDPOINTS_MAX {
            return Err(Failure::usage(anyhow!(
                "{} endpoints are given, but {ENDPOINTS_MAX} is the most",
                addresses.len()
            )));
        }
        if !self.keys.is_empty() {
            return Err(Failure::usage(anyhow!(
                "--key is for looking at shards; at an endpoint, filter with / or leave it out"
            )));
        }
        if self.scan.is_some() {
            return Err(Failure::usage(anyhow!(
                "--scan is for looking at shards; at an endpoint, leave it out"
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
    let asking = Asking::start(sources, args.interval);
    if !args.is_live() {
        let views = args.view.map_or(View::ALL.to_vec(), |view| vec![view]);
        return once::print(model, asking, &views).await;
    }
    let setting = Setting {
        interval: args.interval,
        colours: std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
    };
    live::show(model, asking, setting).await
}
