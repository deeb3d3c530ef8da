//! A client of the Redis protocol that sends any bytes and shows every reply, for tests of a
//! server. It opens one connection and never a second one.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use redis::{Parser, Value};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::wait::PATIENCE;

/// A connection. Its reads time out after [`PATIENCE`].
pub struct RespClient {
    stream: Stream,
    parser: Parser,
}

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Read for &Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).read(buffer),
            Stream::Tcp(stream) => (&mut &*stream).read(buffer),
        }
    }
}

impl Write for &Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => (&mut &*stream).write(bytes),
            Stream::Tcp(stream) => (&mut &*stream).write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl fmt::Debug for RespClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RespClient").finish_non_exhaustive()
    }
}

impl RespClient {
    /// Connects to a Unix socket.
    ///
    /// # Errors
    ///
    /// Nothing listens there.
    pub fn unix(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        Ok(Self::over(Stream::Unix(stream)))
    }

    /// Connects to `host:port`.
    ///
    /// # Errors
    ///
    /// Nothing listens there.
    pub fn tcp(address: &str) -> io::Result<Self> {
        let stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        stream.set_nodelay(true)?;
        Ok(Self::over(Stream::Tcp(stream)))
    }

    fn over(stream: Stream) -> Self {
        Self {
            stream,
            parser: Parser::new(),
        }
    }

    /// Sends these bytes as they are.
    ///
    /// # Errors
    ///
    /// The server has closed the connection.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        (&self.stream).write_all(bytes)
    }

    /// Sends these bytes, unless the server stops reading for this long. Returns whether all were
    /// sent.
    #[track_caller]
    pub fn send_bytes_within(&mut self, bytes: &[u8], limit: Duration) -> bool {
        let set = |limit| match &self.stream {
            Stream::Unix(stream) => stream.set_write_timeout(Some(limit)),
            Stream::Tcp(stream) => stream.set_write_timeout(Some(limit)),
        };
        set(limit).expect("limit the time to send");
        let sent = (&self.stream).write_all(bytes).is_ok();
        set(PATIENCE).expect("limit the time to send");
        sent
    }

    /// Sends a command, and does not wait for the reply.
    #[track_caller]
    pub fn send(&mut self, words: &[&str]) {
        self.send_bytes(&encoded(words)).expect("send a command");
    }

    /// The next reply or push message.
    #[track_caller]
    pub fn reply(&mut self) -> Value {
        let reply = self.parser.parse_value(&self.stream);
        reply.unwrap_or_else(|error| panic!("no reply: {error}"))
    }

    /// Whether something that was not read yet has arrived. There must be no push messages.
    #[track_caller]
    pub fn has_reply(&self) -> bool {
        let now = Timespec::default();
        let stream: &dyn AsFd = match &self.stream {
            Stream::Unix(stream) => stream,
            Stream::Tcp(stream) => stream,
        };
        let mut wanted = [PollFd::new(&stream, PollFlags::IN)];
        poll(&mut wanted, Some(&now)).expect("look at the connection") > 0
    }

    /// Sends a command and returns its reply.
    #[track_caller]
    pub fn call(&mut self, words: &[&str]) -> Value {
        self.send(words);
        self.reply()
    }

    /// Sends a command whose reply is an integer.
    #[track_caller]
    pub fn integer(&mut self, words: &[&str]) -> i64 {
        match self.call(words) {
            Value::Int(number) => number,
            other => panic!("{words:?}: {other:?}"),
        }
    }

    /// Sends a command whose reply is a text.
    #[track_caller]
    pub fn text(&mut self, words: &[&str]) -> String {
        match self.call(words) {
            Value::BulkString(bytes) => String::from_utf8(bytes).expect("UTF-8"),
            Value::SimpleString(text) => text,
            Value::Okay => "OK".to_owned(),
            other => panic!("{words:?}: {other:?}"),
        }
    }

    /// Sends a command whose reply is an error, and returns its line.
    #[track_caller]
    pub fn error(&mut self, words: &[&str]) -> String {
        let reply = self.call(words);
        line_of_error(&reply).unwrap_or_else(|| panic!("{words:?}: {reply:?}"))
    }

    /// The line of the error that comes next.
    #[track_caller]
    pub fn next_error(&mut self) -> String {
        let reply = self.reply();
        line_of_error(&reply).unwrap_or_else(|| panic!("{reply:?}"))
    }

    /// Closes the side that sends.
    #[track_caller]
    pub fn close_sending(&self) {
        let closed = match &self.stream {
            Stream::Unix(stream) => stream.shutdown(Shutdown::Write),
            Stream::Tcp(stream) => stream.shutdown(Shutdown::Write),
        };
        closed.expect("close the sending side");
    }

    /// Returns everything that the server sends until it closes the connection.
    #[track_caller]
    pub fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        match (&self.stream).read_to_end(&mut rest) {
            // Bytes that the server had not read when it closed the connection.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
            Err(error) => panic!("the connection is not closed: {error}"),
            Ok(_) => {}
        }
        String::from_utf8_lossy(&rest).into_owned()
    }
}

/// The bytes of a command.
pub fn encoded(words: &[&str]) -> Vec<u8> {
    let mut bytes = format!("*{}\r\n", words.len());
    for word in words {
        bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    bytes.into_bytes()
}

/// The line of an error as the server has sent it.
pub fn line_of_error(reply: &Value) -> Option<String> {
    match reply {
        Value::ServerError(error) => Some(match error.details() {
            Some(details) => format!("{} {details}", error.code()),
            None => error.code().to_owned(),
        }),
        _ => None,
    }
}

/// A simple reply as text: a number, a text, `nil`, or the line of an error.
pub fn shown(reply: &Value) -> String {
    match reply {
        Value::Int(number) => number.to_string(),
        Value::BulkString(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Value::SimpleString(text) => text.clone(),
        Value::Okay => "OK".to_owned(),
        Value::Nil => "nil".to_owned(),
        other => line_of_error(other).unwrap_or_else(|| format!("{other:?}")),
    }
}
