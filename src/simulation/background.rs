//! The background thread of a manager, as in `driver::background` and `driver::watchdog`: jobs,
//! abandoned cycles, renewals.

use std::time::Duration;

use super::clock::Nanos;
use super::network::{Driver, Order};
use super::world::{Event, Part, World};
use crate::clock::Moment;
use crate::engine::{Flaw, Request};
use crate::protocol::Cycle;
use crate::store::Priority;

#[derive(Debug, Clone, Copy)]
pub(super) enum Job {
    Request { k: usize, request: Request },
    Abandon { k: usize, cycle: Cycle },
}

/// A cycle that is over and is being released.
#[derive(Debug, Clone, Copy)]
pub(super) struct Abandon {
    k: usize,
    cycle: Cycle,
    started: Moment,
    lane: Priority,
    pause: Duration,
    /// Nothing of the cycle can arrive after this release.
    is_final: bool,
}

const PAUSE_MIN: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
const LOOK_EVERY_MIN: Nanos = 1_000_000;

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
                self.abandon(m, k, cycle, false);
            }
        }
    }

    fn abandon(&mut self, m: usize, k: usize, cycle: Cycle, is_final: bool) {
        let started = self.managers[m].clock.at(self.now);
        self.release_abandoned(
            m,
            Abandon {
                k,
                cycle,
                started,
                lane: Priority::Foreground,
                pause: PAUSE_MIN,
                is_final,
            },
        );
    }

    /// The reply proves that nothing of the cycle is left only if the release arrived after
    /// everything else of the cycle.
    pub(super) fn abandon_answered(&mut self, m: usize, abandon: Abandon) {
        if !abandon.is_final && (abandon.lane != Priority::Foreground || self.was_cut_lately(m)) {
            self.doubt(m, abandon.k, abandon.cycle, false);
        }
    }

    pub(super) fn was_cut_lately(&self, m: usize) -> bool {
        let manager = &self.managers[m];
        let now = manager.clock.at(self.now);
        manager
            .last_cut
            .is_some_and(|cut| now.since(cut) < self.plan.late_max())
    }

    /// Something of this cycle may still arrive.
    pub(super) fn doubt(&mut self, m: usize, k: usize, cycle: Cycle, is_postponed: bool) {
        if self.plan.rules.has(Flaw::TrustsReleases) {
            return;
        }
        self.stats.doubted += 1;
        let clock = self.managers[m].clock;
        let at = clock.when(clock.at(self.now) + self.plan.late_max());
        self.inside(at, m, Part::Background, Event::Doubted { k, cycle, is_postponed });
    }

    /// Nothing of this cycle can arrive any more.
    pub(super) fn doubt_ends(&mut self, m: usize, k: usize, cycle: Cycle, is_postponed: bool) {
        if self.managers[m].queues[k].is_current(cycle) {
            return;
        }
        if !is_postponed && self.was_cut_lately(m) {
            return self.doubt(m, k, cycle, true);
        }
        self.abandon(m, k, cycle, true);
    }

    fn release_abandoned(&mut self, m: usize, abandon: Abandon) {
        let release = Request::Release {
            cycle: abandon.cycle,
            requeue: None,
            nobody_waits: false,
            tokens: self.plan.rules.max_burst,
        };
        self.send(
            m,
            abandon.k,
            Order::Queue(release),
            Driver::Abandon(abandon),
            abandon.lane,
        );
    }

    pub(super) fn abandon_failed(&mut self, m: usize, abandon: Abandon) {
        let waited = self.managers[m].clock.at(self.now).since(abandon.started);
        if abandon.lane == Priority::Foreground {
            let lane = Priority::Background;
            self.release_abandoned(m, Abandon { lane, ..abandon });
        } else if waited < self.plan.ttls.iter().copied().max().unwrap_or_default() {
            let at = self.now + super::clock::nanos(abandon.pause);
            let pause = (abandon.pause * 2).min(PAUSE_MAX);
            let again = Abandon { pause, ..abandon };
            self.inside(at, m, Part::Background, Event::AbandonAgain(again));
        } else {
            self.stats.left_to_run_out += 1;
            self.note(|_| format!("m{m} k{} cycle {} is left to run out", abandon.k, abandon.cycle));
        }
    }

    pub(super) fn abandon_again(&mut self, m: usize, abandon: Abandon) {
        self.release_abandoned(m, abandon);
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
        let at = manager.clock.when(moment).max(self.now + LOOK_EVERY_MIN / 10) + late;
        if at < manager.next_look {
            manager.next_look = at;
            self.inside(at, m, Part::Watchdog, Event::Look { at });
        }
    }

    /// Lets time pass for every key, and sends the renewals that are due.
    pub(super) fn watchdog_looks(&mut self, m: usize, at: Nanos) {
        if self.managers[m].next_look != at {
            return;
        }
        self.managers[m].next_look = Nanos::MAX;
        for k in 0..self.keys.len() {
            let (due, request) = self.event(m, k, |queue, cx| {
                let effects = queue.tick(cx);
                (queue.renewal(cx), effects)
            });
            if let Some(request) = request {
                self.job(m, Job::Request { k, request });
            }
            if let Some((cycle, ttl, _)) = due {
                self.send(
                    m,
                    k,
                    Order::Renew { cycle, ttl },
                    Driver::Watchdog,
                    Priority::Background,
                );
            }
        }
    }
}
