//! `shardlock bench`: whole processes that want locks without end, and what that comes to.
//!
//! | file | what it does |
//! |---|---|
//! | `play` | the course of a run: servers, workers, warm-up, the measured window |
//! | `stage` | what a run sets up, and how all of it is removed |
//! | `worker`, `task` | what the worker processes run, and each task of them |
//! | `keys` | which task wants which key |
//! | `waits` | histograms of waits, and what makes them honest |
//! | `figures` | the result: as a table, as JSON, and whether it is right |
//! | `plot` | the distribution of the waits as a picture |

mod figures;
mod keys;
mod play;
mod plot;
mod protocol;
mod stage;
mod task;
mod waits;
mod worker;

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use clap::builder::RangedI64ValueParser;

use crate::exit::{self, Failure};
use crate::load::signals::Signals;
use crate::output::{self, complain};
use crate::shards;
use play::Played;
use stage::Stage;
pub(crate) use worker::run as work;

/// Measure what locks cost: whole processes want them without end, on servers that are given or started for it
///
/// Each task takes a lock, holds it, gives it back, waits for that to be done, and wants the next at once.
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Args {
    /// How many processes there are
    #[arg(long, value_name = "COUNT", default_value_t = 4, value_parser = up_to(256))]
    processes: u32,

    /// How many tasks each process runs
    #[arg(long, value_name = "COUNT", default_value_t = 64, value_parser = up_to(100_000))]
    tasks: u32,

    /// How many keys there are: as many as tasks in all, and each task has its own; otherwise each lock is of a random one
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = up_to(i64::from(KEYS_MAX)))]
    keys: u32,

    /// How long a lock is held, such as 5ms; timers make it up to a millisecond longer, which the result shows
    #[arg(long, value_name = "DURATION", default_value = "0s", value_parser = parse_hold)]
    hold: Duration,

    /// For how long it is measured, after a warm-up
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    duration: Duration,

    /// Want some keys more often than others: the n-th by 1 / n to this power
    #[arg(long, value_name = "ZIPF", value_parser = parse_skew)]
    skew: Option<f64>,

    /// Keep a lease with its process for so long when its last guard is gone and nobody waits for it, such as 1s. Without it, as
    /// the configuration has it
    #[arg(long, value_name = "DURATION", value_parser = parse_linger)]
    linger: Option<Duration>,

    /// Write a picture of the distribution of the waits, in SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,

    #[command(flatten)]
    form: output::Form,

    #[command(flatten)]
    shards: shards::Options,
}

const AFTER_HELP: &str = "\
Without a shard, a throw-away Redis server is started. On shards that are given, all keys are in a namespace of their own and are removed.
memory:// is for one process.

A wait counts from the moment when the task wanted the lock, those that are not over at the end with what they have lasted. Where a
task waited for longer than the mean cycle of a task, the waits that it would have had meanwhile count, too, so that a task that starves
weighs no less than one that is lucky. All times are in ms but those of the server's CPU, in us.

With --json, one object:
  locks, seconds, locks_per_s   what was had in the window
  per_process, per_task         the least and the most; jain is 1 if all processes had as many, and 1/processes if one had all
  wait_ms, hold_ms              waits for locks; how long they were held, as measured
  handoffs                      locks from a task of the same process or under a lease that lingered, from another process, and of free keys
  server                        by the servers' own count, for each lock; null for shards that are not Redis

Exit code:
  0  all is well
  1  a lock failed, a token did not grow, two tasks held a key at once, or a worker died
  64 the command line is wrong
  78 the environment or the configuration file is wrong
  130 it was ended early by Ctrl-C, and shows what was measured by then";

/// How many keys there can be, and tasks in all: a worker keeps the last token of each key.
const KEYS_MAX: u32 = 1_000_000;

const HOLD_MAX: Duration = Duration::from_secs(60);
/// As for the setting.
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

fn parse_skew(text: &str) -> anyhow::Result<f64> {
    let skew: f64 = text.parse()?;
    ensure!((0.0..=SKEW_MAX).contains(&skew), "from 0 to {SKEW_MAX}");
    Ok(skew)
}

impl Args {
    /// How many tasks there are in all.
    const fn tasks_in_all(&self) -> u64 {
        self.processes as u64 * self.tasks as u64
    }

    /// Whether each task has a key of its own.
    fn own_keys(&self) -> bool {
        u64::from(self.keys) == self.tasks_in_all()
    }

    fn check(&self) -> Result<(), Failure> {
        let tasks = self.tasks_in_all();
        if tasks > KEYS_MAX.into() {
            return Err(Failure::usage(anyhow!(
                "--processes {} with --tasks {} are {tasks} tasks, but must be at most {KEYS_MAX} in all",
                self.processes,
                self.tasks
            )));
        }
        if self.own_keys() && self.keys > 1 && self.skew.is_some() {
            return Err(Failure::usage(anyhow!(
                "--skew says which keys are wanted more often, but with --keys {tasks} each task has its own; give another number of keys"
            )));
        }
        Ok(())
    }

    /// The file for the picture, made before the run, since afterwards it would be a pity.
    fn plot_file(&self) -> Result<Option<File>, Failure> {
        let Some(path) = &self.plot else {
            return Ok(None);
        };
        let file = File::create(path).with_context(|| format!("--plot {} can't be written", path.display()));
        file.map(Some).map_err(Failure::usage)
    }
}

/// Runs the bench. Whatever way it ends, what it has started is stopped and what it has written is removed.
pub(crate) async fn run(args: Args) -> Result<u8, Failure> {
    args.check()?;
    let config = args.shards.load()?;
    let mut stage = Stage::new(&config, args.processes)?;
    let plot_file = args.plot_file()?;
    let mut signals = Signals::listen()
        .context("signals can't be handled")
        .map_err(Failure::system)?;

    let played = play::play(&args, config, &mut stage, &mut signals).await;
    let cleared = stage.clear().await;
    if let Err(error) = &cleared {
        complain(format_args!("{error:#}"));
    }
    let code = match played.map_err(|error| Failure::new(1, error))? {
        Played::Stopped(signal) => {
            complain(format_args!("stopped by {} before anything was measured", signal.name));
            signal.exit_code
        }
        Played::Measured(outcome, signal) => {
            args.form.print(&outcome.figures.as_json(), &outcome.as_text(&args))?;
            if let Some(file) = plot_file {
                write_plot(file, &plot::svg(&outcome.waits, &args.in_words()))?;
            }
            for line in outcome.wrong() {
                complain(format_args!("wrong: {line}"));
            }
            if let Some(signal) = signal {
                complain(format_args!("ended early by {}", signal.name));
            }
            let right = if outcome.wrong().is_empty() { exit::OK } else { 1 };
            signal.map_or(right, |signal| signal.exit_code)
        }
    };
    Ok(if cleared.is_err() { code.max(1) } else { code })
}

fn write_plot(mut file: File, svg: &str) -> Result<(), Failure> {
    file.write_all(svg.as_bytes())
        .context("the picture could not be written")
        .map_err(Failure::system)
}
