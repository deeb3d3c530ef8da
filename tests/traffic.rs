//! What locking costs the server, counted by the server itself.

// A test is over when its surroundings fail.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod support;
mod support_locks;

use std::collections::BTreeMap;
use std::time::Duration;

use shardlock::LockManager;
use support::{RedisServer, worker};
use support_locks::{lock, soon, until_queued};
use tokio::task::JoinSet;

/// Long enough that neither renewals nor the ends of leases are among what is counted.
const LONG_TTL: Duration = Duration::from_secs(600);

#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    match me.name() {
        "contender" => contend(&me),
        name => panic!("no worker is called {name}"),
    }
}

async fn connect(url: &str, ttl: Duration) -> LockManager {
    LockManager::builder()
        .shard(url)
        .ttl(ttl)
        .connect()
        .await
        .expect("connect")
}

/// Locks, says so, and for each line that it hears gives the lock back and asks for it again at once.
#[tokio::main]
async fn contend(me: &worker::Current) {
    let locks = connect(&me.var("LOCKTEST_URL"), LONG_TTL).await;
    me.say("connected");
    let hear = async || {
        let me = me.clone();
        tokio::task::spawn_blocking(move || me.hear()).await.expect("listen")
    };
    hear().await;
    loop {
        let guard = locks.lock("k").await.expect("lock");
        me.say("locked");
        if hear().await.is_none() {
            return;
        }
        guard.release().await.expect("release");
    }
}

/// So many processes with one task each pass the lock round and round, and all others always wait.
async fn hand_offs_cost_two_calls_and_one_message(processes: usize) {
    let server = RedisServer::start();
    let url = server.url();
    let watcher = connect(&url, LONG_TTL).await;
    let mut contenders: Vec<_> = (0..processes)
        .map(|_| worker::spawn("contender", &[("LOCKTEST_URL", &url)]))
        .collect();
    for (place, contender) in contenders.iter_mut().enumerate() {
        assert_eq!(contender.line(), "connected");
        contender.send("begin");
        if place == 0 {
            assert_eq!(contender.line(), "locked");
        } else {
            until_queued(&watcher, "k", place as u64).await;
        }
    }
    let hand_off = async |contenders: &mut Vec<worker::Worker>, holder: usize| {
        contenders[holder].send("next");
        let next = (holder + 1) % processes;
        assert_eq!(contenders[next].line(), "locked");
        // The last holder waits again.
        until_queued(&watcher, "k", processes as u64 - 1).await;
        next
    };
    let mut holder = 0;
    // In the first round the server may be told the texts of the scripts, and the first holder reckoned with nobody.
    for _ in 0..processes {
        holder = hand_off(&mut contenders, holder).await;
    }
    server.reset_stats();
    let hand_offs = 64;
    for _ in 0..hand_offs {
        holder = hand_off(&mut contenders, holder).await;
    }
    assert_eq!(
        (server.script_calls(), server.publishes()),
        (2 * hand_offs, hand_offs),
        "{:?}",
        server.commands()
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_off_costs_two_script_calls_and_one_message_among_2_processes() {
    hand_offs_cost_two_calls_and_one_message(2).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_off_costs_two_script_calls_and_one_message_among_8_processes() {
    hand_offs_cost_two_calls_and_one_message(8).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_off_costs_two_script_calls_and_one_message_among_32_processes() {
    hand_offs_cost_two_calls_and_one_message(32).await;
}

/// What has run since the counts began, but for what counting takes.
fn commands(server: &RedisServer) -> BTreeMap<String, u64> {
    let mut commands = server.commands();
    commands.retain(|name, _| name != "info" && !name.starts_with("config"));
    commands
}

/// Sixteen tasks in each of eight managers that wait for the key.
async fn wait(url: &str, watcher: &LockManager, ttl: Duration) -> JoinSet<()> {
    let mut waiting = JoinSet::new();
    for place in 1..=8 {
        let locks = connect(url, ttl).await;
        for _ in 0..16 {
            let locks = locks.clone();
            waiting.spawn(async move { lock(&locks, "k").await.release().await.expect("release") });
        }
        until_queued(watcher, "k", place).await;
    }
    waiting
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_sends_nothing() {
    let server = RedisServer::start();
    let holder = connect(&server.url(), LONG_TTL).await;
    let guard = lock(&holder, "k").await;
    let mut waiting = wait(&server.url(), &holder, LONG_TTL).await;
    server.reset_stats();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(commands(&server), BTreeMap::new());
    guard.release().await.expect("release");
    while let Some(ended) = soon("the waiters", waiting.join_next()).await {
        ended.expect("a task");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_looks_once_in_each_ttl_of_the_holder() {
    let server = RedisServer::start();
    let ttl = Duration::from_millis(500);
    let holder = connect(&server.url(), ttl).await;
    let guard = lock(&holder, "k").await;
    let mut waiting = wait(&server.url(), &holder, ttl).await;
    server.reset_stats();
    tokio::time::sleep(4 * ttl).await;
    // The holder renews ten times in each TTL. A look comes when the TTL that the last one saw has passed, of which a
    // tenth may have been used up by then: five looks of each manager in this time, one for the edges, however many
    // tasks wait in it.
    let calls = server.script_calls();
    assert!(calls <= 4 * 10 + 2 + 8 * 6, "{:?}", server.commands());
    // The first to wait tells the holder of rivals, and each look does so again, in case that message was lost.
    assert!(server.publishes() <= 1 + 8 * 6, "{:?}", server.commands());
    guard.release().await.expect("it was held all the time");
    while let Some(ended) = soon("the waiters", waiting.join_next()).await {
        ended.expect("a task");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tasks_of_one_process_pass_the_lock_on_without_the_server() {
    let server = RedisServer::start();
    let locks = connect(&server.url(), LONG_TTL).await;
    // The text of the release is known to the server from here on.
    lock(&locks, "k").await.release().await.expect("release");
    let mut tasks = JoinSet::new();
    let guard = lock(&locks, "k").await;
    for _ in 0..200 {
        let mut waiting = Box::pin({
            let locks = locks.clone();
            async move { lock(&locks, "k").await.release().await.expect("release") }
        });
        assert!(support_locks::poll_once(&mut waiting).is_none());
        tasks.spawn(waiting);
    }
    server.reset_stats();
    guard.release().await.expect("release");
    while let Some(ended) = soon("the tasks", tasks.join_next()).await {
        ended.expect("a task");
    }
    // A few calls that bring more tokens, and the release of the last.
    assert!(server.script_calls() <= 20, "{:?}", server.commands());
    assert_eq!(server.publishes(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_free_key_costs_two_plain_commands_and_one_script_call() {
    let server = RedisServer::start();
    let locks = connect(&server.url(), LONG_TTL).await;
    // The first time in a slot its counter is raised, and the texts of the scripts are sent.
    for _ in 0..2 {
        lock(&locks, "k").await.release().await.expect("release");
    }
    server.reset_stats();
    for _ in 0..50 {
        lock(&locks, "k").await.release().await.expect("release");
    }
    let expected = [
        ("del", 50),
        ("evalsha", 50),
        ("exists", 50),
        ("get", 50),
        ("incrby", 50),
        ("set", 50),
    ];
    let expected: BTreeMap<_, _> = expected.map(|(name, calls)| (name.to_owned(), calls)).into();
    assert_eq!(commands(&server), expected);
}
