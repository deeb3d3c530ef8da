//! Every metric exists from the start, at 0, and each fault changes its own metric.

use std::collections::BTreeSet;
use std::future::IntoFuture;
use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use shardlock::LockManager;
use shardlock::config::Builder;
use shardlock::metrics::{METRICS, MetricKind};
use support::{ClientType, PATIENCE, RedisServer, eventually, wait_until, worker};
use support_locks::{STORE_TIMEOUT, lock, soon, until_queued};
use tokio::task::JoinSet;

/// The recorder of this process. Tests distinguish their series by the name of their shard.
fn recorder() -> &'static PrometheusHandle {
    static RECORDER: OnceLock<PrometheusHandle> = OnceLock::new();
    RECORDER.get_or_init(|| {
        let buckets = |name: &str| METRICS.iter().find(|metric| metric.name == name).unwrap().buckets();
        let mut builder = PrometheusBuilder::new();
        for metric in METRICS.iter().filter(|metric| metric.kind == MetricKind::Histogram) {
            let name = metrics_exporter_prometheus::Matcher::Full(metric.name.to_owned());
            builder = builder.set_buckets_for_metric(name, buckets(metric.name)).unwrap();
        }
        builder.install_recorder().unwrap()
    })
}

/// A builder for a manager whose series have this shard and class.
fn builder(name: &str, url: &str) -> Builder {
    recorder();
    let builder = LockManager::builder().store_timeout(STORE_TIMEOUT);
    builder.named_shard(name, url).class(name)
}

/// The series with this name and all these labels.
fn series(name: &str, labels: &[&str]) -> Vec<(String, f64)> {
    let page = recorder().render();
    let lines = page
        .lines()
        .filter(|line| line.split(['{', ' ']).next() == Some(name) && labels.iter().all(|label| line.contains(label)));
    lines
        .map(|line| {
            let (series, value) = line.rsplit_once(' ').unwrap();
            (series.to_owned(), value.parse().unwrap())
        })
        .collect()
}

/// The sum of these series.
fn sum(name: &str, labels: &[&str]) -> f64 {
    series(name, labels).iter().map(|(_, value)| value).sum()
}

async fn becomes(name: &str, labels: &[&str], wanted: impl Fn(f64) -> bool) {
    eventually(&format!("{name} {labels:?} has the expected value"), PATIENCE, || {
        wanted(sum(name, labels))
    })
    .await;
}

#[tokio::test]
async fn every_series_starts_at_zero() {
    let locks = builder("zero", "memory://metrics-zero").connect().await.unwrap();
    for metric in METRICS
        .iter()
        .filter(|metric| !metric.labels.contains(&"key") && !metric.labels.contains(&"node"))
    {
        let ours: &[&str] = if metric.labels.contains(&"shard") {
            &["shard=\"zero\""]
        } else if metric.labels.contains(&"class") {
            &["class=\"zero\""]
        } else {
            &[]
        };
        let name = match metric.kind {
            MetricKind::Histogram => format!("{}_count", metric.name),
            _ => metric.name.to_owned(),
        };
        let found = series(&name, ours);
        assert!(!found.is_empty(), "{name} has no series");
        for (series, value) in found {
            assert!(
                metric
                    .labels
                    .iter()
                    .all(|label| series.contains(&format!("{label}=\""))),
                "{series}"
            );
            if metric.name == "shardlock_shard_up" {
                assert_eq!(value, 1.0, "{series}");
            } else if !ours.is_empty() {
                assert_eq!(value, 0.0, "{series}");
            }
        }
    }
    let there = |name: &str, label: &str, values: &[&str]| {
        for value in values {
            let label = format!("{label}=\"{value}\"");
            assert_eq!(series(name, &["\"zero\"", &label]).len(), 1, "{name} {label}");
        }
    };
    let outcomes = [
        "busy",
        "timeout",
        "queue_full",
        "unavailable",
        "refused",
        "closed",
        "cancelled",
    ];
    there("shardlock_acquisitions_total", "outcome", &outcomes);
    there(
        "shardlock_acquisitions_total",
        "path",
        &["uncontended", "local", "remote", "lingering"],
    );
    there("shardlock_waiters", "mode", &["exclusive", "shared", "permits"]);
    // A class has dozens of series, so those of modes that nobody uses do not exist.
    let class = "class=\"zero\"";
    for mode in ["mode=\"shared\"", "mode=\"permits\"", "path=\"joined\""] {
        let found = series("shardlock_acquisitions_total", &[class, mode]);
        assert!(found.is_empty(), "{found:?}");
    }
    there(
        "shardlock_lost_total",
        "reason",
        &["expired", "taken", "max_hold", "closed"],
    );
    there(
        "shardlock_bypass_limits_total",
        "limit",
        &["gate", "max_burst", "max_slice"],
    );
    there("shardlock_hand_offs_total", "kind", &["local", "remote"]);
    there(
        "shardlock_renewals_total",
        "outcome",
        &["extended", "not_ours", "failed"],
    );
    for limit in ["max_waiters_per_key", "max_waiters", "max_keys"] {
        assert_eq!(
            series("shardlock_rejections_total", &[&format!("limit=\"{limit}\"")]).len(),
            1
        );
    }
    drop(locks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_exact_under_load_and_histograms_have_their_values() {
    let locks = builder("load", "memory://metrics-load").connect().await.unwrap();
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        let locks = locks.clone();
        tasks.spawn(async move {
            for _ in 0..1000 {
                lock(&locks, "k").await.release().await.unwrap();
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    let acquired = ["class=\"load\"", "outcome=\"acquired\""];
    becomes("shardlock_acquisitions_total", &acquired, |value| value == 8000.0).await;
    let local = sum("shardlock_acquisitions_total", &["class=\"load\"", "path=\"local\""]);
    assert_eq!(
        sum("shardlock_hand_offs_total", &["shard=\"load\"", "kind=\"local\""]),
        local
    );
    for name in ["shardlock_wait_seconds_count", "shardlock_hold_seconds_count"] {
        assert!((1.0..=8000.0).contains(&sum(name, &["class=\"load\""])), "{name}");
    }
    assert!(sum("shardlock_validity_left_ratio_count", &["shard=\"load\""]) >= 1.0);
    assert_eq!(
        sum(
            "shardlock_validity_left_ratio_bucket",
            &["shard=\"load\"", "le=\"0.5\""]
        ),
        0.0
    );
    // Each guard belongs to a batch.
    let state = &locks.shard_states()[0];
    assert_eq!((state.acquired, state.local as f64), (8000, local));
    becomes("shardlock_local_batch_size_sum", &["shard=\"load\""], |value| {
        value >= 1.0
    })
    .await;
    for gauge in ["shardlock_leases", "shardlock_waiters"] {
        becomes(gauge, &["shard=\"load\""], |value| value == 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_loss_is_counted_under_its_reason() {
    let server = RedisServer::start();
    // Long enough that no lease expires by itself on a busy machine.
    let ttl = Duration::from_secs(3);
    let locks = builder("lost", &server.url()).ttl(ttl).connect().await.unwrap();
    let lost = async |reason: &str| {
        becomes(
            "shardlock_lost_total",
            &["shard=\"lost\"", &format!("reason=\"{reason}\"")],
            |value| value == 1.0,
        )
        .await;
    };
    let taken = lock(&locks, "taken").await;
    server.command(&["DEL", "lock:taken"]);
    soon("the loss", taken.lost()).await;
    lost("taken").await;
    becomes("shardlock_renewals_total", &["shard=\"lost\"", "not_ours"], |value| {
        value >= 1.0
    })
    .await;

    let stuck = locks.lock("stuck").max_hold(Duration::from_millis(50)).await.unwrap();
    soon("the loss", stuck.lost()).await;
    lost("max_hold").await;

    let expired = lock(&locks, "expired").await;
    server.stop();
    soon("the loss", expired.lost()).await;
    lost("expired").await;
    becomes("shardlock_renewals_total", &["shard=\"lost\"", "failed"], |value| {
        value >= 1.0
    })
    .await;
    becomes("shardlock_shard_up", &["shard=\"lost\""], |value| value == 0.0).await;
    server.cont();
    becomes("shardlock_shard_up", &["shard=\"lost\""], |value| value == 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn subscription_reconnects_and_stale_grants_are_counted() {
    let server = RedisServer::start();
    let locks = builder("pushes", &server.url()).connect().await.unwrap();
    let ours = ["shard=\"pushes\""];
    assert_eq!(sum("shardlock_subscription_reconnects_total", &ours), 0.0);
    server.client_kill(ClientType::PubSub);
    becomes("shardlock_subscription_reconnects_total", &ours, |value| value == 1.0).await;

    assert_eq!(sum("shardlock_stale_grants_total", &ours), 0.0);
    let inbox = server.channels().pop().expect("an inbox");
    let guard = lock(&locks, "k").await;
    let (_, over) = server.owners().pop().expect("a lease");
    guard.release().await.unwrap();
    let grant = |key: &str| server.query::<i64>(&["PUBLISH", &inbox, &format!("g {over} 90 8 0 {key}")]);
    assert_eq!(grant("nobody-wants-it"), 1);
    becomes("shardlock_stale_grants_total", &ours, |value| value == 1.0).await;
    // A grant for a key in use, but for a finished cycle.
    let guard = lock(&locks, "k").await;
    grant("k");
    becomes("shardlock_stale_grants_total", &ours, |value| value == 2.0).await;
    assert!(guard.is_valid());
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn killed_server_is_reported_down_even_without_requests() {
    let server = RedisServer::start();
    let locks = builder("idle", &server.url()).connect().await.unwrap();
    assert!(locks.shard_states()[0].is_up);
    assert_eq!(sum("shardlock_shard_up", &["shard=\"idle\""]), 1.0);
    server.kill();
    becomes("shardlock_shard_up", &["shard=\"idle\""], |value| value == 0.0).await;
    assert!(!locks.shard_states()[0].is_up);
    server.restart();
    becomes("shardlock_shard_up", &["shard=\"idle\""], |value| value == 1.0).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bypass_limits_and_batch_sizes_are_counted() {
    let server = RedisServer::start();
    let first = builder("bypass", &server.url())
        .max_burst(3)
        .max_slice(Duration::from_secs(10));
    let first = first.connect().await.unwrap();
    // The second manager has the same shard name, and thus the same series.
    let second = builder("bypass", &server.url()).connect().await.unwrap();
    let guard = lock(&first, "k").await;
    let other = tokio::spawn(async move { lock(&second, "k").await.release().await });
    until_queued(&first, "k", 1).await;
    let mut tasks = JoinSet::new();
    for _ in 0..9 {
        let first = first.clone();
        tasks.spawn(async move { lock(&first, "k").await.release().await });
    }
    becomes("shardlock_waiters", &["shard=\"bypass\""], |value| value == 9.0).await;
    guard.release().await.unwrap();
    while let Some(done) = tasks.join_next().await {
        done.unwrap().unwrap();
    }
    other.await.unwrap().unwrap();
    becomes(
        "shardlock_bypass_limits_total",
        &["shard=\"bypass\"", "max_burst"],
        |value| value >= 1.0,
    )
    .await;
    assert_eq!(
        sum("shardlock_bypass_limits_total", &["shard=\"bypass\"", "max_slice"]),
        0.0
    );
    // Eleven guards in total, each in one batch.
    becomes("shardlock_local_batch_size_sum", &["shard=\"bypass\""], |value| {
        value == 11.0
    })
    .await;
    assert!(sum("shardlock_local_batch_size_count", &["shard=\"bypass\""]) >= 2.0);
    becomes("shardlock_hand_offs_total", &["shard=\"bypass\"", "remote"], |value| {
        value >= 1.0
    })
    .await;
}

#[tokio::test]
async fn a_refusal_is_counted_under_its_limit() {
    let locks = builder("refusals", "memory://metrics-refusals")
        .max_waiters_per_key(1)
        .max_keys(1)
        .connect()
        .await
        .unwrap();
    let before = |limit: &str| sum("shardlock_rejections_total", &[limit]);
    let (per_key, keys) = (before("max_waiters_per_key"), before("max_keys"));
    let guard = lock(&locks, "k").await;
    let mut waiting = Box::pin(locks.lock("k").into_future());
    assert!(support_locks::poll_once(&mut waiting).is_none());
    locks.lock("k").await.unwrap_err();
    locks.lock("other").await.unwrap_err();
    locks.try_lock("another").await.unwrap_err();
    assert_eq!(before("max_waiters_per_key"), per_key + 1.0);
    assert_eq!(before("max_keys"), keys + 2.0);
    becomes(
        "shardlock_acquisitions_total",
        &["class=\"refusals\"", "queue_full"],
        |value| value == 3.0,
    )
    .await;
    drop(waiting);
    becomes(
        "shardlock_acquisitions_total",
        &["class=\"refusals\"", "cancelled"],
        |value| value == 1.0,
    )
    .await;
    guard.release().await.unwrap();
}

#[tokio::test]
async fn longest_hold_and_wait_are_reported() {
    let locks = builder("oldest", "memory://metrics-oldest").connect().await.unwrap();
    let guard = lock(&locks, "k").await;
    let waiting = tokio::spawn({
        let locks = locks.clone();
        async move { lock(&locks, "k").await.release().await }
    });
    becomes("shardlock_oldest_guard_seconds", &["shard=\"oldest\""], |value| {
        value > 0.5
    })
    .await;
    becomes("shardlock_oldest_waiter_seconds", &["shard=\"oldest\""], |value| {
        value > 0.5
    })
    .await;
    becomes("shardlock_leases", &["shard=\"oldest\""], |value| value == 1.0).await;
    guard.release().await.unwrap();
    waiting.await.unwrap().unwrap();
    becomes("shardlock_oldest_guard_seconds", &["shard=\"oldest\""], |value| {
        value == 0.0
    })
    .await;
    becomes("shardlock_oldest_waiter_seconds", &["shard=\"oldest\""], |value| {
        value == 0.0
    })
    .await;
    becomes("shardlock_leases", &["shard=\"oldest\""], |value| value == 0.0).await;
}

/// One key: the holder, the first waiter and the second waiter are of different classes, so an
/// alert can exempt one of them.
#[tokio::test]
async fn longest_hold_and_wait_are_reported_by_class() {
    let locks = builder("by-class", "memory://metrics-by-class")
        .connect()
        .await
        .unwrap();
    let oldest = |what: &str, class: &str| {
        let name = format!("shardlock_oldest_{what}_seconds");
        sum(&name, &["shard=\"by-class\"", &format!("class=\"{class}\"")])
    };
    let guard = locks.lock("k").class("leader").await.unwrap();
    let waiting = ["standby", "job"].map(|class| Box::pin(locks.lock("k").class(class).into_future()));
    let [mut standby, mut job] = waiting;
    assert!(support_locks::poll_once(&mut standby).is_none());
    assert!(support_locks::poll_once(&mut job).is_none());
    eventually("each class has its own longest hold or wait", PATIENCE, || {
        let long = |what, class| oldest(what, class) > 0.5;
        long("guard", "leader") && long("waiter", "standby") && long("waiter", "job")
    })
    .await;
    for (what, class) in [("guard", "standby"), ("guard", "job"), ("waiter", "leader")] {
        assert_eq!(oldest(what, class), 0.0, "{what} {class}");
    }
    drop(standby);
    eventually("the wait of a class is over", PATIENCE, || {
        oldest("waiter", "standby") == 0.0
    })
    .await;
    assert!(oldest("waiter", "job") > 0.5 && oldest("guard", "leader") > 0.5);
    guard.release().await.unwrap();
    job.await.unwrap().release().await.unwrap();
    eventually("all is over", PATIENCE, || {
        oldest("waiter", "job") + oldest("guard", "leader") + oldest("guard", "job") == 0.0
    })
    .await;
}

/// Readers, writers and holders of permits are counted apart.
#[tokio::test]
async fn each_mode_is_counted_separately() {
    let locks = builder("modes", "memory://metrics-modes").connect().await.unwrap();
    let of = |name: &str, mode: &str| sum(name, &["\"modes\"", &format!("mode=\"{mode}\"")]);
    let become_of = async |name: &str, wanted: [f64; 3]| {
        eventually(&format!("{name} is {wanted:?}"), PATIENCE, || {
            ["exclusive", "shared", "permits"].map(|mode| of(name, mode)) == wanted
        })
        .await;
    };
    let permits = async |name: &str, wanted: f64| becomes(name, &["\"modes\""], |value| value == wanted).await;

    let writer = lock(&locks, "written").await;
    let readers = [locks.lock("read").shared().await, locks.lock("read").shared().await];
    let holders = [2, 3].map(|weight| locks.permits("mail", 5).weight(weight));
    let [two, three] = holders;
    let holders = [two.await, three.await];
    let mut late_reader = Box::pin(locks.lock("written").shared().into_future());
    let mut late_holder = Box::pin(locks.permits("mail", 5).into_future());
    assert!(support_locks::poll_once(&mut late_reader).is_none());
    assert!(support_locks::poll_once(&mut late_holder).is_none());
    become_of("shardlock_guards", [1.0, 2.0, 2.0]).await;
    become_of("shardlock_waiters", [0.0, 1.0, 1.0]).await;
    permits("shardlock_permits_in_use", 5.0).await;
    permits("shardlock_permits_limit", 5.0).await;

    writer.release().await.unwrap();
    for guard in readers.into_iter().chain(holders) {
        guard.unwrap().release().await.unwrap();
    }
    late_reader.await.unwrap().release().await.unwrap();
    late_holder.await.unwrap().release().await.unwrap();
    become_of("shardlock_waiters", [0.0; 3]).await;
    become_of("shardlock_wait_seconds_count", [1.0, 3.0, 3.0]).await;
    become_of("shardlock_hold_seconds_count", [1.0, 3.0, 3.0]).await;
    become_of("shardlock_acquisitions_total", [1.0, 3.0, 3.0]).await;
    let joined = ["class=\"modes\"", "mode=\"shared\"", "path=\"joined\""];
    assert_eq!(sum("shardlock_acquisitions_total", &joined), 1.0);
    become_of("shardlock_guards", [0.0; 3]).await;
    permits("shardlock_permits_in_use", 0.0).await;
    permits("shardlock_permits_limit", 0.0).await;
}

#[tokio::test]
async fn permits_and_their_limits_are_reported_by_class() {
    let locks = builder("permits", "memory://metrics-permits").connect().await.unwrap();
    let of_class = async |class: &str, in_use: f64, limit: f64| {
        eventually(&format!("{class} has {in_use} of {limit}"), PATIENCE, || {
            let value = |name| sum(name, &["shard=\"permits\"", &format!("class=\"{class}\"")]);
            value("shardlock_permits_in_use") == in_use && value("shardlock_permits_limit") == limit
        })
        .await;
    };
    let small = [
        locks.permits("a", 4).class("small").await.unwrap(),
        locks.permits("b", 6).weight(2).class("small").await.unwrap(),
    ];
    let big = locks.permits("c", 10).class("big").await.unwrap();
    of_class("small", 3.0, 10.0).await;
    of_class("big", 1.0, 10.0).await;
    // A request with an older, smaller limit: the smallest counts.
    let older = locks.permits("a", 3).class("small").await.unwrap();
    of_class("small", 4.0, 9.0).await;
    // A class that only waits has a limit, too.
    let mut waiting = Box::pin(locks.permits("a", 2).class("late").into_future());
    assert!(support_locks::poll_once(&mut waiting).is_none());
    of_class("late", 0.0, 2.0).await;
    for guard in small.into_iter().chain([big, older]) {
        guard.release().await.unwrap();
    }
    waiting.await.unwrap().release().await.unwrap();
    for class in ["small", "big", "late"] {
        of_class(class, 0.0, 0.0).await;
    }
}

#[tokio::test]
async fn classes_beyond_the_limit_are_merged() {
    let locks = builder("classes", "memory://metrics-classes")
        .max_classes(3)
        .connect()
        .await
        .unwrap();
    for number in 0..50 {
        let class = format!("made-from-data-{number}");
        locks.lock("k").class(&class).await.unwrap().release().await.unwrap();
    }
    let acquired = ["outcome=\"acquired\"", "path=\"uncontended\""];
    becomes("shardlock_acquisitions_total", &["other", acquired[0]], |value| {
        value >= 47.0
    })
    .await;
    let found: BTreeSet<_> = series(
        "shardlock_acquisitions_total",
        &["made-from-data-", acquired[0], acquired[1]],
    )
    .into_iter()
    .collect::<Vec<_>>()
    .into_iter()
    .map(|(series, _)| series)
    .collect();
    assert_eq!(found.len(), 3, "{found:?}");
}

/// Reports the number and the total duration of its stalls, each time the test asks.
#[tokio::main]
pub(crate) async fn report_stalls(me: &worker::Current) {
    let locks = builder("stalls", "memory://metrics-stalls").connect().await.unwrap();
    me.send("connected");
    while me.recv().is_some() {
        let (count, seconds) = (
            sum("shardlock_runtime_stalls_total", &[]),
            sum("shardlock_runtime_stall_seconds_sum", &[]),
        );
        me.send(format!("{count} {seconds}"));
    }
    drop(locks);
}

#[test]
fn a_process_that_was_stopped_has_stalled() {
    let mut stopped = worker::spawn("stopped", &[]);
    assert_eq!(stopped.line(), "connected");
    let ask = |worker: &mut worker::Worker| -> (f64, f64) {
        worker.send("stalls?");
        let line = worker.line();
        let (count, seconds) = line.split_once(' ').unwrap();
        (count.parse().unwrap(), seconds.parse().unwrap())
    };
    let (before, _) = ask(&mut stopped);
    let start = std::time::Instant::now();
    stopped.stop();
    wait_until("the process has been stopped for a second", PATIENCE, || {
        start.elapsed() > Duration::from_secs(1)
    });
    stopped.cont();
    wait_until("the stall is counted", PATIENCE, || {
        let (count, seconds) = ask(&mut stopped);
        count > before && seconds > 0.8
    });
}
