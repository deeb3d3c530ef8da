//! Random commands for the comparison, of few managers, keys and cycles, so that they collide.

use std::time::Duration;

use proptest::prelude::*;

use crate::mode::LockMode;
use crate::protocol::{AcquireKind, Cycle};
use crate::store::redis::claim::ClaimKind;

pub(super) const MANAGERS: usize = 3;
pub(super) const CYCLES: u64 = 7;
/// Two keys that share a slot, and so a counter, and one whose name must be encoded.
pub(super) const KEYS: [&str; 3] = ["{s}one", "{s}two", "a } key 100%"];
/// 2035 on the server's clock, as a token.
pub(super) const FLOOR: u64 = 10 * 365 * 24 * 3600 * 8_000_000;

#[derive(Debug, Clone)]
pub(super) enum Command {
    Acquire {
        lock: Lock,
        kind: AcquireKind,
        terms: Given,
    },
    Release {
        lock: Lock,
        requeue: Option<u64>,
        terms: Given,
    },
    /// A release before the `min_hold` has passed, with the rest of it.
    Retire {
        lock: Lock,
        rest: Duration,
        terms: Given,
    },
    /// What a quorum asks of a node.
    Claim {
        lock: Lock,
        kind: ClaimKind,
        at_least: u64,
        terms: Given,
    },
    Renew {
        manager: usize,
        leases: Vec<(usize, u64, Duration)>,
    },
    /// Writes a lease as an administrator or another library would.
    Put {
        key: usize,
        owner: String,
        ttl: Option<Duration>,
    },
    Delete {
        key: usize,
    },
    Listen {
        manager: usize,
        listens: bool,
    },
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Lock {
    pub(super) manager: usize,
    pub(super) key: usize,
    pub(super) cycle: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Given {
    pub(super) ttl: Duration,
    pub(super) tokens: u32,
    pub(super) floor: u64,
}

/// Each cycle number has its own TTL and its mode. Each mode has an even number, whose owner is
/// notified of waiters, and an odd one.
pub(super) fn numbered(cycle: u64) -> Cycle {
    let permits = |weight, limit| LockMode::Permits { weight, limit };
    let mode = match cycle {
        3 | 4 => LockMode::Shared,
        5 => permits(1, 3),
        6 => permits(2, 3),
        7 => permits(1, 2),
        _ => LockMode::Exclusive,
    };
    let exclusive = Cycle::with_ttl(cycle, Duration::from_secs(100 + 50 * cycle));
    // Stores do not check codes.
    Cycle::parse(&format!("{exclusive}{}", mode.suffix())).unwrap()
}

fn ttl() -> impl Strategy<Value = Duration> {
    prop::sample::select(vec![100, 300, 1_000]).prop_map(Duration::from_secs)
}

fn given() -> impl Strategy<Value = Given> {
    let floor = prop_oneof![3 => Just(0), 4 => Just(FLOOR), 2 => FLOOR..FLOOR + 500];
    (ttl(), 1..70u32, floor).prop_map(|(ttl, tokens, floor)| Given { ttl, tokens, floor })
}

/// Few distinct locks, so that commands collide.
fn lock() -> impl Strategy<Value = Lock> {
    let key = prop_oneof![6 => Just(0), 2 => Just(1), 1 => Just(2)];
    (0..MANAGERS, key, 1..=CYCLES).prop_map(|(manager, key, cycle)| Lock { manager, key, cycle })
}

pub(super) fn command() -> impl Strategy<Value = Command> {
    let kind = prop_oneof![
        2 => Just(AcquireKind::Fast),
        6 => Just(AcquireKind::Enqueue),
        2 => Just(AcquireKind::Try),
        2 => Just(AcquireKind::Extend),
    ];
    let owner = prop::sample::select(vec!["another-library", "h-1-zz:3", "550e8400-e29b-41d4"]);
    let lease = (0..KEYS.len(), 1..=CYCLES, ttl());
    let claim_kind = prop_oneof![2 => Just(ClaimKind::Take), 1 => Just(ClaimKind::Extend)];
    let at_least = prop_oneof![Just(0), FLOOR..FLOOR + 1_000];
    prop_oneof![
        12 => (lock(), kind, given()).prop_map(|(lock, kind, terms)| Command::Acquire {
            lock,
            // Only an exclusive cycle has a fast path.
            kind: match kind {
                AcquireKind::Fast if !numbered(lock.cycle).mode().is_exclusive() => AcquireKind::Enqueue,
                kind => kind,
            },
            terms,
        }),
        8 => (lock(), prop::option::of(1..=CYCLES), given()).prop_map(|(lock, requeue, terms)| Command::Release {
            lock,
            requeue: requeue.filter(|&next| next != lock.cycle),
            terms,
        }),
        2 => (lock(), ttl(), given()).prop_map(|(lock, rest, terms)| Command::Retire {
            // The first number is that of retired leases.
            lock: Lock { cycle: lock.cycle.max(2), ..lock },
            rest,
            terms,
        }),
        3 => (lock(), claim_kind, at_least, given()).prop_map(|(lock, kind, at_least, terms)| Command::Claim {
            // A quorum has no permits: the numbers from 5 on.
            lock: Lock { cycle: lock.cycle.min(4), ..lock },
            kind,
            at_least,
            terms,
        }),
        2 => (0..MANAGERS, prop::collection::vec(lease, 1..6))
            .prop_map(|(manager, leases)| Command::Renew { manager, leases }),
        1 => (lock(), owner, prop::option::of(ttl())).prop_map(|(lock, owner, ttl)| Command::Put {
            key: lock.key,
            owner: owner.to_owned(),
            ttl,
        }),
        3 => lock().prop_map(|lock| Command::Delete { key: lock.key }),
        2 => (0..MANAGERS, prop::bool::weighted(0.7))
            .prop_map(|(manager, listens)| Command::Listen { manager, listens }),
    ]
}
