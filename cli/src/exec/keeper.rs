//! The process that holds the lock and is the parent of the command.

use std::convert::Infallible;
use std::io::PipeReader;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use shardlock::config::{Builder, Config};
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockKey, LockManager};

use super::agent::{self, AgentRequest};
use super::arguments::Work;
use super::command::{self, Outcome, RunningCommand};
use super::environment;
use super::events::Events;
use super::holding::{Holding, NotReleased};
use super::terminal::Terminal;
use super::textfile::{self, Call, Textfile};
use super::{Args, Permits, Source, retries};
use crate::exit::{self, Failure};
use crate::{metrics, output, shards};

/// How long a call that did not get the lock waits for the confirmation that its place in the queue
/// is given up. Without it, the place ends by itself.
const LEAVE_MAX: Duration = Duration::from_secs(1);

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
    pub(super) async fn run(self, args: Args, source: Source) -> Result<u8, Failure> {
        let work = Work::parse(&args)?;
        // From here on, no signal ends the tool before it has cleaned up.
        let mut events = Events::new(&self).map_err(Failure::system)?;
        let mut call = Call::begin();
        let ended = match source {
            Source::Shards(config) => {
                self.run_with_manager(&args, &work, &mut events, &mut call, *config)
                    .await
            }
            Source::Agent(request) => self.run_with_agent(&args, &work, &mut events, &mut call, request).await,
        };
        if let Some(textfile) = Textfile::new(&args.textfile, &work.keys) {
            textfile.report(&call, ended.as_ref().map_or_else(|failure| failure.code, |&code| code));
        }
        ended
    }

    async fn run_with_agent(
        &self,
        args: &Args,
        work: &Work<'_>,
        events: &mut Events,
        call: &mut Call,
        request: AgentRequest,
    ) -> Result<u8, Failure> {
        // Dropping the request closes the connection, and so gives up the wait.
        let acquired = tokio::select! {
            acquired = request.acquire() => acquired?.map(Holding::Agent),
            code = events.wait_for_termination() => {
                call.wait_ended(textfile::Outcome::Interrupted);
                return Ok(code);
            }
            never = log_waiting(work) => match never {},
        };
        let acquired = acquired.map_or_else(|| Acquisition::busy(work, args), Acquisition::Acquired);
        self.run_command(acquired, args, work, events, call).await
    }

    async fn run_with_manager(
        &self,
        args: &Args,
        work: &Work<'_>,
        events: &mut Events,
        call: &mut Call,
        config: Config,
    ) -> Result<u8, Failure> {
        let admin_failure = |error: anyhow::Error| Failure::new(exit::UNAVAILABLE, error);
        let admin = args.metrics.bind().map_err(admin_failure)?;

        let (started, limit) = (Instant::now(), config.timeout);
        let locks = tokio::select! {
            connected = connect(config, args) => connected?,
            code = events.wait_for_termination() => {
                call.wait_ended(textfile::Outcome::Interrupted);
                return Ok(code);
            }
        };
        let server = admin.map(|admin| args.metrics.serve(admin, &locks)).transpose();
        // Serve until the end of this function.
        let _server = server.map_err(admin_failure)?;
        // The time to connect counts as waiting.
        let left = limit.map(|limit| limit.saturating_sub(started.elapsed()));
        // Dropping the request gives up the place in the queue. `shutdown` waits until the server
        // confirms it.
        let acquired = tokio::select! {
            acquired = acquire(&locks, work, args, left) => acquired.map_err(Failure::from),
            code = events.wait_for_termination() => Ok(Acquisition::Interrupted(code)),
            never = log_waiting(work) => match never {},
        };
        let was_acquired = matches!(acquired, Ok(Acquisition::Acquired(_)));
        let code = match acquired {
            Ok(acquired) => self.run_command(acquired, args, work, events, call).await,
            Err(failure) => Err(failure),
        };
        if was_acquired {
            // What was left is logged.
            locks.shutdown().await.ok();
        } else {
            // A server that is unreachable must not delay the end beyond --timeout for long.
            tokio::time::timeout(LEAVE_MAX, locks.shutdown()).await.ok();
        }
        code
    }

    /// Runs the command, if the locks were acquired.
    async fn run_command(
        &self,
        acquired: Acquisition,
        args: &Args,
        work: &Work<'_>,
        events: &mut Events,
        call: &mut Call,
    ) -> Result<u8, Failure> {
        call.wait_ended(acquired.outcome());
        match acquired {
            Acquisition::Acquired(held) => {
                for key in &work.keys {
                    if let Some(lock) = held.describe(key.as_str()) {
                        tracing::info!(key = key.as_str(), token = lock.token, "the lock was acquired");
                    }
                }
                let mut command = build_command(work, &held);
                if !args.inherit_password {
                    for variable in shards::variables_with_passwords() {
                        command.env_remove(variable);
                    }
                    command.env_remove(agent::PASSWORD_VARIABLE);
                }
                run_under_lock(held, command, work, self, events, call, args.kill_after).await
            }
            Acquisition::NotAcquired { reason, .. } => {
                if !args.quiet {
                    output::eprint(reason);
                }
                Ok(args.conflict_exit_code)
            }
            Acquisition::Interrupted(code) => Ok(code),
        }
    }
}

/// Connects to the shards. If there is a timeout, retries until it has passed, so a shorter outage
/// only costs time.
async fn connect(config: Config, args: &Args) -> Result<LockManager, Failure> {
    let started = Instant::now();
    let limit = config.timeout.filter(|_| !args.nonblock);
    let (mut backoff, mut is_first) = (retries(), true);
    loop {
        let error = match Builder::new().config(config.clone()).connect().await {
            Err(error) if error.kind() == LockErrorKind::Unavailable => error,
            connected => return connected.map_err(|error| args.shards.connect_failure(&error)),
        };
        let pause = backoff.next_delay();
        if limit.is_none_or(|limit| started.elapsed() + pause >= limit) {
            let what = exit::describe_after(&error, started.elapsed());
            return Err(Failure::new(exit::UNAVAILABLE, anyhow::Error::msg(what)));
        }
        if is_first {
            tracing::warn!(%error, limit = ?limit.unwrap_or_default(), "can't connect; retrying until the timeout has passed");
        }
        is_first = false;
        tokio::time::sleep(pause).await;
    }
}

/// Logs that the tool is waiting for the lock, at growing intervals.
async fn log_waiting(work: &Work<'_>) -> Infallible {
    const FIRST: Duration = Duration::from_secs(1);
    const PAUSE_MAX: Duration = Duration::from_secs(60);
    let started = Instant::now();
    let mut pause = FIRST;
    let keys: Vec<&str> = work.keys.iter().map(LockKey::as_str).collect();
    let key = keys.join(", ");
    tracing::debug!(key, "requesting the lock");
    loop {
        tokio::time::sleep(pause).await;
        tracing::info!(key, waited = ?started.elapsed(), "waiting for the lock");
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// The outcome of the request.
enum Acquisition {
    Acquired(Holding),
    /// The lock was not acquired, with the reason.
    NotAcquired {
        reason: String,
        is_timeout: bool,
    },
    Interrupted(u8),
}

/// Sets the mode that the arguments ask for. A request and a try are of different types.
macro_rules! in_mode {
    ($request:expr, $args:expr) => {
        match ($args.permits, $args.shared) {
            (Some(Permits { weight, limit }), _) => $request.permits(limit).weight(weight),
            (None, true) => $request.shared(),
            (None, false) => $request,
        }
    };
}

impl Acquisition {
    /// A lock was not acquired in time, or not without waiting.
    fn busy(work: &Work<'_>, args: &Args) -> Self {
        let one_of = if work.keys.len() > 1 { "one of the " } else { "" };
        let locks = work.describe_locks();
        Self::NotAcquired {
            reason: if args.nonblock {
                format!("{one_of}{locks} is held, or others are waiting for it")
            } else {
                format!("timed out waiting for {one_of}{locks}")
            },
            is_timeout: !args.nonblock,
        }
    }

    const fn outcome(&self) -> textfile::Outcome {
        match self {
            Self::Acquired(_) => textfile::Outcome::Acquired,
            Self::NotAcquired { is_timeout: true, .. } => textfile::Outcome::Timeout,
            Self::NotAcquired { is_timeout: false, .. } => textfile::Outcome::Busy,
            Self::Interrupted(_) => textfile::Outcome::Interrupted,
        }
    }
}

async fn acquire(
    locks: &LockManager,
    work: &Work<'_>,
    args: &Args,
    limit: Option<Duration>,
) -> Result<Acquisition, LockError> {
    let guard = if args.nonblock {
        in_mode!(locks.try_lock_all(&work.keys), args).await?
    } else {
        match in_mode!(locks.lock_all(&work.keys), args).timeout(limit).await {
            Err(error) if error.is_timeout() => {
                return Ok(Acquisition::NotAcquired {
                    reason: exit::describe_error(&error),
                    is_timeout: true,
                });
            }
            guard => Some(guard?),
        }
    };
    let held = guard.map(Holding::Manager);
    Ok(held.map_or_else(|| Acquisition::busy(work, args), Acquisition::Acquired))
}

/// Builds the command, with the locks in its environment.
fn build_command(work: &Work<'_>, held: &Holding) -> Command {
    let mut command = Command::new(work.program);
    command.args(work.arguments).env_remove(metrics::VARIABLE);
    environment::describe(&mut command, work, held);
    command
}

/// Runs the command, and releases the lock when the command is gone.
async fn run_under_lock(
    held: Holding,
    command: Command,
    work: &Work<'_>,
    keeper: &Keeper,
    events: &mut Events,
    call: &mut Call,
    grace: Duration,
) -> Result<u8, Failure> {
    let outcome = if held.is_valid() {
        let started = Instant::now();
        match RunningCommand::spawn(command, keeper) {
            Ok(running) => {
                let outcome = running.wait(&held, events, grace).await;
                call.ran = started.elapsed();
                Ok(outcome)
            }
            Err(error) => Err(command::spawn_failure(work.program, error)),
        }
    } else {
        // The tool was stopped for too long after it acquired the lock.
        let lost = held.lost().await;
        output::eprint(format_args!("{lost}; the command was not started"));
        Ok(Outcome::Lost)
    };
    if matches!(outcome, Ok(Outcome::Lost)) {
        call.outcome = textfile::Outcome::Lost;
    }
    // The release also reports whether the lock was held until now.
    match held.release().await {
        Err(NotReleased::Lost(error)) => {
            call.outcome = textfile::Outcome::Lost;
            if !matches!(outcome, Ok(Outcome::Lost)) {
                output::eprint(error);
            }
            // If the command could not be started, that error takes precedence.
            outcome.map(|_| exit::LOST)
        }
        released => {
            if let Err(NotReleased::Unconfirmed(error)) = released {
                let locks = work.describe_locks();
                output::eprint(format_args!("{locks} may stay locked until the TTL expires: {error}"));
            }
            outcome.map(|outcome| match outcome {
                Outcome::Ended(code) => code,
                Outcome::Lost => exit::LOST,
            })
        }
    }
}
