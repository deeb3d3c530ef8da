//! An unencrypted connection whose driver waits until the tasks with something to send have sent
//! it.
//!
//! # Implementation details
//!
//! Each connection has a driver: a task that writes what other tasks send to it. A multi-threaded
//! runtime runs a task that was just woken before all others (`lifo_slot` in tokio's
//! `scheduler/multi_thread/worker.rs`). The driver would thus write after each request, which costs
//! a system call per request on both sides. While several requests are in flight, the driver yields
//! once to the end of the run queue and then writes everything that the tasks before it have
//! requested. For a single request this would only add latency: another thread may be woken for the
//! queued task.
//!
//! The client library spawns the drivers of connections that it opens, so the connection is opened
//! here. The library does not accept an encrypted stream made elsewhere; it opens those itself
//! (`link`).

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{AsyncConnectionConfig, ConnectionInfo, RedisResult};
use futures_util::future::select_ok;
use tokio::net::{TcpStream, lookup_host};

use super::super::client::prepare;
use super::super::cut::Ending;
use crate::clock::Moment;
use crate::time_limit::within;

/// How many requests are in flight on a connection.
#[derive(Debug, Default, Clone)]
pub(super) struct Traffic(Arc<AtomicUsize>);

/// Counts one request until it is dropped.
#[derive(Debug)]
pub(super) struct UnderWay(Traffic);

/// How many addresses of a name are considered.
const ADDRESSES_MAX: usize = 16;

/// The number of requests in flight from which it pays to wait for more.
const CROWD: usize = 4;

impl Traffic {
    pub(super) fn enter(&self) -> UnderWay {
        self.0.fetch_add(1, Ordering::Relaxed);
        UnderWay(self.clone())
    }

    fn is_dense(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= CROWD
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Connects and spawns the driver on the current runtime. The returned [`Ending`] ends the driver.
/// Connects to the address `only`, if given.
pub(super) async fn connect(
    place: (&str, u16),
    only: Option<SocketAddr>,
    info: &ConnectionInfo,
    config: AsyncConnectionConfig,
    timeout: Duration,
    traffic: &Traffic,
) -> RedisResult<(MultiplexedConnection, Ending)> {
    let connecting = async {
        let stream = match only {
            Some(address) => reach(std::iter::once(address)).await?,
            None => reach(resolve(place).await?.into_iter()).await?,
        };
        prepare(&stream)?;
        let (connection, driver) =
            MultiplexedConnection::new_with_config(info.redis_settings(), stream, config).await?;
        let driver = tokio::spawn(LastInLine {
            driver: Box::pin(driver),
            traffic: traffic.clone(),
            has_waited: false,
        });
        Ok((connection, Ending::Driver(driver.abort_handle())))
    };
    let silent = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {timeout:?}"));
    within(Moment::now(), timeout, pin!(connecting)).await.map_err(silent)?
}

async fn resolve(place: (&str, u16)) -> io::Result<Vec<SocketAddr>> {
    #[cfg(test)]
    if let Some(known) = tests::NAMES.lock().get(place.0) {
        return Ok(known.clone());
    }
    Ok(lookup_host(place).await?.collect())
}

/// The distinct addresses that a name resolves to.
pub(super) async fn addresses(host: &str, port: u16) -> Vec<SocketAddr> {
    // If this fails, connecting reports why.
    let found = resolve((host, port)).await.unwrap_or_default();
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in found.into_iter().take(ADDRESSES_MAX) {
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    addresses
}

/// Connects to whichever address of a server answers first, as the client library does: one of them
/// may drop everything that is sent to it.
async fn reach(addresses: impl Iterator<Item = SocketAddr>) -> io::Result<TcpStream> {
    let reaching: Vec<_> = addresses.map(|address| Box::pin(TcpStream::connect(address))).collect();
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
struct LastInLine<F> {
    driver: Pin<Box<F>>,
    traffic: Traffic,
    has_waited: bool,
}

impl<F: Future> Future for LastInLine<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        self.has_waited = !self.has_waited && self.traffic.is_dense();
        if self.has_waited {
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

    use super::*;
    use crate::identity::ManagerId;
    use crate::key::LockKey;
    use crate::protocol::{Acquire, AcquireMode, AcquireReply, Cycle, Push};
    use crate::store::redis::primary::RedisStore;
    use crate::store::support::RedisServer;
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
        let url = crate::Endpoint::parse("redis://replica-first.test:1")
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
            mode: AcquireMode::Fast,
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
    async fn an_address_that_swallows_everything_does_not_keep_from_the_others() {
        let listen = || std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let (silent, open) = (listen(), listen());
        let [hole, good] = [&silent, &open].map(|listener| listener.local_addr().unwrap());
        // Fills the backlog, which holds one connection: the system drops further attempts until
        // there is room.
        SockRef::from(&silent).listen(0).unwrap();
        let _takes_it = std::net::TcpStream::connect(hole).unwrap();
        let mut swallowed = Box::pin(reach([hole].into_iter()));
        assert!(
            swallowed
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()))
                .is_pending()
        );
        let stream = reach([hole, good, hole].into_iter()).await.unwrap();
        assert_eq!(stream.peer_addr().unwrap(), good);
        drop(open);
        assert!(reach([good].into_iter()).await.is_err());
        assert!(reach(std::iter::empty()).await.is_err());
    }

    #[tokio::test]
    async fn what_is_ready_goes_first_while_traffic_is_dense() {
        let traffic = Traffic::default();
        let mut requests = vec![];
        for seen_by_count in [0, 0, 0, 0, 2] {
            let others = Cell::new(0);
            let one = || async { others.set(others.get() + 1) };
            let last = LastInLine {
                driver: Box::pin(async { others.get() }),
                traffic: traffic.clone(),
                has_waited: false,
            };
            let (seen, ..) = tokio::join!(biased; last, one(), one());
            assert_eq!(seen, seen_by_count, "{} requests in flight", requests.len());
            requests.push(traffic.enter());
        }
        drop(requests);
        assert!(!traffic.is_dense());
    }
}
