//! Why a connection could not be made: what the server, a proxy or whatever listens there said or lacks.
//!
//! # Implementation details
//!
//! A server that takes no more connections says so and closes the connection, before it was asked anything. What was sent meanwhile makes the system
//! discard those words, so that all that is left is a broken pipe. A proxy that does not know a command closes the connection as well, and so does a
//! port that speaks TLS. So after such an end a few connections more are made, each of which asks one question. Nothing that is secret is sent on them.
//! It happens only if a connection failed after it was made, and takes no longer than [`PATIENCE`], or a quarter of the time limit.

use std::io;
use std::time::Duration;

use deadpool_redis::redis::{ErrorKind, RedisError};
use futures_util::future::{Either, join_all, join3, select};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::reply::error_in_words;
use crate::store::StoreError;
use crate::text::must_be_escaped;

/// How long the answer to a question is waited for.
pub(super) const PATIENCE: Duration = Duration::from_millis(200);
/// How long a greeting is waited for where everything else is answered.
const GREETING_PATIENCE: Duration = Duration::from_millis(20);
/// How much of an answer is read, and how much of it is shown.
const READ_MAX: usize = 256;
const SHOWN_MAX: usize = 80;

/// Also the end of the headers of a request of HTTP.
const PING_LINE: &[u8] = b"PING\r\n\r\n";

const ENCRYPTED: &str = "the port speaks TLS; use a URL with TLS (rediss:// and its like), or the server's plain port";
const TLS_ALERT: u8 = 21;
const TLS_HANDSHAKE: u8 = 22;

/// Commands that proxies lack, each in a form that changes nothing and takes no notice of who asks.
const QUESTIONS: [(&str, &[&str]); 5] = [
    ("CLIENT", &["CLIENT", "GETNAME"]),
    ("ROLE", &["ROLE"]),
    ("TIME", &["TIME"]),
    ("SUBSCRIBE", &["SUBSCRIBE", "shardlock:probe"]),
    ("PUBLISH", &["PUBLISH", "shardlock:probe", ""]),
];

/// What an error means, found out by asking whatever listens at that address where the error itself says too little.
pub(super) async fn explained(error: &RedisError, host: &str, port: u16, timeout: Duration) -> StoreError {
    if !says_too_little(error) {
        return error_in_words(error);
    }
    let limit = PATIENCE.min(timeout / 4);
    let hello = client_hello();
    let others = join3(
        answer(host, port, &[], limit),
        answer(host, port, &hello, limit),
        answer(host, port, PING_LINE, limit),
    );
    // Not every proxy understands a command as people type it.
    let pong = answer(host, port, b"*1\r\n$4\r\nPING\r\n", limit);
    let ((greeting, hello, line), pong) = match select(Box::pin(others), Box::pin(pong)).await {
        Either::Left((others, pong)) => (others, pong.await),
        // A server that is well says nothing to who asks nothing.
        Either::Right((pong, others)) if pong.is_of_redis() => {
            let others = tokio::time::timeout(GREETING_PATIENCE, others).await;
            (others.unwrap_or_default(), pong)
        }
        Either::Right((pong, others)) => (others.await, pong),
    };
    if let Some(words) = greeting
        .refusal()
        .or_else(|| pong.refusal().filter(|words| is_of_connections(words)))
    {
        return no_connection(words);
    }
    if let [TLS_ALERT | TLS_HANDSHAKE, ..] = hello.bytes[..] {
        return StoreError::Refused(format!("{ENCRYPTED}: {error}").into());
    }
    if let Some(line) = greeting.foreign().or_else(|| line.foreign()) {
        return not_redis(&line);
    }
    if pong.is_of_redis() {
        let lacking = lacking(host, port, limit).await;
        if !lacking.is_empty() {
            return StoreError::Refused(
                format!(
                    "what listens there answers PING and closes the connection at {}: a proxy that lacks commands which locks need; \
                     connect to the Redis server itself: {error}",
                    lacking.join(", ")
                )
                .into(),
            );
        }
    }
    error_in_words(error)
}

/// The same for a connection with TLS, on which nothing can be asked: a server that takes no more connections ends it before the handshake.
pub(super) fn explained_with_tls(error: &RedisError) -> StoreError {
    match error_in_words(error) {
        StoreError::Unavailable(words) if says_too_little(error) => StoreError::Unavailable(
            format!("{words}; a server that has reached maxclients closes encrypted connections like this").into(),
        ),
        error => error,
    }
}

/// What listens at that address, if it is certain that it is no Redis server that we could talk to. For a connection that is being made for suspiciously
/// long: a server that is slow or hangs is none of that.
pub(super) async fn is_of_another_kind(host: &str, port: u16, limit: Duration) -> Option<StoreError> {
    let hello = client_hello();
    let (hello, pong) = tokio::join!(answer(host, port, &hello, limit), answer(host, port, PING_LINE, limit),);
    if let [TLS_ALERT | TLS_HANDSHAKE, ..] = hello.bytes[..] {
        return Some(StoreError::Refused(ENCRYPTED.into()));
    }
    pong.foreign().map(|line| not_redis(&line))
}

/// Whether a server answers what is not encrypted.
pub(super) async fn answers_plainly(host: &str, port: u16) -> bool {
    // Without a time limit of its own: the connection that is being made has one.
    let pong = read_answer(host, port, b"PING\r\n", &mut Vec::new()).await;
    matches!(pong, Ok(Some(b'+' | b'-')))
}

/// Whether the connection was made and then ended without a reason, or with bytes that are no reply.
fn says_too_little(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Parse || error.is_connection_dropped() && !error.is_connection_refusal()
}

const TOO_MANY: &str = "max number of clients";
const PROTECTED: &str = "DENIED";

/// Whether a server said that of a connection and not of what was asked on it.
fn is_of_connections(words: &str) -> bool {
    words.contains(TOO_MANY) || words.starts_with(PROTECTED)
}

/// A server whose first words are an error. Most of those pass: too many connections, a server that is about to end.
fn no_connection(words: String) -> StoreError {
    if words.starts_with(PROTECTED) {
        let advice = "the server is in protected mode; give it a password, or `bind` and `protected-mode no` where only those who may reach it can";
        return StoreError::Refused(format!("{advice}: {words}").into());
    }
    let advice = match words.contains(TOO_MANY) {
        true => "; raise maxclients, or see who has so many connections (CLIENT LIST)",
        false => "",
    };
    StoreError::Unavailable(format!("the server takes no connection: {words}{advice}").into())
}

fn not_redis(line: &str) -> StoreError {
    StoreError::Refused(
        format!("what listens there is no Redis server: it says {line:?}; check the host and the port").into(),
    )
}

/// The commands at which the connection is closed.
async fn lacking(host: &str, port: u16, limit: Duration) -> Vec<&'static str> {
    let asking = QUESTIONS.map(|(name, words)| async move {
        let mut bytes = format!("*{}\r\n", words.len());
        for word in words {
            bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        let answer = answer(host, port, bytes.as_bytes(), limit).await;
        (answer.ended && answer.bytes.is_empty()).then_some(name)
    });
    join_all(asking).await.into_iter().flatten().collect()
}

/// What came back within the limit.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    /// Whether the other side closed the connection.
    pub(super) ended: bool,
}

impl Answer {
    pub(super) fn line(&self) -> String {
        let line = self
            .bytes
            .split(|byte| matches!(byte, b'\r' | b'\n'))
            .next()
            .unwrap_or_default();
        let text = String::from_utf8_lossy(line);
        // It is shown: nothing that changes a terminal, and not too much.
        text.chars()
            .filter(|&char| !must_be_escaped(char))
            .take(SHOWN_MAX)
            .collect()
    }

    /// An error in Redis' protocol.
    pub(super) fn refusal(&self) -> Option<String> {
        // The line leaves out control characters, which may come before the dash.
        let is_error = self.bytes.starts_with(b"-");
        self.line().strip_prefix('-').filter(|_| is_error).map(str::to_owned)
    }

    /// Whether it is a reply in Redis' protocol.
    fn is_of_redis(&self) -> bool {
        self.bytes
            .first()
            .is_some_and(|first| b"+-:$*%_#,(!=~>|".contains(first))
    }

    /// The first line, if it is none of Redis' protocol.
    pub(super) fn foreign(&self) -> Option<String> {
        (!self.bytes.is_empty() && !self.is_of_redis()).then(|| self.line())
    }
}

async fn answer(host: &str, port: u16, question: &[u8], limit: Duration) -> Answer {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(limit, read_answer(host, port, question, &mut bytes)).await;
    // A connection that was made and reset ended as well; one that was refused says nothing of what listens there.
    let ended = match read {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() != io::ErrorKind::ConnectionRefused,
        Err(_) => false,
    };
    Answer { bytes, ended }
}

/// Reads a line, or what comes before the end. Returns the first byte.
async fn read_answer(host: &str, port: u16, question: &[u8], bytes: &mut Vec<u8>) -> io::Result<Option<u8>> {
    let mut stream = TcpStream::connect((host, port)).await?;
    stream.write_all(question).await?;
    while bytes.len() < READ_MAX && !bytes.contains(&b'\n') && stream.read_buf(bytes).await? > 0 {}
    Ok(bytes.first().copied())
}

/// The least that can be said to begin with TLS 1.2: one cipher suite, no session, no compression, and zeros for what would be random.
/// Whoever speaks TLS answers, be it with a refusal.
fn client_hello() -> Vec<u8> {
    let (record, handshake) = ([TLS_HANDSHAKE, 3, 1, 0, 45], [1, 0, 0, 41]);
    let (version, random_and_session) = ([3, 3], [0; 33]);
    let (cipher_suites, compressions) = ([0, 2, 0xc0, 0x2f], [1, 0]);
    [
        &record[..],
        &handshake,
        &version,
        &random_and_session,
        &cipher_suites,
        &compressions,
    ]
    .concat()
}
