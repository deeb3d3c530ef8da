//! `shardlock exec`: a command that runs under a lock.

mod child;
mod front;
mod orders;
mod signals;
mod terminal;
mod tree;

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use shardlock::{Builder, Config, LockError, LockGuard, LockKey, LockManager};

use crate::exit::{self, Failure};
use crate::{metrics, output, shards};
use child::{Child, Outcome};
use front::{Keeper, Side};
use orders::Orders;

/// Run a command while holding a lock
///
/// Waits for the lock, runs the command, and releases the lock when the command is gone. The command has standard
/// input, output and error of the tool. It finds the lock in its environment: LOCK_KEY, LOCK_TOKEN (the fencing token,
/// larger for every later holder) and LOCK_OWNER.
///
/// Signals that the tool gets are passed on to the command's process group. TERM, INT and HUP reach all processes that
/// the command has started, and are followed by KILL for those that are left after --kill-after. The same is done when
/// the lock is lost while the command runs. What the command leaves running in the background when it ends by itself
/// runs on without the lock.
///
/// If the tool is killed, all of them are killed at once and the lock is released when they are gone (on Linux). A
/// second process of the tool, lock-keeper, sees to that. It can't signal processes that run as another user, such as
/// those of sudo, unless it runs as root: it reports that and keeps the lock until they have ended. What a daemon runs on
/// the command's behalf (docker run, systemd-run) is not among its processes.
///
/// The command is part of the tool's job in a terminal: it reads from it, ^C and ^Z reach it, and it keeps the lock while
/// it is stopped. Without a terminal it has a process group of its own.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "shardlock exec [OPTIONS] <KEY> [--] <COMMAND> [ARGUMENTS]...",
    after_help = EXIT_CODES
)]
pub(crate) struct Args {
    // One list, since everything after the key belongs to the command, whatever it looks like.
    /// The name of the lock, and the command to run
    #[arg(
        required = true,
        num_args = 2..,
        trailing_var_arg = true,
        value_names = ["KEY", "COMMAND"],
        help_heading = "Arguments"
    )]
    words: Vec<OsString>,

    /// Fail rather than wait where the lock is held or others wait for it
    #[arg(short, long, conflicts_with = "timeout")]
    nonblock: bool,

    /// How long to wait for the lock, such as 500ms or 2s (a bare number is seconds); none waits for ever
    #[arg(short = 'w', long, value_name = "DURATION", value_parser = seconds_or_duration)]
    timeout: Option<String>,

    /// How long the key stays locked after this machine died [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    ttl: Option<String>,

    /// For how long the lock is kept at most: the command is ended then; none for no limit
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    max_hold: Option<String>,

    /// The exit code when the lock was not obtained: busy, or timed out
    #[arg(short = 'E', long, value_name = "CODE", default_value_t = 1)]
    conflict_exit_code: u8,

    /// How long the command has between TERM and KILL, up to a day
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = grace)]
    kill_after: Duration,

    /// The class under which metrics count this lock
    #[arg(long)]
    class: Option<String>,

    /// Don't say on standard error that the lock was not obtained
    #[arg(short, long)]
    quiet: bool,

    /// Leave SHARDLOCK_SHARDS in the environment of the command even if there is a password in it
    ///
    /// Without it the variable is removed then, and a `shardlock` that the command runs needs its own, or a file.
    #[arg(long)]
    inherit_password: bool,

    #[command(flatten)]
    metrics: metrics::Options,

    #[command(flatten)]
    shards: shards::Options,
}

const EXIT_CODES: &str = "\
Exit codes:
  that of the command, or 128+N if signal N killed it
    1  the lock was not obtained: busy, or timed out (see --conflict-exit-code)
   64  the command line is wrong
   69  a shard can't be reached, or refused
   71  the operating system refused something
   78  the environment, the configuration file or the shard map is wrong
  117  the lock was lost before the command was done; the command was asked to end
  126  the command can't be executed
  127  the command was not found
128+N  signal N came while the tool waited for the lock";

/// Flags take plain numbers as seconds, as flock(1) does. The settings check the rest.
fn seconds_or_duration(text: &str) -> Result<String, Infallible> {
    let seconds = text
        .parse()
        .ok()
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    Ok(seconds.map_or_else(
        || text.to_owned(),
        |seconds| humantime::format_duration(seconds).to_string(),
    ))
}

const GRACE_MAX: Duration = Duration::from_secs(24 * 3600);

fn grace(text: &str) -> Result<Duration, String> {
    let Ok(text) = seconds_or_duration(text);
    let grace = humantime::parse_duration(&text)
        .ok()
        .filter(|&grace| grace <= GRACE_MAX);
    grace.ok_or_else(|| "it must be a duration such as 500ms or 10s, from 0s to 1day".to_owned())
}

impl Args {
    fn config(&self) -> Result<Config, Failure> {
        let mut config = self.shards.load_with_shards()?;
        for (name, value) in [
            ("timeout", &self.timeout),
            ("ttl", &self.ttl),
            ("max_hold", &self.max_hold),
            ("class", &self.class),
        ] {
            if let Some(value) = value {
                config.set(name, value)?;
            }
        }
        Ok(config)
    }

    /// The key, and the command with its arguments.
    fn words(&self) -> Result<(LockKey, &OsStr, &[OsString]), Failure> {
        let (key, command) = match &*self.words {
            [key, dashes, command @ ..] if dashes == "--" => (key, command),
            [key, command @ ..] => (key, command),
            [] => return Err(Failure::usage(anyhow!("a key and a command are missing"))),
        };
        let (program, arguments) = command
            .split_first()
            .ok_or_else(|| Failure::usage(anyhow!("no command is given after the key {key:?}")))?;
        let key = key
            .to_str()
            .ok_or_else(|| Failure::usage(anyhow!("key is {key:?}, but must be UTF-8")))?;
        Ok((LockKey::new(key)?, program, arguments))
    }
}

/// To be called while the process has one thread.
pub(crate) fn run(args: Args) -> Result<u8, Failure> {
    // What is wrong with these is reported by the process that the caller has started.
    args.words()?;
    let config = args.config()?;
    match front::split().map_err(Failure::system)? {
        Side::Front(mut front) => front.run(),
        Side::Keeper(keeper) => crate::on_this_thread(keep(args, config, keeper)),
    }
}

async fn keep(args: Args, config: Config, keeper: Keeper) -> Result<u8, Failure> {
    let (key, program, arguments) = args.words()?;
    // From here on no signal ends the tool before it has cleaned up.
    let mut orders = Orders::listen(&keeper).map_err(Failure::system)?;
    let unserved = |error: anyhow::Error| Failure::new(exit::UNAVAILABLE, error);
    let admin = args.metrics.bind().map_err(unserved)?;

    let locks = tokio::select! {
        connected = connect(config, args.nonblock) => connected?,
        code = orders.ending() => return Ok(code),
    };
    let serving = admin.map(|admin| args.metrics.serve(admin, &locks)).transpose();
    // Until the end.
    let _serving = serving.map_err(unserved)?;
    // Dropping the request gives the place in the queue up; the shutdown waits until the server has said so.
    let obtained = tokio::select! {
        obtained = obtain(&locks, &key, args.nonblock) => obtained.map_err(Failure::from),
        code = orders.ending() => Ok(Obtained::Interrupted(code)),
        never = log_the_wait(&key) => match never {},
    };
    let code = match obtained {
        Ok(Obtained::Lock(guard)) => {
            tracing::info!(key = guard.key(), token = %guard.token(), "the lock was acquired");
            let mut child = command(program, arguments, &guard);
            if !args.inherit_password && shards::variable_has_password() {
                child.env_remove(shards::VARIABLE);
            }
            under_lock(guard, child, program, &keeper, &mut orders, args.kill_after).await
        }
        Ok(Obtained::Not(reason)) => {
            if !args.quiet {
                output::complain(reason);
            }
            Ok(args.conflict_exit_code)
        }
        Ok(Obtained::Interrupted(code)) => Ok(code),
        Err(failure) => Err(failure),
    };
    locks.shutdown().await;
    code
}

/// Connects. With a limit on the wait, that is tried until the limit has passed, so that an outage which is over before costs
/// only time; the rest is for the lock.
async fn connect(mut config: Config, only_try: bool) -> Result<LockManager, LockError> {
    const PAUSE_MIN: Duration = Duration::from_millis(20);
    const PAUSE_MAX: Duration = Duration::from_secs(1);
    let started = Instant::now();
    let limit = config.timeout.filter(|_| !only_try);
    let mut bound = PAUSE_MIN;
    loop {
        let error = match Builder::new().config(config.clone()).connect().await {
            Err(error @ LockError::Unavailable { .. }) => error,
            connected => return connected,
        };
        // Random, so that the processes that lost a server at the same moment do not come back to it at the same moment.
        let pause = rand::random_range(PAUSE_MIN / 2..=bound);
        let left = limit.and_then(|limit| limit.checked_sub(started.elapsed() + pause));
        let Some(left) = left.filter(|left| !left.is_zero()) else {
            return Err(error);
        };
        if bound == PAUSE_MIN {
            tracing::warn!(%error, limit = ?limit.unwrap_or_default(), "connecting is tried again until the limit has passed");
        }
        bound = (bound * 2).min(PAUSE_MAX);
        tokio::time::sleep(pause).await;
        config.timeout = Some(left);
    }
}

/// Logs that the tool waits, ever more seldom.
async fn log_the_wait(key: &LockKey) -> Infallible {
    const FIRST: Duration = Duration::from_secs(1);
    const PAUSE_MAX: Duration = Duration::from_secs(60);
    let started = Instant::now();
    let mut pause = FIRST;
    tracing::debug!(key = key.as_str(), "requesting the lock");
    loop {
        tokio::time::sleep(pause).await;
        tracing::info!(key = key.as_str(), waited = ?started.elapsed(), "waiting for the lock");
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// What became of the request.
enum Obtained {
    Lock(LockGuard),
    /// Others have it; with the reason in words.
    Not(String),
    Interrupted(u8),
}

async fn obtain(locks: &LockManager, key: &LockKey, only_try: bool) -> Result<Obtained, LockError> {
    let guard = if only_try {
        locks.try_lock(key).await?
    } else {
        match locks.lock(key).await {
            Err(error) if error.is_timeout() => return Ok(Obtained::Not(error.to_string())),
            guard => Some(guard?),
        }
    };
    Ok(guard.map_or_else(
        || Obtained::Not(format!("lock {:?} is held, or others wait for it", key.as_str())),
        Obtained::Lock,
    ))
}

/// The command, with the lock in its environment. Under a lock within a lock, the inner one is seen.
fn command(program: &OsStr, arguments: &[OsString], guard: &LockGuard) -> Command {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env("LOCK_KEY", guard.key())
        .env("LOCK_TOKEN", guard.token().to_string())
        .env("LOCK_OWNER", guard.owner())
        .env_remove(metrics::VARIABLE);
    command
}

/// Runs the command and then, when it is gone, gives the lock back.
async fn under_lock(
    guard: LockGuard,
    command: Command,
    program: &OsStr,
    keeper: &Keeper,
    orders: &mut Orders,
    grace: Duration,
) -> Result<u8, Failure> {
    let key = guard.key().to_owned();
    let outcome = if guard.is_valid() {
        match Child::spawn(command, keeper) {
            Ok(child) => Ok(child.outlive(&guard, orders, grace).await),
            Err(error) => Err(child::spawn_failure(program, error)),
        }
    } else {
        // The tool was stopped for long after it got the lock.
        output::complain(format_args!("lock {key:?} was lost before the command was started"));
        Ok(Outcome::Lost)
    };
    // A release also says whether the lock was held until now.
    match guard.release().await {
        Err(error @ LockError::Lost { .. }) => {
            if !matches!(outcome, Ok(Outcome::Lost)) {
                output::complain(error);
            }
            // A command that was never started did nothing without the lock.
            outcome.map(|_| exit::LOST)
        }
        released => {
            if let Err(error) = released {
                output::complain(format_args!(
                    "lock {key:?} may stay locked until its TTL has passed: {error}"
                ));
            }
            outcome.map(|outcome| match outcome {
                Outcome::Ended(code) => code,
                Outcome::Lost => exit::LOST,
            })
        }
    }
}
