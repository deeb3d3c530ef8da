//! The demo: a promotion with ten coupons, claimed by many tasks of many processes that read, think
//! and write, first without the lock and then with it; calls of a partner's API that serves ten at
//! once, first without permits and then with them; and jobs on keys of which a few are hot.
//!
//! | file | what it does |
//! |---|---|
//! | `run` | runs the parts in order, and returns the result |
//! | `setup` | sets up servers, worker processes and keys, and removes everything afterwards |
//! | `worker` | what the worker processes run |
//! | `coupons`, `partner`, `jobs` | the work itself: an example of how to use the lock |
//! | `classes`, `targets_file` | what `--load` runs instead; a list of the workers for Prometheus |
//! | `cleanup` | removes the keys of the demo from given servers |
//! | `report` | the result: whether it is correct, as a table, as JSON |

mod classes;
mod cleanup;
mod coupons;
mod jobs;
mod partner;
mod protocol;
mod report;
mod run;
mod setup;
mod targets_file;
mod worker;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use clap::builder::RangedI64ValueParser;

use crate::output::eprint;
use crate::signals::{INTERRUPTS, Signals};
use report::Report;
use setup::Setup;
pub(crate) use worker::run as run_worker;

/// Show on real servers what goes wrong without locks, that locks prevent it, and what they cost
#[derive(Debug, Clone, Args)]
pub(crate) struct DemoArgs {
    /// A running shard, by a URL of any kind except memory://; repeat it for several. Without it,
    /// three Redis servers are started and removed. The protected data is kept on the same servers
    /// if all are redis://, otherwise on one that is started for it
    #[arg(long = "shard", value_name = "URL")]
    shards: Vec<String>,

    /// The number of worker processes
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = up_to(64))]
    processes: u32,

    /// The number of tasks per process
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = up_to(10_000))]
    tasks: u32,

    /// The number of coupons
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = up_to(1_000_000))]
    coupons: u32,

    /// How long a customer thinks between reading what is left and writing one less
    #[arg(long, value_name = "DURATION", default_value = "2ms", value_parser = parse_think)]
    think: Duration,

    /// How many calls at once the partner's API serves; it refuses more
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1_000))]
    partner_limit: u16,

    /// How many seconds the jobs run
    #[arg(long, value_name = "SECONDS", default_value = "8", value_parser = parse_seconds)]
    seconds: Duration,

    /// The number of keys of the jobs
    #[arg(long, value_name = "COUNT", default_value_t = 200, value_parser = up_to(1_000_000))]
    keys: u32,

    /// Where the first worker process serves its metrics; by default a free port of 127.0.0.1
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,

    /// Run a load of several classes of work until it is stopped, instead of the demo: for a
    /// dashboard, for `shardlock top`, or to try out faults. It has hot keys, timeouts, refusals
    /// and long holds on purpose. If no shard is given, a quorum of three further servers is one of
    /// its shards
    #[arg(long, conflicts_with_all = ["json", "seconds", "coupons", "think", "partner_limit"])]
    load: bool,

    /// Write the metrics addresses of the workers to this file, for `file_sd_configs` of
    /// Prometheus. It is removed at the end
    #[arg(long, value_name = "FILE")]
    targets: Option<PathBuf>,

    /// Also print the result as one line of JSON at the end
    #[arg(long)]
    json: bool,
}

impl DemoArgs {
    /// The total number of tasks.
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

/// Runs the demo. However it ends, everything it started is stopped and everything it wrote is
/// removed.
///
/// # Errors
///
/// If the demo could not be completed. An incorrect result is not an error but the exit code 1; a
/// signal is 128 plus its number.
pub(crate) async fn run(args: DemoArgs) -> anyhow::Result<u8> {
    let mut signals = Signals::install(INTERRUPTS).context("signals can't be handled")?;
    let mut setup = Setup::new();
    let result = tokio::select! {
        biased;
        signal = signals.next() => Err(signal),
        result = run::run(&args, &mut setup) => Ok(result),
    };
    let torn_down = setup.tear_down().await;
    if let Err(error) = &torn_down {
        eprint(format_args!("{error:#}"));
    }
    match result {
        Err(signal) => {
            eprint(format_args!("stopped by {}", signal.name));
            Ok(signal.exit_code)
        }
        Ok(result) => Ok(print(&args, &result?)?.max(u8::from(torn_down.is_err()))),
    }
}

fn print(args: &DemoArgs, report: &Report) -> anyhow::Result<u8> {
    let mut out = std::io::stdout().lock();
    report.write_table(&mut out)?;
    let problems = report.problems();
    if problems.is_empty() {
        let calls = match &report.partner {
            Some(_) => ", no call was refused",
            None => "",
        };
        writeln!(
            out,
            "\nWith the lock, no extra coupon was claimed{calls} and no update was lost."
        )?;
    }
    if args.json {
        writeln!(out, "{}", serde_json::to_string(report)?)?;
    }
    out.flush()?;
    if let Some(warning) = report.warning() {
        eprint(format_args!("note: {warning}"));
    }
    for line in &problems {
        eprint(format_args!("wrong: {line}"));
    }
    Ok(u8::from(!problems.is_empty()))
}
