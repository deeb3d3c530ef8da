//! Locks that the agent holds for this process.
//!
//! # Implementation details
//!
//! The locks end with the connection, so the connection is kept until the command is gone. The
//! agent reports a loss with a push message, and the end of the connection is a loss as well. An
//! agent that is stopped reports nothing. Therefore this process asks for the remaining validity
//! again and again, and considers the locks lost when that time has passed without an answer. The
//! time counts from before the question was sent.

use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{self, Pipeline, PushInfo, PushKind, RedisResult, Value, cmd};
use shardlock::tool::printable;
use shardlock::{LockKey, LossReason};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::holding::NotReleased;

/// How long a release waits for its answer.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);

/// The shortest time between two questions for the validity.
const ASK_EVERY_MIN: Duration = Duration::from_millis(10);

/// A lock of this connection.
#[derive(Debug, Clone)]
pub(super) struct HeldKey {
    pub(super) key: LockKey,
    pub(super) token: u64,
}

/// Why locks were lost.
#[derive(Debug, Clone)]
pub(super) enum Loss {
    /// This one, for this reason: the identifier that the agent sends, or text.
    One { index: usize, reason: String },
    /// All of them.
    All(&'static str),
}

const CONNECTION_ENDED: Loss = Loss::All("the connection to the agent has ended");
const NO_ANSWER: Loss = Loss::All("the agent does not answer");

impl Loss {
    fn not_held(index: usize) -> Self {
        let reason = "the agent does not hold it any more".to_owned();
        Self::One { index, reason }
    }

    /// Whether another attempt to lock all keys makes sense.
    pub(super) fn may_be_locked_again(&self) -> bool {
        match self {
            Self::One { reason, .. } => ["expired", "taken"].contains(&reason.as_str()),
            Self::All(_) => false,
        }
    }

    pub(super) fn describe(&self, locks: &[HeldKey]) -> String {
        let name = |lock: &HeldKey| format!("{:?} (token {})", lock.key.as_str(), lock.token);
        match (self, locks) {
            (Self::One { index, reason }, _) => {
                let lock = locks.get(*index).map(name).unwrap_or_default();
                let known = LossReason::ALL.iter().find(|known| known.as_str() == reason);
                let reason = known.map_or_else(|| reason.clone(), ToString::to_string);
                format!("lock {lock} was lost: {reason}")
            }
            (Self::All(reason), [lock]) => format!("lock {} was lost: {reason}", name(lock)),
            (Self::All(reason), locks) => {
                let names: Vec<String> = locks.iter().map(name).collect();
                format!("locks {} were lost: {reason}", names.join(", "))
            }
        }
    }
}

/// Locks that the agent holds for this process.
pub(super) struct AgentLocks {
    connection: MultiplexedConnection,
    locks: Vec<HeldKey>,
    /// Why one was lost, once it was.
    lost: watch::Receiver<Option<Loss>>,
    valid_until: watch::Receiver<Instant>,
    watcher: JoinHandle<()>,
}

impl AgentLocks {
    /// Asks for the validity, and watches the locks from then on.
    pub(super) async fn watch(
        mut connection: MultiplexedConnection,
        mut pushes: mpsc::UnboundedReceiver<PushInfo>,
        locks: Vec<HeldKey>,
    ) -> RedisResult<Self> {
        let (lost_sender, lost) = watch::channel(None);
        let first = ask(&mut connection, &locks).await?;
        let (validity, valid_until) = watch::channel(first.valid_until);
        let mut asking = connection.clone();
        let watched = locks.clone();
        let watcher = tokio::spawn(async move {
            let loss = tokio::select! {
                loss = next_loss(&mut pushes, &watched) => loss,
                loss = keep_asking(&mut asking, &watched, first, &validity) => loss,
            };
            lost_sender.send_replace(Some(loss));
        });
        Ok(Self {
            connection,
            locks,
            lost,
            valid_until,
            watcher,
        })
    }

    pub(super) fn token(&self, key: &str) -> Option<u64> {
        let lock = self.locks.iter().find(|lock| lock.key.as_str() == key);
        lock.map(|lock| lock.token)
    }

    /// Whether all are certainly held.
    pub(super) fn is_valid(&self) -> bool {
        self.lost.borrow().is_none() && Instant::now() < *self.valid_until.borrow()
    }

    /// Waits for the loss of one. Returns which lock it was, and why.
    pub(super) async fn lost(&self) -> String {
        let mut lost = self.lost.clone();
        match lost.wait_for(Option::is_some).await.as_deref() {
            Ok(Some(loss)) => loss.describe(&self.locks),
            // The watcher has ended without a reason: it has panicked.
            _ => Loss::All("it is not watched any more").describe(&self.locks),
        }
    }

    pub(super) async fn release(self) -> Result<(), NotReleased> {
        self.watcher.abort();
        let lost = |loss: Loss| Err(NotReleased::Lost(loss.describe(&self.locks)));
        let known = self.lost.borrow().clone();
        if let Some(loss) = known {
            return lost(loss);
        }
        let mut connection = self.connection.clone();
        let unlock = of_each(&self.locks, "UNLOCK");
        let answer = unlock.query_async::<Vec<u64>>(&mut connection);
        match tokio::time::timeout(RELEASE_LIMIT, answer).await {
            Ok(Ok(released)) => match released.iter().position(|&released| released != 1) {
                Some(index) => lost(Loss::not_held(index)),
                None => Ok(()),
            },
            Ok(Err(error)) if error.is_io_error() || error.is_connection_dropped() => lost(CONNECTION_ENDED),
            Ok(Err(error)) => Err(NotReleased::Unconfirmed(printable(&error.to_string()).into_owned())),
            Err(_) => Err(NotReleased::Unconfirmed(format!(
                "the agent has not answered for {RELEASE_LIMIT:?}"
            ))),
        }
    }
}

impl std::fmt::Debug for AgentLocks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("AgentLocks").field(&self.locks).finish()
    }
}

/// A command about each of the locks.
fn of_each(locks: &[HeldKey], command: &str) -> Pipeline {
    let mut pipeline = redis::pipe();
    for lock in locks {
        let mut command = cmd(command);
        command.arg(lock.key.as_str()).arg(lock.token);
        pipeline.add_command(command);
    }
    pipeline
}

/// The answer to the question for the validity.
#[derive(Debug, Clone, Copy)]
struct Validity {
    /// Whether all locks were still held.
    is_held: bool,
    /// Until when all locks are certainly held.
    valid_until: Instant,
    /// The lock that ends first.
    first: usize,
}

/// Asks until when all the locks are certainly held.
async fn ask(connection: &mut MultiplexedConnection, locks: &[HeldKey]) -> RedisResult<Validity> {
    let asked = Instant::now();
    let left: Vec<u64> = of_each(locks, "HELD").query_async(connection).await?;
    let least = left.iter().enumerate().min_by_key(|(_, left)| **left);
    let (first, left) = least.map_or((0, 0), |(index, left)| (index, *left));
    Ok(Validity {
        is_held: left > 0,
        valid_until: asked + Duration::from_millis(left),
        first,
    })
}

/// Waits for the message that a lock was lost, or for the end of the connection.
///
/// Cancel safe.
pub(super) async fn next_loss(pushes: &mut mpsc::UnboundedReceiver<PushInfo>, locks: &[HeldKey]) -> Loss {
    while let Some(push) = pushes.recv().await {
        match push.kind {
            PushKind::Disconnection => break,
            PushKind::Other(kind) if kind == "lost" => {
                if let [key, Value::Int(token), reason] = &*push.data
                    && let Ok(key) = redis::from_redis_value::<String>(key.clone())
                    && let Some(index) = locks
                        .iter()
                        .position(|lock| lock.key.as_str() == key && u64::try_from(*token) == Ok(lock.token))
                {
                    let reason = redis::from_redis_value::<String>(reason.clone()).unwrap_or_default();
                    let reason = printable(&reason).into_owned();
                    return Loss::One { index, reason };
                }
            }
            _ => {}
        }
    }
    CONNECTION_ENDED
}

/// Asks for the validity before it ends. Returns when a lock is lost.
async fn keep_asking(
    connection: &mut MultiplexedConnection,
    locks: &[HeldKey],
    mut known: Validity,
    validity: &watch::Sender<Instant>,
) -> Loss {
    loop {
        let left = known.valid_until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Loss::not_held(known.first);
        }
        sleep((left / 3).max(ASK_EVERY_MIN).min(left)).await;
        match timeout_at(known.valid_until, ask(connection, locks)).await {
            Ok(Ok(now)) if !now.is_held => return Loss::not_held(now.first),
            // An answer that comes late may say less than the one before it, which still holds.
            Ok(Ok(now)) if now.valid_until > known.valid_until => {
                known = now;
                validity.send_replace(now.valid_until);
            }
            Ok(Ok(_)) => {}
            Ok(Err(_)) => return CONNECTION_ENDED,
            Err(_) => return NO_ANSWER,
        }
    }
}
