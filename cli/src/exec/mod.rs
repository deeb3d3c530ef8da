//! `shardlock exec`: runs a command under a lock.

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
/// Waits for the lock, runs the command, and releases the lock when the command has ended. The
/// command inherits standard input, output and error. Its environment describes the lock: LOCK_KEY,
/// LOCK_TOKEN (the fencing token, larger for every later holder) and LOCK_OWNER.
///
/// Signals are forwarded to the command's process group. TERM, INT and HUP are sent to all
/// processes that the command has started; those still running after --kill-after get KILL. The
/// same happens if the lock is lost while the command runs: all processes get TERM, then KILL. If
/// the command ends by itself, its background processes keep running, without the lock.
///
/// If the tool is killed, a second process, lock-keeper, kills all processes of the command and
/// releases the lock when they are gone (on Linux). Processes that run as another user, for example
/// through sudo, can't be signalled unless the tool runs as root: the tool reports them and keeps
/// the lock until they have ended. A process that a daemon starts on the command's behalf (docker
/// run, systemd-run) is not a process of the command.
///
/// In a terminal, the command is part of the tool's job: it can read from the terminal, ^C and ^Z
/// reach it, and the lock is kept while the command is stopped. Without a terminal, the command
/// gets its own process group.
#[derive(Debug, clap::Args)]
#[command(
    override_usage = "shardlock exec [OPTIONS] <KEY> [--] <COMMAND> [ARGUMENTS]...",
    after_help = EXIT_CODES
)]
pub(crate) struct Args {
    // One list, because everything after the key belongs to the command, even if it looks like an
    // option.
    /// The name of the lock, then the command to run and its arguments
    #[arg(
        required = true,
        num_args = 2..,
        trailing_var_arg = true,
        value_names = ["KEY", "COMMAND"],
        help_heading = "Arguments"
    )]
    words: Vec<OsString>,

    /// Fail instead of waiting if the lock is held or others are waiting for it
    #[arg(short, long, conflicts_with = "timeout")]
    nonblock: bool,

    /// How long to wait for the lock, such as 500ms or 2s (a plain number is seconds), or none to
    /// wait forever
    #[arg(short = 'w', long, value_name = "DURATION", value_parser = seconds_or_duration)]
    timeout: Option<String>,

    /// How long the key stays locked if this machine dies [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    ttl: Option<String>,

    /// How long the lock may be held before the command is ended, or none for no limit
    #[arg(long, value_name = "DURATION", value_parser = seconds_or_duration)]
    max_hold: Option<String>,

    /// The exit code if the lock was not acquired: busy or timed out
    #[arg(short = 'E', long, value_name = "CODE", default_value_t = 1)]
    conflict_exit_code: u8,

    /// How long to wait between TERM and KILL, up to a day
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = grace)]
    kill_after: Duration,

    /// The class label for this lock in metrics
    #[arg(long)]
    class: Option<String>,

    /// Print no message if the lock was not acquired
    #[arg(short, long)]
    quiet: bool,

    /// Keep SHARDLOCK_SHARDS in the command's environment even if it contains a password
    ///
    /// Without this option, a SHARDLOCK_SHARDS that contains a password is removed. A nested
    /// `shardlock` must then get its shards in another way, such as from a file.
    #[arg(long)]
    inherit_password: bool,

    #[command(flatten)]
    metrics: metrics::Options,

    #[command(flatten)]
    shards: shards::Options,
}

const EXIT_CODES: &str = "\
Exit codes:
  the command's own, or 128+N if signal N killed it
    1  the lock was not acquired: busy or timed out (see --conflict-exit-code)
   64  the command line is invalid
   69  a shard can't be reached, or refused the request
   71  the operating system reported an error
   78  the environment, the configuration file or the shard map is invalid
  117  the lock was lost before the command ended; the command was asked to end
  126  the command can't be executed
  127  the command was not found
128+N  the tool received signal N while waiting for the lock";

/// Accepts a plain number as seconds, like flock(1). The configuration validates everything else.
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
    grace.ok_or_else(|| "must be a duration such as 500ms or 10s, from 0s to 1day".to_owned())
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

    /// The key, the command and its arguments.
    fn words(&self) -> Result<(LockKey, &OsStr, &[OsString]), Failure> {
        let (key, command) = match &*self.words {
            [key, dashes, command @ ..] if dashes == "--" => (key, command),
            [key, command @ ..] => (key, command),
            [] => return Err(Failure::usage(anyhow!("the key and the command are missing"))),
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

/// Call this while the process has a single thread.
pub(crate) fn run(args: Args) -> Result<u8, Failure> {
    // Report invalid arguments before the fork, from the process that the caller started.
    args.words()?;
    let config = args.config()?;
    match front::split().map_err(Failure::system)? {
        Side::Front(mut front) => front.run(),
        Side::Keeper(keeper) => crate::on_this_thread(keep(args, config, keeper)),
    }
}

async fn keep(args: Args, config: Config, keeper: Keeper) -> Result<u8, Failure> {
    let (key, program, arguments) = args.words()?;
    // From here on, no signal ends the tool before it has cleaned up.
    let mut orders = Orders::listen(&keeper).map_err(Failure::system)?;
    let unserved = |error: anyhow::Error| Failure::new(exit::UNAVAILABLE, error);
    let admin = args.metrics.bind().map_err(unserved)?;

    let locks = tokio::select! {
        connected = connect(config, args.nonblock) => connected?,
        code = orders.ending() => return Ok(code),
    };
    let serving = admin.map(|admin| args.metrics.serve(admin, &locks)).transpose();
    // Serve until the end of this function.
    let _serving = serving.map_err(unserved)?;
    // Dropping the request gives up the place in the queue. `shutdown` waits until the server
    // confirms it.
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
                output::eprint(reason);
            }
            Ok(args.conflict_exit_code)
        }
        Ok(Obtained::Interrupted(code)) => Ok(code),
        Err(failure) => Err(failure),
    };
    locks.shutdown().await;
    code
}

/// Connects to the shards. If there is a timeout, retries until it has passed, so a shorter outage
/// only costs time. The time that remains is left for the lock.
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
        // Randomised, so that processes that lost a server together do not all reconnect together.
        let pause = rand::random_range(PAUSE_MIN / 2..=bound);
        let left = limit.and_then(|limit| limit.checked_sub(started.elapsed() + pause));
        let Some(left) = left.filter(|left| !left.is_zero()) else {
            return Err(error);
        };
        if bound == PAUSE_MIN {
            tracing::warn!(%error, limit = ?limit.unwrap_or_default(), "can't connect; retrying until the timeout has passed");
        }
        bound = (bound * 2).min(PAUSE_MAX);
        tokio::time::sleep(pause).await;
        config.timeout = Some(left);
    }
}

/// Logs that the tool is waiting for the lock, at growing intervals.
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

/// The outcome of the request.
enum Obtained {
    Lock(LockGuard),
    /// The lock was not acquired, with the reason.
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
        || Obtained::Not(format!("lock {:?} is held, or others are waiting for it", key.as_str())),
        Obtained::Lock,
    ))
}

/// Builds the command, with the lock in its environment. A nested `exec` overrides the outer lock's
/// variables.
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

/// Runs the command, and releases the lock when the command is gone.
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
        // The tool was stopped for too long after it acquired the lock.
        output::eprint(format_args!("lock {key:?} was lost before the command was started"));
        Ok(Outcome::Lost)
    };
    // The release also reports whether the lock was held until now.
    match guard.release().await {
        Err(error @ LockError::Lost { .. }) => {
            if !matches!(outcome, Ok(Outcome::Lost)) {
                output::eprint(error);
            }
            // If the command could not be started, that error takes precedence.
            outcome.map(|_| exit::LOST)
        }
        released => {
            if let Err(error) = released {
                output::eprint(format_args!(
                    "lock {key:?} may stay locked until its TTL expires: {error}"
                ));
            }
            outcome.map(|outcome| match outcome {
                Outcome::Ended(code) => code,
                Outcome::Lost => exit::LOST,
            })
        }
    }
}
