//! Spans, and the log lines of slow waits and long holds.

use std::fmt::Debug;
use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardlock::LockManager;
use shardlock::config::Builder;
use support::{PATIENCE, RedisServer, eventually};
use support_locks::{STORE_TIMEOUT, hand_off, lock, until_queued, waiting};
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Settings for a busy machine.
fn builder() -> Builder {
    LockManager::builder().store_timeout(STORE_TIMEOUT)
}

/// Records spans and events as text.
#[derive(Clone)]
struct Listener {
    level: LevelFilter,
    next: Arc<AtomicU64>,
    said: Arc<Mutex<Vec<String>>>,
    open: Arc<Mutex<Vec<(u64, String, usize)>>>,
}

struct Text(String);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.push_str(&format!(" {}={value:?}", field.name()));
    }
}

impl Listener {
    fn new(level: LevelFilter) -> Self {
        Self {
            level,
            next: Arc::new(AtomicU64::new(1)),
            said: Arc::default(),
            open: Arc::default(),
        }
    }

    fn lines(&self, part: &str) -> Vec<String> {
        self.said
            .lock()
            .iter()
            .filter(|line| line.contains(part))
            .cloned()
            .collect()
    }
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("shardlock") && *metadata.level() <= self.level
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(self.level)
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut text = Text(String::new());
        span.record(&mut text);
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let name = span.metadata().name().to_owned();
        self.said.lock().push(format!("span {name}{}", text.0));
        self.open.lock().push((id, name, 1));
        Id::from_u64(id)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut text = Text(String::new());
        event.record(&mut text);
        self.said.lock().push(format!("{}{}", event.metadata().level(), text.0));
    }

    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}

    fn clone_span(&self, id: &Id) -> Id {
        if let Some(span) = self.open.lock().iter_mut().find(|span| span.0 == id.into_u64()) {
            span.2 += 1;
        }
        id.clone()
    }

    fn try_close(&self, id: Id) -> bool {
        let mut open = self.open.lock();
        let Some(index) = open.iter().position(|span| span.0 == id.into_u64()) else {
            return false;
        };
        open[index].2 -= 1;
        let is_over = open[index].2 == 0;
        if is_over {
            let (_, name, _) = open.remove(index);
            self.said.lock().push(format!("end of {name}"));
        }
        is_over
    }
}

/// One subscriber for the process, because a manager's background thread only uses the global one.
/// Tests distinguish their lines by key and shard.
fn listener() -> &'static Listener {
    static LISTENER: std::sync::OnceLock<Listener> = std::sync::OnceLock::new();
    LISTENER.get_or_init(|| {
        let listener = Listener::new(LevelFilter::DEBUG);
        tracing::subscriber::set_global_default(listener.clone()).expect("no other");
        listener
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn acquiring_holding_and_renewing_are_spans() {
    let listener = listener();
    let locks = builder()
        .named_shard("spans", "memory://tracing-spans")
        .ttl(Duration::from_secs(3));
    let locks = locks.connect().await.unwrap();
    let guard = lock(&locks, "in-a-span").await;
    let token = guard.token();
    assert_eq!(
        listener.lines("span acquire key=in-a-span"),
        ["span acquire key=in-a-span try_only=false"]
    );
    assert_eq!(
        listener.lines("span hold key=in-a-span"),
        [format!("span hold key=in-a-span shard=spans token={token}")]
    );
    eventually("the lease is renewed", PATIENCE, || {
        !listener.lines("span renew shard=spans leases=1").is_empty()
    })
    .await;
    guard.release().await.unwrap();
    let ended = |name: &str| !listener.lines(&format!("end of {name}")).is_empty();
    eventually("all spans have ended", PATIENCE, || {
        ["acquire", "hold", "renew"].into_iter().all(ended)
    })
    .await;
}

#[test]
fn without_log_keys_no_key_is_logged_above_debug() {
    let listener = Listener::new(LevelFilter::INFO);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    tracing::subscriber::with_default(listener.clone(), || {
        runtime.block_on(async {
            let locks = builder()
                .shard("memory://tracing-quiet")
                .log_keys(false)
                .slow_wait(Duration::from_millis(1));
            let locks = locks.connect().await.unwrap();
            let guard = lock(&locks, "secret-key").await;
            let error = locks
                .lock("secret-key")
                .timeout(Duration::from_millis(20))
                .await
                .unwrap_err();
            assert!(error.is_timeout());
            guard.release().await.unwrap();
        });
    });
    let said = listener.said.lock();
    assert!(
        said.iter()
            .all(|line| line.starts_with("WARN") && !line.contains("secret-key")),
        "{said:?}"
    );
    // On a slow machine the first request may be slow, too; it has another caller.
    let of_the_second = said
        .iter()
        .filter(|line| line.contains("caller=tests/telemetry/tracing.rs:"));
    assert_eq!(of_the_second.count(), 1, "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_log_keys_losses_holds_and_terms_do_not_name_the_key() {
    let listener = listener();
    let locks = builder()
        .named_shard("private", "memory://tracing-private")
        .log_keys(false)
        .slow_wait(Duration::from_millis(20))
        .long_hold(Duration::from_millis(20));
    let locks = locks.connect().await.unwrap();
    let guard = locks.lock("private-1").max_hold(Duration::from_secs(3)).await.unwrap();
    let waiting = waiting(&locks, "private-1");
    guard.lost().await;
    drop(waiting.await.unwrap());
    locks.lead("private-2", async |_| ()).await.unwrap();
    for message in [
        "slow wait for a lock, still waiting",
        "a lock has been held for a long time",
        "a lock was lost",
    ] {
        let line = format!("WARN message={message} shard=private");
        eventually(message, PATIENCE, || !listener.lines(&line).is_empty()).await;
    }
    assert!(!listener.lines("INFO message=this process leads").is_empty());
    let named = listener.lines("private-");
    assert!(!named.is_empty());
    let loud = ["WARN", "INFO", "ERROR"];
    let loud: Vec<_> = named
        .iter()
        .filter(|line| loud.iter().any(|level| line.starts_with(level)))
        .collect();
    assert!(loud.is_empty(), "{loud:#?}");
}

/// A server that fails loses all locks of a process at once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_lost_locks_log_a_few_lines_and_their_number() {
    let listener = listener();
    let locks = builder().named_shard("many", "memory://tracing-many");
    let locks = locks.connect().await.unwrap();
    let mut guards = Vec::new();
    for number in 0..100 {
        let request = locks.lock(format!("k-{number}")).max_hold(Duration::from_secs(2));
        guards.push(request.await.unwrap());
    }
    for guard in &guards {
        guard.lost().await;
    }
    eventually("all losses are logged at debug level", PATIENCE, || {
        listener.lines("DEBUG message=the lock that was lost key=k-").len() == 100
    })
    .await;
    assert_eq!(listener.lines("WARN message=a lock was lost shard=many").len(), 20);
    drop((guards, locks));
    eventually("the rest is counted", PATIENCE, || {
        !listener.lines("WARN message=more locks were lost").is_empty()
    })
    .await;
    let rest = listener.lines("more locks were lost");
    assert!(rest.len() == 1 && rest[0].contains("suppressed=80"), "{rest:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_waits_are_logged_with_their_caller_and_rate_limited() {
    let listener = listener();
    let server = RedisServer::start();
    let locks = builder()
        .named_shard("slow", server.url())
        .slow_wait(Duration::from_millis(30));
    let locks = locks.connect().await.unwrap();
    let warnings = || {
        // On a loaded machine a lock without contention may be slow as well.
        let mut warnings = listener.lines("WARN message=slow wait for a lock shard=slow");
        warnings.retain(|line| line.contains("caller=tests/telemetry/tracing.rs:"));
        warnings
    };
    let guard = lock(&locks, "slow-wait").await;
    let line = line!() + 2;
    for _ in 0..20 {
        let waited = locks.lock("slow-wait").timeout(Duration::from_millis(40)).await;
        assert!(waited.is_err_and(|error| error.is_timeout()));
    }
    let warned = warnings();
    assert_eq!(warned.len(), 1, "{warned:?}");
    assert!(
        warned[0].contains(&format!("caller=tests/telemetry/tracing.rs:{line}:")),
        "{warned:?}"
    );
    assert!(
        warned[0].contains("suppressed=0") && warned[0].contains("key=\"slow-wait\""),
        "{warned:?}"
    );
    // Another caller is logged separately. This request finally gets its lock from another manager.
    let other = builder()
        .named_shard("slow", server.url())
        .slow_wait(Duration::from_millis(30));
    let other = other.connect().await.unwrap();
    let waiting = tokio::spawn(async move { other.with_lock("slow-wait", async |_| ()).await });
    until_queued(&locks, "slow-wait", 1).await;
    tokio::time::sleep(Duration::from_millis(40)).await;
    guard.release().await.unwrap();
    waiting.await.unwrap().unwrap();
    let warned = warnings();
    assert_eq!(warned.len(), 2, "{warned:?}");
    assert!(
        warned[1].contains("acquired") && warned[1].contains("caller=tests/telemetry/tracing.rs:"),
        "{warned:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_wait_that_is_cancelled_is_logged_too() {
    let listener = listener();
    let locks = builder()
        .named_shard("cancelled", "memory://tracing-cancelled")
        .slow_wait(Duration::from_millis(1));
    let locks = locks.connect().await.unwrap();
    let guard = lock(&locks, "k").await;
    let waited = tokio::time::timeout(Duration::from_millis(20), locks.lock("k").into_future()).await;
    assert!(waited.is_err());
    let warned = listener.lines("WARN message=slow wait for a lock shard=cancelled caller=tests/telemetry/tracing.rs:");
    assert!(
        warned.len() == 1 && warned[0].contains("outcome=\"cancelled\""),
        "{warned:?}"
    );
    guard.release().await.unwrap();
}

/// A stuck waiter may never stop waiting.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_wait_is_logged_while_it_lasts() {
    let listener = listener();
    let locks = builder()
        .named_shard("stuck", "memory://tracing-stuck")
        .slow_wait(Duration::from_millis(50));
    let locks = locks.connect().await.unwrap();
    let guard = lock(&locks, "stuck-key").await;
    let waiting = waiting(&locks, "stuck-key");
    let warned = || listener.lines("WARN message=slow wait for a lock, still waiting shard=stuck");
    eventually("the slow wait is logged", PATIENCE, || !warned().is_empty()).await;
    assert!(!waiting.is_finished());
    let warned = warned();
    assert!(
        warned[0].contains("waiting=1") && warned[0].contains("key=\"stuck-key\""),
        "{warned:?}"
    );
    guard.release().await.unwrap();
    drop(waiting.await.unwrap());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outage_logs_one_line_at_its_start_and_one_at_its_end() {
    let listener = listener();
    let server = RedisServer::start();
    // The failure is noticed before the loss, on a busy machine as well. No wait is slow.
    let ttl = Duration::from_secs(3);
    let locks = builder().named_shard("away", server.url()).ttl(ttl);
    let locks = locks.slow_wait(PATIENCE * 3).connect().await.unwrap();
    let guard = lock(&locks, "held-in-outage").await;
    let waiting = locks.lock("held-in-outage").timeout(Duration::from_secs(60));
    let waiting = tokio::spawn(async move { waiting.await.unwrap() });
    server.kill();
    guard.lost().await;
    // Requests, renewals, health checks and the inbox all fail repeatedly.
    for key in 0..10 {
        let limit = Duration::from_millis(200);
        locks.lock(key.to_string()).timeout(limit).await.unwrap_err();
    }
    server.restart();
    drop(waiting.await.unwrap());
    let back = || listener.lines("WARN message=the shard is back shard=away");
    eventually("the recovery is logged", PATIENCE, || !back().is_empty()).await;
    let lines = listener.lines("shard=away");
    let loud: Vec<_> = lines
        .iter()
        .filter(|line| line.starts_with("WARN") || line.starts_with("ERROR"))
        .collect();
    let [down, lost, back] = &loud[..] else {
        panic!("{loud:#?}")
    };
    assert!(down.starts_with("WARN message=the shard is down"), "{down}");
    assert!(lost.starts_with("WARN message=a lock was lost"), "{lost}");
    assert!(lost.contains("key=\"held-in-outage\""), "{lost}");
    assert!(
        back.contains("down_for=") && back.contains("failed_requests="),
        "{back}"
    );
    assert!(!loud.iter().any(|line| line.contains("Unavailable(")), "{loud:#?}");
}

/// It says what becomes of the lease, and why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn release_that_is_refused_until_its_lease_has_ended_is_logged() {
    let listener = listener();
    let server = RedisServer::start();
    let locks = builder().named_shard("refusing", server.url());
    let locks = locks.ttl(Duration::from_secs(1)).connect().await.unwrap();
    let guard = lock(&locks, "refused").await;
    server.command(&["SET", "{lock:refused}:q", "not a queue"]);
    drop(guard);
    let lines = || listener.lines("WARN message=leases of failed requests could not be released");
    let ours = || lines().into_iter().find(|line| line.contains("shard=refusing"));
    eventually("it is logged", PATIENCE, || ours().is_some()).await;
    let line = ours().unwrap();
    assert!(line.contains("those that exist expire with their ttl"), "{line}");
    assert!(line.contains("leases=1") && line.contains("WRONGTYPE"), "{line}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_hold_is_logged_while_it_lasts() {
    let listener = listener();
    let locks = builder()
        .named_shard("long", "memory://tracing-long")
        .long_hold(Duration::from_millis(50));
    let locks = locks.connect().await.unwrap();
    let line = line!() + 1;
    let guard = locks.lock("long-hold").await.unwrap();
    let warned = || listener.lines("WARN message=a lock has been held for a long time shard=long");
    eventually("the long hold is logged", PATIENCE, || !warned().is_empty()).await;
    assert!(guard.is_valid());
    assert!(
        warned()[0].contains(&format!("caller=tests/telemetry/tracing.rs:{line}:")),
        "{:?}",
        warned()
    );
    eventually("the key is logged at debug level", PATIENCE, || {
        let line = "DEBUG message=the lock held for a long time key=long-hold";
        !listener.lines(line).is_empty()
    })
    .await;
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_inbox_message_is_shown_at_debug_level_only() {
    let listener = listener();
    let server = RedisServer::start();
    let locks = builder().named_shard("strange", server.url());
    let locks = locks.connect().await.unwrap();
    eventually("the inbox is subscribed", PATIENCE, || !server.channels().is_empty()).await;
    server.command(&["PUBLISH", &server.channels()[0], "not a push about secret-key"]);
    let told = || listener.lines("message=the inbox message that is not in this version's format shard=strange");
    eventually("the malformed message is logged", PATIENCE, || !told().is_empty()).await;
    assert!(
        told()[0].starts_with("DEBUG") && told()[0].contains("secret-key"),
        "{told:?}",
        told = told()
    );
    let warned = listener.lines("WARN message=an inbox message is not in this version's format");
    assert!(warned.len() == 1 && !warned[0].contains("secret-key"), "{warned:?}");
    // Later pushes are still received.
    let other = builder().named_shard("strange", server.url());
    let other = other.connect().await.unwrap();
    hand_off(&other, &locks, "k").await;
}
