//! `shardlock bench`: measures processes that request locks continuously.
//!
//! | file | what it does |
//! |---|---|
//! | `run` | runs it: servers, workers, warm-up, the measured window |
//! | `setup` | sets up a run and removes everything afterwards |
//! | `worker`, `task`, `context` | the worker processes, their tasks, and the state these share |
//! | `locker` | how a task takes locks: from the manager of its process, or through an agent |
//! | `temp_agent` | the agent of a run |
//! | `keys`, `mode` | which task locks which key, and in which mode |
//! | `wait_histogram` | histograms of waits, corrected for coordinated omission |
//! | `report`, `figures` | the result as a table, and whether it is correct; its numbers, as JSON |
//! | `plot` | the distribution of the waits as an SVG |

mod context;
mod figures;
mod hold_timer;
mod keys;
mod locker;
mod mode;
mod plot;
mod protocol;
mod report;
mod run;
mod setup;
mod task;
mod temp_agent;
mod wait_histogram;
mod worker;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use clap::builder::RangedI64ValueParser;
use shardlock::tool;

use crate::exit::{self, Failure};
use crate::output::{self, eprint};
use crate::shards;
use crate::signals::{INTERRUPTS, Signals};
use mode::ModeChoice;
use run::RunResult;
use setup::Setup;
pub(crate) use worker::run as run_worker;

/// Measure the cost of locks: processes request them continuously, on given servers or on one
/// started for the run
///
/// Each task takes a lock, holds it, releases it, waits for the release, and immediately requests
/// the next one.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// The number of processes
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = up_to(256))]
    processes: u32,

    /// The number of tasks per process
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = up_to(100_000))]
    tasks: u32,

    /// The number of keys. If it equals the total number of tasks, each task has its own key;
    /// otherwise each lock is of a random key
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = up_to(i64::from(KEYS_MAX)))]
    keys: u32,

    /// How long a lock is held, such as 5ms. Timers add up to a millisecond; the result shows the
    /// measured time
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_hold)]
    hold: Duration,

    /// How long to measure, after a warm-up
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,

    /// Lock some keys more often: the n-th with weight 1 / n to this power
    #[arg(long, value_name = "ZIPF", value_parser = parse_skew)]
    skew: Option<f64>,

    /// The part of the locks that are shared, such as 0.95. The others are exclusive
    #[arg(long, value_name = "PART", value_parser = parse_part, conflicts_with = "permits")]
    shared: Option<f64>,

    /// Take a permit instead of a lock, of this many for each key
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1_000))]
    permits: Option<u16>,

    /// How long a process keeps a lease after its last guard is dropped if no one waits for the
    /// key, such as 1s. Without it, the configuration decides
    #[arg(long, value_name = "DURATION", value_parser = parse_linger)]
    linger: Option<Duration>,

    /// Start an agent (`shardlock serve`) for the run, and take the locks through it: each task has
    /// a connection of its own, and no process has a manager
    #[arg(long)]
    agent: bool,

    /// Write the distribution of the waits to this file, as SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    format: output::Format,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Without a shard, a throw-away Redis server is started. On given shards, all keys are in a separate
namespace and are removed at the end. memory:// works with a single process, or with --agent.

A wait starts when the task requests the lock. Waits that are not over at the end count with the
time they have lasted. A wait longer than the mean cycle of a task also counts for the waits that
the task would have had in that time, so that starving tasks are not under-represented. Times are
in ms, except for the server's CPU, which is in us.

With --json, one object:
  locks, seconds, locks_per_s   locks acquired in the window
  per_process, per_task         fewest and most; jain is 1 if all processes have the same number,
                                1/processes if one has all
  wait_ms, hold_ms              how long locks were waited for, and held, as measured
  handoffs                      local: from the same process, or under a lingering lease; remote:
                                from another process; uncontended: of a free key. With --agent,
                                local: from any worker of the agent
  writers                       only with --shared: how many waits for exclusive locks there were,
                                and wait_ms, as measured
  server                        per lock, as counted by the servers; null if not on Redis

Exit code:
  0   success
  1   a lock failed, a token did not grow, tasks held a key at once that must not, or a worker died
  64  the command line is invalid
  78  the environment or the configuration file is invalid
  130 ended early by Ctrl-C; shows what was measured until then";

/// The maximum number of keys, and of tasks in all: a worker keeps the last token of each key.
const KEYS_MAX: u32 = 1_000_000;

const HOLD_MAX: Duration = Duration::from_secs(60);
/// The limit of the setting.
const LINGER_MAX: Duration = Duration::from_secs(3600);
const DURATION_MIN: Duration = Duration::from_millis(100);
const DURATION_MAX: Duration = Duration::from_secs(3600);
const SKEW_MAX: f64 = 10.0;

fn up_to(most: i64) -> RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=most)
}

fn parse_hold(text: &str) -> anyhow::Result<Duration> {
    let hold = humantime::parse_duration(text)?;
    ensure!(hold <= HOLD_MAX, "at most {HOLD_MAX:?}");
    Ok(hold)
}

fn parse_linger(text: &str) -> anyhow::Result<Duration> {
    let linger = humantime::parse_duration(text)?;
    ensure!(linger <= LINGER_MAX, "at most {LINGER_MAX:?}");
    Ok(linger)
}

fn parse_duration(text: &str) -> anyhow::Result<Duration> {
    let duration = humantime::parse_duration(text)?;
    ensure!(
        (DURATION_MIN..=DURATION_MAX).contains(&duration),
        "from {DURATION_MIN:?} to {DURATION_MAX:?}"
    );
    Ok(duration)
}

fn parse_part(text: &str) -> anyhow::Result<f64> {
    let part: f64 = text.parse()?;
    ensure!((0.0..=1.0).contains(&part), "from 0 to 1");
    Ok(part)
}

fn parse_skew(text: &str) -> anyhow::Result<f64> {
    let skew: f64 = text.parse()?;
    ensure!((0.0..=SKEW_MAX).contains(&skew), "from 0 to {SKEW_MAX}");
    Ok(skew)
}

impl Args {
    /// The total number of tasks.
    const fn total_tasks(&self) -> u64 {
        self.processes as u64 * self.tasks as u64
    }

    /// Whether each task has a key of its own.
    fn has_own_keys(&self) -> bool {
        u64::from(self.keys) == self.total_tasks()
    }

    const fn mode(&self) -> ModeChoice {
        match (self.permits, self.shared) {
            (Some(limit), _) => ModeChoice::Permits { limit },
            (None, Some(shared)) => ModeChoice::Mixed { shared },
            (None, None) => ModeChoice::Exclusive,
        }
    }

    fn validate(&self) -> Result<(), Failure> {
        let tasks = self.total_tasks();
        if tasks > KEYS_MAX.into() {
            return Err(Failure::usage(anyhow!(
                "--processes {} with --tasks {} are {tasks} tasks, but must be at most {KEYS_MAX} in all",
                self.processes,
                self.tasks
            )));
        }
        if self.has_own_keys() && self.keys > 1 && self.skew.is_some() {
            return Err(Failure::usage(anyhow!(
                "--skew has no effect with --keys {tasks}, where each task has its own key; use another number of keys"
            )));
        }
        Ok(())
    }

    /// Creates the file for the picture before the run, so that a bad path does not waste a
    /// measurement.
    fn plot_file(&self) -> Result<Option<File>, Failure> {
        let Some(path) = &self.plot else {
            return Ok(None);
        };
        let file = File::create(path).with_context(|| format!("--plot {} can't be written", path.display()));
        file.map(Some).map_err(Failure::usage)
    }
}

/// Runs the bench. However it ends, everything it started is stopped and everything it wrote is
/// removed.
pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    args.validate()?;
    let mut config = args.shards.load()?;
    tool::put_login_into_urls(&mut config).map_err(Failure::config)?;
    // Only the agent has a manager.
    let managers = if args.agent { 1 } else { args.processes };
    let mut setup = Setup::new(&config, managers)?;
    let plot_file = args.plot_file()?;
    let mut signals = Signals::install(INTERRUPTS)
        .context("signals can't be handled")
        .map_err(Failure::system)?;

    let result = run::run(&args, config, &mut setup, &mut signals).await;
    let torn_down = setup.tear_down().await;
    if let Err(error) = &torn_down {
        eprint(format_args!("{error:#}"));
    }
    let code = match result.map_err(|error| Failure::new(1, error))? {
        RunResult::Interrupted(signal) => {
            eprint(format_args!("stopped by {} before anything was measured", signal.name));
            signal.exit_code
        }
        RunResult::Measured(report, signal) => {
            args.format.print(&report.figures.as_json(), &report.as_text(&args))?;
            if let Some(file) = plot_file {
                write_plot(file, &plot::svg(&report.waits, &args.title()))?;
            }
            for line in report.problems() {
                eprint(format_args!("wrong: {line}"));
            }
            if let Some(signal) = signal {
                eprint(format_args!("ended early by {}", signal.name));
            }
            let code = if report.problems().is_empty() { exit::OK } else { 1 };
            signal.map_or(code, |signal| signal.exit_code)
        }
    };
    Ok(if torn_down.is_err() { code.max(1) } else { code })
}

fn write_plot(mut file: File, svg: &str) -> Result<(), Failure> {
    file.write_all(svg.as_bytes())
        .context("the picture could not be written")
        .map_err(Failure::system)
}
