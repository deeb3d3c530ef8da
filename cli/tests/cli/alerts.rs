//! A real server that refuses locks: the agent is not ready, and a real Prometheus has alerts.
//!
//! Alerts fire after a minute or more, which promtool tests with a clock of its own
//! (`tests/alerts`). Here they become pending. With `SHARDLOCK_TEST_ALERTS_FIRE=1`, this test uses
//! the intervals of `config/prometheus/prometheus.yml`, waits until they fire, and prints how long
//! that took; see tests/README.md.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::prometheus::Prometheus;
use support::{PATIENCE, RedisServer, RespClient, directory, wait_until};

use crate::exec::metrics::get;
use crate::tool::{Run, tool};

/// The variable that selects the long variant.
const FIRE: &str = "SHARDLOCK_TEST_ALERTS_FIRE";
/// The time within which operators must know.
const FIRES_WITHIN: Duration = Duration::from_secs(120);
/// The shortest and the longest interval at which the alerts' state is read.
const PAUSE: Duration = Duration::from_millis(100);

/// Takes and releases locks until the test is over. Errors are expected.
fn request_locks(socket: &Path, is_over: &AtomicBool) {
    let mut client = RespClient::unix(socket).expect("connect to the agent");
    let mut number = 0;
    while !is_over.load(Ordering::Relaxed) {
        number += 1;
        let key = format!("job:{}", number % 10);
        if let redis::Value::Int(token) = client.call(&["LOCK", &key]) {
            client.call(&["UNLOCK", &key, &token.to_string()]);
        }
        std::thread::sleep(PAUSE);
    }
}

fn count(prometheus: &Prometheus, expression: &str) -> usize {
    prometheus.query(expression).len()
}

#[test]
fn agent_on_a_server_that_is_out_of_memory_is_not_ready_and_alerts() {
    let fires = std::env::var_os(FIRE).is_some();
    let server = RedisServer::start_with(&["--maxmemory-policy", "noeviction"]);
    let dir = directory("alerts");
    let (socket, targets) = (dir.path().join("agent.sock"), dir.path().join("targets.json"));
    let arguments = ["serve", "--metrics", "127.0.0.1:0", "--socket"];
    let mut agent = tool(&server, &arguments);
    agent.arg(&socket);
    let agent = Run::start(agent);
    wait_until("the agent listens", PATIENCE, || {
        agent.stderr().contains("listening on")
    });
    let printed = agent.stderr();
    let address = printed.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    let address = address.unwrap_or_else(|| panic!("no address: {printed}"));
    std::fs::write(&targets, format!("[{{\"targets\": [\"{address}\"]}}]")).expect("write the targets");
    let interval = if fires { "15s" } else { Prometheus::SCRAPE_INTERVAL };
    let prometheus = Prometheus::start_every(interval, &targets);
    let is_ready = || get(address, "/readyz").starts_with("HTTP/1.1 200");

    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| request_locks(&socket, &is_over));
        // The thread must end even if an assertion fails.
        let over = SetWhenDropped(&is_over);
        wait_until("locks are scraped", PATIENCE * 3, || {
            count(&prometheus, "shardlock_acquisitions_total{outcome=\"acquired\"} > 0") > 0
        });
        assert!(is_ready());
        // A scrape that a busy machine misses makes that of a target that is down pending.
        let critical = "ALERTS{severity=\"critical\", alertname!=\"LockTargetDown\"}";
        assert_eq!(count(&prometheus, critical), 0);
        if fires {
            // Some healthy traffic, so that the share of failures has to grow.
            std::thread::sleep(FIRES_WITHIN);
        }

        server.command(&["CONFIG", "SET", "maxmemory", "1"]);
        let began = Instant::now();
        wait_until("the agent is not ready", PATIENCE, || !is_ready());
        eprintln!("/readyz: 503 after {:.1} s", began.elapsed().as_secs_f64());
        let page = get(address, "/readyz");
        assert!(page.contains("the server is out of memory"), "{page}");

        let (state, limit) = match fires {
            true => ("firing", FIRES_WITHIN + Duration::from_secs(60)),
            false => ("pending", PATIENCE * 3),
        };
        for name in ["LockShardDown", "LockRequestsFailing"] {
            let alert = format!("ALERTS{{alertname=\"{name}\", severity=\"critical\", alertstate=\"{state}\"}}");
            wait_until(&alert, limit, || {
                std::thread::sleep(PAUSE);
                count(&prometheus, &alert) > 0
            });
            let took = began.elapsed();
            eprintln!("{name}: {state} after {:.1} s", took.as_secs_f64());
            assert!(name != "LockShardDown" || took < FIRES_WITHIN, "{took:?}");
        }

        server.command(&["CONFIG", "SET", "maxmemory", "0"]);
        wait_until("the agent is ready again", PATIENCE, is_ready);
        wait_until("the shard is up in Prometheus", limit, || {
            count(&prometheus, "ALERTS{alertname=\"LockShardDown\"}") == 0
        });
        drop(over);
    });
}

struct SetWhenDropped<'a>(&'a AtomicBool);

impl Drop for SetWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
