//! When `/readyz` answers 200, and what it reports about shards that are down.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use shardlock::LockManager;
use shardlock::config::{Builder, ReadyWhen};
use support::{PATIENCE, RedisServer, wait_until};
use support_locks::{TestStore, lock, lock_in_time, on_each_store, until};

use crate::admin::{get, serve};

/// The status and the content of the page.
fn readyz(address: SocketAddr) -> (u16, Value) {
    let (status, body) = get(address, "/readyz");
    let content = serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}"));
    (status, content)
}

/// The settings of a manager of one server.
fn one_shard(url: String) -> Builder {
    LockManager::builder().named_shard("s", url).store_timeout(LOOK_LIMIT)
}

/// Two servers, and the settings of a manager with both.
fn two_shards() -> (RedisServer, RedisServer, Builder) {
    let (one, two) = (RedisServer::start(), RedisServer::start());
    let builder = LockManager::builder()
        .store_timeout(LOOK_LIMIT)
        .named_shard("one", one.url())
        .named_shard("two", two.url());
    (one, two, builder)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_is_ready_while_any_shard_is_up_and_the_page_names_the_others() {
    let (one, two, builder) = two_shards();
    let (locks, admin) = serve(builder).await;
    let (status, page) = readyz(admin.address());
    let both_up = json!({
        "ready": true,
        "ready_when": "any",
        "shards": [{"name": "one", "up": true}, {"name": "two", "up": true}],
    });
    assert_eq!((status, page), (200, both_up));

    two.kill();
    until("the dead shard is reported", async || !locks.shard_states()[1].is_up).await;
    let (status, page) = readyz(admin.address());
    assert_eq!((status, &page["ready"]), (200, &json!(true)), "{page}");
    assert_eq!(page["shards"][0], json!({"name": "one", "up": true}));
    let down = &page["shards"][1];
    assert_eq!((&down["name"], &down["up"]), (&json!("two"), &json!(false)));
    assert!(down["down_for_ms"].as_f64().is_some_and(|ms| ms >= 0.0), "{page}");
    assert!(
        down["reason"].as_str().is_some_and(|reason| !reason.is_empty()),
        "{page}"
    );
    let state = &locks.shard_states()[1];
    assert!(state.reason.is_some() && state.down_for.is_some(), "{state:?}");

    one.kill();
    wait_until("no shard is up", PATIENCE, || readyz(admin.address()).0 == 503);
    assert_eq!(get(admin.address(), "/healthz"), (200, "ok".to_owned()));

    two.restart();
    wait_until("one shard is up again", PATIENCE, || readyz(admin.address()).0 == 200);
    let (_, page) = readyz(admin.address());
    assert_eq!(page["shards"][1], json!({"name": "two", "up": true}));

    locks.shutdown().await.ok();
    let (status, page) = readyz(admin.address());
    assert_eq!(
        (status, &page["ready"], &page["shut_down"]),
        (503, &json!(false), &json!(true))
    );
    drop(locks);
    wait_until("the endpoint does not keep the manager alive", PATIENCE, || {
        get(admin.address(), "/held").0 == 503
    });
    assert_eq!(get(admin.address(), "/healthz").0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn process_that_needs_all_shards_is_not_ready_while_one_is_down() {
    let (_one, two, builder) = two_shards();
    let (_locks, admin) = serve(builder.ready_when(ReadyWhen::AllShardsUp)).await;
    let (status, page) = readyz(admin.address());
    assert_eq!((status, &page["ready_when"]), (200, &json!("all")), "{page}");
    two.kill();
    wait_until("the process is not ready", PATIENCE, || {
        readyz(admin.address()).0 == 503
    });
    let (_, page) = readyz(admin.address());
    assert_eq!(page["ready"], json!(false));
    assert_eq!(page["shards"][0], json!({"name": "one", "up": true}));
    two.restart();
    wait_until("the process is ready again", PATIENCE, || {
        readyz(admin.address()).0 == 200
    });
}

/// Checks that the process is not ready while the server refuses locks for this reason.
async fn is_not_ready_while(server: &RedisServer, begin: impl Fn(), end: impl Fn(), reason: &str) {
    let (locks, admin) = serve(one_shard(server.url())).await;
    assert_eq!(readyz(admin.address()).0, 200);
    begin();
    wait_until("the shard is down", PATIENCE, || readyz(admin.address()).0 == 503);
    let (_, page) = readyz(admin.address());
    assert_eq!(page["shards"][0]["up"], json!(false), "{page}");
    let given = page["shards"][0]["reason"].as_str().unwrap_or_default();
    assert!(given.contains(reason), "{page}");
    assert!(!locks.shard_states()[0].is_up);
    // The server does refuse locks.
    let refused = locks.try_lock("k").await.unwrap_err();
    assert!(!refused.is_timeout(), "{refused}");
    end();
    wait_until("the shard is up again", PATIENCE, || readyz(admin.address()).0 == 200);
    assert!(lock_in_time(&locks, "k").await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_is_out_of_memory_is_down() {
    let server = RedisServer::start_with(&["--maxmemory-policy", "noeviction"]);
    let memory = |limit| {
        server.command(&["CONFIG", "SET", "maxmemory", limit]);
    };
    is_not_ready_while(&server, || memory("1"), || memory("0"), "the server is out of memory").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_can_not_save_its_data_is_down() {
    let server = RedisServer::start();
    server.command(&["CONFIG", "SET", "save", "3600 1000000"]);
    let [_, name]: [String; 2] = server.query(&["CONFIG", "GET", "dbfilename"]);
    let path = server.dir().join(name);
    let save = |status: &str| {
        server.try_query::<String>(&["BGSAVE"]).ok();
        wait_until("the server has tried to save", PATIENCE, || {
            let info: String = server.query(&["INFO", "persistence"]);
            info.contains("rdb_bgsave_in_progress:0") && info.contains(&format!("rdb_last_bgsave_status:{status}"))
        });
    };
    let begin = || {
        // A file can't replace a directory.
        fs::create_dir_all(path.join("full")).unwrap();
        save("err");
    };
    let end = || {
        fs::remove_dir_all(&path).unwrap();
        save("ok");
    };
    is_not_ready_while(&server, begin, end, "MISCONF").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_lacks_replicas_is_down() {
    let server = RedisServer::start();
    let replicas = |count| {
        server.command(&["CONFIG", "SET", "min-replicas-to-write", count]);
    };
    is_not_ready_while(&server, || replicas("1"), || replicas("0"), "NOREPLICAS").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_became_a_replica_is_down() {
    let server = RedisServer::start();
    let follow = |host, port| {
        server.command(&["REPLICAOF", host, port]);
    };
    is_not_ready_while(&server, || follow("127.0.0.1", "1"), || follow("NO", "ONE"), "replica").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_forbids_the_user_to_write_is_down() {
    let server = RedisServer::start();
    let permit = |rule| {
        server.command(&["ACL", "SETUSER", "default", rule]);
    };
    is_not_ready_while(&server, || permit("-set"), || permit("+set"), "+set").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn server_that_refuses_the_login_is_down() {
    let server = RedisServer::start();
    server.command(&["ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all"]);
    let url = server.url().replace("redis://", "redis://worker:secret@");
    let (locks, admin) = serve(one_shard(url)).await;
    assert_eq!(readyz(admin.address()).0, 200);
    // Ends the user's connections.
    server.command(&["ACL", "DELUSER", "worker"]);
    wait_until("the shard is down", PATIENCE, || {
        let (status, page) = readyz(admin.address());
        let reason = page["shards"][0]["reason"].as_str().unwrap_or_default();
        assert!(!reason.contains("secret"), "{page}");
        status == 503 && reason.contains("check the user and the password")
    });
    server.command(&["ACL", "SETUSER", "worker", "on", ">secret", "~*", "&*", "+@all"]);
    wait_until("the shard is up again", PATIENCE, || readyz(admin.address()).0 == 200);
    assert!(lock_in_time(&locks, "k").await > 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn shard_with_another_shard_map_is_down() {
    let server = RedisServer::start();
    let (locks, admin) = serve(one_shard(server.url())).await;
    assert!(lock_in_time(&locks, "k").await > 0);
    let map: String = server.query(&["GET", "lock:%map"]);
    server.command(&["SET", "lock:%map", "of another version"]);
    wait_until("the shard is down", PATIENCE, || readyz(admin.address()).0 == 503);
    let (_, page) = readyz(admin.address());
    assert_eq!(page["shards"][0]["reason"], json!("it has another shard map"), "{page}");
    server.command(&["SET", "lock:%map", &map]);
    wait_until("the shard is up again", PATIENCE, || readyz(admin.address()).0 == 200);
    assert!(lock_in_time(&locks, "k").await > 0);
}

/// Longer than a loaded machine delays the reply of a healthy server.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// The interval of the health checks, their time limit, and the slack for a loaded machine.
const KNOWN_WITHIN: Duration = Duration::from_secs(3 + 5 + 5);

on_each_store! { on(servers, own);
    async fn shard_that_is_down_is_not_ready_even_without_requests(store: &TestStore) {
        let (locks, admin) = serve(store.builder().store_timeout(LOOK_LIMIT)).await;
        let is_ready = || get(admin.address(), "/readyz").0 == 200;
        assert!(is_ready() && locks.shard_states()[0].is_up);
        // The shard stays ready for longer than the interval of the health checks.
        let still = Instant::now() + Duration::from_secs(4);
        while Instant::now() < still {
            assert!(is_ready());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }

        store.servers().kill_all();
        let killed = Instant::now();
        until("the shard is reported down", async || !locks.shard_states()[0].is_up).await;
        assert!(killed.elapsed() < KNOWN_WITHIN, "{:?}", killed.elapsed());
        assert_eq!(get(admin.address(), "/readyz").0, 503);

        store.servers().restart_all();
        until("the shard is ready again", async || is_ready()).await;
        // The report is correct.
        assert!(lock_in_time(&locks, "k").await > 0);
    }
}

on_each_store! { on(redis_nodes, own);
    /// Such a server still answers everything except what a new lock needs, including renewals and
    /// liveness checks.
    async fn a_shard_that_refuses_locks_is_not_ready(store: &TestStore) {
        let (locks, admin) = serve(store.builder()).await;
        let is_ready = || get(admin.address(), "/readyz").0 == 200;
        let held = lock(&locks, "held").await;
        // Lasts less long than the time without memory.
        let shared = locks.lock("shared").shared().ttl(Duration::from_secs(3)).await;
        let shared = shared.expect("lock");
        for setting in ["maxmemory", "min-replicas-to-write"] {
            assert!(is_ready());
            let set = |value| store.servers().command(&["CONFIG", "SET", setting, value]);
            set("100");
            until("the shard is not ready", async || !is_ready()).await;
            assert!(!locks.shard_states()[0].is_up);
            // Another key than the one below: its release may have been refused, too.
            assert!(locks.try_lock(setting).await.is_err());
            // The shard stays not ready although renewals are answered.
            let still = Instant::now() + Duration::from_secs(4);
            while Instant::now() < still {
                assert!(!is_ready());
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            set("0");
            until("the shard is ready again", async || is_ready()).await;
            assert!(lock_in_time(&locks, "k").await > 0);
            if setting == "maxmemory" {
                assert!(held.is_valid() && shared.is_valid(), "renewals need no memory");
            }
        }
    }
}
