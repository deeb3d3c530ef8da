//! What a group does after each event, until nothing is left to do: it collects what lanes were
//! granted, admits tasks, ends holds, and makes claims or gives them up.

use std::sync::Arc;

use super::lane::{CLAIMS_MAX, Hold, Lane};
use super::{Group, Guard};
use crate::engine::key::{
    Context, Effects, Granted, InOutage, Lease, LockMode, Moment, Outcome, Path, WaiterId, WaiterOptions,
};
use crate::fence::FencingToken;

impl<W> Group<W> {
    /// Follows up on an event until nothing is left to do.
    pub(super) fn settle(&mut self, cx: Context<'_>, effects: &mut Effects<W>) {
        while self.take_outcome(cx, effects)
            || self.join(cx, effects)
            || self.end_hold(cx, effects)
            || self.claim(cx, effects)
        {}
        if self.waiters.is_empty() {
            self.outage = None;
        }
        self.lanes.retain(|lane| !lane.is_unused());
    }

    /// Handles the outcome of a claim, if one is known.
    fn take_outcome(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let found = self.lanes.iter_mut().enumerate().find_map(|(index, lane)| {
            let outcome = lane.queue.collect(lane.claim?)?;
            lane.claim = None;
            Some((index, outcome))
        });
        let Some((index, outcome)) = found else { return false };
        let first = self.waiters.first();
        match outcome {
            Outcome::Granted(granted) => self.begin_hold(index, &granted, cx, effects),
            Outcome::Busy => {
                self.remote_waiters_seen = true;
                let is_try = first.and_then(|id| self.waiters.get(id));
                if let Some(id) = first
                    && is_try.is_some_and(|waiter| waiter.options.try_only)
                {
                    self.resolve(id, Outcome::Busy, effects);
                }
            }
            Outcome::Regressed { .. } => {
                if let Some(id) = first {
                    self.resolve(id, outcome, effects);
                }
            }
            Outcome::Failed(_) => self.fail_all(&outcome, effects),
            Outcome::TooLate => {
                let ttl = self.lanes.get(index).map(|lane| lane.queue.ttl()).unwrap_or_default();
                for id in self.waiters.find_all(|waiter| waiter.options.lease_ttl() <= ttl) {
                    self.resolve(id, Outcome::TooLate, effects);
                }
            }
        }
        true
    }

    fn begin_hold(&mut self, index: usize, granted: &Granted, cx: Context<'_>, effects: &mut Effects<W>) {
        let Some(lane) = self.lanes.get_mut(index) else { return };
        let (cycle, token) = (granted.lease.cycle, granted.token);
        lane.hold = Some(Hold { cycle, token });
        self.remote_waiters_seen = lane.queue.remote_waiters_seen();
        let mode = lane.mode;
        let found = self.waiters.iter().find(|(_, waiter)| waiter.options.mode == mode);
        // The task that the claim was made for may have been served elsewhere, and the turn may not
        // include the next one. The hold then ends without a guard.
        if let Some((id, since)) = found.map(|(id, waiter)| (id, waiter.since))
            && !lane.queue.came_later(since)
        {
            self.admit(index, id, token, granted.path, cx, effects);
        }
    }

    /// Gives the key to a task, under the hold of a lane.
    fn admit(
        &mut self,
        index: usize,
        id: WaiterId,
        token: FencingToken,
        path: Path,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let (Some(lane), Some(waiter)) = (self.lanes.get_mut(index), self.waiters.get(id)) else {
            return;
        };
        let Some(lane_lease) = lane.queue.serve_for_another(&waiter.options, cx) else {
            return;
        };
        let is_shared = lane.mode == LockMode::Shared;
        let lease = if is_shared {
            let (cycle, until) = (lane_lease.cycle, lane_lease.valid_until());
            Arc::new(Lease::new(cycle, until, lane.queue.ttl()))
        } else {
            lane_lease
        };
        let hold_until = waiter
            .options
            .max_hold
            .filter(|_| is_shared)
            .map(|longest| cx.now + longest);
        self.guards.push(Guard {
            cycle: lease.cycle,
            token,
            lease: Arc::clone(&lease),
            waiter: Some(id),
            hold_until,
        });
        let outcome = Outcome::Granted(Granted {
            at: cx.now,
            lease,
            token,
            path,
        });
        self.resolve(id, outcome, effects);
    }

    /// Lets the first task share the key with those that hold it.
    fn join(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let is_open = |lane: &Lane| lane.mode == LockMode::Shared && lane.hold.is_some();
        let (Some(index), Some((id, first))) = (self.lanes.iter().position(is_open), self.waiters.iter().next()) else {
            return false;
        };
        let waiting_since = first.since;
        let mut token = None;
        self.on_lane(index, effects, |queue| {
            let (joined, effects) = queue.join(waiting_since, cx);
            token = joined;
            effects
        });
        let Some(token) = token else { return false };
        let path = if waiting_since == cx.now {
            Path::Joined
        } else {
            Path::LocalHandOff
        };
        self.admit(index, id, token, path, cx, effects);
        true
    }

    /// Ends a hold without guards. A task that can use the lease claims it first, or claims the
    /// next lease of the lane if the turn must not serve it.
    fn end_hold(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let is_over = |lane: &Lane| {
            lane.hold
                .is_some_and(|hold| self.guards.iter().all(|guard| guard.cycle != hold.cycle))
        };
        let Some(index) = self.lanes.iter().position(is_over) else {
            return false;
        };
        let Some((mode, hold)) = self.lanes.get_mut(index).map(|lane| (lane.mode, lane.hold.take())) else {
            return false;
        };
        let first = self.waiters.front();
        if let Some((options, since)) = first.map(|first| (first.options, first.since))
            && options.mode == mode
            && (self.may_serve(index, since, cx) || !self.has_claims_for_all(mode))
        {
            // The hold is about to end, so the lane is not busy for a try.
            self.claim_in(index, options, since, false, cx, effects);
        }
        if let Some(hold) = hold {
            self.on_lane(index, effects, |queue| queue.released(hold.cycle, hold.token, cx).1);
        }
        true
    }

    /// Whether the turn of the lane includes a task that has waited since then.
    fn may_serve(&self, index: usize, since: Moment, cx: Context<'_>) -> bool {
        let lane = self.lanes.get(index);
        lane.is_some_and(|lane| lane.queue.reached_bound(since, cx).is_none())
    }

    /// Whether the tasks that may have a claim in this mode all have one.
    fn has_claims_for_all(&self, mode: LockMode) -> bool {
        let line = self.waiters.iter().take(CLAIMS_MAX);
        let tasks = line.filter(|(_, waiter)| waiter.options.mode == mode).count();
        let lanes = self.lanes.iter();
        tasks <= lanes.filter(|lane| lane.mode == mode && lane.claim.is_some()).count()
    }

    /// The lanes with a claim, those that will have a lease first before the others.
    fn claims(&self) -> Vec<usize> {
        let place = |lane: &Lane| match lane.queue.contending_cycle() {
            _ if lane.queue.holds() => (0, None),
            Some(cycle) => (1, Some(cycle)),
            // Its cycle begins when a release has been answered.
            None => (2, None),
        };
        let lanes = self.lanes.iter().enumerate();
        let mut claims: Vec<_> = lanes
            .filter(|(_, lane)| lane.claim.is_some())
            .map(|(index, lane)| (place(lane), index))
            .collect();
        claims.sort_unstable();
        claims.into_iter().map(|(_, index)| index).collect()
    }

    /// Makes a claim for the first task that has none, or gives up one that no task needs.
    fn claim(&mut self, cx: Context<'_>, effects: &mut Effects<W>) -> bool {
        let mut unused = self.claims();
        let mut wanted = None;
        for (_, waiter) in self.waiters.iter().take(CLAIMS_MAX) {
            let mode = waiter.options.mode;
            let found = unused
                .iter()
                .position(|&index| self.lanes.get(index).is_some_and(|lane| lane.mode == mode));
            match found {
                Some(place) => {
                    unused.remove(place);
                }
                None => {
                    wanted = Some((waiter.options, waiter.since));
                    break;
                }
            }
            if mode == LockMode::Shared {
                break;
            }
        }
        // A claim that nobody needs is given up before another one is made.
        if let Some(index) = unused.pop() {
            let claim = self.lanes.get_mut(index).and_then(|lane| lane.claim.take());
            if let Some(id) = claim {
                self.on_lane(index, effects, |queue| queue.give_up(id, cx));
            }
            return true;
        }
        let Some((options, since)) = wanted else { return false };
        let is_shared = options.mode == LockMode::Shared;
        if is_shared && self.lanes.iter().any(|lane| lane.hold.is_some())
            || !is_shared && self.weight_in_use() + options.mode.weight() > options.mode.limit()
        {
            return false;
        }
        let is_free = |lane: &Lane| lane.mode == options.mode && lane.claim.is_none() && lane.hold.is_none();
        let index = self.lanes.iter().position(is_free).unwrap_or_else(|| {
            let index = self.lanes.len();
            let mut lane = Lane::new(options.mode);
            lane.queue.keeps_nothing = self.keeps_nothing;
            self.lanes.push(lane);
            index
        });
        let lane = self.lanes.get(index);
        let is_busy = options.try_only && lane.is_some_and(|lane| !lane.queue.is_free_for_a_try());
        self.claim_in(index, options, since, is_busy, cx, effects);
        true
    }

    /// Makes a claim for a task that has waited since then. It is refused if the task only tries
    /// and the lane is busy.
    fn claim_in(
        &mut self,
        index: usize,
        options: WaiterOptions,
        since: Moment,
        is_busy: bool,
        cx: Context<'_>,
        effects: &mut Effects<W>,
    ) {
        let claim = WaiterOptions {
            // The patience of tasks is watched by the group.
            in_outage: InOutage::UntilOwnLimit,
            contended_hint: self.remote_waiters_seen,
            max_hold: None,
            ..options
        };
        let mut id = None;
        self.on_lane(index, effects, |queue| {
            let (claim, effects) = queue.enqueue_since(since, is_busy, claim, None, cx);
            id = Some(claim);
            effects
        });
        if let Some(lane) = self.lanes.get_mut(index) {
            lane.claim = id;
        }
    }

    /// The permits that this process has or waits for. Leases that linger are given up for others.
    pub(super) fn weight_in_use(&self) -> u32 {
        let is_used = |lane: &&Lane| lane.claim.is_some() || lane.hold.is_some();
        self.lanes.iter().filter(is_used).map(|lane| lane.mode.weight()).sum()
    }
}
