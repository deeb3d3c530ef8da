//! A connection, from its first byte to its end.
//!
//! # Implementation details
//!
//! One task serves a connection and executes its commands one after the other, so replies come in
//! the order of the commands. While a command waits, for a lock or for the answer of a shard, the
//! task keeps reading, up to the longest request, to notice that the client has closed the
//! connection. Then the locks of the connection are given up, and so is the place in the queue.
//! Once as many bytes are buffered, it waits for the end of the connection without reading.
//!
//! What is buffered in either direction is bounded: commands are executed only while replies can
//! be sent. However the task ends, dropping the session gives up all locks of the connection.

use std::io;
use std::pin::pin;
use std::sync::Arc;

use shardlock::{LockGuard, LossReason};
use tokio::time::{Instant, timeout, timeout_at};

use super::FAREWELL;
use super::acquire::{acquire, error_reply};
use super::agent::{Agent, Phase, Phases};
use super::clients::Client;
use super::command::{Command, Lock, LockId};
use super::held::Losses;
use super::replies::{Protocol, Replies};
use super::requests::Requests;
use super::stream::{Received, Stream};

/// The reply to a LOCK once the agent drains.
const DRAINING: &str = "UNAVAILABLE the agent is shutting down and grants no lock; try again later";

/// The most bytes of replies that are collected before they are sent.
const UNSENT_BYTES_MAX: usize = 16 * 1024;

/// A connection.
pub(super) struct Session {
    pub(super) agent: Arc<Agent>,
    pub(super) client: Arc<Client>,
    pub(super) replies: Replies,
    pub(super) is_authenticated: bool,
    stream: Stream,
    requests: Requests,
    losses: Losses,
    phases: Phases,
    /// When the client must have authenticated.
    auth_deadline: Instant,
    /// Whether the client sends nothing more.
    is_closed: bool,
}

/// Whether the connection continues after a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Flow {
    Continue,
    Close,
}

/// What happened on a connection while a command waited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attended {
    /// A loss was reported, or bytes were sent or received.
    Event,
    /// The client has closed the connection, or its sending side.
    End,
}

/// How a request for a lock ended.
enum Acquired {
    Guard(LockGuard),
    /// It is held by others, and the time to wait has passed.
    No,
    /// The reply is an error.
    Failed(String),
    /// Nobody is there to get a reply.
    ClientGone,
}

impl Session {
    pub(super) fn new(agent: Arc<Agent>, client: Arc<Client>, stream: Stream) -> Self {
        Self {
            is_authenticated: !agent.access.needs_password(),
            requests: Requests::new(agent.limits.request_bytes_max()),
            phases: agent.phases(),
            auth_deadline: Instant::now() + agent.limits.auth_timeout,
            agent,
            client,
            stream,
            replies: Replies::default(),
            losses: Losses::default(),
            is_closed: false,
        }
    }

    /// Serves the connection until it ends.
    pub(super) async fn run(mut self) {
        let (id, peer) = (self.client.id, self.client.peer);
        tracing::info!(client = id, %peer, "a client has connected");
        match self.serve().await {
            Ok(()) => tracing::info!(client = id, %peer, "a client has disconnected"),
            Err(error) => tracing::info!(client = id, %peer, %error, "a connection has failed"),
        }
    }

    async fn serve(&mut self) -> io::Result<()> {
        loop {
            if self.execute_received().await? == Flow::Close {
                return self.farewell().await;
            }
            self.flush().await?;
            if self.is_closed {
                return Ok(());
            }
            tokio::select! {
                received = receive(&self.stream, &mut self.requests) => {
                    self.is_closed = received? == Received::End;
                }
                (id, reason) = self.losses.next() => self.report_loss(&id, reason),
                () = self.phases.reached(Phase::Stopping) => return self.flush_losses().await,
                () = tokio::time::sleep_until(self.auth_deadline), if !self.is_authenticated => {
                    let error = self.not_authenticated();
                    self.replies.error(&error);
                    return self.farewell().await;
                }
            }
        }
    }

    fn not_authenticated(&self) -> String {
        let limit = humantime::format_duration(self.agent.limits.auth_timeout);
        format!("LIMIT the connection did not authenticate within {limit} (--auth-timeout)")
    }

    /// Executes all commands that were received completely.
    async fn execute_received(&mut self) -> io::Result<Flow> {
        loop {
            let metrics = &self.agent.metrics;
            let parse = |words: &[&[u8]]| {
                metrics.count_request(words.first().copied().unwrap_or_default());
                Command::parse(words)
            };
            let command = match self.requests.next(parse) {
                Ok(Some(command)) => command,
                Ok(None) => return Ok(Flow::Continue),
                Err(malformed) => {
                    let peer = self.client.peer;
                    metrics.count_protocol_error(&malformed);
                    tracing::info!(client = self.client.id, %peer, %malformed, "a request is malformed");
                    self.replies.error(&malformed.to_string());
                    return Ok(Flow::Close);
                }
            };
            // Nothing else may yield between commands that need no answer from a shard.
            tokio::task::coop::consume_budget().await;
            match command {
                Ok(command) => {
                    if self.execute(command).await? == Flow::Close {
                        return Ok(Flow::Close);
                    }
                }
                Err(refusal) => self.replies.error(&refusal.0),
            }
            if self.replies.unsent().len() >= UNSENT_BYTES_MAX {
                self.flush().await?;
            }
        }
    }

    /// Sends all replies. A client that has not authenticated must read them in time.
    async fn flush(&mut self) -> io::Result<()> {
        if self.is_authenticated {
            return self.send_all().await;
        }
        let sent = timeout_at(self.auth_deadline, self.send_all()).await;
        sent.unwrap_or_else(|_| Err(timed_out(&self.not_authenticated())))
    }

    /// Sends the last replies. A client that does not read them keeps neither the connection nor
    /// its locks.
    async fn farewell(&mut self) -> io::Result<()> {
        let sent = timeout(FAREWELL, self.send_all()).await;
        sent.unwrap_or_else(|_| Err(timed_out("the client does not read its last replies")))
    }

    async fn send_all(&mut self) -> io::Result<()> {
        while !self.replies.unsent().is_empty() {
            let count = self.stream.send(self.replies.unsent()).await?;
            self.replies.sent(count);
        }
        Ok(())
    }

    /// Waits for the answer of a shard. If the client closes the connection meanwhile, its locks
    /// are released at once. The answer is still waited for, since a client that has closed only
    /// its sending side reads the reply.
    pub(super) async fn answer<T>(&mut self, answer: impl Future<Output = T>) -> io::Result<T> {
        let mut answer = pin!(answer);
        loop {
            tokio::select! {
                biased;
                answer = &mut answer => return Ok(answer),
                attended = self.attend(), if !self.is_closed => {
                    if attended? == Attended::End {
                        self.release_all();
                    }
                }
            }
        }
    }

    /// Does the next thing that the connection needs while a command waits.
    ///
    /// Cancel safe.
    async fn attend(&mut self) -> io::Result<Attended> {
        tokio::select! {
            (id, reason) = self.losses.next() => self.report_loss(&id, reason),
            sent = self.stream.send(self.replies.unsent()), if !self.replies.unsent().is_empty() => {
                self.replies.sent(sent?);
            }
            received = read_ahead(&self.stream, &mut self.requests, self.is_closed) => {
                if received? == Received::End {
                    self.is_closed = true;
                    return Ok(Attended::End);
                }
            }
        }
        Ok(Attended::Event)
    }

    /// Gives up all locks of the connection.
    fn release_all(&self) {
        // Dropping a guard releases it: to the next waiter of this host at once, to one of another
        // host by the manager's thread.
        let released = self.agent.held.remove_client(self.client.id).len();
        if released > 0 {
            self.agent.metrics.disconnect_releases.increment(released as u64);
            let peer = self.client.peer;
            tracing::info!(client = self.client.id, %peer, released, "the locks of a client were released");
        }
    }

    pub(super) async fn lock(&mut self, lock: Lock) -> io::Result<Flow> {
        let most = self.agent.limits.max_locks;
        let count = self.agent.held.count_of(self.client.id);
        if count as u64 >= most {
            self.replies.error(&format!(
                "LIMIT this connection holds {count} locks, the most that it may (--max-locks); \
                 release some, or use another connection"
            ));
            return Ok(Flow::Continue);
        }
        match self.acquire(&lock).await? {
            Acquired::Guard(guard) => self.grant(lock, guard),
            Acquired::No => self.replies.null(),
            Acquired::Failed(error) => self.replies.error(&error),
            Acquired::ClientGone => return Ok(Flow::Close),
        }
        Ok(Flow::Continue)
    }

    async fn acquire(&mut self, lock: &Lock) -> io::Result<Acquired> {
        let (agent, client) = (Arc::clone(&self.agent), Arc::clone(&self.client));
        let mut phases = self.phases.clone();
        let _waiting = client.waits_for(lock, &agent.metrics.waiters);
        let mut acquiring = pin!(acquire(&agent, lock));
        loop {
            tokio::select! {
                biased;
                () = phases.reached(Phase::Draining) => {
                    return Ok(Acquired::Failed(DRAINING.to_owned()));
                }
                acquired = &mut acquiring => return Ok(match acquired {
                    Ok(Some(guard)) => Acquired::Guard(guard),
                    Ok(None) => Acquired::No,
                    Err(error) => Acquired::Failed(error_reply(&error)),
                }),
                attended = self.attend() => {
                    if attended? == Attended::End {
                        return Ok(Acquired::ClientGone);
                    }
                }
            }
        }
    }

    fn grant(&mut self, lock: Lock, guard: LockGuard) {
        let token = guard.token().get();
        let Ok(number) = i64::try_from(token) else {
            self.replies.error(&format!(
                "ERR the token {token} is larger than 9223372036854775807, the largest integer of \
                 the protocol; the lock was released; check the server's clock and data"
            ));
            return;
        };
        let id = LockId { key: lock.key, token };
        self.agent.held.add(self.client.id, id.clone(), guard, &mut self.losses);
        // If the agent began to drain meanwhile, it may have found no lock, and not wait for this
        // one. Dropping the guard releases it.
        if self.agent.phase() >= Phase::Draining {
            drop(self.agent.held.remove(&id));
            self.replies.error(DRAINING);
            return;
        }
        self.replies.integer(number);
    }

    /// Gives up a lock that was lost, and reports it if the protocol can.
    fn report_loss(&mut self, id: &LockId, reason: LossReason) {
        // It may have been released meanwhile.
        if self.agent.held.remove(id).is_none() {
            return;
        }
        let peer = self.client.peer;
        tracing::info!(client = self.client.id, %peer, token = id.token, %reason, "a client has lost a lock");
        if self.replies.protocol == Protocol::Resp3 {
            self.replies.push(4);
            self.replies.bulk("lost");
            self.replies.bulk(id.key.as_str());
            self.replies.integer(i64::try_from(id.token).unwrap_or(i64::MAX));
            self.replies.bulk(reason.as_str());
        }
    }

    /// Reports the losses that are known already, and sends everything.
    async fn flush_losses(&mut self) -> io::Result<()> {
        loop {
            tokio::select! {
                biased;
                (id, reason) = self.losses.next() => self.report_loss(&id, reason),
                () = std::future::ready(()) => return self.flush().await,
            }
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.release_all();
        self.agent.clients.remove(self.client.id);
    }
}

fn timed_out(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

/// Receives what the client sends next. There must be room.
async fn receive(stream: &Stream, requests: &mut Requests) -> io::Result<Received> {
    let room = requests.room();
    stream.receive(room, |bytes| requests.add(bytes)).await
}

/// Receives what the client sends while one of its commands waits, as far as there is room.
async fn read_ahead(stream: &Stream, requests: &mut Requests, is_closed: bool) -> io::Result<Received> {
    if is_closed {
        Ok(Received::End)
    } else if requests.room() == 0 {
        stream.closed().await?;
        Ok(Received::End)
    } else {
        receive(stream, requests).await
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use shardlock::LockManager;
    use shardlock::config::Config;
    use tokio::net::UnixStream;

    use super::super::access::Access;
    use super::super::clients::Peer;
    use super::super::defaults::Defaults;
    use super::super::limits::Limits;
    use super::*;

    /// With several threads, a lock may be granted as another thread lets the agent drain.
    #[tokio::test]
    async fn lock_that_is_granted_as_the_agent_begins_to_drain_is_given_up() {
        let locks = LockManager::connect("memory://").await.unwrap();
        let limits = Limits {
            max_connections: 1,
            max_locks: 1,
            max_request_bytes: 1024,
            auth_timeout: Duration::from_secs(1),
        };
        let access = Access::load(None).unwrap();
        let agent = Arc::new(Agent::new(
            locks.clone(),
            limits,
            access,
            Defaults::new(Config::default()),
        ));
        let peer = Peer::Process {
            pid: None,
            uid: 0,
            gid: 0,
        };
        let client = agent.clients.add(peer, 1).unwrap();
        let (stream, _other_end) = UnixStream::pair().unwrap();
        let mut session = Session::new(Arc::clone(&agent), client, Stream::Unix(stream));
        let Ok(Command::Lock(lock)) = Command::parse(&[b"LOCK", b"k"]) else {
            panic!("a command")
        };

        let guard = locks.lock("k").await.unwrap();
        agent.enter(Phase::Draining);
        session.grant(lock, guard);
        assert_eq!(session.replies.unsent(), format!("-{DRAINING}\r\n").as_bytes());
        assert_eq!(agent.held.count(), 0);
        assert!(locks.lock("k").timeout(Duration::from_secs(20)).await.is_ok());
    }
}
