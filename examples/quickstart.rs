//! Acquires a lock, does some work, and releases the lock.
//!
//! `cargo run --example quickstart -- redis://127.0.0.1:6379`. Without a URL, the locks are kept in
//! this process.

use std::time::Duration;

use shardlock::LockManager;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).unwrap_or_else(|| "memory://".to_owned());
    let locks = LockManager::connect(&url).await?;

    let guard = locks
        .lock("coupon:123")
        .ttl(Duration::from_secs(5))
        .timeout(Duration::from_secs(2))
        .await?;
    println!("{} holds {} with token {}", guard.owner(), guard.key(), guard.token());

    // Another request for the same key has to wait; a try returns `None`.
    assert!(locks.try_lock("coupon:123").await?.is_none());

    guard.release().await?;
    locks.shutdown().await?;
    Ok(())
}
