//! Processes that stand still, and runtimes that are blocked.

use std::time::{Duration, Instant};

use shardlock::LockManager;

mod support;

use support::{PATIENCE, RedisServer, wait_until, worker};

const TTL: Duration = Duration::from_millis(400);

#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    assert_eq!(me.name(), "paused");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    let locks = runtime.block_on(LockManager::connect(&me.var("LOCKTEST_URL"))).unwrap();
    let guard = runtime.block_on(locks.lock("k").ttl(TTL).into_future()).unwrap();
    assert!(guard.is_valid());
    me.say("held");
    // Nothing but the clock tells this thread that the process stood still; its next instruction asks the guard.
    let mut last = Instant::now();
    loop {
        let now = Instant::now();
        if now.duration_since(last) > TTL {
            let (valid, remaining) = (guard.is_valid(), guard.remaining());
            me.say(format!("valid: {valid}, remaining: {remaining:?}"));
            break;
        }
        last = now;
    }
    let reason = runtime.block_on(guard.lost());
    let error = runtime.block_on(guard.release()).unwrap_err();
    me.say(format!("{reason:?}, {}", error.is_lost()));
}

#[test]
fn a_process_that_was_stopped_for_longer_than_its_lease_knows_at_once() {
    let server = RedisServer::start();
    let mut worker = worker::spawn("paused", &[("LOCKTEST_URL", &server.url())]);
    assert_eq!(worker.line(), "held");
    worker.stop();
    wait_until("the lease ran out", PATIENCE, || {
        server.query::<u64>(&["EXISTS", "lock:k"]) == 0
    });
    let since = Instant::now();
    wait_until("the worker stood still for longer than its TTL", PATIENCE, || {
        since.elapsed() > TTL
    });
    worker.cont();
    assert_eq!(worker.line(), "valid: false, remaining: 0ns");
    assert_eq!(worker.line(), "Expired, true");
    assert!(worker.wait().success());
}

#[test]
fn a_lock_is_held_while_all_workers_of_the_runtime_are_blocked() {
    let server = RedisServer::start();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let locks = runtime.block_on(LockManager::connect(&server.url())).unwrap();
    let guard = runtime.block_on(locks.lock("k").ttl(TTL).into_future()).unwrap();

    let (tell, blocked) = std::sync::mpsc::channel();
    let ends: Vec<_> = (0..2)
        .map(|_| {
            let (end, ended) = std::sync::mpsc::channel::<()>();
            let tell = tell.clone();
            runtime.spawn(async move {
                tell.send(()).unwrap();
                // Blocks the worker's thread, as a task should not, until the test drops its end.
                ended.recv().unwrap_err();
            });
            end
        })
        .collect();
    for _ in 0..2 {
        blocked.recv().unwrap();
    }

    let other = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let rival = other.block_on(LockManager::connect(&server.url())).unwrap();
    let since = Instant::now();
    while since.elapsed() < 3 * TTL {
        assert!(
            other.block_on(rival.try_lock("k").into_future()).unwrap().is_none(),
            "taken after {:?}",
            since.elapsed()
        );
        assert!(guard.is_valid());
    }
    drop(ends);
    runtime.block_on(guard.release()).unwrap();
}
