//! The background thread of a manager, as in `driver::background` and `driver::watchdog`: jobs,
//! abandoned cycles, renewals.

use rand::Rng;

use super::clock::Nanos;
use super::network::{Driver, Lease, Order};
use super::world::{Event, Manager, Orphan, Part, World};
use crate::clock::Moment;
use crate::engine::orphans::{Circumstances, Released, Verdict};
use crate::engine::renewals::Due;
use crate::engine::{BLOCK_OF_GRANT, Request};
use crate::protocol::Cycle;
use crate::store::Priority;

#[derive(Debug, Clone, Copy)]
pub(super) enum Job {
    Request {
        k: usize,
        request: Request,
    },
    Abandon {
        k: usize,
        cycle: Cycle,
    },
    /// A request of the cycle may arrive late.
    ReleaseAgain {
        k: usize,
        cycle: Cycle,
    },
}

const SCAN_EVERY_MIN: Nanos = 1_000_000;

impl World {
    /// Queues a job for the background thread, which runs jobs in order.
    pub(super) fn job(&mut self, m: usize, job: Job) {
        let hop = self.between(1_000, 100_000);
        let manager = &mut self.managers[m];
        manager.last_job = manager.last_job.max(self.now + hop);
        let at = manager.last_job;
        self.inside(at, m, Part::Background, Event::Job(job));
    }

    pub(super) fn job_starts(&mut self, m: usize, job: Job) {
        match job {
            Job::Request { k, request } => {
                self.send(m, k, Order::Queue(request), Driver::Background, Priority::Background);
            }
            Job::Abandon { k, cycle } => {
                self.stats.abandoned += 1;
                let manager = &mut self.managers[m];
                let now = manager.clock.at(self.now);
                manager.orphans.add(k, cycle, (), now);
                self.release_orphans(m);
            }
            Job::ReleaseAgain { k, cycle } => {
                let manager = &mut self.managers[m];
                let now = manager.clock.at(self.now);
                let verdict = manager.orphans.release_again_later(k, cycle, now);
                self.orphan_is_judged(m, verdict);
                self.release_orphans(m);
            }
        }
    }

    /// As `driver::Shard` has it.
    pub(super) fn may_arrive_late(&mut self, m: usize, cycle: Cycle) -> bool {
        let late_max = self.plan.late_max();
        let manager = &mut self.managers[m];
        let now = manager.clock.at(self.now);
        let Some(cut) = manager.last_cut.filter(|&cut| now.since(cut) < late_max) else {
            return false;
        };
        manager.late.may_include(cycle, cut, || manager.cycles.newest())
    }

    /// Sends the releases that are due, as `driver::orphans` does after each event.
    fn release_orphans(&mut self, m: usize) {
        let now = self.managers[m].clock.at(self.now);
        loop {
            let Manager {
                orphans,
                queues,
                last_cut,
                ..
            } = &mut self.managers[m];
            let is_current = |&k: &usize, cycle| queues[k].is_current(cycle);
            let Some(verdict) = orphans.next_second_release(now, *last_cut, is_current, || Some(())) else {
                break;
            };
            self.orphan_is_judged(m, verdict);
        }
        while let Some(orphan) = self.managers[m].orphans.next(now) {
            self.release_orphan(m, orphan);
        }
        let manager = &self.managers[m];
        if let Some(due) = manager.orphans.next_due() {
            let at = manager.clock.when(due).max(self.now);
            if at < manager.orphans_due {
                self.managers[m].orphans_due = at;
                self.inside(at, m, Part::Background, Event::OrphansDue { at });
            }
        }
    }

    pub(super) fn orphans_are_due(&mut self, m: usize, at: Nanos) {
        if self.managers[m].orphans_due == at {
            self.managers[m].orphans_due = Nanos::MAX;
            self.release_orphans(m);
        }
    }

    fn release_orphan(&mut self, m: usize, orphan: Orphan) {
        let release = Request::Release {
            cycle: orphan.cycle,
            requeue: None,
            nobody_waits: false,
            tokens: BLOCK_OF_GRANT,
        };
        let priority = match orphan.is_ordered() {
            true => Priority::Foreground,
            false => Priority::Background,
        };
        let request = self.send(m, orphan.key, Order::Queue(release), Driver::Orphans, priority);
        if let Some(in_flight) = self.in_flight.get_mut(&request) {
            in_flight.orphan = Some(orphan);
        }
    }

    /// The release of a cycle that is over got its reply or none.
    pub(super) fn orphan_ended(&mut self, m: usize, mut orphan: Orphan, released: Released) {
        if released != Released::Confirmed && orphan.falls_back() {
            return self.release_orphan(m, orphan);
        }
        let rng = &mut self.rng;
        let manager = &mut self.managers[m];
        let circumstances = Circumstances {
            now: manager.clock.at(self.now),
            last_cut: manager.last_cut,
            is_ending: manager.is_closed || manager.is_left,
            default_ttl: self.plan.ttls[0],
            longest_ttl: self.plan.longest_ttl(),
        };
        let verdict = manager
            .orphans
            .on_result(orphan, released, circumstances, |pause| rng.random_range(pause));
        self.orphan_is_judged(m, verdict);
        self.release_orphans(m);
    }

    fn orphan_is_judged(&mut self, m: usize, verdict: Verdict<()>) {
        match verdict {
            Verdict::Done | Verdict::Retried => {}
            Verdict::ReleasedAgainLater => self.stats.second_releases += 1,
            Verdict::LeftToExpire(()) | Verdict::TooManySecondReleases => {
                self.stats.left_to_run_out += 1;
                self.note(|_| format!("m{m} a cycle is left to expire: {verdict:?}"));
            }
        }
    }

    /// Passes the request that follows to the driver of the previous one, if the driver is still
    /// interested.
    pub(super) fn drive_on(&mut self, m: usize, k: usize, driver: Driver, next: Option<Request>) {
        match (driver, next) {
            (Driver::Task(task), next) => self.task_drives_on(m, k, task, next),
            (Driver::Background, Some(request)) => {
                self.send(m, k, Order::Queue(request), Driver::Background, Priority::Background);
            }
            (_, Some(request)) => self.job(m, Job::Request { k, request }),
            (_, None) => {}
        }
    }

    /// Something is due at this moment of the local clock.
    pub(super) fn look_at(&mut self, m: usize, moment: Moment) {
        let late = self.between(0, 1_000_000);
        let manager = &mut self.managers[m];
        let at = manager.clock.when(moment).max(self.now + SCAN_EVERY_MIN / 10) + late;
        if at < manager.next_scan {
            manager.next_scan = at;
            self.inside(at, m, Part::Watchdog, Event::Look { at });
        }
    }

    /// Lets time pass for every key, and sends the renewals that are due.
    pub(super) fn watchdog_looks(&mut self, m: usize, at: Nanos) {
        if self.managers[m].next_scan != at {
            return;
        }
        self.managers[m].next_scan = Nanos::MAX;
        let now = self.managers[m].clock.at(self.now);
        let mut all_due = Vec::new();
        for k in 0..self.keys.len() {
            let (due, request) = self.event(m, k, |queue, cx| {
                let effects = queue.tick(cx);
                let due: Vec<_> = std::iter::from_fn(|| queue.renewal(cx)).collect();
                (due, effects)
            });
            if let Some(request) = request {
                self.job(m, Job::Request { k, request });
            }
            for (cycle, ttl, late) in due {
                all_due.push(Due::new(Lease { k, cycle, ttl }, ttl, late, &self.plan.rules, now));
            }
        }
        self.managers[m].renewals.add(all_due);
        self.send_renewals(m);
    }

    /// Sends the batches of renewals that may be in flight, as `driver::watchdog` does.
    fn send_renewals(&mut self, m: usize) {
        let now = self.managers[m].clock.at(self.now);
        while let Some(batch) = self.managers[m].renewals.next(now) {
            let mut batch: Vec<Lease> = batch.into_iter().map(|due| due.what).collect();
            // Leases may have been released while the batch waited for its turn.
            batch.retain(|lease| self.holds(m, lease.k, lease.cycle));
            let Some(first) = batch.first() else {
                self.managers[m].renewals.ended(true);
                continue;
            };
            let k = first.k;
            self.stats.batches += 1;
            self.stats.renewals += batch.len() as u64;
            self.send(m, k, Order::Renew(batch), Driver::Watchdog, Priority::Background);
        }
    }

    /// A batch got its reply or none.
    pub(super) fn batch_ended(&mut self, m: usize, in_time: bool) {
        self.managers[m].renewals.ended(in_time);
        self.send_renewals(m);
    }

    fn holds(&self, m: usize, k: usize, cycle: Cycle) -> bool {
        self.managers[m].queues[k].has_lease_of(cycle)
    }
}
