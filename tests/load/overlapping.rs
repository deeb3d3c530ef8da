//! Many processes lock several of the same keys at once.

use std::future::IntoFuture;
use std::time::Duration;

use rand::Rng;
use support::{PATIENCE, RedisServer, worker};
use support_locks::{TestStore, builder_of, on_each_store};
use tokio::task::JoinSet;

use super::ALONE;

/// What the processes of the test below do together.
const PROCESSES: usize = 8;
const TASKS: usize = 2;
const ROUNDS: usize = 10_000;
const KEYS: [&str; 8] = ["a", "b", "c", "d", "e", "{t}f", "{t}g", "{t}h"];

/// Locks random keys and enters them into a ledger on a server, which shows whether anybody else
/// holds them.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn contend(me: &worker::Current) {
    let locks = builder_of(me).connect().await.expect("connect");
    let client = redis::Client::open(me.var("SHARDLOCK_TEST_LEDGER")).expect("a good address");
    let ledger = client.get_multiplexed_async_connection().await.expect("connect");
    let mut tasks = JoinSet::new();
    for _ in 0..TASKS {
        let (locks, mut ledger) = (locks.clone(), ledger.clone());
        tasks.spawn(async move {
            for _ in 0..ROUNDS / PROCESSES / TASKS {
                let (keys, gives_up) = random_keys();
                if gives_up {
                    // May end at any step of the request.
                    let request = locks.lock_all(keys.clone()).into_future();
                    drop(tokio::time::timeout(Duration::from_millis(1), request).await);
                }
                let guard = locks
                    .lock_all(keys.clone())
                    .timeout(3 * PATIENCE)
                    .await
                    .expect("no deadlock");
                let mut enter = redis::pipe();
                for &key in &keys {
                    let token = guard.token(key).expect("a token").get();
                    enter.atomic().cmd("INCR").arg(format!("inside:{key}"));
                    enter.cmd("SET").arg(format!("token:{key}")).arg(token).arg("GET");
                }
                let replies: Vec<Option<u64>> = enter.query_async(&mut ledger).await.expect("the ledger");
                for (key, seen) in keys.iter().zip(replies.chunks(2)) {
                    assert_eq!(seen[0], Some(1), "{key} has two holders");
                    let earlier = seen[1].unwrap_or(0);
                    assert!(guard.token(key).expect("a token").get() > earlier, "{key}: {earlier}");
                }
                let mut leave = redis::pipe();
                leave.atomic();
                for key in &keys {
                    leave.cmd("DECR").arg(format!("inside:{key}")).ignore();
                }
                leave.cmd("INCR").arg("rounds").ignore();
                leave.exec_async(&mut ledger).await.expect("the ledger");
                guard.release().await.expect("all were held");
            }
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended.expect("a task");
    }
    locks.shutdown().await.expect("shut down");
    me.send("done");
}

/// Two to five of the keys in random order, and whether a request for them is given up first.
fn random_keys() -> (Vec<&'static str>, bool) {
    let mut random = rand::rng();
    let count = random.random_range(2..=5);
    let chosen = rand::seq::index::sample(&mut random, KEYS.len(), count);
    (
        chosen.into_iter().map(|index| KEYS[index]).collect(),
        random.random_ratio(1, 8),
    )
}

on_each_store! {
    on(redis);

    async fn many_processes_with_overlapping_keys_neither_block_each_other_nor_overlap(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let ledger = RedisServer::start();
        let url = ledger.url();
        let start = |_| store.worker("user_of_overlapping_keys", &[("SHARDLOCK_TEST_LEDGER", &url)]);
        let mut workers: Vec<_> = (0..PROCESSES).map(start).collect();
        let mut rounds = 0;
        for worker in &mut workers {
            // However slow a busy machine is, there is progress unless the processes deadlock.
            let line = loop {
                if let Some(line) = worker.line_within(3 * PATIENCE) {
                    break line;
                }
                let before = std::mem::replace(&mut rounds, ledger.query(&["GET", "rounds"]));
                assert!(rounds > before, "no progress after {rounds} rounds");
            };
            assert_eq!(line, "done");
            assert!(worker.wait().success());
        }
        assert_eq!(ledger.query::<usize>(&["GET", "rounds"]), ROUNDS);
        for key in KEYS {
            assert_eq!(ledger.query::<i64>(&["GET", &format!("inside:{key}")]), 0, "{key}");
        }
        store.is_clean().await;
    }
}
