//! The tool on a primary that sentinels watch.

use support::sentinel::Watched;

use crate::tool::{bare, run};

#[test]
fn the_tool_takes_the_url_of_sentinels() {
    let watched = Watched::start(1);
    let tool = |args: &[&str]| {
        let mut command = bare(args);
        command.env("SHARDLOCK_SHARDS", watched.url());
        run(command)
    };
    let held = tool(&["exec", "k", "sh", "-c", "echo $LOCK_TOKEN"]);
    assert_eq!(held.code, 0, "{held:?}");
    let token: u64 = held.stdout.trim().parse().expect("a token");
    let old = watched.primary();
    watched.has_replicas(1);
    old.kill();
    watched.switched(old.port());
    let held = tool(&["exec", "k", "sh", "-c", "echo $LOCK_TOKEN"]);
    assert_eq!(held.code, 0, "{held:?}");
    let later: u64 = held.stdout.trim().parse().expect("a token");
    assert!(later > token, "{later} after {token}");
    let seen = tool(&["inspect", "k"]);
    assert_eq!(seen.code, 0, "{seen:?}");
    assert!(
        seen.stdout.contains("nobody") && seen.stdout.contains(&later.to_string()),
        "{seen:?}"
    );
}
