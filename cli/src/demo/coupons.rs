//! A customer of the promotion: reads how many coupons are left, thinks, and writes one less.
//!
//! The read and the write are separate requests. Without the lock, all customers that read the same
//! number claim the same coupon.

use deadpool_redis::redis::cmd;

use super::protocol::COUPON_LOCK;
use super::worker::Workplace;

/// Tries to claim one coupon, with or without the lock.
pub(super) async fn claim(place: &Workplace, locked: bool) -> anyhow::Result<()> {
    if locked {
        let guard = place.locks.lock(COUPON_LOCK).class("coupons").await?;
        read_think_write(place, guard.token().get()).await?;
        guard.release().await?;
    } else {
        read_think_write(place, 0).await?;
    }
    place.count();
    Ok(())
}

async fn read_think_write(place: &Workplace, token: u64) -> anyhow::Result<()> {
    let mut data = place.data();
    let left_key = place.names.coupons_left();
    let left: u64 = cmd("GET").arg(&left_key).query_async(&mut data).await?;
    tokio::time::sleep(place.think).await;
    if left > 0 {
        cmd("SET").arg(&left_key).arg(left - 1).exec_async(&mut data).await?;
        // The ledger only records the claims; no decision depends on it.
        let mut entry = cmd("RPUSH");
        entry.arg(place.names.ledger()).arg(token).exec_async(&mut data).await?;
    }
    Ok(())
}
