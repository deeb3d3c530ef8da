//! What one seed's run is made of.

use std::time::Duration;

use rand::Rng;
use rand::rngs::SmallRng;

use super::clock::{Nanos, nanos};
use crate::queue::{Flaw, Rules};

/// Which faults may happen at all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// Everything that leaves the store's data alone.
    Faults,
    /// The store is flushed and leases are deleted or overwritten, too.
    Forgetting,
    /// Replicas that lack the last leases take over, too.
    Failover,
    /// No faults, and leases that last, or are kept, for so long that waiting for the end of one is seen.
    Prompt,
    /// The same, but half of the messages that say that a lease is wanted are lost, and renewals make up for them.
    Unheard,
}

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) variant: Variant,
    pub(super) rules: Rules,
    pub(super) managers: usize,
    pub(super) keys: usize,
    /// The tasks of each manager.
    pub(super) tasks: usize,
    /// What tasks and managers choose their TTLs from.
    pub(super) ttls: Vec<Duration>,
    /// What tasks choose from for how long a lease is kept; zero is not at all.
    pub(super) lingers: Vec<Duration>,
    /// Whether half of the messages that say that a lease is wanted are lost.
    pub(super) misses_wanted: bool,
    /// The time limit of a request.
    pub(super) timeout: Duration,
    /// When the faults end and no task wants anything new.
    pub(super) faults_end: Nanos,
    /// The usual time of a message one way, at most.
    pub(super) message_max: Nanos,
    /// How often a message takes long, and how long.
    pub(super) slow_chance: f64,
    pub(super) slow_max: Nanos,
    /// How often the server refuses a command.
    pub(super) refuse_chance: f64,
    pub(super) think_max: Nanos,
    pub(super) hold_max: Nanos,
    pub(super) long_hold_chance: f64,
    pub(super) long_hold_max: Nanos,
    pub(super) try_chance: f64,
    pub(super) max_hold_chance: f64,
    /// How often a task stops waiting after some time, or just when it is woken, or while its release is under way.
    pub(super) give_up_chance: f64,
    /// How many of each kind of fault happen at most.
    pub(super) pauses: u32,
    pub(super) task_pauses: u32,
    pub(super) crashes: u32,
    pub(super) resets: u32,
    pub(super) stalls: u32,
    pub(super) slow_times: u32,
    pub(super) subscription_losses: u32,
    pub(super) inboxes_elsewhere: u32,
    pub(super) shutdowns: u32,
    /// How often something that is kept is given back to make room.
    pub(super) evictions: u32,
    pub(super) foreigners: u32,
    pub(super) forgettings: u32,
    pub(super) failovers: u32,
    /// Whether commands of a broken connection may still execute, out of order with those of the next, and long after those.
    pub(super) ghosts: bool,
}

impl Plan {
    pub(super) fn draw(rng: &mut SmallRng, variant: Variant, flaw: Option<Flaw>) -> Self {
        let base = Duration::from_millis(rng.random_range(50..=200));
        let mut ttls = vec![base];
        if rng.random_bool(0.4) {
            ttls.push(base * rng.random_range(2..=5));
        }
        let longest = nanos(*ttls.last().unwrap_or(&base));
        // Some kinds of faults, and of those a few.
        let mut some = |most: u32, chance: f64| {
            if rng.random_bool(chance) {
                rng.random_range(1..=most)
            } else {
                0
            }
        };
        let (pauses, task_pauses, crashes) = (some(4, 0.5), some(2, 0.2), some(1, 0.2));
        let (resets, stalls, subscription_losses) = (some(3, 0.3), some(3, 0.3), some(3, 0.35));
        let (shutdowns, foreigners, slow_times) = (some(1, 0.1), some(3, 0.2), some(1, 0.2));
        let evictions = some(4, 0.2);
        let inboxes_elsewhere = if variant == Variant::Faults { some(3, 0.3) } else { 0 };
        let forgettings = if variant == Variant::Forgetting {
            some(6, 0.9)
        } else {
            0
        };
        let failovers = if variant == Variant::Failover { some(3, 0.95) } else { 0 };
        let mut chance = |often: f64, how_often: f64| if rng.random_bool(often) { how_often } else { 0.0 };
        let (slow_chance, refuse_chance) = (chance(0.6, 0.02), chance(0.15, 0.02));
        let (try_chance, max_hold_chance) = (chance(0.3, 0.15), chance(0.25, 0.2));
        let (give_up_chance, long_hold_chance) = (chance(0.5, 0.15), chance(0.5, 0.08));
        let lingers = match rng.random_range(0..4) {
            0 => vec![Duration::ZERO],
            1 => vec![Duration::ZERO, base / 4, base * 3],
            2 => vec![base / 10, base, base * 8],
            _ => vec![base * 20],
        };
        let plan = Self {
            variant,
            rules: Rules {
                max_burst: [1, 2, 3, 8, 64][rng.random_range(0..5)],
                max_slice: Duration::from_millis([2, 10, 1000][rng.random_range(0..3)]),
                renew_fraction: 0.1,
                flaw,
            },
            managers: rng.random_range(2..=4),
            keys: [1, 1, 2, 3][rng.random_range(0..4)],
            tasks: rng.random_range(1..=5),
            ttls,
            lingers,
            misses_wanted: variant == Variant::Unheard,
            timeout: base.mul_f64([0.3, 0.8, 2.5][rng.random_range(0..3)]),
            faults_end: nanos(base) * rng.random_range(6..=16),
            message_max: nanos(base) / rng.random_range(40..=150),
            slow_chance,
            slow_max: longest * rng.random_range(1..=3),
            refuse_chance,
            think_max: nanos(base) / [4, 40][rng.random_range(0..2)],
            hold_max: nanos(base) / rng.random_range(10..=40),
            long_hold_chance,
            long_hold_max: longest * 2,
            try_chance,
            max_hold_chance,
            give_up_chance,
            pauses,
            task_pauses,
            crashes,
            resets,
            stalls,
            slow_times,
            subscription_losses,
            inboxes_elsewhere,
            shutdowns,
            evictions,
            foreigners,
            forgettings,
            failovers,
            ghosts: rng.random_bool(0.3) && variant != Variant::Failover,
        };
        match variant {
            Variant::Faults | Variant::Forgetting | Variant::Failover => plan,
            Variant::Prompt => plan.without_faults(1_000),
            // Renewals come ten times in a TTL, so a wait for the end of one is seen, too.
            Variant::Unheard => plan.without_faults(10),
        }
    }

    /// Only what tasks do on their own is left: they still give up, drop requests and try.
    fn without_faults(self, longer: u32) -> Self {
        let ttls = self.ttls.iter().map(|&ttl| ttl * longer).collect();
        let lingers = self.lingers.iter().map(|&linger| linger * 1_000).collect();
        Self {
            ttls,
            lingers,
            timeout: self.ttls[0] * 1_000,
            slow_chance: 0.0,
            refuse_chance: 0.0,
            long_hold_chance: 0.0,
            max_hold_chance: 0.0,
            pauses: 0,
            task_pauses: 0,
            crashes: 0,
            resets: 0,
            stalls: 0,
            slow_times: 0,
            subscription_losses: 0,
            inboxes_elsewhere: 0,
            shutdowns: 0,
            evictions: 0,
            foreigners: 0,
            forgettings: 0,
            failovers: 0,
            ghosts: false,
            ..self
        }
    }

    pub(super) fn longest_ttl(&self) -> Duration {
        self.ttls.iter().max().copied().unwrap_or_default()
    }

    /// How long after a connection broke a command that was sent on it may be executed, or one that was sent on a connection that is slow.
    pub(super) fn late_max(&self) -> Duration {
        self.longest_ttl() * 4
    }

    pub(super) fn longest_linger(&self) -> Duration {
        self.lingers.iter().max().copied().unwrap_or_default()
    }

    /// The time within which everything must have come to its end once the faults have ended: each holder and each dead owner may
    /// take its time, one after the other, though hardly all of them do.
    pub(super) fn patience(&self) -> Nanos {
        if self.variant == Variant::Prompt {
            let one = self.hold_max + 10 * self.message_max + 1_000_000;
            return one * (self.managers * self.tasks + 2) as Nanos;
        }
        if self.variant == Variant::Unheard {
            let renewal = nanos(self.rules.renew_every(self.longest_ttl()));
            let one = self.hold_max + 10 * self.message_max + 1_000_000 + renewal * 3 / 2;
            return one * (self.managers * self.tasks + 2) as Nanos;
        }
        let one = self.long_hold_max + self.slow_max + nanos(self.timeout) + 2 * nanos(self.longest_ttl());
        one * (self.managers * self.tasks + 2) as Nanos / 4
    }
}
