//! Many processes share the permits of one key.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use support::{PATIENCE, worker};
use support_locks::{TestStore, builder_of, on_each_store, until};

use super::ALONE;

/// Takes permits of `k` in many tasks, holds each for [`HOLD`], and reports how many it had when
/// asked, until its input ends.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn use_permits(me: &worker::Current) {
    let builder = builder_of(me).store_timeout(Duration::from_secs(20));
    let locks = builder.connect().await.expect("connect");
    let had = Arc::new(AtomicU64::new(0));
    for _ in 0..TASKS {
        let (locks, had) = (locks.clone(), Arc::clone(&had));
        tokio::spawn(async move {
            loop {
                let guard = locks.permits("k", PERMITS).await.expect("a permit");
                tokio::time::sleep(HOLD).await;
                had.fetch_add(1, Ordering::Relaxed);
                guard.release().await.expect("release");
            }
        });
    }
    tokio::task::block_in_place(|| {
        while me.recv().is_some() {
            me.send(had.load(Ordering::Relaxed).to_string());
        }
    });
}

/// The semaphore of [`use_permits`].
const PERMITS: u16 = 10;
const TASKS: usize = 32;
const HOLD: Duration = Duration::from_millis(5);

on_each_store! {
    on(counted);

    /// Eight processes of 32 tasks keep a semaphore full and get equal shares of it.
    async fn processes_share_a_semaphore_fairly_and_keep_it_full(store: &TestStore) {
        let _alone = ALONE.lock().await;
        let mut workers: Vec<_> = (0..8).map(|_| store.worker("permits", &[])).collect();
        let mut counts = || -> Vec<u64> {
            workers.iter_mut().for_each(|worker| worker.send("how many"));
            workers.iter().map(|worker| worker.line().parse().expect("a number")).collect()
        };
        until("all of them contend", async || counts().iter().all(|&had| had > 20)).await;
        let (before, began) = (counts(), Instant::now());
        let (mut shares, mut took) = (Vec::<u64>::new(), Duration::ZERO);
        let are_fair = |shares: &[u64]| shares.iter().max().expect("some") * 2 < shares.iter().min().expect("some") * 3;
        // On a busy machine a process without processor time misses turns, which matters less the
        // longer the shares are measured.
        while shares.is_empty() || !are_fair(&shares) && took < PATIENCE {
            tokio::time::sleep(Duration::from_secs(4)).await;
            let after = counts();
            took = began.elapsed();
            shares = after.iter().zip(&before).map(|(after, before)| after - before).collect();
        }
        let ideal = f64::from(PERMITS) * took.as_secs_f64() / HOLD.as_secs_f64();
        let part = shares.iter().sum::<u64>() as f64 / ideal;
        let (least, most) = (shares.iter().min().expect("some"), shares.iter().max().expect("some"));
        println!("{part:.3} of the ideal, shares {shares:?}, most/least {:.3}", *most as f64 / *least as f64);
        assert!(part > 0.4 && are_fair(&shares), "{part:.3} {shares:?}");
    }
}
