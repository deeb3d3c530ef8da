//! From a key of 16 bytes to its shard, compared with the checksum alone.

// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::hint::black_box;
use std::time::Instant;

use crc16::{State, XMODEM};
use shardlock::LockKey;
use shardlock::config::Config;
use shardlock::tool;

#[path = "beside/mod.rs"]
mod beside;

use beside::{Comparison, Side, criterion};

const KEY: &str = "coupon:123456789";

fn timed<T>(mut step: impl FnMut() -> T + Clone + 'static) -> Side {
    let _: T = step();
    Box::new(move |operations| {
        let mut step = step.clone();
        let start = Instant::now();
        for _ in 0..operations {
            black_box(step());
        }
        start.elapsed()
    })
}

fn main() {
    assert_eq!(KEY.len(), 16);
    let mut config = Config::default();
    let shards = ["redis://10.0.0.1", "redis://10.0.0.2", "redis://10.0.0.3"];
    tool::set(&mut config, "shards", &shards.join(" ")).expect("good shards");
    let map = config.shard_map();
    let key = LockKey::new(KEY).expect("a key");
    let crc = || timed(|| State::<XMODEM>::calculate(black_box(KEY).as_bytes()));
    let of_a_key = map.clone();
    let comparisons = [
        (
            "routing a key of 16 bytes",
            timed(move || of_a_key.index(black_box(&key).slot())),
        ),
        (
            "checking and routing a name of 16 bytes",
            timed(move || LockKey::new(black_box(KEY)).map(|key| map.index(key.slot()))),
        ),
    ];
    let mut criterion = criterion();
    for (name, ours) in comparisons {
        let comparison = Comparison {
            name: name.to_owned(),
            ours,
            limit_name: "crc16",
            limit: crc(),
            operations: 1_000_000,
            server: None,
        };
        comparison.run(&mut criterion);
    }
    criterion.final_summary();
}
