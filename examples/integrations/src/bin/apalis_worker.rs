//! Workers of apalis that number the invoices of each customer without gaps. Jobs of one customer
//! run one at a time, on any number of hosts, and those of others beside them.
//!
//! ```sh
//! export SHARDLOCK_SHARDS=redis://127.0.0.1 REDIS_URL=redis://127.0.0.1
//! cargo run --package shardlock-examples --bin apalis_worker -- push anne bert anne
//! cargo run --package shardlock-examples --bin apalis_worker
//! ```

use std::env;
use std::time::Duration;

use apalis::prelude::*;
use apalis_redis::RedisStorage;
use redis::AsyncCommands;
use redis::aio::ConnectionManager;
use serde::{Deserialize, Serialize};
use shardlock::LockManager;
use shardlock::config::Config;
use shardlock::tower::{BoxError, Hold, LockLayer};

/// The job.
#[derive(Debug, Serialize, Deserialize)]
struct Invoice {
    customer: String,
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let redis = apalis_redis::connect(env::var("REDIS_URL")?).await?;
    let mut jobs: RedisStorage<Invoice> = RedisStorage::new(redis.clone());
    let mut arguments = env::args().skip(1);
    if arguments.next().as_deref() == Some("push") {
        for customer in arguments {
            jobs.push(Invoice { customer }).await?;
        }
        return Ok(());
    }

    let locks = LockManager::builder().config(Config::from_env()?).connect().await?;
    let requests = locks.clone();
    // Jobs wait for their turn, however long it takes.
    let lock_of = move |job: &Task<Invoice>| Some(requests.lock(format!("customer:{}", job.args.customer)));
    let layer = LockLayer::new(lock_of).attach(|job: &mut Task<Invoice>, hold: &Hold| {
        job.inject_data(hold.clone());
    });
    let worker = WorkerBuilder::new(format!("worker-{}", std::process::id()))
        .backend(jobs)
        .data(redis)
        .layer(layer)
        // Several jobs at a time.
        .parallelize(tokio::spawn)
        .build(write_invoice);
    println!("ready");
    worker.run_until(async { tokio::signal::ctrl_c().await }).await?;
    locks.shutdown().await?;
    Ok(())
}

/// Reads a number and writes the next one, which is wrong if another job of the customer does the
/// same at that moment.
async fn write_invoice(invoice: Invoice, hold: Data<Hold>, redis: Data<ConnectionManager>) -> Result<(), BoxDynError> {
    let mut redis = (*redis).clone();
    let numbers = format!("invoices:{}", invoice.customer);
    let last: Option<u64> = redis.lindex(&numbers, -1).await?;
    let number = last.unwrap_or(0) + 1;
    tokio::time::sleep(Duration::from_millis(5)).await;
    let () = redis.rpush(&numbers, number).await?;
    println!("{} {number} with token {}", invoice.customer, hold.token());
    Ok(())
}
