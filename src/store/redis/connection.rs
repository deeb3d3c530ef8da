//! Opens connections to Redis servers, over TCP, TLS or a Unix socket alike, and drives them.
//!
//! # Implementation details
//!
//! Each connection has a driver: a task that writes what other tasks send to it. A multi-threaded
//! runtime runs a task that was just woken before all others (`lifo_slot` in tokio's
//! `scheduler/multi_thread/worker.rs`). The driver would thus write after each request, which costs
//! a system call per request on both sides. While several requests are in flight, the driver yields
//! once to the end of the run queue and then writes everything that the tasks before it have
//! requested. For a single request this would only add latency: another thread may be woken for the
//! queued task. The client library spawns the drivers of connections that it opens itself, so
//! streams are opened here.
//!
//! A request sent on a connection may execute after the connection was abandoned and replaced. If
//! it acquires something, no task knows: the release of its cycle went out on the next connection
//! and was answered earlier. A connection is therefore *reset* when it is closed (`SO_LINGER` 0,
//! see `client`), which discards data that the system has not sent yet. It must also be closed at
//! once: when a [`Driver`] is dropped, its task ends, the stream is closed, and all requests on the
//! connection fail.
//!
//! Data that already left this machine may still arrive, for example from a proxy's buffer. The
//! time at which a connection was last abandoned is therefore recorded ([`Cuts`]). Until
//! [`LATE_MAX`](crate::store::LATE_MAX) has passed, an answered release does not prove that nothing
//! of its cycle is left.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use deadpool_redis::redis::aio::{MultiplexedConnection, PubSub};
use deadpool_redis::redis::{
    AsyncConnectionConfig, ConnectionAddr, ErrorKind, RedisConnectionInfo, RedisError, RedisResult,
};
use futures_util::future::select_ok;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, lookup_host};
use tokio::task::AbortHandle;

use super::client::{Target, prepare};
use crate::clock::Moment;
use crate::time_limit::within;

/// How many requests are in flight on a connection.
#[derive(Debug, Default, Clone)]
pub(super) struct InFlight(Arc<AtomicUsize>);

/// Counts one request until it is dropped.
#[derive(Debug)]
pub(super) struct InFlightGuard(InFlight);

/// How many addresses of a name are considered.
const ADDRESSES_MAX: usize = 16;

/// The number of requests in flight from which it pays to wait for more.
const CROWD: usize = 4;

/// How many requests may wait to be written before senders block: enough for thousands of tasks at
/// once.
const PIPELINE_BUFFER: usize = 4096;

/// A connection is not replaced after a shorter silence, even if the sender has less time: a server
/// that is briefly busy must not be abandoned.
pub(super) const SILENCE_MIN: Duration = Duration::from_millis(250);

impl InFlight {
    pub(super) fn enter(&self) -> InFlightGuard {
        self.0.fetch_add(1, Ordering::Relaxed);
        InFlightGuard(self.clone())
    }

    fn is_dense(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= CROWD
    }
}

impl Drop for InFlightGuard {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Closes a connection when it is dropped: its driver ends, and all requests on it fail.
#[derive(Debug)]
pub(super) struct Driver(AbortHandle);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// When one of a store's connections was last abandoned.
#[derive(Debug, Default)]
pub(super) struct Cuts {
    /// In nanoseconds; zero if there was none.
    last: AtomicU64,
}

impl Cuts {
    /// Records that a connection is abandoned now. Call this before another connection can take its
    /// place.
    pub(super) fn note(&self) {
        self.last.fetch_max(Moment::now().as_nanos(), Ordering::AcqRel);
    }

    pub(super) fn last(&self) -> Option<Moment> {
        match self.last.load(Ordering::Acquire) {
            0 => None,
            nanos => Some(Moment::from_nanos(nanos)),
        }
    }
}

/// The client library's settings for a connection that carries commands.
pub(super) fn settings() -> AsyncConnectionConfig {
    // No response timeout: the sender of a request enforces the limit, on whatever runtime it runs.
    AsyncConnectionConfig::new()
        .set_response_timeout(None)
        .set_pipeline_buffer_size(PIPELINE_BUFFER)
}

/// Opens a connection for commands, and spawns its driver on the current runtime. Connects to the
/// address `only`, if given.
pub(super) async fn open(
    target: &Target,
    only: Option<SocketAddr>,
    settings: AsyncConnectionConfig,
    limit: Duration,
    in_flight: &InFlight,
) -> RedisResult<(MultiplexedConnection, Driver)> {
    let opening = async {
        let login = target.settings().await?;
        match connect(target, only).await? {
            Stream::Tcp(stream) => drive(&login, stream, settings, in_flight).await,
            #[cfg(feature = "tls")]
            Stream::Tls(stream) => drive(&login, stream, settings, in_flight).await,
            #[cfg(unix)]
            Stream::Unix(stream) => drive(&login, stream, settings, in_flight).await,
        }
    };
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"));
    within(Moment::now(), limit, pin!(opening)).await.map_err(silent)?
}

/// Opens a connection for subscriptions. Its driver is the client library's, and ends with it.
pub(super) async fn subscriber(target: &Target, only: Option<SocketAddr>) -> RedisResult<PubSub> {
    let login = target.settings().await?;
    match connect(target, only).await? {
        Stream::Tcp(stream) => PubSub::new(&login, stream).await,
        #[cfg(feature = "tls")]
        Stream::Tls(stream) => PubSub::new(&login, stream).await,
        #[cfg(unix)]
        Stream::Unix(stream) => PubSub::new(&login, stream).await,
    }
}

async fn drive<S>(
    login: &RedisConnectionInfo,
    stream: S,
    settings: AsyncConnectionConfig,
    in_flight: &InFlight,
) -> RedisResult<(MultiplexedConnection, Driver)>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (connection, driver) = MultiplexedConnection::new_with_config(login, stream, settings).await?;
    let driver = tokio::spawn(YieldingDriver {
        driver: Box::pin(driver),
        in_flight: in_flight.clone(),
        has_yielded: false,
    });
    Ok((connection, Driver(driver.abort_handle())))
}

/// An open stream to a server, before the login.
enum Stream {
    Tcp(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    #[cfg(unix)]
    Unix(tokio::net::UnixStream),
}

async fn connect(target: &Target, only: Option<SocketAddr>) -> RedisResult<Stream> {
    let unusable = |why| RedisError::from((ErrorKind::InvalidClientConfig, why));
    match target.info().addr() {
        ConnectionAddr::Tcp(host, port) => {
            let addresses = resolve((host, *port), only).await?;
            let plain = |stream| std::future::ready(Ok(stream));
            Ok(Stream::Tcp(reach(addresses.into_iter(), plain).await?))
        }
        #[cfg(feature = "tls")]
        ConnectionAddr::TcpTls {
            host,
            port,
            insecure: false,
            ..
        } => {
            use rustls::pki_types::ServerName;

            let connector = tokio_rustls::TlsConnector::from(Arc::new(target.tls_config()?));
            let name = ServerName::try_from(host.clone());
            let name = name.map_err(|_| unusable("the host can't be a name in a certificate"))?;
            let addresses = resolve((host, *port), only).await?;
            let handshake = |stream| connector.connect(name.clone(), stream);
            let stream = reach(addresses.into_iter(), handshake).await?;
            Ok(Stream::Tls(Box::new(stream)))
        }
        #[cfg(feature = "tls")]
        ConnectionAddr::TcpTls { .. } => Err(unusable("certificates must be verified")),
        #[cfg(not(feature = "tls"))]
        ConnectionAddr::TcpTls { .. } => Err(unusable("this build lacks the feature `tls`")),
        #[cfg(unix)]
        ConnectionAddr::Unix(path) => Ok(Stream::Unix(tokio::net::UnixStream::connect(path).await?)),
        _ => Err(unusable("this kind of address is not supported")),
    }
}

async fn resolve(place: (&str, u16), only: Option<SocketAddr>) -> io::Result<Vec<SocketAddr>> {
    if let Some(address) = only {
        return Ok(vec![address]);
    }
    #[cfg(test)]
    if let Some(known) = tests::NAMES.lock().get(place.0) {
        return Ok(known.clone());
    }
    Ok(lookup_host(place).await?.collect())
}

/// The distinct addresses that the server's name resolves to.
pub(super) async fn addresses(target: &Target) -> Vec<SocketAddr> {
    let (ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. }) = target.info().addr() else {
        return Vec::new();
    };
    // If this fails, connecting reports why.
    let found = resolve((host, *port), None).await.unwrap_or_default();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found.into_iter().take(ADDRESSES_MAX) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Connects to whichever address of a server is first to complete the handshake: one of them may
/// drop everything that is sent to it.
async fn reach<S, F>(addresses: impl Iterator<Item = SocketAddr>, handshake: impl Fn(TcpStream) -> F) -> io::Result<S>
where
    F: Future<Output = io::Result<S>>,
{
    let handshake = &handshake;
    let reaching: Vec<_> = addresses
        .map(|address| {
            Box::pin(async move {
                let stream = TcpStream::connect(address).await?;
                prepare(&stream)?;
                handshake(stream).await
            })
        })
        .collect();
    if reaching.is_empty() {
        return Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the server's host name resolves to no address",
        ));
    }
    select_ok(reaching).await.map(|(stream, _)| stream)
}

/// A task that yields to all queued tasks when it is woken under dense traffic. It ends when all
/// handles of its connection are gone.
struct YieldingDriver<F> {
    driver: Pin<Box<F>>,
    in_flight: InFlight,
    has_yielded: bool,
}

impl<F: Future> Future for YieldingDriver<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.has_yielded = !self.has_yielded && self.in_flight.is_dense();
        if self.has_yielded {
            // A task that wakes itself goes to the end of the run queue.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        self.driver.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::BTreeMap;
    use std::task::Waker;

    use deadpool_redis::redis::io::tcp::socket2::SockRef;
    use support::RedisServer;

    use super::*;
    use crate::identity::ManagerId;
    use crate::key::LockKey;
    use crate::protocol::{Acquire, AcquireKind, AcquireReply, Cycle, Push};
    use crate::store::redis::primary::RedisStore;
    use crate::store::{LeaseStore, StoreOptions};

    /// Names that no system resolves.
    pub(super) static NAMES: parking_lot::Mutex<BTreeMap<&str, Vec<SocketAddr>>> =
        parking_lot::Mutex::new(BTreeMap::new());

    /// A service without an address of its own resolves to its servers in any order.
    #[tokio::test]
    async fn name_whose_first_address_is_that_of_a_replica_leads_to_the_primary() {
        let primary = RedisServer::start();
        let replica = RedisServer::start_with(&["--replicaof", "127.0.0.1", &primary.port().to_string()]);
        let address = |server: &RedisServer| server.address().parse().unwrap();
        NAMES
            .lock()
            .insert("replica-first.test", vec![address(&replica), address(&primary)]);
        let url = crate::config::Endpoint::parse("redis://replica-first.test:1")
            .unwrap()
            .servers()
            .remove(0);
        let options = StoreOptions {
            timeout: Duration::from_secs(10),
            ..StoreOptions::for_tests(ManagerId::new())
        };
        let store = RedisStore::new(&url, options).unwrap();
        store.connect().await.unwrap();
        let request = Acquire {
            key: LockKey::new("k").unwrap(),
            cycle: Cycle::of(2),
            kind: AcquireKind::Fast,
            ttl: Duration::from_secs(10),
            tokens: 1,
        };
        let answer = store.acquire(request).await.unwrap();
        assert!(matches!(answer.reply, AcquireReply::Granted { .. }), "{answer:?}");
        // The inbox connects to the primary as well.
        let (pushes, mut pushed) = tokio::sync::mpsc::unbounded_channel();
        let listening = tokio::spawn(store.run_subscriber(pushes));
        assert!(matches!(pushed.recv().await, Some(Push::Resubscribed { .. })));
        assert_eq!((primary.channels().len(), replica.channels().len()), (1, 0));
        listening.abort();
    }

    #[tokio::test]
    async fn unresponsive_address_does_not_prevent_connecting_to_others() {
        let plain = |stream| std::future::ready(Ok(stream));
        let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (silent, open) = (listen(), listen());
        let [hole, good] = [&silent, &open].map(|listener| listener.local_addr().unwrap());
        // Fills the backlog, which holds one connection: the system drops further attempts until
        // there is room.
        SockRef::from(&silent).listen(0).unwrap();
        let _takes_it = std::net::TcpStream::connect(hole).unwrap();
        let mut swallowed = Box::pin(reach([hole].into_iter(), plain));
        assert!(
            swallowed
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_pending()
        );
        let stream = reach([hole, good, hole].into_iter(), plain).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        drop(open);
        assert!(reach([good].into_iter(), plain).await.is_err());
        assert!(reach(std::iter::empty(), plain).await.is_err());
    }

    #[tokio::test]
    async fn ready_tasks_run_before_the_driver_while_traffic_is_dense() {
        let in_flight = InFlight::default();
        let mut requests = vec![];
        for seen_by_count in [0, 0, 0, 0, 2] {
            let others = Cell::new(0);
            let one = || async { others.set(others.get() + 1) };
            let last = YieldingDriver {
                driver: Box::pin(async { others.get() }),
                in_flight: in_flight.clone(),
                has_yielded: false,
            };
            let (seen, ..) = tokio::join!(biased; last, one(), one());
            assert_eq!(seen, seen_by_count, "{} requests in flight", requests.len());
            requests.push(in_flight.enter());
        }
        drop(requests);
        assert!(!in_flight.is_dense());
    }

    #[test]
    fn last_of_several_cuts_is_reported() {
        let cuts = Cuts::default();
        assert_eq!(cuts.last(), None);
        cuts.note();
        let first = cuts.last().unwrap();
        cuts.note();
        assert!(cuts.last().unwrap() >= first);
    }

    #[tokio::test]
    async fn requests_fail_once_their_driver_is_dropped() {
        let server = RedisServer::start();
        let url = crate::config::Endpoint::parse(&format!("redis://{}", server.address()));
        let url = url.unwrap().servers().remove(0);
        let target = Target::new(&url, &crate::store::TlsFiles::default()).unwrap();
        let limit = Duration::from_secs(10);
        let opened = open(&target, None, settings(), limit, &InFlight::default()).await;
        let (mut connection, driver) = opened.unwrap();
        let waiting = tokio::spawn(async move {
            let mut pop = deadpool_redis::redis::cmd("BLPOP");
            pop.arg("k").arg(0).exec_async(&mut connection).await
        });
        tokio::task::yield_now().await;
        drop(driver);
        assert!(waiting.await.unwrap().unwrap_err().is_unrecoverable_error());
    }
}
