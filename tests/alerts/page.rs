//! The metrics page of a process under load.

use std::collections::BTreeSet;
use std::io::{Read, Seek, Write};
use std::net::{SocketAddr, TcpStream};

use shardlock::admin::Admin;
use shardlock::metrics::METRICS;
use shardlock::{LockManager, LockRequest};
use support::quorum::MAX_TTL;
use support::{PATIENCE, Quorum, RedisServer};
use tokio::sync::OnceCell;
use tokio::task::JoinSet;

use crate::promql;

/// The page as text.
#[derive(Debug)]
pub(crate) struct Page(String);

impl Page {
    /// The page of two managers that contend for a few keys on two kinds of shards, and of a third
    /// one that uses the other modes. There is only one, since a process has one recorder.
    pub(crate) async fn of_a_load() -> &'static Self {
        static PAGE: OnceCell<Page> = OnceCell::const_new();
        PAGE.get_or_init(load).await
    }

    /// The values of a label over the series with this name.
    pub(crate) fn values(&self, name: &str, label: &str) -> BTreeSet<String> {
        let lines = self.0.lines().filter(|line| line.split('{').next() == Some(name));
        let series = lines.map(|line| line.rsplit_once(' ').unwrap().0);
        let matchers = series.flat_map(|series| promql::names(series).selectors.remove(0).matchers);
        matchers
            .filter(|matcher| matcher.label == label)
            .map(|matcher| matcher.value)
            .collect()
    }
}

async fn load() -> Page {
    let admin = Admin::bind(([127, 0, 0, 1], 0).into()).unwrap();
    let (server, quorum) = (RedisServer::start(), Quorum::start(3));
    let builder = LockManager::builder()
        .named_shard("single", server.url())
        .named_shard("quorum", quorum.url())
        .ttl(MAX_TTL)
        .redlock_max_ttl(MAX_TTL)
        .hot_key_metrics(true);
    let (first, second) = (
        builder.clone().connect().await.unwrap(),
        builder.connect().await.unwrap(),
    );
    let serving = admin.serve(&first).unwrap();
    let mut tasks = JoinSet::new();
    for task in 0..16 {
        let locks = if task % 2 == 0 { first.clone() } else { second.clone() };
        tasks.spawn(async move {
            for round in 0..50 {
                pass(locks.lock(format!("hot-{}", round % 4))).await;
            }
            pass(locks.lock("hot-0").class("reports")).await;
        });
    }
    while let Some(done) = tasks.join_next().await {
        done.unwrap();
    }
    // In the same process, so its series are on the same page.
    let modes = LockManager::builder().named_shard("modes", "memory://modes");
    let modes = modes.connect().await.unwrap();
    for request in [modes.lock("k").shared(), modes.permits("p", 2)] {
        pass(request).await;
    }
    let page = Page(get(serving.address(), "/metrics"));
    for locks in [first, second, modes] {
        locks.shutdown().await.ok();
    }
    page
}

/// Locks and releases. On a busy machine, nodes of a quorum may reply late, which is also counted.
async fn pass(request: LockRequest) {
    match request.timeout(PATIENCE).await {
        // Nor does it matter whether the release was late.
        Ok(guard) => drop(guard.release().await),
        Err(error) => assert!(error.is_retryable(), "{error}"),
    }
}

/// The body of a page.
fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains(" 200 "), "{head}");
    body.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn promtool_accepts_the_metrics_of_a_load() {
    let page = Page::of_a_load().await;
    for metric in METRICS {
        let kind = format!("# TYPE {} {:?}\n", metric.name, metric.kind).to_lowercase();
        assert!(
            page.0.to_lowercase().contains(&kind),
            "{} is not on the page:\n{}",
            metric.name,
            page.0
        );
    }
    let mut input = tempfile::tempfile().unwrap();
    input.write_all(page.0.as_bytes()).unwrap();
    input.rewind().unwrap();
    let said = super::promtool(&["check", "metrics"], Some(input));
    assert_eq!(said, "");
}
