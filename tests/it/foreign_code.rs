//! Foreign code that a manager calls: wakers that call back into the manager, recorders and log
//! subscribers that panic.

use std::future::{Future, IntoFuture};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use shardlock::{LockManager, LossReason};
use support::{PATIENCE, worker};
use support_locks::{STORE_TIMEOUT, lock, poll_once, soon};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// A waker that calls the manager when it is woken and when it is dropped, as foreign code may.
struct ManagerCaller {
    locks: LockManager,
    called: mpsc::Sender<&'static str>,
}

impl ManagerCaller {
    fn waker(locks: &LockManager) -> (Waker, mpsc::Receiver<&'static str>) {
        let (called, answers) = mpsc::channel();
        let locks = locks.clone();
        (Waker::from(Arc::new(Self { locks, called })), answers)
    }

    fn call_manager(&self, when: &'static str) {
        drop(self.locks.held());
        self.called.send(when).ok();
    }
}

impl Wake for ManagerCaller {
    fn wake(self: Arc<Self>) {
        self.call_manager("called");
    }
}

impl Drop for ManagerCaller {
    fn drop(&mut self) {
        self.call_manager("dropped");
    }
}

/// Regression: the wakers of `lost()` were called under the key's mutex. A waker that called the
/// manager deadlocked on that mutex, on the thread that renews all leases of the process.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waker_of_a_loss_may_call_the_manager() {
    let ttl = Duration::from_secs(3);
    let builder = LockManager::builder().shard("memory://wakers-of-losses").ttl(ttl);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    let other = lock(&locks, "other").await;
    let capped = locks.lock("capped").max_hold(ttl * 2 / 3).await.expect("lock");
    let (waker, answers) = ManagerCaller::waker(&locks);
    let mut lost = Box::pin(capped.lost());
    assert!(lost.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    assert_eq!(answers.recv_timeout(PATIENCE), Ok("called"));
    assert_eq!(poll_once(&mut lost), Some(LossReason::MaxHold));
    tokio::time::sleep(ttl).await;
    assert!(other.is_valid(), "renewals continue");

    let (waker, answers) = ManagerCaller::waker(&locks);
    let mut lost = Box::pin(other.lost());
    assert!(lost.as_mut().poll(&mut Context::from_waker(&waker)).is_pending());
    soon("the shutdown", locks.shutdown()).await.ok();
    assert_eq!(answers.recv_timeout(PATIENCE), Ok("called"));
    assert_eq!(poll_once(&mut lost), Some(LossReason::Closed));
}

/// A recorder whose metrics panic once enabled.
#[derive(Clone, Default)]
struct Failing(Arc<AtomicBool>);

impl Failing {
    fn check(&self) {
        if self.0.load(Ordering::SeqCst) {
            // Unlike `panic!`, prints no backtrace. Printing one takes longer than a TTL in a debug
            // build.
            std::panic::resume_unwind(Box::new("a recorder that fails"));
        }
    }
}

impl metrics::CounterFn for Failing {
    fn increment(&self, _value: u64) {
        self.check();
    }

    fn absolute(&self, _value: u64) {
        self.check();
    }
}

impl metrics::GaugeFn for Failing {
    fn increment(&self, _value: f64) {
        self.check();
    }

    fn decrement(&self, _value: f64) {
        self.check();
    }

    fn set(&self, _value: f64) {
        self.check();
    }
}

impl metrics::HistogramFn for Failing {
    fn record(&self, _value: f64) {
        self.check();
    }
}

impl metrics::Recorder for Failing {
    fn describe_counter(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn describe_gauge(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn describe_histogram(&self, _: metrics::KeyName, _: Option<metrics::Unit>, _: metrics::SharedString) {}

    fn register_counter(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Counter {
        self.check();
        metrics::Counter::from_arc(Arc::new(self.clone()))
    }

    fn register_gauge(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Gauge {
        self.check();
        metrics::Gauge::from_arc(Arc::new(self.clone()))
    }

    fn register_histogram(&self, _: &metrics::Key, _: &metrics::Metadata<'_>) -> metrics::Histogram {
        self.check();
        metrics::Histogram::from_arc(Arc::new(self.clone()))
    }
}

/// Regression: the recorder's panic ended the renewal in progress, and those leases were silently
/// never renewed again.
#[tokio::test]
async fn recorder_that_panics_loses_no_lock() {
    let recorder = Failing::default();
    let _for_this_thread = metrics::set_default_local_recorder(&recorder);
    let ttl = Duration::from_secs(2);
    let builder = LockManager::builder().shard("memory://failing-recorder").ttl(ttl);
    let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    recorder.0.store(true, Ordering::SeqCst);
    let lost = tokio::time::timeout(2 * ttl, guard.lost()).await;
    assert!(lost.is_err() && guard.is_valid(), "{lost:?}");
    let mut next = Box::pin(async { lock(&locks, "k").await });
    assert!(poll_once(&mut next).is_none());
    guard.release().await.expect("release");
    soon("the next", next).await.release().await.expect("release");
    // The metrics of this class are registered now.
    let guard = soon("a new class", locks.lock("k").class("new").into_future()).await;
    guard.expect("lock").release().await.expect("release");
}

/// What a log subscriber is called for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Call {
    Event = 1,
    NewSpan,
    Enter,
    Exit,
    Close,
}

/// A log subscriber that panics in one kind of call.
struct FailingLog;

/// The kind of call, or 0.
static FAILS_AT: AtomicU8 = AtomicU8::new(0);

impl FailingLog {
    fn check(call: Call) {
        if FAILS_AT.load(Ordering::SeqCst) == call as u8 {
            std::panic::resume_unwind(Box::new("a log subscriber that fails"));
        }
    }
}

impl Subscriber for FailingLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("shardlock")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Self::check(Call::NewSpan);
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, _: &Event<'_>) {
        Self::check(Call::Event);
    }

    fn enter(&self, _: &Id) {
        Self::check(Call::Enter);
    }

    fn exit(&self, _: &Id) {
        Self::check(Call::Exit);
    }

    fn try_close(&self, _: Id) -> bool {
        Self::check(Call::Close);
        true
    }
}

/// Runs in a process of its own, since the subscriber is that of all threads.
pub(crate) fn lock_with_a_failing_log(me: &worker::Current) {
    const TTL: Duration = Duration::from_secs(2);
    const SLOW: Duration = Duration::from_millis(1);
    tracing::subscriber::set_global_default(FailingLog).expect("the first subscriber");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let builder = LockManager::builder().shard("memory://").ttl(TTL).slow_wait(SLOW);
        let locks = builder.store_timeout(STORE_TIMEOUT).connect().await.expect("connect");
        let renewed = lock(&locks, "renewed").await;
        for call in [Call::Event, Call::NewSpan, Call::Enter, Call::Exit, Call::Close] {
            FAILS_AT.store(call as u8, Ordering::SeqCst);
            let guard = lock(&locks, "k").await;
            let waiting = locks.clone();
            let next = tokio::spawn(async move { waiting.lock("k").await });
            // Some renewals, and a slow wait.
            let lost = tokio::time::timeout(TTL / 2, guard.lost()).await;
            assert!(lost.is_err(), "{call:?}: {lost:?}");
            drop(guard);
            let next = soon("the next", next).await.expect("no panic");
            next.expect("lock").release().await.expect("release");
            let free = locks.try_lock("k").await.expect("try");
            drop(free.unwrap_or_else(|| panic!("{call:?}: nobody holds the lock, but it is not free")));
        }
        FAILS_AT.store(0, Ordering::SeqCst);
        assert!(renewed.is_valid());
    });
    me.send("held");
}

/// Regression: a panic of the subscriber at the line about a slow wait unwound before there was a
/// guard, and the lock was renewed for ever.
#[test]
fn log_subscriber_that_panics_loses_no_lock_and_keeps_none() {
    let worker = worker::spawn("failing log", &[]);
    assert_eq!(worker.line(), "held");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waker_that_is_replaced_or_dropped_may_call_the_manager() {
    let locks = support_locks::connect("memory://wakers-that-end").await;
    let guard = lock(&locks, "k").await;
    let (ended, told) = mpsc::channel();
    // On a separate thread, since the bug would deadlock it.
    std::thread::spawn(move || {
        let mut waiting = Box::pin(locks.lock("k").into_future());
        let (first, answers_of_first) = ManagerCaller::waker(&locks);
        assert!(waiting.as_mut().poll(&mut Context::from_waker(&first)).is_pending());
        drop(first);
        assert!(answers_of_first.try_recv().is_err(), "the queue keeps the waker");
        let (second, answers_of_second) = ManagerCaller::waker(&locks);
        assert!(waiting.as_mut().poll(&mut Context::from_waker(&second)).is_pending());
        drop(second);
        let replaced = answers_of_first.try_recv();
        drop(waiting);
        ended.send((replaced, answers_of_second.try_recv())).ok();
    });
    let both = told.recv_timeout(PATIENCE).expect("the thread ends");
    assert_eq!(both, (Ok("dropped"), Ok("dropped")));
    guard.release().await.expect("release");
}
