//! The queue of one key inside one manager: a pure state machine.
//!
//! # Implementation details
//!
//! Events come in as method calls (a task wants the key, gives up, releases; a reply, a grant, a renewal came; time
//! passed), effects come out ([`Effects`]: a request to send, cycles to clean up, waiters to wake). Nothing in here reads
//! a clock, knows a task or talks to a store, so that the same code runs in the product, in the exhaustive tests and in the
//! simulation.
//!
//! A manager is at most one contender for a key: however many tasks wait, one *cycle* stands in the store's queue. When
//! the lease is there, local waiters get it one after the other, in the order in which they came, each with a token of
//! its own from the block that came with the lease. Once remote waiters are known, that goes on for `max_burst` guards or
//! `max_slice`, whichever ends first; then the lease is released and the process joins the tail of the store's queue in the same
//! request, so that bypass is bounded.
//!
//! At most one request for the key is on its way at any time, the renewals of the watchdog aside, which take nothing
//! that is not ours. Its reply is told by [`Queue::replied`] or [`Queue::released_remotely`], and where there will be none, by
//! [`Queue::failed`] or [`Queue::dropped`]. After those the store may know of cycles that are over; they are *abandoned*: released in the
//! background until an answer comes.
//!
//! Who may enter when a grant is pushed is decided by three rules, all in [`Queue::granted`].

mod effect;
#[cfg(test)]
mod tests;
mod waiters;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use effect::{Effects, Request};
pub(crate) use waiters::WaiterId;

use crate::clock::Moment;
use crate::error::{LockError, LossReason};
use crate::fence::{FencingToken, TokenBlock};
use crate::lease::Lease;
use crate::protocol::{AcquireReply, Answer, Ask, Cycle, Cycles, Grant, Place, ReleaseReply, RenewReply};
use waiters::Waiters;

/// The settings that the queue acts by.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    /// How many guards one tenure of the lease may serve once remote waiters are known.
    pub(crate) max_burst: u32,
    /// How long one tenure of the lease may go on once remote waiters are known.
    pub(crate) max_slice: Duration,
    /// How often a lease is renewed, as a part of its TTL.
    pub(crate) renew_fraction: f64,
    /// Deliberate mistakes, to show that the simulation finds them.
    #[cfg(test)]
    pub(crate) flaw: Option<Flaw>,
}

/// A deliberate mistake.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flaw {
    /// Old grants that ran out are believed.
    IgnoresMarks,
    /// The validity of a lease counts from the receipt of the grant.
    CountsFromReceipt,
    /// A manager uses the same cycle again.
    ReusesCycles,
}

impl Rules {
    pub(crate) fn renew_every(&self, ttl: Duration) -> Duration {
        ttl.mul_f64(self.renew_fraction)
    }

    #[cfg(test)]
    fn has(&self, flaw: Flaw) -> bool {
        self.flaw == Some(flaw)
    }
}

/// What comes with every event.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context<'a> {
    pub(crate) now: Moment,
    pub(crate) rules: &'a Rules,
    pub(crate) cycles: &'a Cycles,
}

impl Context<'_> {
    fn open_cycle(&self, expects_rivals: bool) -> Cycle {
        #[cfg(test)]
        if self.rules.has(Flaw::ReusesCycles) {
            return Cycle(1);
        }
        self.cycles.open(expects_rivals)
    }
}

/// What a task wants.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Want {
    pub(crate) ttl: Duration,
    pub(crate) max_hold: Option<Duration>,
    /// Whether to come back with nothing rather than wait.
    pub(crate) only_try: bool,
    /// Whether there is reason to think that other managers want the key, so that the free path is not worth a try.
    pub(crate) expects_rivals: bool,
}

/// How a lock was had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Path {
    /// The key was free.
    Uncontended,
    /// From another task of this process, without the network.
    LocalHandOff,
    /// After waiting in the store's queue.
    RemoteGrant,
}

/// What a waiter got.
#[derive(Debug, Clone)]
pub(crate) enum Outcome {
    Granted(Granted),
    /// A try found the key held or wanted.
    Busy,
    Failed(Box<LockError>),
    /// Replies came later than the lease lasts, several times in a row.
    TooLate,
    /// The store's token was not above what was seen before.
    Regressed {
        token: u64,
        floor: u64,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Granted {
    /// When: from this moment on nobody else can have the lock.
    pub(crate) at: Moment,
    pub(crate) lease: Arc<Lease>,
    pub(crate) token: FencingToken,
    pub(crate) path: Path,
}

#[derive(Debug)]
struct Waiter<W> {
    want: Want,
    /// How to tell the waiter that its outcome is there. Taken when it is told.
    waker: Option<W>,
    outcome: Option<Outcome>,
}

#[derive(Debug)]
enum Phase {
    /// Nothing is wanted, or what is wanted waits for nothing but the next event.
    Idle,
    /// An acquire, or a release that requeues, is on its way.
    Asking(Asking),
    /// The cycle stands in the store's queue.
    Queued(Queued),
    /// The lease is ours.
    Held(Held),
    /// A release is on its way; who comes now waits for its reply, so that one request follows the other.
    Releasing { cycle: Cycle },
}

#[derive(Debug)]
struct Asking {
    cycle: Cycle,
    ask: Ask,
    /// The cycle that the same request releases.
    releases: Option<Cycle>,
    /// A grant that overtook the reply.
    early: Option<Grant>,
    /// The owner was told of rivals before the reply came.
    wanted: bool,
    /// Pushes may have been missed since the request was sent, so a "queued" reply is not to be trusted.
    missed_pushes: bool,
    /// Whether the cycle stood in the queue before.
    was_queued: bool,
    /// How many replies came too late to be of use.
    too_late: u32,
}

#[derive(Debug)]
struct Queued {
    cycle: Cycle,
    mark: u64,
    /// When the request was sent whose reply said "queued": the grant was executed after that.
    asked_at: Moment,
    /// When to look again unasked.
    ask_again_at: Moment,
}

#[derive(Debug)]
struct Held {
    lease: Arc<Lease>,
    tokens: TokenBlock,
    /// A later block, used when the first is empty.
    spare: TokenBlock,
    /// Remaining tokens when the last extension was sent.
    left_when_asked: u64,
    /// How many tokens are used up in a round trip, as last seen.
    used_in_a_round_trip: u64,
    holder: Option<Holder>,
    /// An acquire that extends the lease and brings more tokens is on its way.
    extending: bool,
    /// An extension had no reply: it may execute after the release, which therefore has to be repeated.
    in_doubt: bool,
    /// Whether remote waiters are known, and from when on bypass counts.
    rivals: bool,
    served: u32,
    since: Moment,
    renew_at: Moment,
    renewing: bool,
}

#[derive(Debug)]
struct Holder {
    token: FencingToken,
    /// The waiter, until it has collected its guard.
    waiter: Option<WaiterId>,
    /// When `max_hold` ends.
    hold_until: Option<Moment>,
}

/// The queue of one key. `W` is what wakes a waiter.
#[derive(Debug)]
pub(crate) struct Queue<W> {
    phase: Phase,
    waiters: Waiters<Waiter<W>>,
    /// The TTL of the next request: that of the waiter which is or was first.
    ttl: Duration,
    /// Whether remote waiters were seen in the last tenure, so that the free path is not worth a try.
    rivals_seen: bool,
    /// Set by a shutdown: whoever still comes is refused.
    closed: bool,
}

/// After how many replies that came later than the lease lasts the waiters are told.
const TOO_LATE_MAX: u32 = 3;
/// Bounds for the size of a block of tokens.
const BLOCK_MIN: u64 = 64;
const BLOCK_MAX: u64 = 1 << 16;
/// How long after the end of the owner's lease the first in the queue looks again, and by how much more each further one.
const SPREAD: Duration = Duration::from_millis(2);
/// How often the first in the queue looks at an owner who will not tell us of its release.
const FOREIGN_OWNER_LOOK: Duration = Duration::from_millis(400);
/// The longest time between two looks at the store while waiting.
const LOOK_MAX: Duration = Duration::from_secs(10);

/// What must be taken off a TTL because two clocks do not run equally fast, and for the granularity of timers: the
/// allowance of the Redlock description, 1 % and 2 ms.
pub(crate) fn drift(ttl: Duration) -> Duration {
    ttl / 100 + Duration::from_millis(2)
}

impl<W> Queue<W> {
    pub(crate) const fn new() -> Self {
        Self {
            phase: Phase::Idle,
            waiters: Waiters::new(),
            ttl: Duration::from_secs(1),
            rivals_seen: false,
            closed: false,
        }
    }

    /// Whether nothing would be lost if this were thrown away.
    pub(crate) fn is_unused(&self) -> bool {
        matches!(self.phase, Phase::Idle) && self.waiters.is_unused()
    }

    /// Whether the lease is ours.
    pub(crate) const fn holds(&self) -> bool {
        matches!(self.phase, Phase::Held(_))
    }

    /// How many tasks wait.
    pub(crate) const fn waiting(&self) -> usize {
        self.waiters.len()
    }

    /// Whether other managers were seen to want the key in the last tenure.
    pub(crate) const fn rivals_seen(&self) -> bool {
        self.rivals_seen
    }

    // ---- tasks ------------------------------------------------------------------------------------------------------

    /// A task wants the key. Its outcome is there to be [`collect`](Self::collect)ed when its waker comes out of an
    /// effect, or at once.
    pub(crate) fn want(&mut self, want: Want, waker: Option<W>, cx: Context<'_>) -> (WaiterId, Effects<W>) {
        let mut effects = Effects::none();
        let refused = if self.closed {
            Some(Outcome::Failed(Box::new(LockError::Closed)))
        } else if want.only_try && !self.is_free_for_a_try() {
            Some(Outcome::Busy)
        } else {
            None
        };
        let settled = refused.is_some();
        let id = self.waiters.push_back(Waiter {
            want,
            waker,
            outcome: refused,
        });
        if settled {
            self.waiters.detach(id);
        } else if matches!(self.phase, Phase::Idle) {
            self.rivals_seen |= want.expects_rivals;
            self.ask(cx, &mut effects);
        }
        (id, effects)
    }

    /// A try neither waits behind a local task nor passes one.
    fn is_free_for_a_try(&self) -> bool {
        matches!(self.phase, Phase::Idle | Phase::Releasing { .. }) && self.waiters.is_empty()
    }

    /// Whether the outcome is there.
    pub(crate) fn is_settled(&self, id: WaiterId) -> bool {
        self.waiters.get(id).is_some_and(|waiter| waiter.outcome.is_some())
    }

    /// Takes the outcome, if it is there. A guard that is handed out here is from then on ended by
    /// [`released`](Self::released).
    pub(crate) fn collect(&mut self, id: WaiterId) -> Option<Outcome> {
        self.waiters.get(id)?.outcome.as_ref()?;
        if let Phase::Held(Held {
            holder: Some(holder), ..
        }) = &mut self.phase
            && holder.waiter == Some(id)
        {
            holder.waiter = None;
        }
        self.waiters.remove(id)?.outcome
    }

    /// Replaces the waker of a waiter.
    pub(crate) fn set_waker(&mut self, id: WaiterId, waker: W) {
        if let Some(waiter) = self.waiters.get_mut(id) {
            waiter.waker = Some(waker);
        }
    }

    /// The waker of a waiter that has not been woken yet.
    pub(crate) fn waker(&self, id: WaiterId) -> Option<&W> {
        self.waiters.get(id)?.waker.as_ref()
    }

    /// A waiter goes away without collecting. Where the lock was already its own, it is passed on.
    pub(crate) fn give_up(&mut self, id: WaiterId, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.waiters.remove(id);
        match &mut self.phase {
            Phase::Held(held) if held.holder.as_ref().is_some_and(|holder| holder.waiter == Some(id)) => {
                held.holder = None;
                self.pass_on(cx, &mut effects);
            }
            Phase::Queued(Queued { cycle, .. }) if self.waiters.is_empty() => {
                let cycle = *cycle;
                self.release(cycle, cx, &mut effects);
            }
            // A request that is on its way finds nobody when its reply comes.
            _ => {}
        }
        effects
    }

    /// A guard is given back. Says whether the lock was still its own; where it was not, nothing of a later holder's is
    /// touched.
    pub(crate) fn released(&mut self, cycle: Cycle, token: FencingToken, cx: Context<'_>) -> (bool, Effects<W>) {
        let mut effects = Effects::none();
        let Phase::Held(held) = &mut self.phase else {
            effects.abandon(cycle);
            return (false, effects);
        };
        if held.lease.cycle != cycle {
            effects.abandon(cycle);
            return (false, effects);
        }
        if held.holder.as_ref().is_none_or(|holder| holder.token != token) {
            return (false, effects);
        }
        if held.lease.loss_at(cx.now).is_some() {
            // Nobody noticed yet that its time has passed.
            self.lose(LossReason::Expired, cx, &mut effects);
            effects.abandon(cycle);
            return (false, effects);
        }
        held.holder = None;
        self.pass_on(cx, &mut effects);
        (true, effects)
    }

    /// The manager is shut down: whoever waits is refused, whoever holds has lost, and the store is told.
    pub(crate) fn close(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        self.closed = true;
        self.fail_all(&Outcome::Failed(Box::new(LockError::Closed)), &mut effects);
        match &mut self.phase {
            Phase::Held(held) => {
                held.lease.lose(LossReason::Closed);
                effects.lost = held.holder.is_some().then_some(LossReason::Closed);
                let cycle = held.lease.cycle;
                if held.extending {
                    effects.abandon(cycle);
                    self.phase = Phase::Idle;
                } else {
                    self.release(cycle, cx, &mut effects);
                }
            }
            Phase::Queued(Queued { cycle, .. }) => {
                let cycle = *cycle;
                self.release(cycle, cx, &mut effects);
            }
            Phase::Idle | Phase::Asking(_) | Phase::Releasing { .. } => {}
        }
        effects
    }

    // ---- the store --------------------------------------------------------------------------------------------------

    /// The reply to an acquire came.
    pub(crate) fn replied(&mut self, cycle: Cycle, answer: Answer<AcquireReply>, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == cycle => self.answered(answer, cx, &mut effects),
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => self.extended(answer, cx, &mut effects),
            // Nobody waits for it any more; whatever it left in the store goes.
            _ => match answer.reply {
                AcquireReply::Granted { .. } | AcquireReply::Queued(_) => effects.abandon(cycle),
                AcquireReply::Taken | AcquireReply::Busy => {}
            },
        }
        effects
    }

    /// The reply to a release came.
    pub(crate) fn released_remotely(
        &mut self,
        cycle: Cycle,
        answer: Answer<ReleaseReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Releasing { cycle: current } if *current == cycle => {
                self.phase = Phase::Idle;
                self.ask(cx, &mut effects);
            }
            Phase::Asking(asking) if asking.releases == Some(cycle) => {
                asking.releases = None;
                match answer.reply.requeued {
                    Some(reply) => {
                        let Answer {
                            sent_at, ttl, floor, ..
                        } = answer;
                        let answer = Answer {
                            sent_at,
                            ttl,
                            floor,
                            reply,
                        };
                        self.answered(answer, cx, &mut effects);
                    }
                    None => self.ask_again(&mut effects),
                }
            }
            _ => {}
        }
        effects
    }

    /// A request failed, or had no reply in time: what it did is unknown. Waiters that depend on it are told.
    pub(crate) fn failed(&mut self, cycle: Cycle, error: &LockError, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == cycle || asking.releases == Some(cycle) => {
                if let Some(released) = asking.releases {
                    effects.abandon(released);
                }
                effects.abandon(asking.cycle);
                self.phase = Phase::Idle;
                self.fail_all(&Outcome::Failed(Box::new(error.clone())), &mut effects);
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => {
                held.extending = false;
                held.in_doubt = true;
                if held.holder.is_none() {
                    self.fail_all(&Outcome::Failed(Box::new(error.clone())), &mut effects);
                    self.pass_on(cx, &mut effects);
                }
            }
            Phase::Releasing { cycle: current } if *current == cycle => {
                effects.abandon(cycle);
                self.phase = Phase::Idle;
                self.ask(cx, &mut effects);
            }
            _ => {}
        }
        effects
    }

    /// The task that carried a request out went away before the reply came. Where others wait, the request is sent
    /// again: the store takes two requests of one cycle for one.
    pub(crate) fn dropped(&mut self, cycle: Cycle, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == cycle || asking.releases == Some(cycle) => {
                if let Some(released) = asking.releases.take() {
                    effects.abandon(released);
                }
                if self.waiters.is_empty() {
                    effects.abandon(asking.cycle);
                    self.phase = Phase::Idle;
                } else {
                    self.ask_again(&mut effects);
                }
            }
            Phase::Held(held) if held.lease.cycle == cycle && held.extending => {
                held.extending = false;
                held.in_doubt = true;
                if held.holder.is_none() {
                    self.pass_on(cx, &mut effects);
                }
            }
            Phase::Releasing { cycle: current } if *current == cycle => {
                effects.abandon(cycle);
                self.phase = Phase::Idle;
                self.ask(cx, &mut effects);
            }
            _ => {}
        }
        effects
    }

    /// A grant was pushed.
    ///
    /// 1. Its cycle must be the current one; otherwise that cycle is released.
    /// 2. Its tokens must be above the mark of the last "queued" reply, otherwise it is an old grant that ran out. A grant
    ///    that overtakes that reply waits for it.
    /// 3. Validity counts from the sending of the request that got the "queued" reply, since the grant was made after it. Where
    ///    less than half of the TTL is left by that count, the store is asked again.
    pub(crate) fn granted(&mut self, grant: Grant, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) if asking.cycle == grant.cycle => {
                if asking
                    .early
                    .is_none_or(|early| early.tokens.first() < grant.tokens.first())
                {
                    asking.early = Some(grant);
                }
            }
            Phase::Queued(queued) if queued.cycle == grant.cycle => {
                let (mark, asked_at) = (queued.mark, queued.asked_at);
                self.enter(grant, mark, asked_at, cx, &mut effects);
            }
            Phase::Held(held) if held.lease.cycle == grant.cycle => {}
            Phase::Releasing { cycle } if *cycle == grant.cycle => {}
            _ => effects.abandon(grant.cycle),
        }
        effects
    }

    /// Somebody began to wait for what we hold.
    pub(crate) fn wanted(&mut self, cycle: Cycle, cx: Context<'_>) {
        match &mut self.phase {
            Phase::Held(held) if held.lease.cycle == cycle => {
                held.meet_rivals(cx.now);
                self.rivals_seen = true;
            }
            Phase::Asking(asking) if asking.cycle == cycle => asking.wanted = true,
            _ => {}
        }
    }

    /// Pushes may have been missed: whoever waits in the store's queue asks again.
    pub(crate) fn resubscribed(&mut self) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Asking(asking) => asking.missed_pushes = true,
            Phase::Queued(_) => self.ask_again(&mut effects),
            _ => {}
        }
        effects
    }

    // ---- time -------------------------------------------------------------------------------------------------------

    /// When something is due next.
    pub(crate) fn look_at(&self) -> Option<Moment> {
        match &self.phase {
            Phase::Held(held) => {
                let hold_until = held.holder.as_ref().and_then(|holder| holder.hold_until);
                let renew_at = (!held.renewing).then_some(held.renew_at);
                [Some(held.lease.valid_until()), hold_until, renew_at]
                    .into_iter()
                    .flatten()
                    .min()
            }
            Phase::Queued(queued) => Some(queued.ask_again_at),
            Phase::Idle | Phase::Asking(_) | Phase::Releasing { .. } => None,
        }
    }

    /// Time passed. Where a lease was lost by it, the lease says why.
    pub(crate) fn tick(&mut self, cx: Context<'_>) -> Effects<W> {
        let mut effects = Effects::none();
        match &mut self.phase {
            Phase::Held(held) => {
                let over = held
                    .holder
                    .as_ref()
                    .and_then(|holder| holder.hold_until)
                    .is_some_and(|until| cx.now >= until);
                if cx.now >= held.lease.valid_until() {
                    self.lose(LossReason::Expired, cx, &mut effects);
                } else if over {
                    self.lose(LossReason::MaxHold, cx, &mut effects);
                }
            }
            Phase::Queued(queued) if cx.now >= queued.ask_again_at => self.ask_again(&mut effects),
            _ => {}
        }
        effects
    }

    /// The renewal that is due, or soon will be, so that all of a shard go out together; from now on it counts as sent. Also
    /// says how late it is.
    pub(crate) fn renewal(&mut self, cx: Context<'_>) -> Option<(Cycle, Duration, Duration)> {
        let Phase::Held(held) = &mut self.phase else {
            return None;
        };
        if held.renewing || held.renew_at > cx.now + cx.rules.renew_every(self.ttl) / 2 {
            return None;
        }
        held.renewing = true;
        Some((held.lease.cycle, self.ttl, cx.now.since(held.renew_at)))
    }

    /// The reply to a renewal came; `None` if there was none, in which case it is tried again.
    pub(crate) fn renewed(
        &mut self,
        cycle: Cycle,
        ttl: Duration,
        sent_at: Moment,
        reply: Option<RenewReply>,
        cx: Context<'_>,
    ) -> Effects<W> {
        let mut effects = Effects::none();
        let Phase::Held(held) = &mut self.phase else {
            return effects;
        };
        if held.lease.cycle != cycle {
            return effects;
        }
        held.renewing = false;
        if held.lease.loss_at(cx.now).is_some() {
            // Told too late: the guard has said already that it is not valid any more.
            self.lose(LossReason::Expired, cx, &mut effects);
            return effects;
        }
        match reply {
            Some(RenewReply::Extended { wanted }) => {
                held.lease.extend(sent_at + ttl - drift(ttl));
                held.renew_at = sent_at + cx.rules.renew_every(ttl);
                if wanted {
                    held.meet_rivals(cx.now);
                    self.rivals_seen = true;
                }
            }
            Some(RenewReply::NotOurs) => self.lose(LossReason::Taken, cx, &mut effects),
            None => held.renew_at = cx.now + cx.rules.renew_every(ttl) / 2,
        }
        effects
    }

    // ---- steps ------------------------------------------------------------------------------------------------------

    /// Opens a cycle for the first waiter, if there is one.
    fn ask(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(first) = self.waiters.first().and_then(|id| self.waiters.get(id)) else {
            return;
        };
        let ask = match (first.want.only_try, self.rivals_seen) {
            (true, _) => Ask::Try,
            (false, true) => Ask::Join,
            (false, false) => Ask::Free,
        };
        // A try can't be queued, so the owner that it may become has to be told of rivals.
        self.ask_as(ask, ask == Ask::Join, cx, effects);
    }

    /// Opens a cycle.
    fn ask_as(&mut self, ask: Ask, expects_rivals: bool, cx: Context<'_>, effects: &mut Effects<W>) {
        let cycle = cx.open_cycle(expects_rivals);
        self.phase = Phase::Asking(Asking::new(cycle, ask, None));
        let request = self.acquire(cycle, ask);
        effects.request(request);
    }

    /// Sends the acquire of the current cycle again. For a try it stays one: it must not join the store's queue.
    fn ask_again(&mut self, effects: &mut Effects<W>) {
        let first = self.waiters.first().and_then(|id| self.waiters.get(id));
        let ask = if first.is_some_and(|first| first.want.only_try) {
            Ask::Try
        } else {
            Ask::Join
        };
        let (cycle, was_queued, too_late) = match &self.phase {
            Phase::Queued(queued) => (queued.cycle, true, 0),
            Phase::Asking(asking) => (asking.cycle, asking.was_queued, asking.too_late),
            _ => return,
        };
        let mut asking = Asking::new(cycle, ask, None);
        (asking.was_queued, asking.too_late) = (was_queued, too_late);
        self.phase = Phase::Asking(asking);
        let request = self.acquire(cycle, ask);
        effects.request(request);
    }

    fn acquire(&mut self, cycle: Cycle, ask: Ask) -> Request {
        if let Some(first) = self.waiters.first().and_then(|id| self.waiters.get(id)) {
            self.ttl = first.want.ttl;
        }
        // A block of one where nobody else waits.
        let tokens = match self.waiters.len() as u64 {
            0 | 1 => 1,
            waiting => (2 * waiting).clamp(BLOCK_MIN, BLOCK_MAX),
        };
        Request::Acquire {
            cycle,
            ask,
            ttl: self.ttl,
            tokens: tokens as u32,
        }
    }

    /// The reply to the acquire that [`Phase::Asking`] waits for.
    fn answered(&mut self, answer: Answer<AcquireReply>, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Asking(asking) = &mut self.phase else { return };
        let (cycle, ask, was_queued) = (asking.cycle, asking.ask, asking.was_queued || asking.early.is_some());
        match answer.reply {
            AcquireReply::Granted { tokens, .. } if tokens.first() <= answer.floor && ask == Ask::Free => {
                // The counter was lost; the script raises it.
                self.ask_again(effects);
            }
            AcquireReply::Granted { tokens, .. } if tokens.first() <= answer.floor => {
                self.regress(cycle, tokens.first(), answer.floor, cx, effects);
            }
            AcquireReply::Granted { tokens, queued, .. } => {
                let path = if was_queued {
                    Path::RemoteGrant
                } else {
                    Path::Uncontended
                };
                self.rivals_seen = asking.wanted || queued > 0 || was_queued;
                self.hold(cycle, tokens, answer.ttl, answer.sent_at, path, cx, effects);
            }
            AcquireReply::Queued(place) => self.queued(answer.sent_at, place, cx, effects),
            AcquireReply::Taken => {
                // That cycle left nothing behind. The next expects rivals: there is one.
                self.rivals_seen = true;
                self.phase = Phase::Idle;
                self.ask(cx, effects);
            }
            AcquireReply::Busy => {
                self.rivals_seen = true;
                self.phase = Phase::Idle;
                while let Some(id) = self.waiters.first()
                    && self.waiters.get(id).is_some_and(|waiter| waiter.want.only_try)
                {
                    self.settle(id, Outcome::Busy, effects);
                }
                self.ask(cx, effects);
            }
        }
    }

    fn queued(&mut self, sent_at: Moment, place: Place, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Asking(asking) = &mut self.phase else { return };
        let (cycle, early, missed_pushes) = (asking.cycle, asking.early, asking.missed_pushes);
        self.rivals_seen = true;
        if self.waiters.is_empty() {
            return self.release(cycle, cx, effects);
        }
        let ahead = u32::try_from(place.ahead).unwrap_or(u32::MAX);
        let spread = SPREAD.saturating_mul(ahead.saturating_add(1)).min(LOOK_MAX / 4);
        let look_in = match (place.owner_ttl, place.owner_foreign) {
            (Some(ttl), false) => ttl + spread,
            (Some(ttl), true) => {
                ttl.min(FOREIGN_OWNER_LOOK.saturating_mul(ahead.saturating_add(1)).min(LOOK_MAX)) + spread
            }
            (None, _) => FOREIGN_OWNER_LOOK.saturating_mul(ahead.saturating_add(1)).min(LOOK_MAX) + spread,
        };
        self.phase = Phase::Queued(Queued {
            cycle,
            mark: place.mark,
            asked_at: sent_at,
            ask_again_at: cx.now + look_in,
        });
        if let Some(grant) = early {
            self.enter(grant, place.mark, sent_at, cx, effects);
        }
        if missed_pushes && matches!(self.phase, Phase::Queued(_)) {
            self.ask_again(effects);
        }
    }

    /// A grant for the queued cycle: rules 2 and 3.
    fn enter(&mut self, grant: Grant, mark: u64, asked_at: Moment, cx: Context<'_>, effects: &mut Effects<W>) {
        #[cfg(test)]
        let (mark, asked_at) = (
            if cx.rules.has(Flaw::IgnoresMarks) { 0 } else { mark },
            if cx.rules.has(Flaw::CountsFromReceipt) {
                cx.now
            } else {
                asked_at
            },
        );
        if grant.tokens.first() <= mark {
            return;
        }
        if (asked_at + grant.ttl).since(cx.now) * 2 <= grant.ttl {
            return self.ask_again(effects);
        }
        self.hold(
            grant.cycle,
            grant.tokens,
            grant.ttl,
            asked_at,
            Path::RemoteGrant,
            cx,
            effects,
        );
    }

    /// The lease is ours, counted from `sent_at`.
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts of one fact, named at both call sites"
    )]
    fn hold(
        &mut self,
        cycle: Cycle,
        tokens: TokenBlock,
        ttl: Duration,
        sent_at: Moment,
        path: Path,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let valid_until = sent_at + ttl.saturating_sub(drift(ttl));
        if valid_until <= cx.now {
            return self.come_too_late(cycle, effects);
        }
        // The owner of an odd cycle is not told of rivals, so it reckons with them.
        let rivals = self.rivals_seen || cycle.expects_rivals();
        self.phase = Phase::Held(Held {
            lease: Arc::new(Lease::new(cycle, valid_until)),
            tokens,
            spare: TokenBlock::EMPTY,
            left_when_asked: 0,
            used_in_a_round_trip: 0,
            holder: None,
            extending: false,
            in_doubt: false,
            rivals,
            served: 0,
            since: cx.now,
            renew_at: sent_at + cx.rules.renew_every(ttl),
            renewing: false,
        });
        self.serve(path, cx, effects);
    }

    /// The reply says that the lease is ours, but its time has passed on the way.
    fn come_too_late(&mut self, cycle: Cycle, effects: &mut Effects<W>) {
        let Phase::Asking(asking) = &mut self.phase else { return };
        asking.too_late += 1;
        if asking.too_late < TOO_LATE_MAX && !self.waiters.is_empty() {
            return self.ask_again(effects);
        }
        effects.abandon(cycle);
        self.phase = Phase::Idle;
        self.fail_all(&Outcome::TooLate, effects);
    }

    fn regress(&mut self, cycle: Cycle, token: u64, floor: u64, cx: Context<'_>, effects: &mut Effects<W>) {
        effects.abandon(cycle);
        self.phase = Phase::Idle;
        if let Some(id) = self.waiters.first() {
            self.settle(id, Outcome::Regressed { token, floor }, effects);
        }
        self.ask(cx, effects);
    }

    /// The reply to an acquire that extends the lease we hold.
    fn extended(&mut self, answer: Answer<AcquireReply>, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        held.extending = false;
        if held.lease.loss_at(cx.now).is_some() {
            let cycle = held.lease.cycle;
            effects.abandon(cycle);
            return self.lose(LossReason::Expired, cx, effects);
        }
        match answer.reply {
            AcquireReply::Granted {
                tokens,
                queued,
                extended: true,
            } if tokens.first() > answer.floor => {
                held.lease.extend(answer.sent_at + answer.ttl - drift(answer.ttl));
                held.used_in_a_round_trip = held.left_when_asked.saturating_sub(held.tokens.remaining());
                held.add_tokens(tokens);
                if queued > 0 {
                    held.meet_rivals(cx.now);
                    self.rivals_seen = true;
                }
                if held.holder.is_none() {
                    self.pass_on(cx, effects);
                }
            }
            // The lease was gone, and somebody else may have had it since. This cycle may have taken it again or begun to
            // wait: it is over.
            _ => {
                let cycle = held.lease.cycle;
                self.lose(LossReason::Taken, cx, effects);
                effects.abandon(cycle);
            }
        }
    }

    /// The holder is gone: the next local waiter, another process, or nobody.
    fn pass_on(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &self.phase else { return };
        if held.extending && (self.waiters.is_empty() || held.must_yield(cx)) {
            // Its reply has to come first, or it could take the lease again after the release.
            return;
        }
        let cycle = held.lease.cycle;
        if self.waiters.is_empty() {
            return self.release(cycle, cx, effects);
        }
        if held.must_yield(cx) {
            return self.requeue(cycle, cx, effects);
        }
        self.serve(Path::LocalHandOff, cx, effects);
    }

    /// Gives the lease, which nobody has, to the first waiter.
    fn serve(&mut self, path: Path, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(id) = self.waiters.first() else {
            return self.pass_on(cx, effects);
        };
        let waiting = self.waiters.len();
        let Phase::Held(held) = &mut self.phase else { return };
        // Renewals keep the validity near the whole TTL; where it is short, they fail, and the lease is not worth passing on.
        let long_enough = held.lease.remaining(cx.now) * 4 >= self.ttl;
        let token = if long_enough || path != Path::LocalHandOff {
            held.take_token()
        } else {
            None
        };
        let Some(token) = token else {
            return self.extend(effects);
        };
        let Some(waiter) = self.waiters.get_mut(id) else { return };
        self.ttl = waiter.want.ttl;
        held.served = held.served.saturating_add(1);
        let hold_until = waiter.want.max_hold.map(|longest| cx.now + longest);
        held.holder = Some(Holder {
            token,
            waiter: Some(id),
            hold_until,
        });
        let outcome = Outcome::Granted(Granted {
            at: cx.now,
            lease: Arc::clone(&held.lease),
            token,
            path,
        });
        if waiting > 1 && held.is_low_on_tokens(cx) {
            self.extend(effects);
        }
        self.settle(id, outcome, effects);
    }

    /// Asks for more time and tokens under the lease that is ours.
    fn extend(&mut self, effects: &mut Effects<W>) {
        let waiting = self.waiters.len() as u64;
        let Phase::Held(held) = &mut self.phase else { return };
        if held.extending {
            return;
        }
        held.extending = true;
        held.left_when_asked = held.tokens.remaining();
        let tokens = waiting.max(4 * held.used_in_a_round_trip).clamp(BLOCK_MIN, BLOCK_MAX) as u32;
        effects.request(Request::Acquire {
            cycle: held.lease.cycle,
            ask: Ask::Join,
            ttl: self.ttl,
            tokens,
        });
    }

    fn release(&mut self, cycle: Cycle, cx: Context<'_>, effects: &mut Effects<W>) {
        self.settle_doubt(cycle, effects);
        self.phase = Phase::Releasing { cycle };
        effects.request(Request::Release {
            cycle,
            requeue: None,
            ttl: self.ttl,
            tokens: cx.rules.max_burst,
        });
    }

    fn requeue(&mut self, cycle: Cycle, cx: Context<'_>, effects: &mut Effects<W>) {
        self.settle_doubt(cycle, effects);
        let next = cx.open_cycle(self.rivals_seen);
        self.phase = Phase::Asking(Asking::new(next, Ask::Join, Some(cycle)));
        effects.request(Request::Release {
            cycle,
            requeue: Some(next),
            ttl: self.ttl,
            tokens: cx.rules.max_burst,
        });
    }

    /// An extension whose reply never came may execute after the release that is sent now: the release is repeated.
    fn settle_doubt(&self, cycle: Cycle, effects: &mut Effects<W>) {
        if matches!(&self.phase, Phase::Held(Held { in_doubt: true, .. })) {
            effects.abandon(cycle);
        }
    }

    /// The lease is lost. The guard under it, if any, is an orphan from now on; whoever waits starts anew.
    fn lose(&mut self, reason: LossReason, cx: Context<'_>, effects: &mut Effects<W>) {
        let Phase::Held(held) = &mut self.phase else { return };
        held.lease.lose(reason);
        if held.extending || held.in_doubt {
            // An extension may still execute, and take the key or a place in the queue for a cycle that nobody knows any more.
            effects.abandon(held.lease.cycle);
        }
        let holder = held.holder.take();
        if holder.as_ref().is_some_and(|holder| holder.waiter.is_none()) {
            effects.lost = Some(reason);
        }
        if let Some(id) = holder.and_then(|holder| holder.waiter) {
            // It has not collected its guard yet, and would get a lost one: it is the first to wait again.
            if let Some(waiter) = self.waiters.get_mut(id) {
                waiter.outcome = None;
            }
            self.waiters.return_to_front(id);
        }
        self.phase = Phase::Idle;
        self.rivals_seen = true;
        self.ask(cx, effects);
    }

    fn fail_all(&mut self, outcome: &Outcome, effects: &mut Effects<W>) {
        while let Some(id) = self.waiters.first() {
            self.settle(id, outcome.clone(), effects);
        }
    }

    /// Takes a waiter out of the line and tells it.
    fn settle(&mut self, id: WaiterId, outcome: Outcome, effects: &mut Effects<W>) {
        self.waiters.detach(id);
        if let Some(waiter) = self.waiters.get_mut(id) {
            waiter.outcome = Some(outcome);
            effects.wake(waiter.waker.take());
        }
    }
}

impl Asking {
    const fn new(cycle: Cycle, ask: Ask, releases: Option<Cycle>) -> Self {
        Self {
            cycle,
            ask,
            releases,
            early: None,
            wanted: false,
            missed_pushes: false,
            was_queued: false,
            too_late: 0,
        }
    }
}

impl Held {
    /// Bypass counts from the moment at which rivals are known.
    fn meet_rivals(&mut self, now: Moment) {
        if !self.rivals {
            (self.rivals, self.served, self.since) = (true, 1, now);
        }
    }

    fn must_yield(&self, cx: Context<'_>) -> bool {
        self.rivals && (self.served >= cx.rules.max_burst || cx.now.since(self.since) >= cx.rules.max_slice)
    }

    /// A later block than those that are there. It never comes before the spare one: tokens must grow.
    fn add_tokens(&mut self, tokens: TokenBlock) {
        if self.tokens.remaining() == 0 {
            self.tokens = std::mem::replace(&mut self.spare, TokenBlock::EMPTY);
        }
        if self.tokens.remaining() == 0 {
            self.tokens = tokens;
        } else {
            self.spare = tokens;
        }
    }

    fn take_token(&mut self) -> Option<FencingToken> {
        if self.tokens.remaining() == 0 {
            self.tokens = std::mem::replace(&mut self.spare, TokenBlock::EMPTY);
        }
        self.tokens.take()
    }

    /// Whether the tokens may run out before a round trip is over.
    fn is_low_on_tokens(&self, cx: Context<'_>) -> bool {
        let left = self.tokens.remaining() + self.spare.remaining();
        let enough_for_the_tenure = self.rivals && left >= u64::from(cx.rules.max_burst.saturating_sub(self.served));
        !self.extending && !enough_for_the_tenure && left <= (2 * self.used_in_a_round_trip).max(BLOCK_MIN / 4)
    }
}
