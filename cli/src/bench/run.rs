//! Runs the bench: servers, workers, warm-up, the measured window.

use std::time::{Duration, Instant};

use deadpool_redis::Pool;
use shardlock::config::Config;

use super::Args;
use super::keys::KeyChoice;
use super::protocol::{Command, Measurements, WorkerSettings};
use super::report::Report;
use super::setup::Setup;
use crate::load::progress::{bar, millis};
use crate::load::server_stats::ServerStats;
use crate::output::eprint;
use crate::servers::pools_of_primaries;
use crate::signals::{ReceivedSignal, Signals};

/// The shortest and the longest warm-up; in between it is a fifth of the measured time.
const WARM_UP_MIN: Duration = Duration::from_millis(200);
const WARM_UP_MAX: Duration = Duration::from_secs(2);

/// How often the progress bar is updated.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How a run ended.
pub(super) enum RunResult {
    /// Stopped by a signal before there was a result.
    Interrupted(ReceivedSignal),
    /// With a result; stopped early if there is a signal.
    Measured(Box<Report>, Option<ReceivedSignal>),
}

/// Runs the whole bench. `setup` records what is started, for the caller to remove.
pub(super) async fn run(
    args: &Args,
    config: Config,
    setup: &mut Setup,
    signals: &mut Signals,
) -> anyhow::Result<RunResult> {
    let servers = tokio::select! {
        biased;
        signal = signals.next() => return Ok(RunResult::Interrupted(signal)),
        servers = prepare(args, config, setup) => servers?,
    };
    let before = (server_stats(servers.as_deref()).await, setup.agent_counts().await);
    setup.workers.run::<()>(&Command::Open, |_| {}).await?;
    let signal = wait_for_window(args.duration, setup, signals).await?;
    let after = (server_stats(servers.as_deref()).await, setup.agent_counts().await);
    let used = after.0.zip(before.0).map(|(after, before)| after.since(before));
    let handoffs = after.1.zip(before.1).map(|(after, before)| after.since(before));
    let measured: Vec<Measurements> = tokio::select! {
        biased;
        signal = signals.next() => return Ok(RunResult::Interrupted(signal)),
        measured = setup.workers.run(&Command::Close, |_| {}) => measured?,
    };
    setup.workers.shut_down(&Command::Shutdown).await?;
    let report = Report::new(args, setup.shards.clone(), measured, used, handoffs)?;
    Ok(RunResult::Measured(Box::new(report), signal))
}

/// Runs until the warm-up is over. Returns pools of connections to the servers if all of
/// them report statistics.
async fn prepare(args: &Args, mut config: Config, setup: &mut Setup) -> anyhow::Result<Option<Vec<Pool>>> {
    let started = setup.start_server(&mut config).await?;
    let servers = pools_of_primaries(&config).await.unwrap_or_else(|error| {
        eprint(format_args!(
            "the servers' statistics can't be read and are left out: {error:#}"
        ));
        None
    });
    let agent = match args.agent {
        true => Some(setup.start_agent(args, &started).await?),
        false => None,
    };
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    for process in 0..args.processes {
        let key_choice = if args.has_own_keys() {
            KeyChoice::Own {
                first: u64::from(process) * u64::from(args.tasks),
            }
        } else {
            KeyChoice::Random {
                keys: args.keys,
                skew: args.skew,
            }
        };
        let settings = WorkerSettings {
            shards: args.shards.clone(),
            started: started.clone(),
            namespace: setup.namespace.clone(),
            tasks: args.tasks,
            key_choice,
            mode: args.mode(),
            hold: args.hold,
            linger: args.linger,
            agent: agent.clone(),
            threads: (processors / args.processes as usize).max(1),
        };
        setup.workers.spawn(&settings).await?;
    }
    setup.workers.wait_until_ready::<()>().await?;
    setup.workers.run::<()>(&Command::Start, |_| {}).await?;
    tokio::time::sleep((args.duration / 5).clamp(WARM_UP_MIN, WARM_UP_MAX)).await;
    Ok(servers)
}

/// The servers' statistics so far, or `None` if any server does not report them.
async fn server_stats(servers: Option<&[Pool]>) -> Option<ServerStats> {
    let stats = ServerStats::of_all(servers?).await;
    stats
        .inspect_err(|error| {
            eprint(format_args!(
                "a server does not report its statistics, so they are left out: {error:#}"
            ));
        })
        .ok()
}

/// Waits for the end of the window, or for a signal.
async fn wait_for_window(
    duration: Duration,
    setup: &mut Setup,
    signals: &mut Signals,
) -> anyhow::Result<Option<ReceivedSignal>> {
    let began = Instant::now();
    let bar = bar(millis(duration), "{bar:40} {msg}")?;
    loop {
        let left = duration.saturating_sub(began.elapsed());
        if left.is_zero() {
            return Ok(None);
        }
        bar.set_position(millis(began.elapsed()));
        bar.set_message(format!("{:.0} s left", left.as_secs_f64().ceil()));
        tokio::select! {
            biased;
            signal = signals.next() => return Ok(Some(signal)),
            () = tokio::time::sleep(left.min(PROGRESS_EVERY)) => {}
        }
        setup.workers.check_alive().await?;
    }
}
