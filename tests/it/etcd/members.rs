//! Members that fail, recover and hang, and an etcd that loses its data.

use shardlock::error::LockErrorKind;

use super::*;

/// Members close a connection that has been silent for 5 s.
const LEADER_PAUSE: Duration = Duration::from_millis(5_500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_survive_the_loss_of_any_one_member() {
    let etcd = Etcd::start_members(3).await;
    // Leases outlast elections on a busy machine.
    let connect = || builder(&etcd).ttl(PATIENCE).connect();
    let (ours, theirs) = (connect().await.unwrap(), connect().await.unwrap());
    for number in 0..3 {
        let guard = lock(&ours, "k").await;
        let waiting = tokio::spawn({
            let theirs = theirs.clone();
            async move { lock(&theirs, "k").await }
        });
        until_queued(&ours, "k", 1).await;
        // One of them is the leader.
        etcd.kill(number);
        let token = guard.token();
        until("there is a leader", async || ours.inspect("k").await.is_ok()).await;
        assert!(guard.is_valid());
        guard.release().await.unwrap();
        let guard = soon("the hand-off", waiting).await.unwrap();
        assert!(guard.token() > token);
        // A manager that connects while a member is down.
        let third = manager(&etcd).await;
        assert!(third.try_lock("k").await.unwrap().is_none());
        guard.release().await.unwrap();
        lock(&third, "k").await.release().await.unwrap();
        etcd.restart(number).await;
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holders_never_overlap_while_members_come_and_go() {
    const MANAGERS: usize = 4;
    const TASKS_PER_MANAGER: usize = 2;
    let etcd = Etcd::start_members(3).await;
    let last = Arc::new(AtomicU64::new(0));
    let over = Arc::new(AtomicBool::new(false));
    let turns: Arc<[AtomicU64]> = (0..MANAGERS * TASKS_PER_MANAGER).map(|_| AtomicU64::new(0)).collect();
    let mut tasks = Vec::new();
    for number in 0..MANAGERS {
        let locks = builder(&etcd).max_burst(4).connect().await.unwrap();
        for task in 0..TASKS_PER_MANAGER {
            let (locks, last, over) = (locks.clone(), Arc::clone(&last), Arc::clone(&over));
            let (turns, task) = (Arc::clone(&turns), number * TASKS_PER_MANAGER + task);
            tasks.push(tokio::spawn(async move {
                while !over.load(Ordering::SeqCst) {
                    // During an election there may be no reply in time.
                    let Ok(guard) = locks.lock("k").timeout(PATIENCE).await else {
                        continue;
                    };
                    let token = guard.token().get();
                    let before = last.swap(token, Ordering::SeqCst);
                    tokio::task::yield_now().await;
                    let after = last.load(Ordering::SeqCst);
                    if guard.is_valid() {
                        assert!(before < token, "{before} before {token}");
                        assert_eq!(after, token);
                        turns[task].fetch_add(1, Ordering::SeqCst);
                    }
                    guard.release().await.ok();
                }
            }));
        }
    }
    let locks = manager(&etcd).await;
    for number in [0, 1, 2] {
        let before = last.load(Ordering::SeqCst);
        etcd.kill(number);
        until("others take turns meanwhile", async || {
            last.load(Ordering::SeqCst) > before + (1 << 20)
        })
        .await;
        etcd.restart(number).await;
        until("etcd answers", async || locks.inspect("k").await.is_ok()).await;
    }
    // A leader that is paused for this long does not immediately learn of its successor.
    let leader = etcd.leader().await;
    etcd.stop(leader);
    tokio::time::sleep(LEADER_PAUSE).await;
    etcd.cont(leader);
    until("etcd answers", async || locks.inspect("k").await.is_ok()).await;
    // A request may have failed in each outage, but with all members up, every task gets its turn.
    let before: Vec<u64> = turns.iter().map(|turns| turns.load(Ordering::SeqCst)).collect();
    until("every task has the lock once more", async || {
        let pairs = turns.iter().zip(&before);
        pairs
            .into_iter()
            .all(|(now, &before)| now.load(Ordering::SeqCst) > before)
    })
    .await;
    over.store(true, Ordering::SeqCst);
    for task in tasks {
        soon("every task ends", task).await.unwrap();
    }
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn holds_and_waits_survive_a_hung_leader() {
    let etcd = Etcd::start_members(3).await;
    let (ours, theirs) = (manager(&etcd).await, manager(&etcd).await);
    let guard = lock(&ours, "k").await;
    let waiting = tokio::spawn({
        let theirs = theirs.clone();
        async move { lock(&theirs, "k").await }
    });
    until_queued(&ours, "k", 1).await;
    let leader = etcd.leader().await;
    etcd.stop(leader);
    // Longer than a lease lasts, so the lease must have been renewed through another member.
    tokio::time::sleep(Duration::from_secs(12)).await;
    assert!(guard.is_valid(), "the lease was renewed");
    guard.release().await.unwrap();
    let guard = soon("the hand-off", waiting).await.unwrap();
    guard.release().await.unwrap();
    etcd.cont(leader);
    until_nothing_is_left(&etcd).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn etcd_restored_from_an_old_backup_grants_no_lock() {
    let etcd = Etcd::start().await;
    let locks = manager(&etcd).await;
    etcd.kill(0);
    let backup = etcd.back_up(0);
    etcd.restart(0).await;
    let mut last = None;
    for _ in 0..3 {
        let guard = lock(&locks, "k").await;
        last = Some(guard.token());
        guard.release().await.unwrap();
    }
    etcd.kill(0);
    etcd.restore(0, &backup);
    etcd.restart(0).await;
    let error = locks.lock("k").await.unwrap_err();
    assert!(error.kind() == LockErrorKind::TokenRegression, "{error}");
    // A new manager has seen no larger token. The resource's own check of tokens covers this case.
    let guard = lock(&manager(&etcd).await, "k").await;
    assert!(Some(guard.token()) < last);
    guard.release().await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waits_survive_a_compaction() {
    let etcd = Etcd::start().await;
    // The lease outlasts the restart on a busy machine.
    let ours = builder(&etcd).ttl(PATIENCE).connect().await.unwrap();
    let theirs = manager(&etcd).await;
    let guard = lock(&ours, "k").await;
    let waiting = tokio::spawn({
        let theirs = theirs.clone();
        async move { lock(&theirs, "k").await }
    });
    until_queued(&ours, "k", 1).await;
    let mut client = etcd.client().await;
    let revision = client
        .put("other", "", None)
        .await
        .unwrap()
        .header()
        .unwrap()
        .revision();
    client.compact(revision, None).await.unwrap();
    // The connections break, and the waiters resume their watches at a revision that has been
    // compacted.
    etcd.restart(0).await;
    client = etcd.client().await;
    until("both managers have reconnected", async || {
        ours.inspect("k").await.is_ok() && theirs.inspect("k").await.is_ok()
    })
    .await;
    assert!(guard.is_valid());
    client.put("other", "", None).await.unwrap();
    guard.release().await.unwrap();
    soon("the hand-off", waiting).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;
}
