//! The demo: a promotion with ten coupons, claimed by many tasks of many processes that read, think and write, first
//! without the lock and then with it; and a queue of jobs on keys of which a few are much wanted.
//!
//! | file | what it does |
//! |---|---|
//! | `play` | the three acts, in order, and what they come to |
//! | `stage` | what the demo sets up: servers, worker processes, keys; and how all of it is removed |
//! | `worker` | what the worker processes run |
//! | `coupons`, `jobs` | the work itself: look here for how the lock is used |
//! | `classes`, `targets` | what runs in place of the acts with `--load`; where Prometheus finds the workers |
//! | `figures` | the result: whether it is right, as a table, as JSON |

mod classes;
mod coupons;
mod figures;
mod jobs;
mod play;
mod probe;
mod protocol;
mod stage;
mod targets;
mod worker;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap::builder::RangedI64ValueParser;

use crate::load::signals::Signals;
use crate::output::complain;
use figures::Outcome;
use stage::Stage;
pub(crate) use worker::run as work;

/// Shows on real servers what goes wrong without the lock, that it does not with it, and what the lock costs
#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// A shard that runs already, by a URL of any kind but memory://; repeat it for several. Without it, three Redis servers
    /// are started and removed. What the lock protects is kept on the same servers where all are redis://, and otherwise
    /// on one that is started for it
    #[arg(long = "shard", value_name = "URL")]
    shards: Vec<String>,

    /// How many worker processes there are
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = up_to(64))]
    processes: u32,

    /// How many tasks each process runs
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = up_to(10_000))]
    tasks: u32,

    /// How many coupons there are to be claimed
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = up_to(1_000_000))]
    coupons: u32,

    /// How long a customer thinks between reading what is left and writing one less
    #[arg(long, value_name = "DURATION", default_value = "2ms", value_parser = parse_think)]
    think: Duration,

    /// For how many seconds the jobs run
    #[arg(long, value_name = "SECONDS", default_value = "8", value_parser = parse_seconds)]
    seconds: Duration,

    /// How many keys the jobs work on
    #[arg(long, value_name = "COUNT", default_value_t = 200, value_parser = up_to(1_000_000))]
    keys: u32,

    /// Where the first worker process serves its metrics. Without it, on a free port of 127.0.0.1
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,

    /// Keeps up a load of several classes of work until it is stopped, in place of the demo: for a dashboard, for
    /// `shardlock top`, to try out faults. It has hot keys, timeouts, refusals and long holds on purpose. Where no shard is given,
    /// a quorum of three more servers is one of its shards
    #[arg(long, conflicts_with_all = ["json", "seconds", "coupons", "think"])]
    load: bool,

    /// Writes where the workers serve their metrics to this file, as `file_sd_configs` of Prometheus reads it. It is removed
    /// at the end
    #[arg(long, value_name = "FILE")]
    targets: Option<PathBuf>,

    /// Ends the output with the figures as one line of JSON
    #[arg(long)]
    json: bool,
}

impl DemoArgs {
    /// How many tasks there are in all.
    const fn customers(&self) -> u64 {
        self.processes as u64 * self.tasks as u64
    }
}

fn up_to(most: i64) -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=most)
}

fn parse_think(text: &str) -> anyhow::Result<Duration> {
    let think = humantime::parse_duration(text)?;
    anyhow::ensure!(think <= Duration::from_secs(10), "at most 10s");
    Ok(think)
}

fn parse_seconds(text: &str) -> anyhow::Result<Duration> {
    let seconds: f64 = text.parse()?;
    anyhow::ensure!((0.1..=3600.0).contains(&seconds), "from 0.1 to 3600");
    Ok(Duration::from_secs_f64(seconds))
}

/// Runs the demo. Whatever way it ends, what it has started is stopped and what it has written is removed.
///
/// # Errors
///
/// Whatever kept the demo from coming to a result. A result that is not right is an exit code of 1; a signal, one of
/// 128 and its number.
pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<u8> {
    let mut signals = Signals::listen().context("signals can't be handled")?;
    let mut stage = Stage::new();
    let played = tokio::select! {
        biased;
        signal = signals.next() => Err(signal),
        played = play::play(&args, &mut stage) => Ok(played),
    };
    let cleared = stage.clear().await;
    if let Err(error) = &cleared {
        complain(format_args!("{error:#}"));
    }
    match played {
        Err(signal) => {
            complain(format_args!("stopped by {}", signal.name));
            Ok(signal.exit_code)
        }
        Ok(played) => Ok(report(&args, &played?)?.max(u8::from(cleared.is_err()))),
    }
}

fn report(args: &DemoArgs, outcome: &Outcome) -> anyhow::Result<u8> {
    let mut out = std::io::stdout().lock();
    outcome.write_table(&mut out)?;
    let wrong = outcome.wrong();
    if wrong.is_empty() {
        writeln!(
            out,
            "\nWith the lock no coupon was claimed too many and no update was lost."
        )?;
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(outcome)?)?;
    }
    out.flush()?;
    if let Some(warning) = outcome.warning() {
        complain(format_args!("note: {warning}"));
    }
    for line in &wrong {
        complain(format_args!("wrong: {line}"));
    }
    Ok(u8::from(!wrong.is_empty()))
}
