//! Taking locks through the agent of this host (`shardlock serve`), over one connection.
//!
//! # Implementation details
//!
//! An agent locks one key at a time. Several keys are locked one after the other, in the order of
//! [`LockManager::lock_all`](shardlock::LockManager::lock_all), by slot and then by name, so that
//! requests with overlapping keys do not deadlock, whether they use an agent or not. They share one
//! time to wait, and whatever fails closes the connection, which releases those that were locked
//! before. If one of these is lost while a later one is waited for, all of them are locked again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, IntoConnectionInfo, ProtocolVersion, PushInfo,
    RedisConnectionInfo, RedisError, RedisResult, cmd,
};
use shardlock::LockKey;
use shardlock::tool::printable;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use super::agent_locks::{AgentLocks, HeldKey, Loss, next_loss};
use super::{Args, Permits, retries};
use crate::exit::{self, Failure};
use crate::serve;

/// Longer than any wait or hold: the most that the agent accepts.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// How often an attempt is repeated because a lock was lost while a later one was waited for, as
/// often as a manager repeats it.
const LOSSES_MAX: u32 = 16;

/// How long after the time to wait the agent's answer is waited for. An agent that is stopped
/// answers nothing.
const ANSWER_LIMIT: Duration = Duration::from_secs(1);
/// The same if nothing is waited for: the agent may have to ask the shard.
const TRY_LIMIT: Duration = Duration::from_secs(5);

/// The environment variables with the password of the agent, or with its file.
pub(super) const PASSWORD_VARIABLE: &str = "SHARDLOCK_AGENT_PASSWORD";
const PASSWORD_FILE_VARIABLE: &str = "SHARDLOCK_AGENT_PASSWORD_FILE";

/// What the agent is asked for.
pub(super) struct AgentRequest {
    socket: PathBuf,
    password: Option<String>,
    /// In the order in which they are locked.
    keys: Vec<LockKey>,
    /// The words after the key, without those of the wait.
    options: Vec<String>,
    wait: Wait,
}

#[derive(Debug, Clone, Copy)]
enum Wait {
    /// As long as the agent's setting allows.
    Default,
    AtMost(Duration),
    No,
}

impl AgentRequest {
    /// Translates the options of the command line. Those that the agent can't express are refused.
    pub(super) fn new(socket: &Path, args: &Args, keys: &[LockKey]) -> Result<Self, Failure> {
        let mut keys = keys.to_vec();
        keys.sort_by(|one, other| (one.slot(), one).cmp(&(other.slot(), other)));
        if args.min_hold.is_some() && keys.len() > 1 {
            return Err(Failure::usage(anyhow!(
                "--min-hold with several keys is not possible with --agent: an agent locks one key after the other, \
                 and those that were locked would stay locked if a later one is not free; use --shard, or one key"
            )));
        }
        let mut options = Vec::new();
        for (name, option, value) in [
            ("TTL", "--ttl", &args.ttl),
            ("MAXHOLD", "--max-hold", &args.max_hold),
            ("MINHOLD", "--min-hold", &args.min_hold),
        ] {
            if let Some(value) = value {
                options.extend([name.to_owned(), millis(option, value)?.as_millis().to_string()]);
            }
        }
        if let Some(class) = &args.class {
            options.extend(["CLASS".to_owned(), class.clone()]);
        }
        if let Some(Permits { weight, limit }) = args.permits {
            options.extend([
                "PERMITS".to_owned(),
                weight.to_string(),
                "OF".to_owned(),
                limit.to_string(),
            ]);
        } else if args.shared {
            options.push("SHARED".to_owned());
        }
        let wait = match &args.timeout {
            _ if args.nonblock => Wait::No,
            Some(limit) => Wait::AtMost(millis("--timeout", limit)?),
            None => Wait::Default,
        };
        Ok(Self {
            socket: socket.to_owned(),
            password: password(args)?,
            keys,
            options,
            wait,
        })
    }

    /// Waits for all the locks. `None` if they were not acquired in time. An agent that is not
    /// there, or whose shard is down, is asked again until the time to wait has passed.
    ///
    /// Cancel safe: dropping the future gives up the wait, and the locks that were acquired.
    pub(super) async fn acquire(&self) -> Result<Option<AgentLocks>, Failure> {
        let started = Instant::now();
        let deadline = match self.wait {
            Wait::AtMost(limit) => Some(started + limit),
            Wait::Default | Wait::No => None,
        };
        let give_up = match self.wait {
            Wait::AtMost(limit) => Some(started + limit + ANSWER_LIMIT),
            Wait::No => Some(started + TRY_LIMIT),
            Wait::Default => None,
        };
        let (mut backoff, mut losses) = (retries(), 0);
        loop {
            let attempt = self.try_once(deadline);
            let attempt = match give_up {
                Some(give_up) => timeout_at(give_up, attempt).await.unwrap_or(Err(AttemptError::Silent)),
                None => attempt.await,
            };
            let error = match attempt {
                Ok(acquired) => return Ok(acquired),
                Err(error) => error,
            };
            let pause = backoff.next_delay();
            let is_in_time = deadline.is_some_and(|deadline| Instant::now() + pause < deadline);
            let again = match &error {
                AttemptError::Agent(error) => is_temporary(error) && is_in_time,
                AttemptError::Silent => false,
                AttemptError::Lost {
                    may_be_locked_again, ..
                } => {
                    losses += 1;
                    *may_be_locked_again && losses <= LOSSES_MAX && (deadline.is_none() || is_in_time)
                }
            };
            if !again {
                return Err(self.failure(&error));
            }
            tracing::debug!(?error, "the locks were not acquired; trying again");
            sleep(pause).await;
        }
    }

    /// Locks one key after the other. Dropping the connection releases those that were locked.
    async fn try_once(&self, deadline: Option<Instant>) -> Result<Option<AgentLocks>, AttemptError> {
        let (sender, mut pushes) = mpsc::unbounded_channel();
        let mut connection = self.connect(sender).await?;
        let mut held: Vec<HeldKey> = Vec::with_capacity(self.keys.len());
        for key in &self.keys {
            let lock = self.lock_command(key, deadline);
            let token: Option<u64> = tokio::select! {
                biased;
                loss = next_loss(&mut pushes, &held), if !held.is_empty() => return Err(AttemptError::of(loss, &held)),
                token = lock.query_async(&mut connection) => token?,
            };
            let Some(token) = token else { return Ok(None) };
            held.push(HeldKey {
                key: key.clone(),
                token,
            });
        }
        Ok(Some(AgentLocks::watch(connection, pushes, held).await?))
    }

    fn lock_command(&self, key: &LockKey, deadline: Option<Instant>) -> Cmd {
        let mut lock = cmd("LOCK");
        lock.arg(key.as_str()).arg(&self.options);
        match self.wait {
            Wait::Default => {}
            Wait::No => {
                lock.arg("NOWAIT");
            }
            Wait::AtMost(limit) => {
                let left = deadline.map_or(limit, |deadline| deadline.saturating_duration_since(Instant::now()));
                lock.arg("TIMEOUT").arg(left.as_millis() as u64);
            }
        }
        lock
    }

    async fn connect(&self, pushes: mpsc::UnboundedSender<PushInfo>) -> RedisResult<MultiplexedConnection> {
        let mut settings = RedisConnectionInfo::default()
            .set_protocol(ProtocolVersion::RESP3)
            .set_lib_name("shardlock-exec", env!("CARGO_PKG_VERSION"));
        if let Some(password) = &self.password {
            settings = settings.set_password(password);
        }
        let address = ConnectionAddr::Unix(self.socket.clone()).into_connection_info()?;
        let client = Client::open(address.set_redis_settings(settings))?;
        // The time to wait also limits how long an agent may take to answer the greeting.
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(None)
            .set_response_timeout(None)
            .set_push_sender(pushes);
        client.get_multiplexed_async_connection_with_config(&config).await
    }

    fn failure(&self, error: &AttemptError) -> Failure {
        let socket = self.socket.display();
        let (code, what) = match error {
            AttemptError::Lost { what, .. } => (exit::UNAVAILABLE, what.clone()),
            AttemptError::Silent => (
                exit::UNAVAILABLE,
                "it does not answer; check whether it is stopped or overloaded".to_owned(),
            ),
            AttemptError::Agent(error) if asks_for_password(error) && self.password.is_none() => (
                exit::CONFIG,
                format!("it asks for a password; give --agent-password-file FILE, or set {PASSWORD_VARIABLE}"),
            ),
            AttemptError::Agent(error) if asks_for_password(error) => {
                (exit::CONFIG, "it does not accept the password".to_owned())
            }
            AttemptError::Agent(error) => {
                let code = match error.code() {
                    Some("ERR") => exit::USAGE,
                    _ => exit::UNAVAILABLE,
                };
                (code, printable(&error.to_string()).into_owned())
            }
        };
        Failure::new(code, anyhow!("agent {socket}: {what}"))
    }
}

/// Why an attempt to lock all keys has failed.
#[derive(Debug)]
enum AttemptError {
    Agent(RedisError),
    /// The agent has not answered in time.
    Silent,
    /// A lock was lost while a later one was waited for.
    Lost {
        what: String,
        may_be_locked_again: bool,
    },
}

impl From<RedisError> for AttemptError {
    fn from(error: RedisError) -> Self {
        Self::Agent(error)
    }
}

impl AttemptError {
    fn of(loss: Loss, held: &[HeldKey]) -> Self {
        let may_be_locked_again = loss.may_be_locked_again();
        Self::Lost {
            what: loss.describe(held),
            may_be_locked_again,
        }
    }
}

/// The password of the agent: the option, or else the environment.
fn password(args: &Args) -> Result<Option<String>, Failure> {
    let from_env = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let file = args.agent_password_file.clone();
    let password = match file.or_else(|| from_env(PASSWORD_FILE_VARIABLE).map(PathBuf::from)) {
        Some(file) => Some(serve::read_password(&file).map_err(Failure::config)?),
        None => from_env(PASSWORD_VARIABLE).map(std::os::unix::ffi::OsStringExt::into_vec),
    };
    let password = password.map(String::from_utf8).transpose();
    // The error would contain it.
    password.map_err(|_| Failure::config(anyhow!("the password of the agent is not UTF-8")))
}

fn asks_for_password(error: &RedisError) -> bool {
    error.kind() == ErrorKind::AuthenticationFailed || matches!(error.code(), Some("NOAUTH" | "WRONGPASS"))
}

/// Whether a later attempt may succeed.
fn is_temporary(error: &RedisError) -> bool {
    error.is_io_error() || error.is_connection_dropped() || matches!(error.code(), Some("UNAVAILABLE" | "LIMIT"))
}

/// A duration in whole milliseconds. `none` stands for the longest.
fn millis(option: &str, text: &str) -> Result<Duration, Failure> {
    if text == "none" {
        return Ok(FOREVER);
    }
    let duration = humantime::parse_duration(text).ok();
    let duration = duration.filter(|duration| duration.subsec_nanos() % 1_000_000 == 0);
    duration.ok_or_else(|| {
        Failure::usage(anyhow!(
            "{option} is {text:?}, but with --agent it must be a number of whole milliseconds, such as 500ms or 10s"
        ))
    })
}
