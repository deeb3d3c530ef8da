//! One process holds very many leases.

use std::future::IntoFuture;
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use support_locks::{TestStore, on_each_store};

use super::ALONE;

on_each_store! {
    on(redis, own);

    async fn fifty_thousand_leases_are_renewed_within_their_interval(store: &TestStore) {
        let _alone = ALONE.lock().await;
        // Renewals are due every three seconds. They form one batch, which on a loaded machine
        // takes longer than the default store timeout.
        let ttl = Duration::from_secs(30);
        let builder = store.builder().ttl(ttl).store_timeout(Duration::from_secs(3));
        let locks = builder.connect().await.expect("connect");
        let locking_began = Instant::now();
        let locking = stream::iter(0..50_000).map(|number| locks.lock(format!("key-{number}")).into_future());
        let guards: Vec<_> = locking.buffer_unordered(1000).try_collect().await.expect("lock");
        let locking_took = locking_began.elapsed();
        let began = Instant::now();
        let mut least = ttl;
        while began.elapsed() < ttl / 8 {
            // Checking all of them would take processor time from the renewals.
            let seen = guards.iter().step_by(100).map(|guard| guard.remaining()).min().expect("some");
            least = seen.min(least);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // A renewal is due after one interval and completes within the next. It costs less than a
        // tenth of acquiring the lease, which shows how busy the machine is.
        let expected = ttl * 8 / 10 - Duration::from_millis(200) - locking_took / 10;
        assert!(least > expected, "{least:?}; locking took {locking_took:?}");
        let releasing = stream::iter(guards).map(|guard| guard.release());
        releasing.buffer_unordered(1000).try_collect::<Vec<_>>().await.expect("the locks were held throughout");
        store.is_clean().await;
    }
}
