//! Errors of a server that can't or won't serve a request. Each has its own error message, and the
//! lock can be acquired as soon as the server recovers.

use std::time::Duration;

use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager};
use support::ClientType;
use support_locks::{TestStore, lock, on_each_store, soon, until};

/// Retries the lock until the server returns an error, and returns that error. The server's state
/// changes a moment after the command that causes it. The request fails with the first error, since
/// the state may not last.
async fn error(locks: &LockManager) -> LockError {
    let mut seen = None;
    until("the server returns an error", async || {
        // Whatever the reply, the release of a guard is repeated until it succeeds.
        seen = locks.lock("k").fail_fast().await.err();
        seen.is_some()
    })
    .await;
    seen.expect("just seen")
}

#[track_caller]
fn assert_mentions(error: &LockError, words: &[&str]) {
    let text = error.to_string();
    assert!(text.contains("\"k\""), "{text}");
    for word in words {
        assert!(text.contains(word), "{word}: {text}");
    }
}

/// Waits until the lock can be acquired again, and checks that the refused requests left nothing
/// behind.
async fn assert_recovers(store: &TestStore, locks: &LockManager) {
    until("the lock can be acquired again", async || match locks.lock("k").await {
        Ok(guard) => guard.release().await.is_ok(),
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            false
        }
    })
    .await;
    store.is_clean().await;
}

on_each_store! {
    on(redis, own);

    async fn error_of_a_full_or_read_only_server_names_the_remedy(store: &TestStore) {
        let (server, locks) = (store.server(), store.manager().await);
        let held = lock(&locks, "held").await;
        let no_replicas = ["CONFIG", "SET", "min-replicas-to-write", "1"];
        let replicas = ["CONFIG", "SET", "min-replicas-to-write", "0"];
        let no_memory = ["CONFIG", "SET", "maxmemory", "1"];
        let memory = ["CONFIG", "SET", "maxmemory", "0"];
        let replica = ["REPLICAOF", "127.0.0.1", "1"];
        let primary = ["REPLICAOF", "NO", "ONE"];
        for (change, back, words) in [
            (&no_replicas[..], &replicas[..], "does not accept writes"),
            (&no_memory[..], &memory[..], "maxmemory"),
            (&replica[..], &primary[..], "connect to the primary"),
        ] {
            server.command(change);
            let error = locks.lock("k").await.expect_err("the server refuses");
            assert!(error.kind() == LockErrorKind::Refused, "{error}");
            assert_mentions(&error, &[words]);
            server.command(back);
            lock(&locks, "k").await.release().await.expect("release");
        }
        held.release().await.expect("the outages were short");
        store.is_clean().await;
    }

    async fn a_server_that_loads_its_data_is_unavailable_until_it_is_done(store: &TestStore) {
        let (server, locks) = (store.server(), store.manager().await);
        lock(&locks, "k").await.release().await.expect("release");
        // For about three seconds the server only replies that it is loading.
        server.command(&["CONFIG", "SET", "key-load-delay", "1000"]);
        server.command(&["CONFIG", "SET", "loading-process-events-interval-bytes", "1024"]);
        server.command(&["DEBUG", "POPULATE", "3000"]);
        let error = std::thread::scope(|scope| {
            scope.spawn(|| server.command(&["DEBUG", "RELOAD"]));
            tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(error(&locks)))
        });
        assert!(error.kind() == LockErrorKind::Unavailable && error.is_retryable(), "{error}");
        assert_mentions(&error, &["not ready", "loading"]);
        assert_recovers(store, &locks).await;
    }

    async fn a_server_that_is_busy_with_a_script_is_unavailable_until_that_ends(store: &TestStore) {
        let (server, locks) = (store.server(), store.manager().await);
        lock(&locks, "k").await.release().await.expect("release");
        server.command(&["CONFIG", "SET", "lua-time-limit", "10"]);
        let client = redis::Client::open(server.url()).expect("a good address");
        let mut stranger = client.get_connection().expect("connect");
        let script = std::thread::spawn(move || {
            let mut endless = redis::cmd("EVAL");
            endless.arg("while true do end").arg(0).exec(&mut stranger)
        });
        let error = error(&locks).await;
        assert!(error.kind() == LockErrorKind::Unavailable && error.is_retryable(), "{error}");
        assert_mentions(&error, &["busy with a script", "BUSY"]);
        server.command(&["SCRIPT", "KILL"]);
        script.join().expect("a thread").expect_err("the script was killed");
        assert_recovers(store, &locks).await;
    }

    async fn refused_release_is_retried_until_it_succeeds(store: &TestStore) {
        let (server, locks, other) = (store.server(), store.manager().await, store.manager().await);
        // Longer than any waiter waits in this test.
        let guard = locks.lock("k").ttl(Duration::from_secs(3600)).await.expect("lock");
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "1"]);
        guard.release().await.expect_err("the server takes no writes");
        let refusals = || {
            let errors: String = server.query(&["INFO", "errorstats"]);
            let count = errors.lines().find_map(|line| line.strip_prefix("errorstat_NOREPLICAS:count="));
            count.map_or(0, |count| count.trim().parse::<u64>().expect("a number"))
        };
        // The guard's own release and its background retries.
        until("the release was refused repeatedly", async || refusals() >= 4).await;
        server.command(&["CONFIG", "SET", "min-replicas-to-write", "0"]);
        soon("the lock", lock(&other, "k")).await.release().await.expect("release");
    }

    async fn newly_required_password_is_reported(store: &TestStore) {
        let (server, locks) = (store.server(), store.manager().await);
        lock(&locks, "k").await.release().await.expect("release");
        server.command(&["CONFIG", "SET", "requirepass", "new"]);
        // Existing connections stay authenticated.
        lock(&locks, "k").await.release().await.expect("release");
        server.client_kill(ClientType::Normal);
        let error = error(&locks).await;
        assert!(error.kind() == LockErrorKind::Refused && !error.is_retryable(), "{error}");
        assert_mentions(&error, &["check the user and the password"]);
        server.command(&["CONFIG", "SET", "requirepass", ""]);
        assert_recovers(store, &locks).await;
    }
}
