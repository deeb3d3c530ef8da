//! A TCP proxy in front of a server. It can hold back the server's replies while the server keeps
//! executing requests, or delay requests until much later.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

/// How often a thread that waits for a reset checks whether the bytes are still withheld. A
/// partition closes hundreds of connections, and as many threads that wake up each millisecond can
/// keep the scheduler from running anything else for a second.
const CHECK_EVERY: Duration = Duration::from_millis(50);

/// The proxy. Its connection threads end with their connections, and its accepting thread ends when
/// the value is dropped.
pub struct Proxy {
    address: SocketAddr,
    replies: Arc<Gate>,
    server: Arc<Mutex<String>>,
    requests: Arc<Withheld>,
    over: Arc<AtomicBool>,
}

/// Bytes that clients have sent and the server has not received.
#[derive(Default)]
struct Withheld {
    /// The number of connections affected, counted from the first.
    count: AtomicU64,
    /// By connection number. Connections that their clients have reset are removed.
    kept: Mutex<BTreeMap<u64, Kept>>,
}

struct Kept {
    bytes: Vec<u8>,
    server: TcpStream,
}

impl Withheld {
    /// Whether bytes of this connection are withheld.
    fn has(&self, connection: u64) -> bool {
        self.kept.lock().contains_key(&connection)
    }

    /// Withholds the bytes if the connection is affected, and returns whether it is.
    fn keep(&self, connection: u64, bytes: &[u8], server: &TcpStream) -> bool {
        let mut kept = self.kept.lock();
        if connection > self.count.load(Ordering::Relaxed) {
            return false;
        }
        let kept = kept.entry(connection).or_insert_with(|| Kept {
            bytes: Vec::new(),
            server: server.try_clone().expect("another handle of the stream"),
        });
        kept.bytes.extend_from_slice(bytes);
        true
    }
}

#[derive(Default)]
struct Gate {
    closed: Mutex<bool>,
    opened: Condvar,
    /// The number of connections so far, and the number of those, counted from the first, that are
    /// silenced for good.
    joined: AtomicU64,
    silent: AtomicU64,
    /// Added latency in milliseconds.
    late: AtomicU64,
}

impl Gate {
    /// Waits until the gate is open. Returns whether data of this connection passes at all.
    fn pass(&self, connection: u64) -> bool {
        let mut closed = self.closed.lock();
        self.opened.wait_while(&mut closed, |closed| *closed);
        drop(closed);
        // Simulates the latency of the network.
        thread::sleep(Duration::from_millis(self.late.load(Ordering::Relaxed)));
        connection > self.silent.load(Ordering::Relaxed)
    }

    fn set(&self, closed: bool) {
        *self.closed.lock() = closed;
        self.opened.notify_all();
    }
}

impl Proxy {
    /// Starts a proxy in front of the server at `address`.
    #[track_caller]
    pub fn start(server: String) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port");
        let address = listener.local_addr().expect("an address");
        let (replies, over) = (Arc::<Gate>::default(), Arc::<AtomicBool>::default());
        let (server, requests) = (Arc::new(Mutex::new(server)), Arc::<Withheld>::default());
        thread::spawn({
            let (replies, over, server) = (Arc::clone(&replies), Arc::clone(&over), Arc::clone(&server));
            let requests = Arc::clone(&requests);
            move || {
                for client in listener.incoming() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    // A client that can't be served gets a closed connection.
                    let server = server.lock().clone();
                    let joined = client.and_then(|client| join(client, &server, &replies, &requests));
                    joined.unwrap_or_else(|error| match error.kind() {
                        // The server is down.
                        io::ErrorKind::ConnectionRefused => {}
                        _ => eprintln!("proxy: {error}"),
                    });
                }
            }
        });
        Self {
            address,
            replies,
            server,
            requests,
            over,
        }
    }

    /// The port on 127.0.0.1 on which the proxy accepts connections.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// `127.0.0.1:<port>`
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// Number of connections accepted so far.
    pub fn connections(&self) -> u64 {
        self.replies.joined.load(Ordering::Relaxed)
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// Directs new connections to the server at this address. Existing connections stay as they
    /// are.
    pub fn lead_to(&self, server: String) {
        *self.server.lock() = server;
    }

    /// Holds back everything the server sends until [`let_through`](Self::let_through).
    pub fn hold_back(&self) {
        self.replies.set(true);
    }

    /// Drops everything the server sends on the existing connections without closing them, as if a
    /// device on the path had lost their state.
    pub fn silence(&self) {
        let joined = self.replies.joined.load(Ordering::Relaxed);
        self.replies.silent.store(joined, Ordering::Relaxed);
    }

    /// Acknowledges what clients send on the existing connections, but keeps it from the server
    /// until [`deliver_late`](Self::deliver_late), as if the network were down and the client's
    /// kernel kept retransmitting.
    pub fn withhold(&self) {
        let joined = self.replies.joined.load(Ordering::Relaxed);
        self.requests.count.store(joined, Ordering::Relaxed);
    }

    /// [`withhold`](Self::withhold), also for connections made from now on. [`heal`](Self::heal)
    /// ends it.
    pub fn cut_off(&self) {
        self.requests.count.store(u64::MAX, Ordering::Relaxed);
    }

    /// Stops withholding. Withheld bytes are delivered late if `delivers`, otherwise lost. Their
    /// connections are closed in either case.
    pub fn heal(&self, delivers: bool) {
        // Done under the lock, so that later bytes of a connection don't overtake withheld ones.
        let mut kept = self.requests.kept.lock();
        self.requests.count.store(0, Ordering::Relaxed);
        for (_, mut kept) in std::mem::take(&mut *kept) {
            // The connection may have ended already.
            if delivers {
                kept.server.write_all(&kept.bytes).ok();
            }
            kept.server.shutdown(Shutdown::Write).ok();
        }
    }

    /// Number of bytes withheld.
    pub fn withheld(&self) -> usize {
        self.requests.kept.lock().values().map(|kept| kept.bytes.len()).sum()
    }

    /// Delivers the withheld bytes, except those of connections that the client has reset since,
    /// then closes the connections. Returns the addresses by which the server knows them: once the
    /// server no longer lists them, it has executed everything.
    pub fn deliver_late(&self) -> Vec<SocketAddr> {
        let kept = std::mem::take(&mut *self.requests.kept.lock());
        let deliver = |mut kept: Kept| {
            let known_as = kept.server.local_addr().ok()?;
            kept.server.write_all(&kept.bytes).ok()?;
            // The connection may have ended already.
            kept.server.shutdown(Shutdown::Write).ok();
            Some(known_as)
        };
        kept.into_values().filter_map(deliver).collect()
    }

    /// From now on delays everything the server sends by `late`.
    pub fn slow_down(&self, late: Duration) {
        let millis = u64::try_from(late.as_millis()).expect("a short time");
        self.replies.late.store(millis, Ordering::Relaxed);
    }

    /// Ends [`hold_back`](Self::hold_back) and delivers what was held back.
    pub fn let_through(&self) {
        self.replies.set(false);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.let_through();
        self.over.store(true, Ordering::Relaxed);
        // Wakes the accepting thread, which may have ended already.
        drop(TcpStream::connect(self.address));
    }
}

fn join(client: TcpStream, server: &str, replies: &Arc<Gate>, requests: &Arc<Withheld>) -> io::Result<()> {
    let server = TcpStream::connect(server)?;
    for stream in [&client, &server] {
        stream.set_nodelay(true)?;
    }
    let (from_client, from_server) = (client.try_clone()?, server.try_clone()?);
    let (replies, requests) = (Arc::clone(replies), Arc::clone(requests));
    let number = replies.joined.fetch_add(1, Ordering::Relaxed) + 1;
    thread::spawn(move || carry(from_client, server, &requests, number));
    thread::spawn(move || copy(from_server, client, || replies.pass(number)));
    Ok(())
}

/// Forwards what a client sends until it closes the connection. If bytes are withheld, the server
/// does not see an orderly close.
fn carry(mut client: TcpStream, mut server: TcpStream, requests: &Withheld, number: u64) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        match client.read(&mut buffer) {
            Ok(length @ 1..) => {
                let bytes = &buffer[..length];
                if !requests.keep(number, bytes, &server) && server.write_all(bytes).is_err() {
                    break;
                }
            }
            Ok(0) if requests.has(number) => {
                // A TLS connection is first closed in order and then reset. A read does not report
                // the reset.
                while !is_reset_within(&client, CHECK_EVERY) {
                    if !requests.has(number) {
                        return;
                    }
                }
                requests.kept.lock().remove(&number);
                break;
            }
            Ok(0) => break,
            Err(_) => {
                // The client's kernel discards what it has not sent.
                requests.kept.lock().remove(&number);
                break;
            }
        }
    }
    end([client, server]);
}

/// Waits until the peer resets the connection, or until the time is over.
fn is_reset_within(stream: &TcpStream, time: Duration) -> bool {
    let time = Timespec::try_from(time).expect("a short time");
    // Without any event to wait for, only an error ends the wait.
    match poll(&mut [PollFd::new(stream, PollFlags::empty())], Some(&time)) {
        Ok(0) | Err(Errno::INTR) => false,
        Ok(_) => true,
        Err(error) => panic!("wait for a reset: {error}"),
    }
}

/// Copies until either side is closed, then closes the other.
fn copy(mut from: TcpStream, mut to: TcpStream, gate: impl Fn() -> bool) {
    let mut buffer = vec![0; 64 * 1024];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if gate() && to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    end([from, to]);
}

fn end(streams: [TcpStream; 2]) {
    for stream in streams {
        // The other side may have closed it already.
        drop(stream.shutdown(Shutdown::Both));
    }
}
