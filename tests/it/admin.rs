//! The admin endpoint: what it shows, and what input it withstands.

use std::future::IntoFuture;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::Value;
use shardlock::LockManager;
use shardlock::admin::{Admin, AdminError, AdminServer};
use shardlock::config::Builder;
use support::prometheus::Prometheus;
use support::{PATIENCE, RedisServer, directory, wait_until, worker};
use support_locks::{STORE_TIMEOUT, connect, lock, poll_once};

/// Settings for a busy machine.
fn builder() -> Builder {
    LockManager::builder().store_timeout(STORE_TIMEOUT)
}

/// Starts an endpoint on a free port for a manager with these settings. The test provides the text
/// that the recorder renders.
pub(crate) async fn serve(builder: Builder) -> (LockManager, AdminServer) {
    let admin = Admin::bind_with(([127, 0, 0, 1], 0).into(), || "# of the recorder\n".to_owned()).unwrap();
    let locks = builder.connect().await.unwrap();
    let server = admin.serve(&locks).unwrap();
    (locks, server)
}

/// Sends these bytes and returns everything received.
fn exchange(address: SocketAddr, bytes: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // The server may close the connection before it has read everything.
    stream.write_all(bytes).ok();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).ok();
    String::from_utf8(answer).unwrap()
}

/// The status and the body of a page.
pub(crate) fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = exchange(
        address,
        format!("GET {path} HTTP/1.1\r\nHost: {address}\r\n\r\n").as_bytes(),
    );
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .unwrap_or_else(|| panic!("no page: {answer:?}"));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, body.to_owned())
}

fn json(address: SocketAddr, path: &str) -> Value {
    let (status, body) = get(address, path);
    assert_eq!(status, 200, "{path}: {body}");
    serde_json::from_str(&body).unwrap_or_else(|error| panic!("{path}: {error}: {body}"))
}

/// The number of acquisitions in [`serve_many_locks`], and that of its tasks.
const MANY: u64 = 200_000;
const TASKS: u64 = 8;

/// Acquires locks as fast as it can on all paths within a process, in two managers, and serves the
/// metrics until the test closes the pipe.
#[tokio::main(flavor = "multi_thread", worker_threads = 4)]
pub(crate) async fn serve_many_locks(me: &worker::Current) {
    let admin = Admin::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let builder = builder().named_shard("many", "memory://admin-many");
    let managers = [
        builder.clone().connect().await.unwrap(),
        builder.connect().await.unwrap(),
    ];
    let server = admin.serve(&managers[0]).unwrap();
    let start = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for task in 0..TASKS {
        let locks = managers[usize::from(task == 0)].clone();
        tasks.spawn(async move {
            let own = format!("own-{task}");
            for number in 0..MANY / TASKS {
                let request = match number % 4 {
                    0 => locks.lock(&own).linger(Duration::from_secs(60)),
                    _ => locks.lock(if task == 0 { "other" } else { "hot" }),
                };
                let guard = request.class("many").await.unwrap();
                // Both ways to release a guard count.
                if number % 8 == 4 {
                    drop(guard);
                } else {
                    guard.release().await.unwrap();
                }
            }
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    // Ends the batches of the leases that linger.
    for locks in &managers {
        locks.shutdown().await.unwrap();
    }
    me.send(server.address().to_string());
    me.send(start.elapsed().as_secs_f64().to_string());
    while me.recv().is_some() {}
}

/// The lines of a page that contain this text.
fn lines_with(page: &str, text: &str) -> String {
    let lines = page.lines().filter(|line| line.contains(text));
    lines.map(|line| format!("{line}\n")).collect()
}

/// The values of all series with this name, in the order of the page.
fn values(page: &str, name: &str) -> Vec<f64> {
    let lines = page.lines().filter(|line| line.split(['{', ' ']).next() == Some(name));
    lines
        .map(|line| line.rsplit_once(' ').unwrap().1.parse().unwrap())
        .collect()
}

/// `_count` used to have a sample of the locks above 20,000 per second.
#[test]
fn histograms_count_every_lock_at_high_rates() {
    let worker = worker::spawn("endpoint", &[]);
    // A busy machine takes long for so many locks.
    let address = worker.line_within(PATIENCE * 6).expect("the locks were acquired");
    let address: SocketAddr = address.parse().unwrap();
    let took: f64 = worker.line().parse().unwrap();
    let (status, page) = get(address, "/metrics");
    assert_eq!(status, 200);
    // The other lines are of classes that nobody used.
    let many = lines_with(&page, "\"many\"");
    let sum = |name: &str| values(&many, name).iter().sum::<f64>();
    let all = MANY as f64;
    assert_eq!(sum("shardlock_acquisitions_total"), all, "{many}");
    for name in [
        "shardlock_wait_seconds",
        "shardlock_hold_seconds",
        "shardlock_validity_left_ratio",
    ] {
        let buckets = values(&many, &format!("{name}_bucket"));
        assert!(buckets.is_sorted(), "{name}: {buckets:?}");
        assert_eq!(buckets.last(), Some(&all), "{name}: {buckets:?}");
        assert_eq!(values(&many, &format!("{name}_count")), [all], "{name}");
        let (total, most) = match name {
            "shardlock_validity_left_ratio" => (sum("shardlock_validity_left_ratio_sum"), all),
            // Each task waits or holds at most all the time.
            name => (sum(&format!("{name}_sum")), took * TASKS as f64),
        };
        assert!(total > 0.0 && total <= most, "{name}: {total} of {most}");
    }
    // Each guard belongs to one batch, and each answered request has a round trip.
    assert_eq!(sum("shardlock_local_batch_size_sum"), all);
    let answered: f64 = values(&lines_with(&many, "\"answered\""), "shardlock_store_requests_total")
        .iter()
        .sum();
    assert!(answered > 0.0);
    assert_eq!(sum("shardlock_store_round_trip_seconds_count"), answered);

    let dir = directory("many");
    let targets = dir.path().join("targets.json");
    std::fs::write(&targets, format!("[{{\"targets\": [\"{address}\"]}}]")).unwrap();
    let prometheus = Prometheus::start(&targets);
    let query = |expression: &str| -> Option<f64> { Some(prometheus.query(expression).first()?.value) };
    wait_until("Prometheus has scraped the process", PATIENCE, || {
        query("shardlock_wait_seconds_count{class=\"many\"}").is_some()
    });
    assert_eq!(query("shardlock_wait_seconds_count{class=\"many\"}"), Some(all));
    assert_eq!(
        query("shardlock_hold_seconds_bucket{class=\"many\", le=\"+Inf\"}"),
        Some(all)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn held_locks_are_listed_oldest_first_with_caller_and_waiters() {
    let (locks, admin) = serve(builder().named_shard("m", "memory://admin-held")).await;
    let line = line!() + 1;
    let old = locks.lock("old").await.unwrap();
    let young = lock(&locks, "young \"quoted\"").await;
    let mut waiting = Box::pin(locks.lock("old").into_future());
    assert!(poll_once(&mut waiting).is_none());
    let held = json(admin.address(), "/held");
    assert_eq!(held["total"], 2);
    let (first, second) = (&held["held"][0], &held["held"][1]);
    assert_eq!(
        (&first["key"], &second["key"]),
        (&"old".into(), &"young \"quoted\"".into())
    );
    assert_eq!(first["token"], old.token().get());
    assert_eq!(first["owner"], old.owner());
    assert_eq!(
        (&first["shard"], &first["waiters"], &second["waiters"]),
        (&"m".into(), &1.into(), &0.into())
    );
    assert!(first["age_ms"].as_f64().unwrap() >= second["age_ms"].as_f64().unwrap());
    assert!(first["remaining_ms"].as_f64().unwrap() > 1000.0);
    let place = first["caller"].as_str().unwrap();
    assert!(place.starts_with(&format!("tests/it/admin.rs:{line}:")), "{place}");
    assert_eq!(locks.held().len(), 2);
    drop(waiting);
    old.release().await.unwrap();
    young.release().await.unwrap();
    assert_eq!(
        json(admin.address(), "/held"),
        serde_json::json!({"total": 0, "held": []})
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hottest_keys_are_shown_and_uncontended_ones_are_not() {
    let builder = builder()
        .named_shard("m", "memory://admin-hot")
        .hot_keys(8)
        .hot_key_metrics(true);
    let (locks, admin) = serve(builder).await;
    for number in 0..500 {
        lock(&locks, &format!("cold-{number}")).await.release().await.unwrap();
    }
    assert_eq!(json(admin.address(), "/hot"), serde_json::json!({"keys": [], "k": 8}));
    // A hundred keys are contended once each, two of them often.
    for number in 0..100 {
        let key = format!("warm-{number}");
        let guard = lock(&locks, &key).await;
        assert!(locks.try_lock(&key).await.unwrap().is_none());
        guard.release().await.unwrap();
    }
    for (key, tries) in [("hot", 300), ("hotter", 700)] {
        let guard = lock(&locks, key).await;
        for _ in 0..tries {
            assert!(locks.try_lock(key).await.unwrap().is_none());
        }
        guard.release().await.unwrap();
    }
    let guard = lock(&locks, "hot").await;
    let mut waiting = Box::pin(locks.lock("hot").into_future());
    assert!(poll_once(&mut waiting).is_none());
    let start = Instant::now();
    wait_until("the wait is long enough", PATIENCE, || {
        start.elapsed() > Duration::from_millis(100)
    });
    guard.release().await.unwrap();
    let guard = waiting.await.unwrap();
    let mut waiting = Box::pin(locks.lock("hot").into_future());
    assert!(poll_once(&mut waiting).is_none());

    let hot = json(admin.address(), "/hot");
    let keys = hot["keys"].as_array().unwrap();
    assert_eq!(keys.len(), 8);
    for (key, name, truth) in [(&keys[0], "hotter", 700), (&keys[1], "hot", 301)] {
        assert_eq!(key["key"], name);
        let (contended, error) = (
            key["contended"].as_u64().unwrap(),
            key["overcount_max"].as_u64().unwrap(),
        );
        assert!(contended >= truth && contended - error <= truth, "{key}");
    }
    let hot = &keys[1];
    assert_eq!(
        (&hot["shard"], &hot["waiters"], &hot["acquired"]),
        (&"m".into(), &1.into(), &1.into())
    );
    assert_eq!(hot["holder"]["token"], guard.token().get());
    let wait = |part: &str| hot["wait_ms"][part].as_f64().unwrap();
    assert!(
        wait("max") >= 100.0 && wait("p99") <= wait("max") && wait("p50") >= 50.0,
        "{hot}"
    );
    assert_eq!(keys[0]["holder"], Value::Null);

    let (_, page) = get(admin.address(), "/metrics");
    let series: Vec<_> = page
        .lines()
        .filter(|line| line.starts_with("shardlock_hot_key_contention{"))
        .collect();
    assert_eq!(series.len(), 8, "{page}");
    assert!(
        series[0].starts_with("shardlock_hot_key_contention{key=\"hotter\",shard=\"m\"} "),
        "{page}"
    );
    drop(waiting);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_shards_are_shown_with_their_figures_and_without_addresses() {
    let server = RedisServer::start_with(&["--requirepass", "s3cret"]);
    let url = format!("redis://:s3cret@{}", server.address());
    let builder = builder()
        .named_shard("one", &url)
        .named_shard("m", "memory://admin-shards");
    let (locks, admin) = serve(builder).await;
    for number in 0..50 {
        lock(&locks, &number.to_string()).await.release().await.unwrap();
    }
    let shards = json(admin.address(), "/shards");
    assert_eq!(shards["manager"], locks.id());
    assert!(shards["uptime_s"].as_f64().unwrap() >= 0.0);
    let (one, memory) = (&shards["shards"][0], &shards["shards"][1]);
    assert_eq!(
        (&one["name"], &one["kind"], &one["up"]),
        (&"one".into(), &"redis".into(), &true.into())
    );
    assert_eq!((&memory["name"], &memory["kind"]), (&"m".into(), &"memory".into()));
    let acquired = |shard: &Value| shard["acquired"].as_u64().unwrap();
    assert_eq!(acquired(one) + acquired(memory), 50);
    assert!(acquired(one) > 0 && one["round_trip_ms"]["p99"].as_f64().unwrap() > 0.0);
    let guard = lock(&locks, "k").await;
    for path in ["/metrics", "/readyz", "/hot", "/held", "/shards", "/nothing"] {
        let (_, body) = get(admin.address(), path);
        assert!(
            !body.contains("s3cret") && !body.contains(&server.port().to_string()),
            "{path}: {body}"
        );
    }
    guard.release().await.unwrap();
}

#[tokio::test]
async fn only_reads_with_a_local_host_name_are_answered() {
    let (_locks, admin) = serve(builder().shard("memory://admin-limits")).await;
    let address = admin.address();
    let status = |request: &str| {
        exchange(address, request.as_bytes())
            .lines()
            .next()
            .unwrap_or_default()
            .to_owned()
    };
    assert_eq!(
        status("GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        "HTTP/1.1 404 Not Found"
    );
    assert_eq!(
        status("POST /held HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"),
        "HTTP/1.1 405 Method Not Allowed"
    );
    assert_eq!(
        status("GET /held HTTP/1.1\r\nHost: evil.example:9187\r\n\r\n"),
        "HTTP/1.1 403 Forbidden"
    );
    assert_eq!(
        status("GET /held HTTP/1.1\r\nHost: LOCALHOST:9187\r\n\r\n"),
        "HTTP/1.1 200 OK"
    );
    assert_eq!(
        status("GET /held HTTP/1.1\r\nHost: [::1]:9187\r\n\r\n"),
        "HTTP/1.1 200 OK"
    );
    assert_eq!(status("GET /held?a=b HTTP/1.0\r\n\r\n"), "HTTP/1.0 200 OK");
    let head = exchange(address, b"HEAD /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert!(head.starts_with("HTTP/1.1 200") && head.ends_with("\r\n\r\n"), "{head}");
    // Malformed and oversized requests are ended.
    assert!(!status("nonsense\r\n\r\n").contains("200"));
    let large = format!(
        "GET /healthz HTTP/1.1\r\nHost: localhost\r\nX: {}\r\n\r\n",
        "x".repeat(100_000)
    );
    assert!(!status(&large).contains("200"));
    let many = format!(
        "GET /healthz HTTP/1.1\r\nHost: localhost\r\n{}\r\n",
        "X: y\r\n".repeat(200)
    );
    assert!(!status(&many).contains("200"));
    assert_eq!(get(address, "/healthz").0, 200);
}

#[tokio::test]
async fn program_can_add_pages_and_replaces_none() {
    let admin = Admin::bind_with(([127, 0, 0, 1], 0).into(), String::new).unwrap();
    let admin = admin
        .json_page("/jobs", || r#"{"jobs":7}"#.to_owned())
        .json_page("/held", || unreachable!("it is a page of the endpoint"));
    let locks = connect("memory://admin-pages").await;
    let server = admin.serve(&locks).unwrap();
    assert_eq!(json(server.address(), "/jobs")["jobs"], 7);
    assert_eq!(json(server.address(), "/held")["total"], 0);
    let (status, body) = get(server.address(), "/job");
    assert!(status == 404 && body.contains("/shards, /jobs"), "{body}");
    // The endpoint does not keep the manager alive, and neither do the pages.
    drop(locks);
    assert_eq!(json(server.address(), "/jobs")["jobs"], 7);
}

#[tokio::test]
async fn idle_connections_do_not_block_others_for_long() {
    let (_locks, admin) = serve(builder().shard("memory://admin-idle")).await;
    let idle: Vec<_> = (0..40).map(|_| TcpStream::connect(admin.address()).unwrap()).collect();
    // Idle connections are closed after five seconds, 32 at a time.
    assert_eq!(get(admin.address(), "/healthz").0, 200);
    drop(idle);
}

#[tokio::test]
async fn address_in_use_is_an_error_and_a_dropped_endpoint_frees_its_address() {
    let (locks, admin) = serve(builder().shard("memory://admin-address")).await;
    let address = admin.address();
    let error = Admin::bind_with(address, String::new).unwrap_err();
    assert!(
        matches!(error, AdminError::Bind { .. }) && error.to_string().contains(&address.to_string()),
        "{error}"
    );
    drop(admin);
    wait_until("the address is free", PATIENCE, || {
        Admin::bind_with(address, String::new).is_ok()
    });
    drop(locks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn installed_recorder_has_all_metrics_with_buckets_and_help() {
    let admin = Admin::bind(([127, 0, 0, 1], 0).into()).unwrap();
    // A process has only one recorder.
    assert!(matches!(
        Admin::bind(([127, 0, 0, 1], 0).into()),
        Err(AdminError::RecorderTaken)
    ));
    let locks = connect("memory://admin-metrics").await;
    let server = admin.serve(&locks).unwrap();
    // Uses its own class: other tests of this process share the recorder.
    let guard = locks.lock("k").class("recorder").await.unwrap();
    guard.release().await.unwrap();
    let (status, page) = get(server.address(), "/metrics");
    assert_eq!(status, 200);
    for metric in shardlock::metrics::METRICS
        .iter()
        .filter(|metric| !["key", "node"].iter().any(|label| metric.labels.contains(label)))
    {
        assert!(
            page.contains(&format!("# HELP {} {}", metric.name, metric.meaning)),
            "{}",
            metric.name
        );
        if let Some(last) = metric.buckets().last() {
            let bucket = format!("le=\"{last}\"");
            let name = format!("{}_bucket{{", metric.name);
            assert!(
                page.lines()
                    .any(|line| line.starts_with(&name) && line.contains(&bucket)),
                "{name} {bucket}"
            );
        }
    }
    // Metrics are flushed before the page is rendered, rather than at the next interval.
    let labels = "class=\"recorder\",mode=\"exclusive\",outcome=\"acquired\",path=\"uncontended\"";
    let acquired = format!("shardlock_acquisitions_total{{{labels}}} 1");
    assert!(page.contains(&acquired), "{page}");
}
