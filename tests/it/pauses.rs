//! Paused processes: stopped as a whole, or with all their workers blocked.

use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use shardlock::LossReason;
use support::quorum::MAX_TTL;
use support::{PATIENCE, worker};
use support_locks::{TestStore, builder_of, lock, on_each_store, poll_once, soon};

/// Longer than a loaded machine deprives threads and servers of their processors. A quorum allows
/// no longer one.
const TTL: Duration = MAX_TTL;

/// How often a worker looks at its guard. One that never rests takes a core from other tests.
const WATCH_EVERY: Duration = Duration::from_millis(1);

/// Holds a lock and only watches the clock and the guard. When the clock shows that the process was
/// paused, reports what the guard returns right afterwards, including its loss.
#[tokio::main]
pub(crate) async fn watch_guard(me: &worker::Current) {
    let ttl = Duration::from_millis(me.var("SHARDLOCK_TEST_TTL").parse().expect("milliseconds"));
    let locks = builder_of(me).ttl(ttl).connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    // Read before the report, since the pause may start with the next instruction.
    let mut last = Instant::now();
    me.send(guard.token().to_string());
    // The runtime's other worker and the background thread keep running.
    loop {
        let valid = guard.is_valid();
        let now = Instant::now();
        // A loaded machine also causes gaps, which are no reason for a loss.
        let gap = now - last;
        if gap > ttl {
            // This reading may precede the pause, so the next one is the first that certainly
            // follows it.
            let first = guard.is_valid();
            let remaining = guard.remaining();
            let told = poll_once(&mut Box::pin(guard.lost()));
            me.send(format!("{first} {remaining:?} {told:?}"));
            break;
        }
        assert!(valid, "the lock was lost without a pause");
        last = now;
        std::thread::sleep(WATCH_EVERY);
    }
    me.recv();
    let released = guard.release().await;
    me.send(released.expect_err("the lock was lost").is_lost().to_string());
}

on_each_store! {
    on(servers);

    async fn process_stopped_for_longer_than_its_ttl_detects_the_loss_at_once(store: &TestStore) {
        let mut paused = store.worker("paused", &[("SHARDLOCK_TEST_TTL", &TTL.as_millis().to_string())]);
        let old: u64 = paused.line().parse().expect("a token");
        paused.stop();
        let stopped = Instant::now();
        let locks = store.builder().ttl(TTL).connect().await.expect("connect");
        let guard = lock(&locks, "k").await;
        assert!(guard.token().get() > old);
        // The next holder gets the lock within the TTL. The pause lasts until a TTL has certainly
        // passed.
        tokio::time::sleep_until((stopped + TTL * 4 / 3).into()).await;
        paused.cont();
        assert_eq!(paused.line(), format!("false 0ns Some({:?})", LossReason::Expired));
        // The late release frees nothing.
        paused.send("release");
        assert_eq!(paused.line(), "true");
        assert!(guard.is_valid());
        let holder = locks.inspect("k").await.expect("inspect").holder.expect("a holder");
        assert_eq!(holder.owner, guard.owner());
        guard.release().await.expect("the lock was held throughout");
        assert!(paused.wait().success());
    }

    async fn a_process_that_was_stopped_for_less_than_its_ttl_keeps_its_lock(store: &TestStore) {
        let mut paused = store.worker("paused", &[("SHARDLOCK_TEST_TTL", &TTL.as_millis().to_string())]);
        paused.line();
        let locks = store.builder().ttl(TTL).connect().await.expect("connect");
        let mut waiting = tokio::spawn(async move { lock(&locks, "k").await });
        for _ in 0..4 {
            paused.stop();
            // A pause, which is longer on a busy machine, and then enough time to renew.
            tokio::time::sleep(TTL / 6).await;
            paused.cont();
            let waited = tokio::time::timeout(TTL / 2, &mut waiting).await;
            assert!(waited.is_err(), "the lock is held");
        }
        assert_eq!(paused.line_within(Duration::ZERO), None, "nothing was lost");
        paused.kill();
        drop(soon("the next", waiting).await.expect("a task"));
    }
}

on_each_store! {
    async fn a_lock_is_held_while_all_workers_of_its_runtime_are_blocked(store: &TestStore) {
        // A quorum waits for a majority for less than half of the store timeout.
        let watcher = store.builder().store_timeout(PATIENCE).connect().await.expect("connect");
        let builder = store.builder().ttl(TTL);
        let workers = 2;
        let blocked = Arc::new(Barrier::new(workers + 1));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .enable_all()
            .build()
            .expect("a runtime");
        let connecting = runtime.spawn(async move {
            let locks = builder.connect().await.expect("connect");
            let guard = lock(&locks, "k").await;
            (locks, guard)
        });
        let (locks, guard) = connecting.await.expect("a task");
        for _ in 0..workers {
            let blocked = Arc::clone(&blocked);
            runtime.spawn(async move {
                blocked.wait();
                // Blocks its worker thread for two TTLs, which tasks must not do.
                std::thread::sleep(2 * TTL);
            });
        }
        let blocked = tokio::task::spawn_blocking(move || blocked.wait());
        blocked.await.expect("all workers are blocked");
        let began = Instant::now();
        while began.elapsed() < TTL * 4 / 3 {
            assert!(guard.is_valid());
            assert!(watcher.try_lock("k").await.expect("try").is_none(), "the lock is held");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        // A loss would also be reported without that runtime.
        assert_eq!(poll_once(&mut Box::pin(guard.lost())), None);
        let rest = tokio::task::spawn_blocking(move || drop(runtime));
        rest.await.expect("the workers end");
        assert!(began.elapsed() >= TTL * 4 / 3 && guard.is_valid());
        soon("the release", guard.release()).await.expect("the lock was held throughout");
        drop(locks);
    }
}
