//! Runs the bench: servers, workers, warm-up, the measured window.

use std::time::{Duration, Instant};

use deadpool_redis::redis::aio::MultiplexedConnection;
use shardlock::Config;

use super::Args;
use super::figures::Outcome;
use super::keys::Wanted;
use super::protocol::{Measured, Order, Setup};
use super::stage::Stage;
use crate::load::progress::{bar, millis};
use crate::load::signals::{Caught, Signals};
use crate::load::usage::Usage;
use crate::output::eprint;
use crate::servers::connect_to_primaries;

/// The shortest and the longest warm-up; in between it is a fifth of the measured time.
const WARM_UP_MIN: Duration = Duration::from_millis(200);
const WARM_UP_MAX: Duration = Duration::from_secs(2);

/// How often the progress bar is updated.
const PROGRESS_EVERY: Duration = Duration::from_millis(100);

/// How a run ended.
pub(super) enum Played {
    /// Stopped by a signal before there was a result.
    Stopped(Caught),
    /// With a result; stopped early if there is a signal.
    Measured(Box<Outcome>, Option<Caught>),
}

/// Runs the whole bench. `stage` records what is set up, for the caller to remove.
pub(super) async fn play(
    args: &Args,
    config: Config,
    stage: &mut Stage,
    signals: &mut Signals,
) -> anyhow::Result<Played> {
    let servers = tokio::select! {
        biased;
        signal = signals.next() => return Ok(Played::Stopped(signal)),
        servers = prepare(args, config, stage) => servers?,
    };
    let before = usage(servers.as_deref()).await;
    stage.crew.order::<()>(&Order::Open, |_| {}).await?;
    let signal = wait(args.duration, stage, signals).await?;
    let after = usage(servers.as_deref()).await;
    let used = after.zip(before).map(|(after, before)| after.since(before));
    let measured: Vec<Measured> = tokio::select! {
        biased;
        signal = signals.next() => return Ok(Played::Stopped(signal)),
        measured = stage.crew.order(&Order::Close, |_| {}) => measured?,
    };
    stage.crew.dismiss(&Order::Leave).await?;
    let outcome = Outcome::new(args, stage.shards.clone(), measured, used)?;
    Ok(Played::Measured(Box::new(outcome), signal))
}

/// Runs until the warm-up is over. Returns connections to the servers if all of them report
/// statistics.
async fn prepare(
    args: &Args,
    mut config: Config,
    stage: &mut Stage,
) -> anyhow::Result<Option<Vec<MultiplexedConnection>>> {
    let started = stage.set_up(&mut config).await?;
    let servers = connect_to_primaries(&config).await.unwrap_or_else(|error| {
        eprint(format_args!(
            "the servers' statistics can't be read and are left out: {error:#}"
        ));
        None
    });
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
    for process in 0..args.processes {
        let wanted = if args.own_keys() {
            Wanted::Own {
                first: u64::from(process) * u64::from(args.tasks),
            }
        } else {
            Wanted::Random {
                keys: args.keys,
                skew: args.skew,
            }
        };
        let setup = Setup {
            shards: args.shards.clone(),
            started: started.clone(),
            namespace: stage.namespace.clone(),
            tasks: args.tasks,
            wanted,
            hold: args.hold,
            linger: args.linger,
            threads: (processors / args.processes as usize).max(1),
        };
        stage.crew.hire(&setup).await?;
    }
    stage.crew.ready::<()>().await?;
    stage.crew.order::<()>(&Order::Start, |_| {}).await?;
    tokio::time::sleep((args.duration / 5).clamp(WARM_UP_MIN, WARM_UP_MAX)).await;
    Ok(servers)
}

/// The servers' statistics so far, or `None` if any server does not report them.
async fn usage(servers: Option<&[MultiplexedConnection]>) -> Option<Usage> {
    let usage = Usage::of_all(servers?).await;
    usage
        .inspect_err(|error| {
            eprint(format_args!(
                "a server does not report its statistics, so they are left out: {error:#}"
            ));
        })
        .ok()
}

/// Waits for the end of the window, or for a signal.
async fn wait(duration: Duration, stage: &mut Stage, signals: &mut Signals) -> anyhow::Result<Option<Caught>> {
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
        stage.crew.look().await?;
    }
}
