//! A connection's socket: a Unix socket or TCP.
//!
//! Reads and writes do not wait, so that no buffer lives in a future while a connection is idle.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};

/// The most bytes that are read at once.
const READ_BYTES_MAX: usize = 16 * 1024;

/// A connected socket.
#[derive(Debug)]
pub(super) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

/// What a read found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Some bytes, which were passed on.
    Bytes,
    /// The client has closed the connection, or its sending side.
    End,
}

impl Stream {
    /// Receives at most `most` bytes, which must not be 0, and passes them on. Waits until there
    /// are some.
    ///
    /// Cancel safe: nothing was received if the future is dropped before it completes.
    pub(super) async fn receive(&self, most: usize, mut pass_on: impl FnMut(&[u8])) -> io::Result<Received> {
        loop {
            self.ready(Interest::READABLE).await?;
            match self.try_receive(most, &mut pass_on) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
        }
    }

    /// Not `async`, so that the buffer is on the stack and not part of a future.
    fn try_receive(&self, most: usize, pass_on: &mut impl FnMut(&[u8])) -> io::Result<Received> {
        let mut buffer = [0; READ_BYTES_MAX];
        let buffer = &mut buffer[..most.min(READ_BYTES_MAX)];
        let count = match self {
            Self::Unix(stream) => stream.try_read(buffer),
            Self::Tcp(stream) => stream.try_read(buffer),
        }?;
        if count == 0 {
            return Ok(Received::End);
        }
        pass_on(&buffer[..count]);
        Ok(Received::Bytes)
    }

    /// Sends as much as the system accepts. Waits until it accepts some.
    ///
    /// Cancel safe: nothing was sent if the future is dropped before it completes.
    pub(super) async fn send(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.try_send(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                other => return other,
            }
            self.ready(Interest::WRITABLE).await?;
        }
    }

    /// Sends as much as the system accepts now.
    pub(super) fn try_send(&self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => stream.try_write(bytes),
            Self::Tcp(stream) => stream.try_write(bytes),
        }
    }

    /// Waits until the client has closed the connection, without reading what it sent before.
    /// Systems other than Linux do not report this: there it never completes, and the end is
    /// noticed by the next read.
    pub(super) async fn closed(&self) -> io::Result<()> {
        #[cfg(target_os = "linux")]
        if self.ready(Interest::PRIORITY).await?.is_read_closed() {
            return Ok(());
        }
        std::future::pending().await
    }

    async fn ready(&self, interest: Interest) -> io::Result<tokio::io::Ready> {
        match self {
            Self::Unix(stream) => stream.ready(interest).await,
            Self::Tcp(stream) => stream.ready(interest).await,
        }
    }

    /// Sends small replies at once, and notices within some seconds that the host of a client is
    /// gone, because the locks of a connection are held until then.
    pub(super) fn of_tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let socket = SockRef::from(&stream);
        let keepalive = TcpKeepalive::new()
            .with_time(Duration::from_secs(5))
            .with_interval(Duration::from_secs(2))
            .with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        #[cfg(target_os = "linux")]
        socket.set_tcp_user_timeout(Some(Duration::from_secs(11)))?;
        Ok(Self::Tcp(stream))
    }
}
