//! A TCP proxy in front of a server, which can hold back what the server says while it goes on doing what it is told.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Its threads end with the connections, and the one that accepts them with the value that stands for the proxy.
pub struct Proxy {
    address: SocketAddr,
    replies: Arc<Gate>,
    over: Arc<AtomicBool>,
}

#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    /// For how long everything is late, in milliseconds.
    late: AtomicU64,
}

impl Gate {
    fn pass(&self) {
        let mut closed = self.closed.lock();
        self.opened.wait_while(&mut closed, |closed| *closed);
        drop(closed);
        // The way is as long as that.
        thread::sleep(Duration::from_millis(self.late.load(Ordering::Relaxed)));
    }

    fn set(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.opened.notify_all();
    }
}

impl Proxy {
    /// Stands in front of the server at `address`.
    #[track_caller]
    pub fn start(server: String) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (replies, over) = (Arc::<Gate>::default(), Arc::<AtomicBool>::default());
        thread::spawn({
            let (replies, over) = (Arc::clone(&replies), Arc::clone(&over));
            move || {
                for client in listener.incoming() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    // Whoever can't be served sees its connection end.
                    let joined = client.and_then(|client| join(client, &server, &replies));
                    joined.unwrap_or_else(|error| eprintln!("proxy: {error}"));
                }
            }
        });
        Self { address, replies, over }
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Nothing that the server says comes through, until [`let_through`](Self::let_through).
    pub fn hold_back(&self) {
        self.replies.set(true);
    }

    /// From now on everything that the server says comes later by that.
    pub fn slow_down(&self, late: Duration) {
        let millis = u64::try_from(late.as_millis()).expect("a short time");
        self.replies.late.store(millis, Ordering::Relaxed);
    }

    /// Also what was held back.
    pub fn let_through(&self) {
        self.replies.set(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.let_through();
        self.over.store(true, Ordering::Relaxed);
        // Wakes the one that accepts; it may be gone already.
        drop(TcpStream::connect(self.address));
    }
}

fn join(client: TcpStream, server: &str, replies: &Arc<Gate>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (from_client, from_server) = (client.try_clone()?, server.try_clone()?);
    thread::spawn(move || copy(from_client, server, || {}));
    let replies = Arc::clone(replies);
    thread::spawn(move || copy(from_server, client, || replies.pass()));
    Ok(())
}

/// Until either side ends, and then the other ends, too.
fn copy(mut from: TcpStream, mut to: TcpStream, gate: impl Fn()) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        gate();
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    for stream in [from, to] {
        // The other side may have ended it.
        drop(stream.shutdown(Shutdown::Both));
    }
}
