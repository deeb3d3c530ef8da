//! What passing a lock between processes costs the server, and that every process gets its share: counted on a real
//! server with real processes of one task each.

// What fails here ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use shardlock::LockManager;

mod support;

use support::{PATIENCE, RedisServer, Worker, wait_until, worker};

#[test]
fn worker_entry() {
    let Some(me) = worker::current() else { return };
    assert_eq!(me.name(), "loop");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        // On a loaded machine it may take long until a process has its turn.
        let builder = LockManager::builder()
            .shard(me.var("LOCKTEST_URL"))
            .store_timeout(PATIENCE);
        let locks = builder.connect().await.unwrap();
        me.say("ready");
        assert_eq!(me.hear().as_deref(), Some("go"));
        let stop = Arc::new(AtomicBool::new(false));
        std::thread::spawn({
            let (me, stop) = (me.clone(), Arc::clone(&stop));
            move || {
                me.hear();
                stop.store(true, Ordering::Relaxed);
            }
        });
        let mut count = 0_u64;
        while !stop.load(Ordering::Relaxed) {
            let guard = locks.lock("hot").await.unwrap();
            // The work: long enough for the one who had the lock before to ask for it again.
            tokio::time::sleep(Duration::from_millis(1)).await;
            guard.release().await.unwrap();
            count += 1;
        }
        locks.shutdown().await;
        me.say(count.to_string());
    });
}

/// What the server counted for so many processes, and how many locks each of them had.
struct Measured {
    per_process: Vec<u64>,
    scripts: u64,
    publishes: u64,
    commands: u64,
}

impl Measured {
    fn per_lock(&self, count: u64) -> f64 {
        count as f64 / self.per_process.iter().sum::<u64>() as f64
    }
}

fn measure(processes: usize) -> Measured {
    // One measurement at a time: sixty processes on one machine would measure the machine.
    static ONE_AT_A_TIME: parking_lot::Mutex<()> = parking_lot::Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock();
    let server = RedisServer::start();
    let mut workers: Vec<Worker> = (0..processes)
        .map(|_| worker::spawn("loop", &[("LOCKTEST_URL", &server.url())]))
        .collect();
    for worker in &workers {
        assert_eq!(worker.line(), "ready");
    }
    server.reset_stats();
    for worker in &mut workers {
        worker.send("go");
    }
    let enough = 60 * processes as u64;
    wait_until("every process had its turn often", PATIENCE, || {
        server.publishes() >= enough
    });
    // Nobody is ahead when all stop: while the test itself has the lock, all others wait for it.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let locks = runtime
        .block_on(
            LockManager::builder()
                .shard(server.url())
                .store_timeout(PATIENCE)
                .connect(),
        )
        .unwrap();
    let guard = runtime.block_on(locks.lock("hot").into_future()).unwrap();
    wait_until("all wait", PATIENCE, || {
        server.query::<usize>(&["ZCARD", "{lock:hot}:q"]) == processes
    });
    let (scripts, publishes, commands) = (server.script_calls(), server.publishes(), server.commands());
    for worker in &mut workers {
        worker.send("stop");
    }
    runtime.block_on(guard.release()).unwrap();
    let per_process: Vec<u64> = workers.iter().map(|worker| worker.line().parse().unwrap()).collect();
    let measured = Measured {
        scripts,
        publishes,
        commands: ["evalsha", "eval"].iter().filter_map(|&name| commands.get(name)).sum(),
        per_process,
    };
    println!(
        "{processes} processes: {:.3} scripts, {:.3} publishes per lock, {:?}",
        measured.per_lock(measured.scripts),
        measured.per_lock(measured.publishes),
        measured.per_process,
    );
    measured
}

/// Two script calls and one publish per lock, however many processes there are: starting and stopping costs a few more.
fn costs_two_scripts_and_one_publish(processes: usize) {
    let measured = measure(processes);
    let (scripts, publishes) = (
        measured.per_lock(measured.scripts),
        measured.per_lock(measured.publishes),
    );
    assert!(
        (1.9..=2.1).contains(&scripts),
        "{scripts} scripts per lock with {processes} processes"
    );
    assert!(
        (0.9..=1.05).contains(&publishes),
        "{publishes} publishes per lock with {processes} processes"
    );
    assert_eq!(measured.commands, measured.scripts);
    let (least, most) = (
        measured.per_process.iter().min().unwrap(),
        measured.per_process.iter().max().unwrap(),
    );
    assert!(
        *least as f64 >= 0.8 * *most as f64,
        "unfair with {processes} processes: {:?}",
        measured.per_process
    );
}

#[test]
fn a_hand_off_between_two_processes_costs_two_scripts_and_one_publish() {
    costs_two_scripts_and_one_publish(2);
}

#[test]
fn a_hand_off_between_eight_processes_costs_two_scripts_and_one_publish() {
    costs_two_scripts_and_one_publish(8);
}

#[test]
fn a_hand_off_between_thirty_two_processes_costs_two_scripts_and_one_publish() {
    costs_two_scripts_and_one_publish(32);
}

async fn take_and_release(request: shardlock::LockRequest) {
    request.await.unwrap().release().await.unwrap();
}

/// While a lock is held and others wait, nobody sends anything but renewals.
#[tokio::test(flavor = "multi_thread")]
async fn waiting_sends_nothing() {
    let server = RedisServer::start();
    let ttl = Duration::from_secs(4);
    let holder = LockManager::connect(&server.url()).await.unwrap();
    let waiters = [
        LockManager::connect(&server.url()).await.unwrap(),
        LockManager::connect(&server.url()).await.unwrap(),
    ];
    let guard = holder.lock("k").ttl(ttl).await.unwrap();
    let waiting: Vec<_> = waiters
        .iter()
        .map(|locks| tokio::spawn(take_and_release(locks.lock("k").ttl(ttl))))
        .collect();
    support::eventually("both stand in the queue", PATIENCE, || {
        server.query::<u64>(&["ZCARD", "{lock:k}:q"]) == 2
    })
    .await;
    server.reset_stats();
    // Renewals, every tenth of the TTL, are the clock of this test: five of them pass.
    support::eventually("five renewals were sent", PATIENCE, || server.script_calls() >= 5).await;
    let commands = server.commands();
    assert_eq!(commands.get("zadd"), None, "somebody asked again: {commands:?}");
    assert_eq!(server.publishes(), 0);
    drop(guard);
    // Whoever was first in the queue is served first, so each gives its lock back by itself.
    for waiter in waiting {
        waiter.await.unwrap();
    }
}
