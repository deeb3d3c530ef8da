//! The process that holds the lock and is the parent of the command.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::io::PipeReader;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use shardlock::config::{Builder, Config};
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockGuard, LockKey, LockManager};

use super::Args;
use super::command::{self, Outcome, RunningCommand};
use super::events::Events;
use super::terminal::Terminal;
use crate::exit::{self, Failure};
use crate::{metrics, output, shards};

/// State of the process that holds the lock.
pub(super) struct Keeper {
    pub(super) front: Pid,
    pub(super) signal_pipe: PipeReader,
    /// The controlling terminal of the front, if there is one.
    pub(super) terminal: Option<Terminal>,
    /// Whether TTOU was ignored when the tool was started. The keeper itself ignores TTOU, because
    /// it runs in the background of the terminal and must not be stopped when it prints a message.
    pub(super) ignored_ttou: bool,
}

impl Keeper {
    pub(super) async fn run(self, args: Args, config: Config) -> Result<u8, Failure> {
        let (key, program, arguments) = args.key_and_command()?;
        // From here on, no signal ends the tool before it has cleaned up.
        let mut events = Events::new(&self).map_err(Failure::system)?;
        let admin_failure = |error: anyhow::Error| Failure::new(exit::UNAVAILABLE, error);
        let admin = args.metrics.bind().map_err(admin_failure)?;

        let locks = tokio::select! {
            connected = connect(config, args.nonblock) => connected?,
            code = events.wait_for_termination() => return Ok(code),
        };
        let server = admin.map(|admin| args.metrics.serve(admin, &locks)).transpose();
        // Serve until the end of this function.
        let _server = server.map_err(admin_failure)?;
        // Dropping the request gives up the place in the queue. `shutdown` waits until the server
        // confirms it.
        let acquired = tokio::select! {
            acquired = acquire(&locks, &key, args.nonblock) => acquired.map_err(Failure::from),
            code = events.wait_for_termination() => Ok(Acquisition::Interrupted(code)),
            never = log_waiting(&key) => match never {},
        };
        let code = match acquired {
            Ok(Acquisition::Acquired(guard)) => {
                tracing::info!(key = guard.key(), token = %guard.token(), "the lock was acquired");
                let mut command = build_command(program, arguments, &guard);
                if !args.inherit_password && shards::variable_has_password() {
                    command.env_remove(shards::VARIABLE);
                }
                run_under_lock(guard, command, program, &self, &mut events, args.kill_after).await
            }
            Ok(Acquisition::NotAcquired(reason)) => {
                if !args.quiet {
                    output::eprint(reason);
                }
                Ok(args.conflict_exit_code)
            }
            Ok(Acquisition::Interrupted(code)) => Ok(code),
            Err(failure) => Err(failure),
        };
        // What was left is logged.
        locks.shutdown().await.ok();
        code
    }
}

/// Connects to the shards. If there is a timeout, retries until it has passed, so a shorter outage
/// only costs time. The time that remains is left for the lock.
async fn connect(mut config: Config, try_only: bool) -> Result<LockManager, LockError> {
    const PAUSE_MIN: Duration = Duration::from_millis(20);
    const PAUSE_MAX: Duration = Duration::from_secs(1);
    let started = Instant::now();
    let limit = config.timeout.filter(|_| !try_only);
    let mut bound = PAUSE_MIN;
    loop {
        let error = match Builder::new().config(config.clone()).connect().await {
            Err(error) if error.kind() == LockErrorKind::Unavailable => error,
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
async fn log_waiting(key: &LockKey) -> Infallible {
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
enum Acquisition {
    Acquired(LockGuard),
    /// The lock was not acquired, with the reason.
    NotAcquired(String),
    Interrupted(u8),
}

async fn acquire(locks: &LockManager, key: &LockKey, try_only: bool) -> Result<Acquisition, LockError> {
    let guard = if try_only {
        locks.try_lock(key).await?
    } else {
        match locks.lock(key).await {
            Err(error) if error.is_timeout() => return Ok(Acquisition::NotAcquired(exit::in_words(&error))),
            guard => Some(guard?),
        }
    };
    Ok(guard.map_or_else(
        || Acquisition::NotAcquired(format!("lock {:?} is held, or others are waiting for it", key.as_str())),
        Acquisition::Acquired,
    ))
}

/// Builds the command, with the lock in its environment. A nested `exec` overrides the outer lock's
/// variables.
fn build_command(program: &OsStr, arguments: &[OsString], guard: &LockGuard) -> Command {
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
async fn run_under_lock(
    guard: LockGuard,
    command: Command,
    program: &OsStr,
    keeper: &Keeper,
    events: &mut Events,
    grace: Duration,
) -> Result<u8, Failure> {
    let key = guard.key().to_owned();
    let outcome = if guard.is_valid() {
        match RunningCommand::spawn(command, keeper) {
            Ok(running) => Ok(running.wait(&guard, events, grace).await),
            Err(error) => Err(command::spawn_failure(program, error)),
        }
    } else {
        // The tool was stopped for too long after it acquired the lock.
        output::eprint(format_args!("lock {key:?} was lost before the command was started"));
        Ok(Outcome::Lost)
    };
    // The release also reports whether the lock was held until now.
    match guard.release().await {
        Err(error) if error.is_lost() => {
            if !matches!(outcome, Ok(Outcome::Lost)) {
                output::eprint(error);
            }
            // If the command could not be started, that error takes precedence.
            outcome.map(|_| exit::LOST)
        }
        released => {
            if let Err(error) = released {
                output::eprint(format_args!(
                    "lock {key:?} may stay locked until its TTL expires: {}",
                    exit::in_words(&error)
                ));
            }
            outcome.map(|outcome| match outcome {
                Outcome::Ended(code) => code,
                Outcome::Lost => exit::LOST,
            })
        }
    }
}
