//! The queue of a key alone, without a clock, tasks or a store, compared with a rotating
//! `VecDeque`. In each turn a guard is released, the next waiter gets the lock, and the previous
//! holder waits again.
//!
//! The queue is not part of the library's interface, so its source is part of this program.

// Not all of the source is used here, and nothing of it is an interface.
#![allow(dead_code, unreachable_pub, unused_imports, missing_docs)]
// A failure ends the run.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::VecDeque;
use std::hint::black_box;
use std::time::{Duration, Instant};

#[path = "../src/backoff.rs"]
mod backoff;
#[path = "beside/mod.rs"]
mod beside;
#[path = "../src/clock.rs"]
mod clock;
#[path = "../src/cycle.rs"]
mod cycle;
#[path = "../src/engine/mod.rs"]
mod engine;
#[path = "../src/error/mod.rs"]
mod error;
#[path = "../src/fence.rs"]
mod fence;
#[path = "../src/key.rs"]
mod key;
#[path = "../src/late_requests.rs"]
mod late_requests;
#[path = "../src/lease.rs"]
mod lease;
#[path = "../src/mode.rs"]
mod mode;
#[path = "../src/protocol.rs"]
mod protocol;
#[path = "../src/random.rs"]
mod random;
#[path = "../src/sync.rs"]
mod sync;

use beside::{Comparison, Side, criterion};
use clock::Moment;
use engine::min_holds::MinHolds;
use engine::{
    Contender, Context, InOutage, Linger, Outcome, Request, Rules, StoreEvent, Unlimited, WaiterId, WaiterOptions,
};
use error::LockError;
use fence::TokenBlock;
use mode::LockMode;
use protocol::{AcquireReply, Answer, Cycles};

const OPTIONS: WaiterOptions = WaiterOptions {
    ttl: Duration::from_secs(10),
    class: 0,
    mode: LockMode::Exclusive,
    min_hold: engine::MinHold::NONE,
    max_hold: None,
    linger: Linger::NONE,
    try_only: false,
    contended_hint: false,
    in_outage: InOutage::Fail,
};

/// A queue with a number of waiters, the lease, and enough tokens for any run.
struct Line {
    queue: Contender<usize>,
    rules: Rules,
    cycles: Cycles,
    ids: VecDeque<WaiterId>,
    min_holds: MinHolds,
}

const NOW: Moment = Moment::from_nanos(1_000_000_000);

impl Line {
    fn of(waiters: usize) -> Self {
        let mut line = Self {
            queue: Contender::new(LockMode::Exclusive),
            rules: Rules {
                max_burst: u32::MAX,
                max_slice: Duration::from_secs(1),
                renew_fraction: 0.1,
                #[cfg(test)]
                flaw: None,
            },
            cycles: Cycles::default(),
            ids: VecDeque::new(),
            min_holds: MinHolds::default(),
        };
        let cx = Context {
            now: NOW,
            epoch: 0,
            rules: &line.rules,
            cycles: &line.cycles,
            capacity: &Unlimited,
            min_holds: &line.min_holds,
        };
        let mut request = None;
        for waiter in 0..waiters {
            let (id, effects) = line.queue.enqueue(OPTIONS, Some(waiter), cx);
            line.ids.push_back(id);
            request = request.or(effects.request);
        }
        let Some(Request::Acquire { cycle, .. }) = request else {
            panic!("the first waiter made no request");
        };
        let reply = AcquireReply::Granted {
            tokens: TokenBlock::ending_at(u64::from(u32::MAX), u32::MAX),
            queued: 0,
            extended: false,
        };
        let answer = Answer {
            reply,
            sent_at: NOW,
            floor: 0,
            ttl: OPTIONS.ttl,
        };
        drop(line.queue.on_event(cycle, StoreEvent::AcquireReply(answer), cx));
        line
    }

    /// The first waiter has the lock, releases it, and waits again.
    fn turn(&mut self) {
        let cx = Context {
            now: NOW,
            epoch: 0,
            rules: &self.rules,
            cycles: &self.cycles,
            capacity: &Unlimited,
            min_holds: &self.min_holds,
        };
        let id = self.ids.pop_front().expect("a waiter");
        let Some(Outcome::Granted(granted)) = self.queue.collect(id) else {
            panic!("the first in line does not have the lock");
        };
        let (id, _) = self.queue.enqueue(OPTIONS, Some(0), cx);
        self.ids.push_back(id);
        let (was_held, effects) = self.queue.released(granted.lease.cycle, granted.token, cx);
        assert!(was_held);
        drop(black_box(effects));
    }
}

fn turning(waiters: usize) -> Side {
    // Built once: building a long queue takes longer than rotating it.
    let line = RefCell::new(Line::of(waiters));
    Box::new(move |operations| {
        let mut line = line.borrow_mut();
        let start = Instant::now();
        for _ in 0..operations {
            line.turn();
        }
        start.elapsed()
    })
}

fn turning_deque(waiters: usize) -> Side {
    let line: VecDeque<[usize; 12]> = (0..waiters).map(|waiter| [waiter; 12]).collect();
    let line = RefCell::new(line);
    Box::new(move |operations| {
        let mut line = line.borrow_mut();
        let start = Instant::now();
        for _ in 0..operations {
            let first = black_box(line.pop_front().expect("a waiter"));
            line.push_back(first);
        }
        start.elapsed()
    })
}

fn main() {
    let mut criterion = criterion();
    for waiters in [2, 1_000, 100_000] {
        let comparison = Comparison {
            name: format!("a turn of a queue of {waiters}"),
            ours: turning(waiters),
            limit_name: "VecDeque",
            limit: turning_deque(waiters),
            operations: 200_000,
            server: None,
        };
        comparison.run(&mut criterion);
    }
    criterion.final_summary();
}
