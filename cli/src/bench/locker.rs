//! How a task takes locks: from the manager of its process, or through an agent.

use std::path::{Path, PathBuf};

use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockGuard, LockManager, LockMode};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

use super::mode::request;
use crate::exit::describe_error;

/// Where the tasks of a worker take locks.
#[derive(Debug)]
pub(super) enum Source {
    Manager(LockManager),
    /// The path of the agent's socket.
    Agent(PathBuf),
}

/// A task's access to locks.
pub(super) enum Locker {
    Manager(LockManager),
    Agent(AgentConnection),
}

/// A lock that is held.
pub(super) enum Held {
    Guard(LockGuard),
    Token(u64),
}

/// Why a lock was not acquired, or not held until its end.
#[derive(Debug)]
pub(super) struct LockFailure {
    pub(super) kind: String,
    pub(super) text: String,
}

impl From<LockError> for LockFailure {
    fn from(error: LockError) -> Self {
        Self {
            kind: error.kind().as_str().to_owned(),
            text: describe_error(&error),
        }
    }
}

impl Source {
    /// The access of one task.
    pub(super) fn locker(&self) -> Locker {
        match self {
            Self::Manager(locks) => Locker::Manager(locks.clone()),
            Self::Agent(socket) => Locker::Agent(AgentConnection::new(socket)),
        }
    }
}

impl Held {
    pub(super) fn token(&self) -> u64 {
        match self {
            Self::Guard(guard) => guard.token().get(),
            Self::Token(token) => *token,
        }
    }

    /// Whether it is not known to be lost. That of an agent is known when it is released.
    pub(super) fn is_valid(&self) -> bool {
        match self {
            Self::Guard(guard) => guard.is_valid(),
            Self::Token(_) => true,
        }
    }
}

impl Locker {
    pub(super) async fn lock(&mut self, key: &str, mode: LockMode) -> Result<Held, LockFailure> {
        match self {
            Self::Manager(locks) => Ok(Held::Guard(request(locks, key, mode).await?)),
            Self::Agent(connection) => connection.lock(key, mode).await.map(Held::Token),
        }
    }

    /// Releases the lock. Fails if it was lost.
    pub(super) async fn release(&mut self, key: &str, held: Held) -> Result<(), LockFailure> {
        match (self, held) {
            (_, Held::Guard(guard)) => Ok(guard.release().await?),
            (Self::Agent(connection), Held::Token(token)) => connection.unlock(key, token).await,
            // There is no other source of tokens.
            (Self::Manager(_), Held::Token(_)) => Ok(()),
        }
    }
}

/// A connection to an agent, opened when it is needed.
pub(super) struct AgentConnection {
    socket: PathBuf,
    stream: Option<BufReader<UnixStream>>,
    request: String,
    reply: String,
}

impl AgentConnection {
    fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            stream: None,
            request: String::new(),
            reply: String::new(),
        }
    }

    async fn lock(&mut self, key: &str, mode: LockMode) -> Result<u64, LockFailure> {
        let token = match mode {
            LockMode::Shared => self.call(&["LOCK", key, "SHARED"]).await?,
            LockMode::Permits { weight, limit } => {
                let (weight, limit) = (weight.to_string(), limit.to_string());
                self.call(&["LOCK", key, "PERMITS", &weight, "OF", &limit]).await?
            }
            // The enum is not exhaustive outside of its crate.
            _ => self.call(&["LOCK", key]).await?,
        };
        // The timeout of the settings has passed.
        token.ok_or_else(|| LockFailure {
            kind: LockErrorKind::Timeout.as_str().to_owned(),
            text: format!("key {key:?}: not acquired in time"),
        })
    }

    async fn unlock(&mut self, key: &str, token: u64) -> Result<(), LockFailure> {
        match self.call(&["UNLOCK", key, &token.to_string()]).await? {
            Some(1) => Ok(()),
            _ => Err(LockFailure {
                kind: LockErrorKind::Lost.as_str().to_owned(),
                text: format!("key {key:?}: the lock with token {token} was lost"),
            }),
        }
    }

    /// Sends a command whose reply is a number or nil.
    async fn call(&mut self, words: &[&str]) -> Result<Option<u64>, LockFailure> {
        self.request.clear();
        self.request.push_str(&format!("*{}\r\n", words.len()));
        for word in words {
            self.request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        if let Err(error) = self.exchange().await {
            self.stream = None;
            return Err(LockFailure {
                kind: LockErrorKind::Unavailable.as_str().to_owned(),
                text: format!("agent {}: {error}", self.socket.display()),
            });
        }
        let reply = self.reply.trim_end();
        if let Some((":", number)) = reply.split_at_checked(1)
            && let Ok(number) = number.parse()
        {
            return Ok(Some(number));
        }
        match reply.split_at_checked(1) {
            Some(("$" | "*", "-1")) => Ok(None),
            Some(("-", error)) => Err(LockFailure {
                kind: error.split(' ').next().unwrap_or_default().to_owned(),
                text: format!("agent {}: {error}", self.socket.display()),
            }),
            _ => Err(LockFailure {
                kind: LockErrorKind::Unavailable.as_str().to_owned(),
                text: format!("agent {}: not a reply: {reply:?}", self.socket.display()),
            }),
        }
    }

    async fn exchange(&mut self) -> std::io::Result<()> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            None => self
                .stream
                .insert(BufReader::new(UnixStream::connect(&self.socket).await?)),
        };
        stream.write_all(self.request.as_bytes()).await?;
        self.reply.clear();
        if stream.read_line(&mut self.reply).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        Ok(())
    }
}
