//! A customer of the promotion: reads how many coupons are left, thinks, and writes one less.
//!
//! The read and the write are separate requests. Without the lock, all customers that read the same
//! number claim the same coupon.

use deadpool_redis::redis::cmd;

use super::protocol::COUPON_LOCK;
use super::worker::Worker;

/// Tries to claim one coupon, with or without the lock.
pub(super) async fn claim_one(worker: &Worker, locked: bool) -> anyhow::Result<()> {
    if locked {
        let guard = worker.locks.lock(COUPON_LOCK).class("coupons").await?;
        read_think_write(worker, guard.token().get()).await?;
        guard.release().await?;
    } else {
        read_think_write(worker, 0).await?;
    }
    worker.count_done();
    Ok(())
}

async fn read_think_write(worker: &Worker, token: u64) -> anyhow::Result<()> {
    let left_key = worker.names.coupons_left();
    let left: u64 = {
        // Returned to the pool before the customer thinks.
        let mut data = worker.data().await?;
        cmd("GET").arg(&left_key).query_async(&mut data).await?
    };
    tokio::time::sleep(worker.think).await;
    if left > 0 {
        let mut data = worker.data().await?;
        cmd("SET").arg(&left_key).arg(left - 1).exec_async(&mut data).await?;
        // The ledger only records the claims; no decision depends on it.
        let mut entry = cmd("RPUSH");
        entry
            .arg(worker.names.ledger())
            .arg(token)
            .exec_async(&mut data)
            .await?;
    }
    Ok(())
}
