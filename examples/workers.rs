//! 100 tasks increment one counter under a lock; the read, pause and write of each stays exact.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use shardlock::LockManager;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "memory://".to_owned());
    let locks = LockManager::connect(&url).await?;
    let counter = Arc::new(AtomicU64::new(0));

    let workers: Vec<_> = (0..100)
        .map(|_| {
            let (locks, counter) = (locks.clone(), Arc::clone(&counter));
            tokio::spawn(async move {
                locks
                    .with_lock("counter", async |_guard| {
                        let read = counter.load(Ordering::Relaxed);
                        tokio::task::yield_now().await;
                        counter.store(read + 1, Ordering::Relaxed);
                    })
                    .await
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }
    println!("100 tasks counted to {}", counter.load(Ordering::Relaxed));
    locks.shutdown().await?;
    Ok(())
}
