//! Finds out why connecting failed: what a server, a proxy or another service at the address sent,
//! or which commands it lacks.
//!
//! # Implementation details
//!
//! A server that has reached its connection limit sends an error and closes the connection before
//! it receives a request. If a request is already in flight, the system discards that error and
//! only a broken pipe is left. A proxy closes the connection on an unknown command, and a TLS port
//! does the same on plaintext. After such a failure, a few more connections are made, each of which
//! sends one probe. Probes contain no secrets. They are sent only if a connection failed after it
//! was made. Each round takes at most [`PATIENCE`], or a quarter of the time limit if that is less.

use std::io;
use std::time::Duration;

use deadpool_redis::redis::{ErrorKind, RedisError};
use futures_util::future::{Either, join_all, join3, select};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::reply::to_store_error;
use crate::store::StoreError;
use crate::text::must_be_escaped;

/// How long to wait for the answer to a probe.
pub(super) const PATIENCE: Duration = Duration::from_millis(200);
/// How long the other probes may still take once `PING` is answered by a Redis server.
const GREETING_PATIENCE: Duration = Duration::from_millis(20);
/// How much of an answer is read, and how much of it is shown.
const READ_MAX: usize = 256;
const SHOWN_MAX: usize = 80;

/// Also ends the headers of an HTTP request.
const PING_LINE: &[u8] = b"PING\r\n\r\n";

const ENCRYPTED: &str = "the port speaks TLS; use a TLS URL (such as rediss://), or the server's plaintext port";
const TLS_ALERT: u8 = 21;
const TLS_HANDSHAKE: u8 = 22;

/// Commands that proxies may lack, each in a form that changes nothing and does not depend on the
/// client.
const QUESTIONS: [(&str, &[&str]); 5] = [
    ("CLIENT", &["CLIENT", "GETNAME"]),
    ("ROLE", &["ROLE"]),
    ("TIME", &["TIME"]),
    ("SUBSCRIBE", &["SUBSCRIBE", "shardlock:probe"]),
    ("PUBLISH", &["PUBLISH", "shardlock:probe", ""]),
];

/// Explains an error, probing the address if the error itself is not informative.
pub(super) async fn explained(error: &RedisError, host: &str, port: u16, timeout: Duration) -> StoreError {
    if !is_uninformative(error) {
        return to_store_error(error);
    }
    let limit = PATIENCE.min(timeout / 4);
    let hello = client_hello();
    let others = join3(
        answer(host, port, &[], limit),
        answer(host, port, &hello, limit),
        answer(host, port, PING_LINE, limit),
    );
    // Not every proxy accepts inline commands.
    let pong = answer(host, port, b"*1\r\n$4\r\nPING\r\n", limit);
    let ((greeting, hello, line), pong) = match select(Box::pin(others), Box::pin(pong)).await {
        Either::Left((others, pong)) => (others, pong.await),
        // A healthy server sends no greeting, so do not wait long for one.
        Either::Right((pong, others)) if pong.is_of_redis() => {
            let others = tokio::time::timeout(GREETING_PATIENCE, others).await;
            (others.unwrap_or_default(), pong)
        }
        Either::Right((pong, others)) => (others.await, pong),
    };
    if let Some(words) = greeting
        .refusal()
        .or_else(|| pong.refusal().filter(|words| concerns_connections(words)))
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
                    "the endpoint answers PING but closes the connection on {}: it is a proxy that lacks commands required for locks; \
                     connect to the Redis server itself: {error}",
                    lacking.join(", ")
                )
                .into(),
            );
        }
    }
    to_store_error(error)
}

/// The same for a TLS connection, on which nothing can be probed. A server at its connection limit
/// closes it before the handshake.
pub(super) fn explained_with_tls(error: &RedisError) -> StoreError {
    match to_store_error(error) {
        StoreError::Unavailable(words) if is_uninformative(error) => StoreError::Unavailable(words.map(|words| {
            format!("{words}; a server that has reached maxclients closes encrypted connections like this")
        })),
        error => error,
    }
}

/// Identifies the service at the address, if it certainly is not a Redis server that we can talk
/// to. For a connection attempt that takes suspiciously long. A server that is merely slow or hangs
/// yields `None`.
pub(super) async fn is_of_another_kind(host: &str, port: u16, limit: Duration) -> Option<StoreError> {
    let hello = client_hello();
    let (hello, pong) = tokio::join!(answer(host, port, &hello, limit), answer(host, port, PING_LINE, limit),);
    if let [TLS_ALERT | TLS_HANDSHAKE, ..] = hello.bytes[..] {
        return Some(StoreError::Refused(ENCRYPTED.into()));
    }
    pong.foreign().map(|line| not_redis(&line))
}

/// Whether a server answers plaintext requests.
pub(super) async fn answers_plainly(host: &str, port: u16) -> bool {
    // No time limit here: the pending connection attempt has one.
    let pong = read_answer(host, port, b"PING\r\n", &mut Vec::new()).await;
    matches!(pong, Ok(Some(b'+' | b'-')))
}

/// Whether the connection was made and then closed without a reason, or with bytes that are not a
/// reply.
fn is_uninformative(error: &RedisError) -> bool {
    error.kind() == ErrorKind::Parse || error.is_connection_dropped() && !error.is_connection_refusal()
}

const TOO_MANY: &str = "max number of clients";
const PROTECTED: &str = "DENIED";

/// Whether the server's error concerns the connection rather than the command sent on it.
fn concerns_connections(words: &str) -> bool {
    words.contains(TOO_MANY) || words.starts_with(PROTECTED)
}

/// The server greeted us with an error. Most of these are temporary: too many connections, or a
/// server that is shutting down.
fn no_connection(words: String) -> StoreError {
    if words.starts_with(PROTECTED) {
        let advice = "the server is in protected mode; set a password, or set `bind` and `protected-mode no` if only trusted clients can reach it";
        return StoreError::Refused(format!("{advice}: {words}").into());
    }
    let advice = match words.contains(TOO_MANY) {
        true => "; raise maxclients, or check which clients hold the connections (CLIENT LIST)",
        false => "",
    };
    StoreError::Unavailable(format!("the server rejected the connection: {words}{advice}").into())
}

fn not_redis(line: &str) -> StoreError {
    StoreError::Refused(
        format!("the endpoint is not a Redis server: it replied {line:?}; check the host and the port").into(),
    )
}

/// The commands on which the connection is closed.
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

/// What was received within the limit.
#[derive(Default)]
pub(super) struct Answer {
    pub(super) bytes: Vec<u8>,
    /// Whether the peer closed the connection.
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
        // The line is shown to users: drop terminal control characters and limit its length.
        text.chars()
            .filter(|&char| !must_be_escaped(char))
            .take(SHOWN_MAX)
            .collect()
    }

    /// The text of an error reply of the Redis protocol.
    pub(super) fn refusal(&self) -> Option<String> {
        // `line` drops control characters, which may come before the dash.
        let is_error = self.bytes.starts_with(b"-");
        self.line().strip_prefix('-').filter(|_| is_error).map(str::to_owned)
    }

    /// Whether the answer is a reply of the Redis protocol.
    fn is_of_redis(&self) -> bool {
        self.bytes
            .first()
            .is_some_and(|first| b"+-:$*%_#,(!=~>|".contains(first))
    }

    /// The first line, if it is not of the Redis protocol.
    pub(super) fn foreign(&self) -> Option<String> {
        (!self.bytes.is_empty() && !self.is_of_redis()).then(|| self.line())
    }
}

async fn answer(host: &str, port: u16, question: &[u8], limit: Duration) -> Answer {
    let mut bytes = Vec::new();
    let read = tokio::time::timeout(limit, read_answer(host, port, question, &mut bytes)).await;
    // A connection that was made and then reset counts as closed. A refused connection proves
    // nothing about the service.
    let ended = match read {
        Ok(Ok(_)) => true,
        Ok(Err(error)) => error.kind() != io::ErrorKind::ConnectionRefused,
        Err(_) => false,
    };
    Answer { bytes, ended }
}

/// Reads up to the end of a line or of the stream. Returns the first byte.
async fn read_answer(host: &str, port: u16, question: &[u8], bytes: &mut Vec<u8>) -> io::Result<Option<u8>> {
    let mut stream = TcpStream::connect((host, port)).await?;
    stream.write_all(question).await?;
    while bytes.len() < READ_MAX && !bytes.contains(&b'\n') && stream.read_buf(bytes).await? > 0 {}
    Ok(bytes.first().copied())
}

/// A minimal TLS 1.2 ClientHello: one cipher suite, no session, no compression, and zeros in place
/// of random bytes. Any TLS server answers it, if only with an alert.
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
