//! A client's connection to the agent. It never waits longer than asked, and an error is a value:
//! agents are killed and stopped here.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use support::resp::encoded;

/// A connection with protocol 3.
pub(super) struct Connection {
    stream: UnixStream,
    received: Vec<u8>,
}

/// What the agent sends.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Reply {
    Int(i64),
    Nil,
    Text(String),
    Error(String),
    Map(Vec<Reply>),
    Array(Vec<Reply>),
    Push(Vec<Reply>),
}

/// The longest time to send a command. The agent may be stopped.
const SEND_WITHIN: Duration = Duration::from_secs(30);

impl Connection {
    /// Connects, and asks for protocol 3.
    pub(super) fn open(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_write_timeout(Some(SEND_WITHIN))?;
        let received = Vec::new();
        let mut connection = Self { stream, received };
        connection.send(&["HELLO", "3"])?;
        match connection.next(Instant::now() + SEND_WITHIN)? {
            Some(Reply::Map(_)) => Ok(connection),
            other => Err(io::Error::other(format!("HELLO: {other:?}"))),
        }
    }

    pub(super) fn send(&mut self, words: &[&str]) -> io::Result<()> {
        self.stream.write_all(&encoded(words))
    }

    /// Ends the connection, and with it its locks.
    pub(super) fn close(&self) {
        // The agent may have closed it already.
        self.stream.shutdown(std::net::Shutdown::Both).ok();
    }

    /// The next reply or push message, or `None` if there is none by the deadline.
    pub(super) fn next(&mut self, deadline: Instant) -> io::Result<Option<Reply>> {
        loop {
            if let Some((reply, length)) = parse(&self.received)? {
                self.received.drain(..length);
                return Ok(Some(reply));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            self.stream.set_read_timeout(Some(left))?;
            let mut buffer = [0; 4096];
            match self.stream.read(&mut buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.received.extend_from_slice(&buffer[..count]),
                Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The first reply in these bytes, and its length. `None` if it is not complete.
fn parse(bytes: &[u8]) -> io::Result<Option<(Reply, usize)>> {
    let Some(end) = bytes.windows(2).position(|pair| pair == b"\r\n") else {
        return Ok(None);
    };
    let line = String::from_utf8_lossy(&bytes[1..end]).into_owned();
    let nonsense = || io::Error::other(format!("nonsense: {line:?}"));
    let number = || line.parse::<i64>().map_err(|_| nonsense());
    let after = end + 2;
    let many = |factor: usize| -> io::Result<Option<(Vec<Reply>, usize)>> {
        let count = usize::try_from(number()?).map_err(|_| nonsense())? * factor;
        let (mut items, mut length) = (Vec::new(), after);
        for _ in 0..count {
            match parse(&bytes[length..])? {
                Some((item, its_length)) => {
                    items.push(item);
                    length += its_length;
                }
                None => return Ok(None),
            }
        }
        Ok(Some((items, length)))
    };
    Ok(match bytes[0] {
        b'+' => Some((Reply::Text(line), after)),
        b'-' => Some((Reply::Error(line), after)),
        b':' => Some((Reply::Int(number()?), after)),
        b'_' => Some((Reply::Nil, after)),
        b'$' => {
            let length = usize::try_from(number()?).map_err(|_| nonsense())?;
            let text = bytes.get(after..after + length + 2);
            text.map(|text| {
                let text = String::from_utf8_lossy(&text[..length]).into_owned();
                (Reply::Text(text), after + length + 2)
            })
        }
        b'%' => many(2)?.map(|(items, length)| (Reply::Map(items), length)),
        b'*' => many(1)?.map(|(items, length)| (Reply::Array(items), length)),
        b'>' => many(1)?.map(|(items, length)| (Reply::Push(items), length)),
        _ => return Err(nonsense()),
    })
}
