//! Lanes, and how an event on one becomes effects of the group.

use super::{Group, Guard};
use crate::engine::key::{Context, Effects, LockMode, LossReason, Queue, Rare, WaiterId};
use crate::fence::FencingToken;
use crate::protocol::Cycle;

/// How many tasks have a claim at a time. More would not have a lease sooner, but lengthen the
/// store's queue.
pub(super) const CLAIMS_MAX: usize = 8;

/// A lease of the group, or what contends for one.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) mode: LockMode,
    pub(super) queue: Queue<NoWaiter>,
    /// Our waiter in the queue.
    pub(super) claim: Option<WaiterId>,
    pub(super) hold: Option<Hold>,
}

/// The waker of a claim. The outcome is collected after each event instead.
#[derive(Debug)]
pub(in crate::engine::key) enum NoWaiter {}

/// What a lane granted to the group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Hold {
    pub(super) cycle: Cycle,
    pub(super) token: FencingToken,
}

impl Lane {
    pub(super) fn new(mode: LockMode) -> Self {
        Self {
            mode,
            queue: Queue::in_mode(mode),
            claim: None,
            hold: None,
        }
    }

    pub(super) fn is_unused(&self) -> bool {
        self.queue.is_unused() && self.claim.is_none() && self.hold.is_none()
    }
}

impl<W> Group<W> {
    /// Applies an event to every lane.
    pub(super) fn each_lane(
        &mut self,
        cx: Context<'_>,
        effects: &mut Effects<W>,
        event: impl Fn(&mut Queue<NoWaiter>, Context<'_>) -> Effects<NoWaiter>,
    ) {
        for index in 0..self.lanes.len() {
            self.on_lane(index, effects, |queue| event(queue, cx));
        }
    }

    /// Applies an event to the lane in which the cycle is in use. Returns whether there is one.
    pub(super) fn lane_of(
        &mut self,
        cycle: Cycle,
        cx: Context<'_>,
        effects: &mut Effects<W>,
        event: impl FnOnce(&mut Queue<NoWaiter>, Context<'_>) -> Effects<NoWaiter>,
    ) -> bool {
        let Some(index) = self.lanes.iter().position(|lane| lane.queue.is_current(cycle)) else {
            return false;
        };
        self.on_lane(index, effects, |queue| event(queue, cx));
        true
    }

    /// Applies an event to a lane, and adds its effects to those of the group.
    pub(super) fn on_lane(
        &mut self,
        index: usize,
        effects: &mut Effects<W>,
        event: impl FnOnce(&mut Queue<NoWaiter>) -> Effects<NoWaiter>,
    ) {
        let waiting = self.waiters.len();
        let Some(lane) = self.lanes.get_mut(index) else { return };
        if let LockMode::Permits { weight, limit } = lane.mode {
            let share = share_of_turn(waiting, weight, limit);
            (lane.queue.share, lane.queue.beside) = (share, share.into());
        } else {
            lane.queue.beside = waiting as u64;
        }
        let done = event(&mut lane.queue);
        let mut reason = LossReason::Expired;
        if let Some(rare) = done.rare {
            let Rare {
                abandoned,
                ended,
                // Counted for each guard below.
                lost: _,
                stale_grant,
                more_requests: _,
                more_served: _,
            } = *rare;
            if let Some(known) = ended.iter().find_map(|lease| lease.loss()) {
                reason = known;
            }
            abandoned.into_iter().for_each(|cycle| effects.abandon(cycle));
            let all = effects.rare();
            all.ended.extend(ended);
            all.stale_grant |= stale_grant;
        }
        if let Some(request) = done.request {
            effects.add_request(request);
        }
        if let Some(served) = done.served {
            effects.add_served(served);
        }
        effects.yielded = effects.yielded.or(done.yielded);
        let held = lane.queue.lease().map(|(lease, _)| (lease.cycle, lease.valid_until()));
        let Some(hold) = lane.hold else { return };
        match held {
            Some((cycle, until)) => {
                debug_assert_eq!(cycle, hold.cycle, "the lane holds a lease that nobody took");
                let ttl = lane.queue.ttl();
                let guards = self.guards.iter().filter(|guard| guard.cycle == cycle);
                guards.for_each(|guard| guard.lease.extend(until, ttl));
            }
            None => {
                lane.hold = None;
                lane.queue.lost_cycles.clear();
                effects.abandon(hold.cycle);
                let lost: Vec<Guard> = self.guards.extract_if(.., |guard| guard.cycle == hold.cycle).collect();
                self.lose_guards(lost, reason, effects);
            }
        }
    }

    /// Guards were lost. A task that has not collected its guard yet would get a lost one: it
    /// returns to the front.
    pub(super) fn lose_guards(&mut self, lost: Vec<Guard>, reason: LossReason, effects: &mut Effects<W>) {
        for guard in lost.into_iter().rev() {
            guard.lease.lose(reason);
            match guard.waiter {
                Some(id) => {
                    if let Some(waiter) = self.waiters.get_mut(id) {
                        waiter.outcome = None;
                    }
                    self.waiters.return_to_front(id);
                }
                None => effects.rare().lost.push(reason),
            }
            effects.rare().ended.push(guard.lease);
        }
    }
}

/// The largest number of tasks that a turn of a permit's lane serves, with `waiting` tasks in line.
///
/// A process may have several lanes, and a turn of each that served the whole line would be the
/// longer the fewer there are. With their parts of the line, the number of turns decides, and that
/// is the store's queue.
fn share_of_turn(waiting: usize, weight: u16, limit: u16) -> u32 {
    let lanes = usize::from(limit / weight.max(1)).clamp(1, CLAIMS_MAX);
    u32::try_from(waiting.div_ceil(lanes)).unwrap_or(u32::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lanes_of_permits_share_the_line() {
        for (waiting, weight, limit, share) in [
            (10, 1, 2, 5),
            (11, 1, 2, 6),
            (10, 2, 2, 10),
            (10, 2, 5, 5),
            (10, 0, 1, 10),
            (0, 1, 2, 1),
        ] {
            assert_eq!(
                share_of_turn(waiting, weight, limit),
                share,
                "{waiting} for {weight} of {limit}"
            );
        }
    }
}
