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
    let jobs: Vec<&str> = ["push"]
        .into_iter()
        .chain(CUSTOMERS.into_iter().cycle().take(CUSTOMERS.len() * INVOICES))
        .collect();
    let count = |customer: &str| redis.query::<usize>(&["LLEN", &format!("invoices:{customer}")]);

    // A worker that finds nothing to do looks seldom.
    Program::start(program, &vars, &jobs).finish();
    let workers = [(); 2].map(|()| Program::start(program, &vars, &[]));
    let mut took_part = [false; 2];
    let mut pushed = INVOICES;
    wait_until("both have taken part", 3 * PATIENCE, || {
        wait_until("all invoices are written", PATIENCE, || {
            CUSTOMERS.map(count).iter().sum::<usize>() >= CUSTOMERS.len() * pushed
        });
        for (took_part, worker) in took_part.iter_mut().zip(&workers) {
            *took_part |= worker.lines.try_iter().any(|line| line.contains(" with token "));
        }
        let have_both = took_part == [true; 2];
        if !have_both {
            // One of them was quick enough to take all.
            Program::start(program, &vars, &jobs).finish();
            pushed += INVOICES;
        }
        have_both
    });
    let expected: Vec<usize> = (1..=pushed).collect();
    for customer in CUSTOMERS {
        let numbers: Vec<usize> = redis.query(&["LRANGE", &format!("invoices:{customer}"), "0", "-1"]);
        assert_eq!(numbers, expected, "{customer}");
    }
}
