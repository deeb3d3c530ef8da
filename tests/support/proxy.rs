//! A TCP proxy in front of a server, which can hold back what the server says while it goes on doing what it is told, or what it is told until much later.

use std::collections::BTreeMap;
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
    server: Arc<Mutex<String>>,
    requests: Arc<Withheld>,
    over: Arc<AtomicBool>,
}

/// What clients have sent and the server has not received.
#[derive(Default)]
struct Withheld {
    /// Of how many connections, the first.
    count: AtomicU64,
    /// By the numbers of their connections. Those whose clients have reset them are gone.
    kept: Mutex<BTreeMap<u64, Kept>>,
}

struct Kept {
    bytes: Vec<u8>,
    server: TcpStream,
}

impl Withheld {
    /// Whether something of that connection is kept.
    fn has(&self, connection: u64) -> bool {
        self.kept.lock().contains_key(&connection)
    }

    /// Says whether that part is kept.
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
    /// How many connections there were, and how many of them, the first, are silent for ever.
    joined: AtomicU64,
    silent: AtomicU64,
    /// For how long everything is late, in milliseconds.
    late: AtomicU64,
}

impl Gate {
    /// Waits until it is open. Says whether what comes from that connection passes at all.
    fn pass(&self, connection: u64) -> bool {
        let mut closed = self.closed.lock();
        self.opened.wait_while(&mut closed, |closed| *closed);
        drop(closed);
        // The way is as long as that.
        thread::sleep(Duration::from_millis(self.late.load(Ordering::Relaxed)));
        connection > self.silent.load(Ordering::Relaxed)
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
        let (server, requests) = (Arc::new(Mutex::new(server)), Arc::<Withheld>::default());
        thread::spawn({
            let (replies, over, server) = (Arc::clone(&replies), Arc::clone(&over), Arc::clone(&server));
            let requests = Arc::clone(&requests);
            move || {
                for client in listener.incoming() {
                    if over.load(Ordering::Relaxed) {
                        return;
                    }
                    // Whoever can't be served sees its connection end.
                    let server = server.lock().clone();
                    let joined = client.and_then(|client| join(client, &server, &replies, &requests));
                    joined.unwrap_or_else(|error| match error.kind() {
                        // A server that is down.
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

    /// The port on 127.0.0.1 at which it accepts.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// `127.0.0.1:<port>`
    pub fn address(&self) -> String {
        self.address.to_string()
    }

    /// How many connections there were.
    pub fn connections(&self) -> u64 {
        self.replies.joined.load(Ordering::Relaxed)
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://{}", self.address)
    }

    /// New connections lead to the server at that address; those that are there now stay where they are.
    pub fn lead_to(&self, server: String) {
        *self.server.lock() = server;
    }

    /// Nothing that the server says comes through, until [`let_through`](Self::let_through).
    pub fn hold_back(&self) {
        self.replies.set(true);
    }

    /// Nothing comes any more on the connections that are there now, which do not end: as where something on the way has forgotten them.
    pub fn silence(&self) {
        let joined = self.replies.joined.load(Ordering::Relaxed);
        self.replies.silent.store(joined, Ordering::Relaxed);
    }

    /// What clients send on the connections that are there now is acknowledged, and does not reach the server until
    /// [`deliver_late`](Self::deliver_late), as if the network were gone and their system tried again and again.
    pub fn withhold(&self) {
        let joined = self.replies.joined.load(Ordering::Relaxed);
        self.requests.count.store(joined, Ordering::Relaxed);
    }

    /// [`withhold`](Self::withhold), also for connections that are made from now on. [`heal`](Self::heal) ends it.
    pub fn cut_off(&self) {
        self.requests.count.store(u64::MAX, Ordering::Relaxed);
    }

    /// Nothing is withheld any more. What was is delivered late, or is lost, and its connections end.
    pub fn heal(&self, delivers: bool) {
        // Under the lock, so that nothing of a connection overtakes what it has sent before.
        let mut kept = self.requests.kept.lock();
        self.requests.count.store(0, Ordering::Relaxed);
        for (_, mut kept) in std::mem::take(&mut *kept) {
            // It may have ended already.
            if delivers {
                kept.server.write_all(&kept.bytes).ok();
            }
            kept.server.shutdown(Shutdown::Write).ok();
        }
    }

    /// How many bytes are withheld.
    pub fn withheld(&self) -> usize {
        self.requests.kept.lock().values().map(|kept| kept.bytes.len()).sum()
    }

    /// Delivers what was withheld, but for what was sent on a connection that its client has reset since; then ends the connections. Returns how the server
    /// calls them: it has executed everything when it does not know them any more.
    pub fn deliver_late(&self) -> Vec<SocketAddr> {
        let kept = std::mem::take(&mut *self.requests.kept.lock());
        let deliver = |mut kept: Kept| {
            let known_as = kept.server.local_addr().ok()?;
            kept.server.write_all(&kept.bytes).ok()?;
            // It may have ended already.
            kept.server.shutdown(Shutdown::Write).ok();
            Some(known_as)
        };
        kept.into_values().filter_map(deliver).collect()
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

/// What a client sends, until it ends the connection. Where something was withheld, the server does not learn of an orderly end.
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
                // An encrypted connection ends in order first, and is reset then. A read does not tell of that.
                while matches!(client.take_error(), Ok(None)) {
                    if !requests.has(number) {
                        return;
                    }
                    thread::sleep(Duration::from_millis(1));
                }
                requests.kept.lock().remove(&number);
                break;
            }
            Ok(0) => break,
            Err(_) => {
                // Whatever its system has not sent is never sent.
                requests.kept.lock().remove(&number);
                break;
            }
        }
    }
    end([client, server]);
}

/// Until either side ends, and then the other ends, too.
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
        // The other side may have ended it.
        drop(stream.shutdown(Shutdown::Both));
    }
}
