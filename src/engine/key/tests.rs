//! The queue as a specification: one test per rule, and all short runs of events against the
//! invariants.

mod cancellation;
mod exhaustive;
mod extending;
mod group;
mod group_rules;
mod hand_off;
mod late;
mod lingering;
mod losses;
mod min_hold;
mod outage;
mod remote;
mod reported_effects;
mod turns;
mod views;

use std::time::Duration;

use super::*;
use crate::clock::Moment;
use crate::engine::min_holds::MinHolds;
use crate::error::{Failure, LockError};
use crate::fence::TokenBlock;
use crate::protocol::{AcquireKind, AcquireReply, Answer, Cycles, Grant, QueuePosition, ReleaseReply, RenewReply};

/// A queue with everything its events need, and a clock set by the test.
#[derive(Debug)]
struct Bench {
    queue: Queue<u32>,
    rules: Rules,
    cycles: Cycles,
    min_holds: MinHolds,
    now: Moment,
    /// The number of other keys. The limit is ten.
    keys: Keys,
    epoch: u32,
    /// What the last event reported for metrics and for tasks that wait for a loss.
    reported: Reported,
}

/// A number of keys.
#[derive(Debug)]
struct Keys(usize);

impl Capacity for Keys {
    fn has_room(&self) -> bool {
        self.0 <= 10
    }
}

/// Results that no waiter depends on, but that are counted or passed on.
#[derive(Debug, Default, PartialEq)]
struct Reported {
    served: Option<u32>,
    yielded: Option<Bound>,
    ended: Option<Cycle>,
    stale_grant: bool,
}

/// The effects of an event in brief.
#[derive(Debug, PartialEq)]
struct Seen {
    request: Option<Request>,
    abandoned: Vec<Cycle>,
    woken: Vec<u32>,
    lost: Option<LossReason>,
}

const TTL: Duration = Duration::from_secs(1);
/// The difference between TTL and validity.
const DRIFT: Duration = Duration::from_millis(12);

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn at(millis: u64) -> Moment {
    Moment::from_nanos(millis * 1_000_000)
}

/// A waiter with no special options.
const OPTIONS: WaiterOptions = WaiterOptions {
    mode: LockMode::Exclusive,
    ttl: TTL,
    max_hold: None,
    linger: Linger::NONE,
    min_hold: MinHold::NONE,
    try_only: false,
    in_outage: InOutage::Fail,
    contended_hint: false,
    class: 0,
};

const fn tokens(first: u64, last: u64) -> TokenBlock {
    TokenBlock::ending_at(last, (last + 1 - first) as u32)
}

const fn granted(first: u64, last: u64) -> AcquireReply {
    AcquireReply::Granted {
        tokens: tokens(first, last),
        queued: 0,
        extended: false,
    }
}

const fn extended(first: u64, last: u64) -> AcquireReply {
    AcquireReply::Granted {
        tokens: tokens(first, last),
        queued: 0,
        extended: true,
    }
}

/// A "queued" reply: the owner's lease lasts for another half second.
const fn queued(mark: u64) -> AcquireReply {
    AcquireReply::Queued(QueuePosition {
        enqueue_token: mark,
        owner_ttl: Some(ms(500)),
        owner_foreign: false,
        ahead: 0,
        is_subscribed: true,
    })
}

const fn grant(cycle: Cycle, first: u64, last: u64) -> Grant {
    Grant {
        cycle,
        tokens: tokens(first, last),
        queued: 0,
    }
}

fn no_answer() -> LockError {
    Failure::Unavailable {
        shard: "main".to_owned(),
        step: "acquire",
        key: None,
        waited: Duration::ZERO,
        reason: "no answer".into(),
    }
    .into()
}

impl Bench {
    fn new() -> Self {
        Self {
            queue: Queue::new(),
            rules: Rules {
                max_burst: 4,
                max_slice: Duration::from_secs(10),
                renew_fraction: 0.1,
                flaw: None,
            },
            cycles: Cycles::default(),
            min_holds: MinHolds::default(),
            now: at(1_000),
            keys: Keys(0),
            epoch: 0,
            reported: Reported::default(),
        }
    }

    fn pass(&mut self, time: Duration) {
        self.now = self.now + time;
    }

    fn event<R>(&mut self, happens: impl FnOnce(&mut Queue<u32>, Context<'_>) -> (R, Effects<u32>)) -> (R, Seen) {
        let cx = Context {
            now: self.now,
            rules: &self.rules,
            cycles: &self.cycles,
            capacity: &self.keys,
            min_holds: &self.min_holds,
            epoch: self.epoch,
        };
        let (result, effects) = happens(&mut self.queue, cx);
        let rare = effects.rare.unwrap_or_default();
        self.reported = Reported {
            served: effects.served,
            yielded: effects.yielded,
            ended: rare.ended.first().map(|lease| lease.cycle),
            stale_grant: rare.stale_grant,
        };
        let seen = Seen {
            request: effects.request,
            abandoned: rare.abandoned,
            woken: effects.wake.into_iter().collect(),
            lost: rare.lost.first().copied(),
        };
        (result, seen)
    }

    fn enqueue(&mut self, waker: u32) -> (WaiterId, Seen) {
        self.enqueue_as(waker, OPTIONS)
    }

    fn enqueue_as(&mut self, waker: u32, options: WaiterOptions) -> (WaiterId, Seen) {
        self.event(|queue, cx| queue.enqueue(options, Some(waker), cx))
    }

    fn give_up(&mut self, id: WaiterId) -> Seen {
        self.event(|queue, cx| ((), queue.give_up(id, cx))).1
    }

    /// Replies to a request that was sent just now.
    fn reply(&mut self, cycle: Cycle, reply: AcquireReply) -> Seen {
        self.reply_to(self.now, cycle, reply)
    }

    fn reply_to(&mut self, sent_at: Moment, cycle: Cycle, reply: AcquireReply) -> Seen {
        let answer = answer(sent_at, reply);
        self.event(|queue, cx| ((), queue.on_acquire_reply(cycle, answer, cx)))
            .1
    }

    /// Releases a guard while a local task and other managers wait, so that the request in flight
    /// requeues. Returns the cycle that it releases.
    fn requeue(&mut self) -> (Cycle, Seen) {
        self.rules.max_burst = 1;
        let (id, cycle) = self.join_store_queue(10);
        self.enqueue(1);
        self.grant(grant(cycle, 11, 11));
        let guard = self.guard(id);
        (cycle, self.release_held(&guard))
    }

    /// Checks that a release is repeated after its reply. If the repetition overtook the release, a
    /// guard would report that its lease was lost.
    #[track_caller]
    fn assert_repeated(&mut self, sent: &Seen, requeued: Option<AcquireReply>) {
        let (cycle, _) = sent.releases();
        assert_eq!(sent.abandoned, []);
        assert_eq!(self.reply_to_release(cycle, requeued).abandoned, [cycle]);
    }

    /// Replies to a release.
    fn reply_to_release(&mut self, cycle: Cycle, requeued: Option<AcquireReply>) -> Seen {
        let answer = answer(self.now, ReleaseReply { held: true, requeued });
        self.event(|queue, cx| ((), queue.on_release_reply(cycle, answer, cx)))
            .1
    }

    fn grant(&mut self, grant: Grant) -> Seen {
        self.event(|queue, cx| ((), queue.on_grant(grant, cx))).1
    }

    fn your_turn(&mut self, cycle: Cycle) -> Seen {
        self.event(|queue, cx| ((), queue.on_your_turn(cycle, cx))).1
    }

    fn remote_waiter(&mut self, cycle: Cycle) -> Seen {
        self.event(|queue, cx| ((), queue.on_remote_waiter(cycle, cx))).1
    }

    fn failed(&mut self, cycle: Cycle) -> Seen {
        let now = self.now;
        let outage = StoreOutage {
            since: now,
            patience: ms(1_000),
            retry_at: now + ms(10),
        };
        self.event(|queue, cx| ((), queue.on_request_failed(cycle, &no_answer(), Some(outage), cx)))
            .1
    }

    fn cancelled(&mut self, cycle: Cycle) -> Seen {
        self.event(|queue, cx| ((), queue.on_request_cancelled(cycle, cx))).1
    }

    fn resubscribed(&mut self) -> Seen {
        self.event(|queue, cx| ((), queue.on_resubscribed(cx))).1
    }

    fn tick(&mut self) -> Seen {
        self.event(|queue, cx| ((), queue.tick(cx))).1
    }

    /// The shard belongs to managers with another shard map.
    fn disown(&mut self) -> Seen {
        self.event(|queue, cx| ((), queue.disown(cx))).1
    }

    fn close(&mut self) -> Seen {
        self.event(|queue, cx| ((), queue.close(cx))).1
    }

    fn evict(&mut self) -> Seen {
        self.event(|queue, cx| ((), queue.evict(cx))).1
    }

    fn renewed(&mut self, cycle: Cycle, sent_at: Moment, reply: Option<RenewReply>) -> Seen {
        self.event(|queue, cx| ((), queue.on_renewal_reply(cycle, TTL, sent_at, reply, cx)))
            .1
    }

    /// The cycle of the renewal that is due, if any.
    fn renewal(&mut self) -> Option<Cycle> {
        self.event(|queue, cx| (queue.renewal(cx), Effects::none()))
            .0
            .map(|(cycle, ..)| cycle)
    }

    fn collect(&mut self, id: WaiterId) -> Option<Outcome> {
        self.queue.collect(id)
    }

    /// Collects a guard, with its lease, its token and how it was acquired.
    #[track_caller]
    fn guard(&mut self, id: WaiterId) -> Granted {
        match self.collect(id) {
            Some(Outcome::Granted(granted)) => granted,
            outcome => panic!("expected a guard, got {outcome:?}"),
        }
    }

    /// Releases a guard. Returns whether it still had the lock.
    fn release(&mut self, guard: &Granted) -> (bool, Seen) {
        let (cycle, token) = (guard.lease.cycle, guard.token);
        self.event(|queue, cx| queue.released(cycle, token, cx))
    }

    fn release_held(&mut self, guard: &Granted) -> Seen {
        let (held, seen) = self.release(guard);
        assert!(held, "it was lost");
        seen
    }

    /// Acquires the lock for one task on the fast path. The key is free, and the store issues these
    /// tokens.
    fn hold(&mut self, first: u64, last: u64) -> Granted {
        let (id, seen) = self.enqueue(0);
        let cycle = seen.acquires().0;
        self.reply(cycle, granted(first, last));
        self.guard(id)
    }

    /// Waits for the lock in the store's queue, after a reply with this enqueue mark. Returns the
    /// waiter and its cycle.
    fn join_store_queue(&mut self, mark: u64) -> (WaiterId, Cycle) {
        let (id, seen) = self.enqueue_as(
            0,
            WaiterOptions {
                contended_hint: true,
                ..OPTIONS
            },
        );
        let cycle = seen.acquires().0;
        assert_eq!(self.reply(cycle, queued(mark)), NOTHING);
        (id, cycle)
    }
}

fn answer<R>(sent_at: Moment, reply: R) -> Answer<R> {
    Answer {
        sent_at,
        ttl: TTL,
        floor: 0,
        reply,
    }
}

const NOTHING: Seen = Seen {
    request: None,
    abandoned: Vec::new(),
    woken: Vec::new(),
    lost: None,
};

impl Seen {
    /// The acquire among the effects: cycle, kind, tokens.
    #[track_caller]
    fn acquires(&self) -> (Cycle, AcquireKind, u32) {
        match self.request {
            Some(Request::Acquire {
                cycle, kind, tokens, ..
            }) => (cycle, kind, tokens),
            _ => panic!("no acquire in {self:?}"),
        }
    }

    /// The release among the effects: its cycle, and the cycle that is requeued.
    #[track_caller]
    fn releases(&self) -> (Cycle, Option<Cycle>) {
        match self.request {
            Some(Request::Release { cycle, requeue, .. }) => (cycle, requeue),
            _ => panic!("no release in {self:?}"),
        }
    }
}

#[test]
fn unused_key_is_acquired_by_the_fast_path() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(7);
    let (cycle, kind, tokens) = seen.acquires();
    assert_eq!((kind, tokens), (AcquireKind::Fast, 1));
    assert!(!cycle.expects_remote_waiters());

    let sent_at = bench.now;
    bench.pass(ms(30));
    let seen = bench.reply_to(sent_at, cycle, granted(100, 100));
    assert_eq!(seen.woken, [7]);
    let guard = bench.guard(id);
    assert_eq!((guard.token.get(), guard.path), (100, Path::Uncontended));
    // Counted from when the request was sent.
    assert_eq!(guard.lease.valid_until(), sent_at + TTL - DRIFT);

    let seen = bench.release_held(&guard);
    assert_eq!(seen.releases(), (cycle, None));
    assert_eq!(bench.reply_to_release(cycle, None), NOTHING);
    assert!(bench.queue.is_unused());
}

#[test]
fn taken_key_is_requested_again_by_script_with_an_odd_cycle() {
    let mut bench = Bench::new();
    let (_, seen) = bench.enqueue(0);
    let (first, ..) = seen.acquires();
    let seen = bench.reply(first, AcquireReply::Taken);
    let (second, kind, _) = seen.acquires();
    assert_eq!(kind, AcquireKind::Enqueue);
    assert!(second > first && second.expects_remote_waiters());
    assert!(seen.abandoned.is_empty(), "the fast path leaves nothing behind");
}

#[test]
fn known_remote_waiters_skip_the_fast_path() {
    let mut bench = Bench::new();
    let options = WaiterOptions {
        contended_hint: true,
        ..OPTIONS
    };
    let (cycle, kind, _) = bench.enqueue_as(0, options).1.acquires();
    assert_eq!(kind, AcquireKind::Enqueue);
    assert!(cycle.expects_remote_waiters());
}

#[test]
fn lost_counter_found_by_the_fast_path_is_raised_by_the_script() {
    let mut bench = Bench::new();
    let (id, seen) = bench.enqueue(0);
    let (cycle, ..) = seen.acquires();
    let below = Answer {
        floor: 50,
        ..answer(bench.now, granted(50, 50))
    };
    let (_, seen) = bench.event(|queue, cx| ((), queue.on_acquire_reply(cycle, below, cx)));
    assert_eq!(seen.acquires(), (cycle, AcquireKind::Enqueue, 1));
    // If the script does not raise it, the token is refused: two holders could get the same one.
    let (_, seen) = bench.event(|queue, cx| ((), queue.on_acquire_reply(cycle, below, cx)));
    assert_eq!(seen.abandoned, [cycle]);
    assert!(matches!(
        bench.collect(id),
        Some(Outcome::Regressed { token: 50, floor: 50 })
    ));
    assert!(bench.queue.is_unused());
}

#[test]
fn one_request_serves_all_local_waiters() {
    let mut bench = Bench::new();
    let cycle = bench.enqueue(0).1.acquires().0;
    for waker in 1..100 {
        assert_eq!(bench.enqueue(waker).1, NOTHING);
    }
    assert_eq!(
        bench.reply(cycle, AcquireReply::Taken).acquires().2,
        200,
        "twice as many"
    );
}
