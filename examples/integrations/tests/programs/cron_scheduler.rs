//! Three hosts whose schedulers start a job at the same time.

use std::thread;
use std::time::{Duration, Instant};

use support::RedisServer;

use crate::Program;

/// How many ticks each host takes part in.
const TICKS: usize = 2;

#[test]
fn job_runs_once_per_tick_on_all_hosts_together() {
    let redis = RedisServer::start();
    let url = redis.url();
    // The key stays locked for three seconds. If a tick was late, it must be free at the next one.
    let vars = [("SHARDLOCK_SHARDS", url.as_str()), ("SCHEDULE", "*/6 * * * * *")];
    let hosts = [(); 3].map(|()| Program::start(env!("CARGO_BIN_EXE_cron_scheduler"), &vars, &[]));
    let watched = hosts.map(|host| {
        thread::spawn(move || {
            host.line("ready");
            // `writing the report` comes before `ran`.
            let ticks = (0..TICKS).map(|_| {
                loop {
                    let line = host.line("");
                    if line == "ran" || line == "skipped" {
                        return (line == "ran", Instant::now());
                    }
                }
            });
            ticks.collect::<Vec<_>>()
        })
    });
    let seen = watched.map(|host| host.join().expect("a host"));
    let mut runs: Vec<Instant> = seen
        .iter()
        .flatten()
        .filter(|(ran, _)| *ran)
        .map(|(_, at)| *at)
        .collect();
    runs.sort();
    // More if a host started late and saw later ticks than the others.
    assert!(runs.len() >= TICKS, "{seen:?}");
    // A busy machine reports a run late.
    for pair in runs.windows(2) {
        assert!(pair[1] - pair[0] > Duration::from_millis(1500), "{seen:?}");
    }
}
