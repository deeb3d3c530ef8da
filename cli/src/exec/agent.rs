//! Taking the lock through the agent of this host (`shardlock serve`), over one connection.
//!
//! # Implementation details
//!
//! The lock ends with the connection, so the connection is kept until the command is gone. The
//! agent reports a loss with a push message, and the end of the connection is a loss as well. An
//! agent that is stopped reports nothing. Therefore this process asks for the remaining validity
//! again and again, and considers the lock lost when that time has passed without an answer. The
//! time counts from before the question was sent.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::anyhow;
use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{
    self, AsyncConnectionConfig, Client, ConnectionAddr, IntoConnectionInfo, ProtocolVersion, PushInfo, PushKind,
    RedisConnectionInfo, RedisError, RedisResult, Value, cmd,
};
use shardlock::LockKey;
use shardlock::tool::printable;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::holding::NotReleased;
use super::{Args, Permits};
use crate::exit::{self, Failure};

/// Longer than any wait or hold: the most that the agent accepts.
const FOREVER: Duration = Duration::from_secs(365 * 24 * 3600);

/// How long a release waits for its answer.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// The shortest time between two questions for the validity.
const ASK_EVERY_MIN: Duration = Duration::from_millis(10);

/// What the agent is asked for.
#[derive(Debug)]
pub(super) struct AgentRequest {
    socket: PathBuf,
    key: LockKey,
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
        let [key] = keys else {
            return Err(Failure::usage(anyhow!(
                "{} keys are given, but an agent locks one at a time; give one key, or use --shard \
                 instead of --agent",
                keys.len()
            )));
        };
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
            key: key.clone(),
            options,
            wait,
        })
    }

    /// Waits for the lock. `None` if it was not acquired in time. An agent that is not there, or
    /// whose shard is down, is asked again until the time to wait has passed.
    pub(super) async fn acquire(&self) -> Result<Option<AgentLock>, Failure> {
        const PAUSE_MIN: Duration = Duration::from_millis(20);
        const PAUSE_MAX: Duration = Duration::from_secs(1);
        let deadline = match self.wait {
            Wait::AtMost(limit) => Some(Instant::now() + limit),
            Wait::Default | Wait::No => None,
        };
        let mut bound = PAUSE_MIN;
        loop {
            let error = match self.try_once(deadline).await {
                Err(error) if is_temporary(&error) => error,
                Err(error) => return Err(self.failure(&error)),
                Ok(acquired) => return Ok(acquired),
            };
            let pause = rand::random_range(PAUSE_MIN / 2..=bound);
            if deadline.is_none_or(|deadline| Instant::now() + pause >= deadline) {
                return Err(self.failure(&error));
            }
            tracing::debug!(%error, "the agent is unavailable; trying again");
            sleep(pause).await;
            bound = (bound * 2).min(PAUSE_MAX);
        }
    }

    async fn try_once(&self, deadline: Option<Instant>) -> RedisResult<Option<AgentLock>> {
        let (sender, pushes) = mpsc::unbounded_channel();
        let mut connection = connect(&self.socket, sender).await?;
        let mut lock = cmd("LOCK");
        lock.arg(self.key.as_str()).arg(&self.options);
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
        let token: Option<u64> = lock.query_async(&mut connection).await?;
        let Some(token) = token else { return Ok(None) };
        AgentLock::watch(connection, pushes, self.key.clone(), token).await
    }

    fn failure(&self, error: &RedisError) -> Failure {
        let code = match error.code() {
            Some("ERR") => exit::USAGE,
            _ => exit::UNAVAILABLE,
        };
        let socket = self.socket.display();
        Failure::new(code, anyhow!("agent {socket}: {}", printable(&error.to_string())))
    }
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

async fn connect(socket: &Path, pushes: mpsc::UnboundedSender<PushInfo>) -> RedisResult<MultiplexedConnection> {
    let settings = RedisConnectionInfo::default()
        .set_protocol(ProtocolVersion::RESP3)
        .set_lib_name("shardlock-exec", env!("CARGO_PKG_VERSION"));
    let address = ConnectionAddr::Unix(socket.to_owned()).into_connection_info()?;
    let client = Client::open(address.set_redis_settings(settings))?;
    let config = AsyncConnectionConfig::new()
        .set_response_timeout(None)
        .set_push_sender(pushes);
    client.get_multiplexed_async_connection_with_config(&config).await
}

/// A lock that the agent holds for this process.
pub(super) struct AgentLock {
    connection: MultiplexedConnection,
    key: LockKey,
    token: u64,
    /// Why the lock was lost, once it was.
    lost: watch::Receiver<Option<String>>,
    valid_until: watch::Receiver<Instant>,
    watcher: JoinHandle<()>,
}

impl AgentLock {
    /// Asks for the validity, and watches the lock from then on. `None` if it was lost already.
    async fn watch(
        mut connection: MultiplexedConnection,
        mut pushes: mpsc::UnboundedReceiver<PushInfo>,
        key: LockKey,
        token: u64,
    ) -> RedisResult<Option<Self>> {
        let (lost_sender, lost) = watch::channel(None);
        let first = ask(&mut connection, &key, token).await?;
        let (validity, valid_until) = watch::channel(first);
        let mut asking = connection.clone();
        let watched = key.clone();
        let watcher = tokio::spawn(async move {
            let reason = tokio::select! {
                reason = next_loss(&mut pushes, &watched, token) => reason,
                reason = keep_asking(&mut asking, &watched, token, &validity) => reason,
            };
            lost_sender.send_replace(Some(reason));
        });
        Ok(Some(Self {
            connection,
            key,
            token,
            lost,
            valid_until,
            watcher,
        }))
    }

    pub(super) fn key(&self) -> &str {
        self.key.as_str()
    }

    pub(super) const fn token(&self) -> u64 {
        self.token
    }

    pub(super) fn is_valid(&self) -> bool {
        self.lost.borrow().is_none() && Instant::now() < *self.valid_until.borrow()
    }

    fn lost_because(&self, reason: &str) -> String {
        format!("lock {:?} (token {}) was lost: {reason}", self.key.as_str(), self.token)
    }

    /// Waits for the loss. Returns which lock it was, and why.
    pub(super) async fn lost(&self) -> String {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(reason)) => self.lost_because(reason),
            // The watcher has ended without a reason: it has panicked.
            _ => self.lost_because("it is not watched any more"),
        }
    }

    pub(super) async fn release(self) -> Result<(), NotReleased> {
        self.watcher.abort();
        let known = self.lost.borrow().clone();
        if let Some(reason) = known {
            return Err(NotReleased::Lost(self.lost_because(&reason)));
        }
        let mut connection = self.connection.clone();
        let mut unlock = cmd("UNLOCK");
        unlock.arg(self.key.as_str()).arg(self.token);
        let answer = unlock.query_async::<u64>(&mut connection);
        match tokio::time::timeout(RELEASE_LIMIT, answer).await {
            Ok(Ok(1)) => Ok(()),
            Ok(Ok(_)) => Err(NotReleased::Lost(
                self.lost_because("the agent does not hold it any more"),
            )),
            Ok(Err(error)) if error.is_io_error() || error.is_connection_dropped() => {
                Err(NotReleased::Lost(self.lost_because(CONNECTION_ENDED)))
            }
            Ok(Err(error)) => Err(NotReleased::Unconfirmed(printable(&error.to_string()).into_owned())),
            Err(_) => Err(NotReleased::Unconfirmed(format!(
                "the agent has not answered for {RELEASE_LIMIT:?}"
            ))),
        }
    }
}

const CONNECTION_ENDED: &str = "the connection to the agent has ended";

/// Until when the lock is certainly held.
async fn ask(connection: &mut MultiplexedConnection, key: &LockKey, token: u64) -> RedisResult<Instant> {
    let asked = Instant::now();
    let mut held = cmd("HELD");
    held.arg(key.as_str()).arg(token);
    let millis: u64 = held.query_async(connection).await?;
    Ok(asked + Duration::from_millis(millis))
}

/// Waits for the message that the lock was lost, or for the end of the connection.
async fn next_loss(pushes: &mut mpsc::UnboundedReceiver<PushInfo>, key: &LockKey, token: u64) -> String {
    while let Some(push) = pushes.recv().await {
        match push.kind {
            PushKind::Disconnection => break,
            PushKind::Other(kind) if kind == "lost" => {
                if let [lost_key, Value::Int(lost), reason] = &*push.data
                    && u64::try_from(*lost) == Ok(token)
                    && redis::from_redis_value::<String>(lost_key.clone()).is_ok_and(|lost| lost == key.as_str())
                {
                    let reason = redis::from_redis_value::<String>(reason.clone()).unwrap_or_default();
                    return printable(&reason).into_owned();
                }
            }
            _ => {}
        }
    }
    CONNECTION_ENDED.to_owned()
}

/// Asks for the validity before it ends. Returns when the lock is lost.
async fn keep_asking(
    connection: &mut MultiplexedConnection,
    key: &LockKey,
    token: u64,
    validity: &watch::Sender<Instant>,
) -> String {
    loop {
        let valid_until = *validity.borrow();
        let left = valid_until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return "the agent does not hold it any more".to_owned();
        }
        sleep((left / 3).max(ASK_EVERY_MIN).min(left)).await;
        match timeout_at(valid_until, ask(connection, key, token)).await {
            Ok(Ok(valid_until)) => {
                validity.send_replace(valid_until);
            }
            Ok(Err(_)) => return CONNECTION_ENDED.to_owned(),
            Err(_) => return "the agent does not answer".to_owned(),
        }
    }
}
