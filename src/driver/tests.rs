//! Behaviour that only a faulty store can reveal.

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Waker;

use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::sync::mpsc;

use super::*;
use crate::contention::HotKeys;
use crate::engine::Rules;
use crate::engine::admission::Limits;
use crate::engine::min_holds::MinHolds;
use crate::engine::renewals::STRAIN_MIN;
use crate::error::{Failure, LockErrorKind};
use crate::fence::TokenBlock;
use crate::identity::ManagerId;
use crate::mode::LockMode;
use crate::protocol::{Acquire, AcquireReply, Answer, Cycles, Push, Release, ReleaseReply, RenewReply, Renewal};
use crate::slow_log::SlowLog;
use crate::store::{Health, Priority, ServerTime, StoreFuture};
use crate::telemetry::{Classes, ManagerMetrics};

/// A store that grants everything and whose clock jumps.
struct BadStore {
    /// The token that it grants. It has promised tokens above 1000.
    token: u64,
    looks: AtomicU64,
}

const PROMISED: u64 = 1000;

impl BadStore {
    fn granting(token: u64) -> Self {
        Self {
            token,
            looks: AtomicU64::new(0),
        }
    }
}

fn done<T: Send + 'static>(value: T) -> StoreFuture<T> {
    Box::pin(std::future::ready(Ok(value)))
}

fn answer<R>(ttl: Duration, reply: R) -> Answer<R> {
    Answer {
        sent_at: Moment::now(),
        ttl,
        floor: PROMISED,
        reply,
    }
}

impl LeaseStore for BadStore {
    fn connect(&self) -> StoreFuture<()> {
        done(())
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        let reply = AcquireReply::Granted {
            tokens: TokenBlock::ending_at(self.token, 1),
            queued: 0,
            extended: false,
        };
        done(answer(request.ttl, reply))
    }

    fn release(&self, _priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        let reply = ReleaseReply {
            held: true,
            requeued: None,
        };
        done(answer(request.ttl(), reply))
    }

    fn renew(&self, _batch: Vec<Renewal>, _limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        panic!("a renewal that panics")
    }

    fn inspect(&self, _key: LockKey) -> StoreFuture<KeyState> {
        Box::pin(std::future::pending())
    }

    fn erase(&self) -> StoreFuture<u64> {
        done(0)
    }

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        let look = self.looks.fetch_add(1, Ordering::Relaxed);
        let now = Moment::now();
        // The clock jumps by an hour between the second and the third probe.
        let ahead = Duration::from_secs(if look < 2 { 0 } else { 3600 });
        Box::pin(std::future::ready(Health {
            reached: Ok(()),
            times: vec![ServerTime {
                server: "bad:1".into(),
                connection: 0,
                since_epoch: Duration::from_secs(1_700_000_000) + Duration::from_nanos(now.as_nanos()) + ahead,
                sent_at: now,
                received_at: now,
            }],
        }))
    }

    fn run_subscriber(&self, _pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(std::future::pending())
    }
}

fn bad_shard(store: BadStore) -> (Arc<Shard>, mpsc::UnboundedReceiver<Job>) {
    shard_on(Arc::new(store))
}

fn shard_on(store: Arc<dyn LeaseStore>) -> (Arc<Shard>, mpsc::UnboundedReceiver<Job>) {
    let (jobs, receiver) = mpsc::unbounded_channel();
    let metrics = Arc::new(ShardMetrics::new("bad", "default"));
    let manager = Arc::new(ManagerContext {
        id: ManagerId::new(),
        rules: Rules {
            max_burst: 1,
            max_slice: Duration::ZERO,
            renew_fraction: 0.1,
            flaw: None,
        },
        cycles: Cycles::default(),
        min_holds: MinHolds::default(),
        limits: Limits {
            waiters_per_key: 1,
            waiters: 10,
            keys: 3,
        },
        timeout: Duration::from_secs(1),
        // A busy machine may keep a test waiting for nearly as long.
        late_max: Duration::from_secs(1),
        default_ttl: Duration::from_secs(1),
        usage: Arc::new(Usage::new(Box::default())),
        metrics: Arc::new(ManagerMetrics::new(Classes::new("default", 1))),
        hot: HotKeys::new(1),
        slow_log: SlowLog::new(None, None, true),
        runtimes: crate::runtime::Runtimes::here(),
        jobs,
    });
    let maps = Maps::new(vec![("bad".into(), Arc::clone(&store))], Duration::from_secs(1));
    let shard = Shard::new(&manager, "bad".into(), "bad".into(), store, &Arc::new(maps), metrics);
    (shard, receiver)
}

const OPTIONS: WaiterOptions = WaiterOptions {
    mode: LockMode::Exclusive,
    // Long enough that the first renewal comes after what a test does with a new lease.
    ttl: Duration::from_secs(20),
    max_hold: None,
    linger: crate::engine::Linger::NONE,
    min_hold: crate::engine::MinHold::NONE,
    try_only: false,
    in_outage: crate::engine::InOutage::Fail,
    contended_hint: false,
    class: 0,
};

fn enqueue(shard: &Arc<Shard>) -> Result<(Arc<Entry>, Enqueued), LockError> {
    shard.enqueue(&LockKey::new("k").unwrap(), OPTIONS, Waker::noop(), Moment::now())
}

/// Enqueues for the key and executes the requests that follow.
async fn enqueue_and_execute(shard: &Arc<Shard>) -> (Arc<Entry>, crate::engine::WaiterId) {
    let (entry, enqueued) = enqueue(shard).unwrap();
    let mut next = enqueued.request;
    while let Some(request) = next {
        next = entry.execute(request, Priority::Foreground).await.next;
    }
    (entry, enqueued.id)
}

fn origin() -> RequestOrigin {
    RequestOrigin {
        at: Moment::now(),
        caller: std::panic::Location::caller(),
        class: 0,
    }
}

/// A panic in a renewal used to go unnoticed: its leases looked held until they expired, and were
/// then acquired and lost again.
#[tokio::test]
async fn manager_closes_after_a_panic_in_its_background_thread() {
    let (shard, jobs) = bad_shard(BadStore::granting(2000));
    let _background =
        BackgroundThread::start(Arc::clone(&shard.manager), vec![Arc::clone(&shard)], &[false], jobs).unwrap();
    let (entry, holder) = enqueue_and_execute(&shard).await;
    let settled = entry.poll(holder, Waker::noop(), origin());
    let std::task::Poll::Ready(Settled::Granted(granted)) = settled else {
        panic!("{settled:?}")
    };
    let (_, waiter) = enqueue_and_execute(&shard).await;
    let lost = tokio::time::timeout(Duration::from_secs(30), granted.lease.lost()).await;
    assert_eq!(lost, Ok(crate::error::LossReason::Closed));
    let refused = entry.poll(waiter, Waker::noop(), origin());
    let std::task::Poll::Ready(Settled::Failed(error)) = refused else {
        panic!("{refused:?}")
    };
    assert!(error.kind() == LockErrorKind::Closed, "{error}");
    let later = enqueue(&shard).map(|_| ());
    assert!(
        later.as_ref().is_err_and(|error| error.kind() == LockErrorKind::Closed),
        "{later:?}"
    );
}

/// A million leases were taken, and most of them were lost.
#[tokio::test]
async fn shard_that_renews_too_late_keeps_its_keys_and_takes_no_new_ones() {
    let (shard, _jobs) = bad_shard(BadStore::granting(2000));
    let (entry, holder) = enqueue_and_execute(&shard).await;
    let settled = entry.poll(holder, Waker::noop(), origin());
    assert!(
        matches!(settled, std::task::Poll::Ready(Settled::Granted(_))),
        "{settled:?}"
    );
    shard.set_strained(true);
    assert!(enqueue(&shard).is_ok(), "that key is held");
    let other = LockKey::new("other").unwrap();
    let enqueued = |shard: &Arc<Shard>| shard.enqueue(&other, OPTIONS, Waker::noop(), Moment::now()).map(|_| ());
    assert!(enqueued(&shard).is_ok(), "one lease is no strain");
    shard.metrics.leases_changed(0, STRAIN_MIN);
    let other = LockKey::new("another").unwrap();
    let enqueued = |shard: &Arc<Shard>| shard.enqueue(&other, OPTIONS, Waker::noop(), Moment::now()).map(|_| ());
    let refused = enqueued(&shard);
    assert!(
        refused.as_ref().is_err_and(|error| {
            error.kind() == LockErrorKind::TooManyLeases && error.in_use().is_some_and(|leases| leases > STRAIN_MIN)
        }),
        "{refused:?}"
    );
    assert_eq!(shard.table.len(), 2);
    shard.set_strained(false);
    assert!(enqueued(&shard).is_ok());
}

#[tokio::test(start_paused = true)]
async fn token_regression_is_refused_and_counted_and_clock_jumps_are_counted() {
    let recorder = PrometheusBuilder::new().build_recorder();
    let page = || recorder.handle().render();
    let (shard, _jobs) = metrics::with_local_recorder(&recorder, || bad_shard(BadStore::granting(500)));
    assert!(page().contains("shardlock_token_regressions_total{shard=\"bad\"} 0"));
    assert!(page().contains("shardlock_server_clock_jumps_total{shard=\"bad\"} 0"));

    let (entry, id) = enqueue_and_execute(&shard).await;
    let settled = entry.poll(id, Waker::noop(), origin());
    let std::task::Poll::Ready(Settled::Failed(error)) = settled else {
        panic!("{settled:?}")
    };
    assert!(
        matches!(
            error.failure(),
            Failure::TokenRegression {
                token: 500,
                floor: 1000,
                ..
            }
        ),
        "{error}"
    );
    assert!(
        page().contains("shardlock_token_regressions_total{shard=\"bad\"} 1"),
        "{}",
        page()
    );

    let watching = tokio::spawn(health::watch(Arc::clone(&shard)));
    // The test controls time: each probe happens when no other work is left.
    while !page().contains("shardlock_server_clock_jumps_total{shard=\"bad\"} 1") {
        assert!(!watching.is_finished());
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    let drift = page();
    let drift = drift
        .lines()
        .find(|line| line.starts_with("shardlock_server_clock_drift_seconds{"));
    let drift: f64 = drift.unwrap().rsplit_once(' ').unwrap().1.parse().unwrap();
    assert!((drift - 3600.0).abs() < 1.0, "{drift}");
    watching.abort();
}

/// Every release gets a reply, and a connection was given up just now.
struct CutStore {
    cut: Moment,
    released: mpsc::UnboundedSender<(Cycle, Priority)>,
}

impl LeaseStore for CutStore {
    fn connect(&self) -> StoreFuture<()> {
        done(())
    }

    fn acquire(&self, request: Acquire) -> StoreFuture<Answer<AcquireReply>> {
        done(answer(request.ttl, AcquireReply::Busy))
    }

    fn release(&self, priority: Priority, request: Release) -> StoreFuture<Answer<ReleaseReply>> {
        self.released.send((request.cycle, priority)).unwrap();
        let reply = ReleaseReply {
            held: false,
            requeued: None,
        };
        done(answer(request.ttl(), reply))
    }

    fn renew(&self, batch: Vec<Renewal>, _limit: Duration) -> StoreFuture<Vec<Option<RenewReply>>> {
        done(vec![None; batch.len()])
    }

    fn inspect(&self, _key: LockKey) -> StoreFuture<KeyState> {
        Box::pin(std::future::pending())
    }

    fn erase(&self) -> StoreFuture<u64> {
        done(0)
    }

    fn probe(&self) -> Pin<Box<dyn Future<Output = Health> + Send>> {
        Box::pin(std::future::pending())
    }

    fn last_cut(&self) -> Option<Moment> {
        Some(self.cut)
    }

    fn run_subscriber(&self, _pushes: mpsc::UnboundedSender<Push>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(std::future::pending())
    }
}

/// A request sent on a connection that was given up may be executed after the reply to the release.
#[tokio::test]
async fn cycle_with_a_possible_request_on_a_cut_connection_is_released_again() {
    let (released, mut releases) = mpsc::unbounded_channel();
    let cut = Moment::now();
    let (shard, _jobs) = shard_on(Arc::new(CutStore { cut, released }));
    let (work, cleaned) = mpsc::unbounded_channel();
    let cleaning = tokio::spawn(orphans::clean(Arc::clone(&shard), cleaned));
    let key = LockKey::new("k").unwrap();
    let abandoned = orphans::Abandoned::new(&shard.manager.usage, &key, Cycle::of(3)).unwrap();
    work.send(orphans::Work::Release(abandoned)).unwrap();
    assert_eq!(releases.recv().await, Some((Cycle::of(3), Priority::Foreground)));
    assert_eq!(releases.recv().await, Some((Cycle::of(3), Priority::Foreground)));
    assert!(Moment::now().since(cut) >= shard.manager.late_max);

    // A cycle whose reply came on another connection, and one released long after the last loss.
    let key = LockKey::new("other").unwrap();
    work.send(orphans::Work::ReleaseAgain {
        key: key.clone(),
        cycle: Cycle::of(5),
    })
    .unwrap();
    assert_eq!(releases.recv().await, Some((Cycle::of(5), Priority::Foreground)));
    let abandoned = orphans::Abandoned::new(&shard.manager.usage, &key, Cycle::of(7)).unwrap();
    work.send(orphans::Work::Release(abandoned)).unwrap();
    assert_eq!(releases.recv().await, Some((Cycle::of(7), Priority::Foreground)));
    drop(work);
    cleaning.await.unwrap();
    assert!(releases.try_recv().is_err());
    assert!(shard.manager.usage.has_no_pending_releases());
}
