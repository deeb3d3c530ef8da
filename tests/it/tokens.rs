//! Fencing tokens: each later acquisition of a key has a larger token, whatever happens to servers
//! and processes.

use std::time::Duration;

use shardlock::LockGuard;
use support::{ClientType, RedisServer, worker};
use support_locks::{Locker, TestStore, builder_of, lock, on_each_store, soon, until};
use tokio::task::JoinSet;

/// The largest token so far.
#[derive(Default)]
struct Largest(u64);

impl Largest {
    /// Makes the process lock and release.
    #[track_caller]
    fn grows_by(&mut self, locker: &mut Locker) {
        self.grows_to(locker.lock());
        locker.release();
    }

    #[track_caller]
    fn grows_to(&mut self, token: u64) {
        assert!(token > self.0, "{token} after {}", self.0);
        self.0 = token;
    }
}

on_each_store! {
    on(pausable, own);

    async fn tokens_grow_across_processes_flushes_crashes_and_the_ends_of_leases(store: &TestStore) {
        let mut largest = Largest::default();
        let mut lockers = store.lockers(3, Duration::from_secs(2));
        for _ in 0..3 {
            for locker in &mut lockers {
                for _ in 0..3 {
                    largest.grows_by(locker);
                }
            }
            store.servers().flush();
            for locker in &mut lockers {
                largest.grows_by(locker);
            }
            // The servers are killed without saving anything, and restart empty.
            store.servers().kill();
                store.servers().restart();
            for locker in &mut lockers {
                largest.grows_by(locker);
            }
        }
        // One process dies while holding the lock, and the counter is lost before its lease
        // expires.
        let mut dead = lockers.remove(0);
        largest.grows_to(dead.lock());
        dead.kill();
        store.servers().set_counters(None);
        for locker in &mut lockers {
            largest.grows_by(locker);
        }
        largest.grows_by(&mut store.locker());
    }

    async fn a_manager_that_outlives_its_servers_data_never_gets_an_old_token(store: &TestStore) {
        let locks = store.short_lived_manager().await;
        let mut largest = Largest::default();
        for round in 0..10 {
            if round % 2 == 0 {
                store.servers().flush();
            } else {
                store.servers().kill();
                store.servers().restart();
            }
            until("the manager has reconnected", async || match locks.lock("k").await {
                Ok(guard) => {
                    largest.grows_to(guard.token().get());
                    guard.release().await.is_ok()
                }
                Err(error) => {
                    assert!(error.is_retryable(), "{error}");
                    false
                }
            })
            .await;
        }
    }
}

on_each_store! {
    on(redis_nodes, own);

    async fn counter_that_went_back_is_raised_and_no_token_repeats(store: &TestStore) {
        let mut largest = Largest::default();
        let mut lockers = store.lockers(2, Duration::from_secs(2));
        largest.grows_by(&mut lockers[0]);
        let old = largest.0;
        for _ in 0..5 {
            for locker in &mut lockers {
                largest.grows_by(locker);
            }
            // Simulates the promotion of a lagging replica, which also breaks all connections.
            store.servers().cut(ClientType::Normal);
            store.servers().set_counters(Some(old));
        }
        for locker in &mut lockers {
            largest.grows_by(locker);
        }
    }
}

on_each_store! {
    async fn tokens_grow_across_tasks_and_managers(store: &TestStore) {
        let number = std::sync::Arc::new(parking_lot::Mutex::new(Largest::default()));
        let mut tasks = JoinSet::new();
        for _ in 0..3 {
            let locks = store.manager().await;
            for _ in 0..8 {
                let (locks, number) = (locks.clone(), std::sync::Arc::clone(&number));
                tasks.spawn(async move {
                    for _ in 0..25 {
                        let guard = lock(&locks, "k").await;
                        number.lock().grows_to(guard.token().get());
                        guard.release().await.expect("release");
                    }
                });
            }
        }
        while let Some(ended) = soon("the tasks", tasks.join_next()).await {
            ended.expect("a task");
        }
    }

    async fn tokens_grow_across_tries_losses_and_drops(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let mut largest = Largest::default();
        for _ in 0..3 {
            let guard = one.try_lock("k").await.expect("try").expect("the key is free");
            largest.grows_to(guard.token().get());
            guard.release().await.expect("release");
            let lost = other.lock("k").max_hold(Duration::from_millis(5)).await.expect("lock");
            largest.grows_to(lost.token().get());
            soon("the loss", lost.lost()).await;
            let next = lock(&one, "k").await;
            largest.grows_to(next.token().get());
            drop(next);
            drop(lost);
            let next = lock(&other, "k").await;
            largest.grows_to(next.token().get());
            next.release().await.expect("release");
        }
    }
}

/// A resource on a server. It stores the largest token seen, and refuses smaller ones if checking
/// is enabled.
const WRITE: &str = "
    local newest = tonumber(redis.call('HGET', KEYS[1], 'token') or 0)
    if ARGV[3] == 'check' and tonumber(ARGV[2]) < newest then return 0 end
    redis.call('HSET', KEYS[1], 'value', ARGV[1], 'token', math.max(newest, tonumber(ARGV[2])))
    return 1";

struct Resource {
    connection: redis::aio::MultiplexedConnection,
    check: String,
}

impl Resource {
    async fn open(url: &str, check: &str) -> Self {
        let client = redis::Client::open(url).expect("a good address");
        let connection = client.get_multiplexed_async_connection().await.expect("connect");
        let check = check.to_owned();
        Self { connection, check }
    }

    async fn read(&mut self) -> u64 {
        let mut read = redis::cmd("HGET");
        read.arg("resource").arg("value");
        let value: Option<u64> = read.query_async(&mut self.connection).await.expect("HGET");
        value.unwrap_or(0)
    }

    /// Whether the resource accepted the write.
    async fn write(&mut self, value: u64, guard: &LockGuard) -> bool {
        let mut write = redis::cmd("EVAL");
        write.arg(WRITE).arg(1).arg("resource");
        write.arg(value).arg(guard.token().get()).arg(&self.check);
        write.query_async(&mut self.connection).await.expect("EVAL")
    }
}

/// Reads under the lock and writes on command, without checking whether it still holds the lock.
#[tokio::main]
pub(crate) async fn write_late(me: &worker::Current) {
    let ttl = Duration::from_millis(me.var("SHARDLOCK_TEST_TTL").parse().expect("milliseconds"));
    let locks = builder_of(me).ttl(ttl).connect().await.expect("connect");
    let mut resource = Resource::open(&me.var("SHARDLOCK_TEST_RESOURCE"), &me.var("SHARDLOCK_TEST_CHECK")).await;
    let guard = lock(&locks, "k").await;
    let value = resource.read().await;
    me.send("read");
    me.recv();
    let taken = resource.write(value + 1, &guard).await;
    me.send(if taken { "written" } else { "refused" });
}

/// Two writers add one each. A third has read before them and writes after them. Returns the third
/// writer's report and the sum.
async fn a_paused_writer(store: &TestStore, check: &str) -> (String, u64) {
    let server = RedisServer::start();
    let (url, ttl) = (server.url(), store.short_ttl().as_millis().to_string());
    let vars = [
        ("SHARDLOCK_TEST_RESOURCE", url.as_str()),
        ("SHARDLOCK_TEST_CHECK", check),
        ("SHARDLOCK_TEST_TTL", &ttl),
    ];
    let mut late = store.worker("writer", &vars);
    assert_eq!(late.line(), "read");
    late.stop();
    for _ in 0..2 {
        let locks = store.manager().await;
        let mut resource = Resource::open(&url, check).await;
        let guard = lock(&locks, "k").await;
        let value = resource.read().await;
        assert!(resource.write(value + 1, &guard).await, "the token is the newest");
        guard.release().await.expect("release");
    }
    late.cont();
    late.send("write");
    let told = late.line();
    let sum = Resource::open(&url, check).await.read().await;
    (told, sum)
}

on_each_store! {
    on(servers);

    async fn a_resource_that_compares_tokens_refuses_a_paused_writer(store: &TestStore) {
        assert_eq!(a_paused_writer(store, "check").await, ("refused".to_owned(), 2));
    }

    async fn a_resource_that_does_not_compare_tokens_loses_updates_in_the_same_run(store: &TestStore) {
        assert_eq!(a_paused_writer(store, "trust").await, ("written".to_owned(), 1));
    }
}
