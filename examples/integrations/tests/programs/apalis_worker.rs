//! Two workers that number the invoices of the same customers.

use support::{RedisServer, wait_until};

use crate::{PATIENCE, Program};

const CUSTOMERS: [&str; 3] = ["anne", "bert", "cora"];

const INVOICES: usize = 10;

#[test]
fn invoices_of_each_customer_have_numbers_without_gaps() {
    let redis = RedisServer::start();
    let url = redis.url();
    let vars = [("SHARDLOCK_SHARDS", url.as_str()), ("REDIS_URL", &url)];
    let program = env!("CARGO_BIN_EXE_apalis_worker");
    let jobs = ["push"]
        .into_iter()
        .chain(CUSTOMERS.into_iter().cycle().take(CUSTOMERS.len() * INVOICES));
    Program::start(program, &vars, &jobs.collect::<Vec<_>>()).finish();

    let workers = [(); 2].map(|()| Program::start(program, &vars, &[]));
    let count = |customer: &str| redis.query::<usize>(&["LLEN", &format!("invoices:{customer}")]);
    wait_until("all invoices are written", PATIENCE, || {
        CUSTOMERS.map(count).iter().sum::<usize>() >= CUSTOMERS.len() * INVOICES
    });
    let expected: Vec<usize> = (1..=INVOICES).collect();
    for customer in CUSTOMERS {
        let numbers: Vec<usize> = redis.query(&["LRANGE", &format!("invoices:{customer}"), "0", "-1"]);
        assert_eq!(numbers, expected, "{customer}");
    }
    // Both took part.
    for worker in &workers {
        assert!(worker.lines.try_iter().any(|line| line.contains(" with token ")));
    }
}
