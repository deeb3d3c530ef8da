//! Two workers that number the invoices of the same customers.

use support::{RedisServer, wait_until};
use support_locks::{connect, until_queued};

use crate::{PATIENCE, Program};

const CUSTOMERS: [&str; 3] = ["anne", "bert", "cora"];

/// For each customer and worker.
const INVOICES: usize = 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn invoices_of_each_customer_have_numbers_without_gaps() {
    let redis = RedisServer::start();
    let url = redis.url();
    let vars = [("SHARDLOCK_SHARDS", url.as_str()), ("REDIS_URL", &url)];
    let program = env!("CARGO_BIN_EXE_apalis_worker");
    let jobs: Vec<&str> = ["push"]
        .into_iter()
        .chain(CUSTOMERS.into_iter().cycle().take(CUSTOMERS.len() * INVOICES))
        .collect();
    let locks = connect(&url).await;
    let keys = CUSTOMERS.map(|customer| format!("customer:{customer}"));
    let until_queued = async |workers| {
        for key in &keys {
            until_queued(&locks, key, workers).await;
        }
    };

    // No job ends until both workers have jobs of each customer.
    let held = locks.lock_all(&keys).await.expect("lock");
    let push = || Program::start(program, &vars, &jobs).finish();
    let start = || Program::start(program, &vars, &[]);
    // A worker takes jobs when it starts, and then only if one of its jobs ends, or after 30 s.
    push();
    let first = start();
    until_queued(1).await;
    // It must not take the jobs of the other one.
    first.process.stop();
    push();
    let second = start();
    until_queued(2).await;
    first.process.cont();
    held.release().await.expect("release");

    let expected: Vec<usize> = (1..=2 * INVOICES).collect();
    let numbers =
        |customer: &str| -> Vec<usize> { redis.query(&["LRANGE", &format!("invoices:{customer}"), "0", "-1"]) };
    wait_until("all invoices are written", PATIENCE, || {
        CUSTOMERS
            .iter()
            .all(|customer| numbers(customer).len() >= expected.len())
    });
    for customer in CUSTOMERS {
        assert_eq!(numbers(customer), expected, "{customer}");
    }
    for worker in [first, second] {
        worker.line("anne ");
    }
}
