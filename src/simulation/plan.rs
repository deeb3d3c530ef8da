//! The parameters of a run, drawn from its seed.

use std::time::Duration;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::clock::{Nanos, nanos};
use crate::engine::orphans::OrphanRules;
use crate::engine::{Flaw, Rules};

/// The kinds of faults that may happen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Variant {
    /// All faults that leave the store's data alone.
    Faults,
    /// In addition, the store is flushed, and leases are deleted or overwritten.
    Forgetting,
    /// In addition, replicas that lack the last leases are promoted.
    Failover,
    /// The same as `Faults`, with exclusive locks, shared locks and permits of the same keys.
    Mixed,
    /// No faults, and TTLs and linger times so long that waiting for one to end is noticed.
    Prompt,
    /// The same, with all modes of the same keys.
    MixedPrompt,
    /// The same as `Prompt`, with many tasks that ask again at once, and no limit on turns but
    /// their gate.
    Turns,
    /// The same, but half of the messages about a remote waiter are lost, and renewals make up for
    /// them.
    Unheard,
}

impl Variant {
    /// Whether tasks use all modes.
    pub(super) const fn is_mixed(self) -> bool {
        matches!(self, Self::Mixed | Self::MixedPrompt)
    }

    /// Whether there are no faults and nobody may wait for a lease to end.
    pub(super) const fn is_prompt(self) -> bool {
        matches!(self, Self::Prompt | Self::MixedPrompt | Self::Turns)
    }

    /// Whether there are no faults.
    pub(super) const fn is_faultless(self) -> bool {
        self.is_prompt() || matches!(self, Self::Unheard)
    }

    /// Whether turns have no limit but their gate.
    pub(super) const fn is_turns(self) -> bool {
        matches!(self, Self::Turns)
    }

    /// Whether everything that the store grants stays known to it.
    pub(super) const fn keeps_data(self) -> bool {
        !matches!(self, Self::Forgetting | Self::Failover)
    }
}

#[derive(Debug)]
pub(super) struct Plan {
    pub(super) variant: Variant,
    pub(super) rules: Rules,
    pub(super) managers: usize,
    pub(super) keys: usize,
    /// The number of tasks of each manager.
    pub(super) tasks: usize,
    /// The TTLs from which tasks and managers choose.
    pub(super) ttls: Vec<Duration>,
    /// The limits of permits from which tasks choose.
    pub(super) limits: Vec<u16>,
    /// The linger times from which tasks choose; zero is off.
    pub(super) lingers: Vec<Duration>,
    /// The minimum holds from which tasks choose; zero is off.
    pub(super) min_holds: Vec<Duration>,
    /// Whether half of the messages about a remote waiter are lost.
    pub(super) misses_remote_waiters: bool,
    /// The time limit of a request.
    pub(super) timeout: Duration,
    /// When the faults end and tasks start nothing new.
    pub(super) faults_end: Nanos,
    /// The maximum delay of a normal message, one way.
    pub(super) message_max: Nanos,
    /// The probability that a message is slow, and its maximum delay.
    pub(super) slow_chance: f64,
    pub(super) slow_max: Nanos,
    /// The probability that the server refuses a command.
    pub(super) refuse_chance: f64,
    /// The probability that the server does not know the script of a command.
    pub(super) unknown_script_chance: f64,
    pub(super) think_max: Nanos,
    pub(super) hold_max: Nanos,
    pub(super) long_hold_chance: f64,
    pub(super) long_hold_max: Nanos,
    pub(super) try_chance: f64,
    pub(super) max_hold_chance: f64,
    /// The probability that a task stops waiting after some time, right when it is woken, or while
    /// its release is in flight.
    pub(super) give_up_chance: f64,
    /// The maximum number of faults of each kind.
    pub(super) pauses: u32,
    pub(super) task_pauses: u32,
    pub(super) crashes: u32,
    pub(super) resets: u32,
    pub(super) stalls: u32,
    pub(super) slow_times: u32,
    pub(super) subscription_losses: u32,
    pub(super) inboxes_elsewhere: u32,
    pub(super) shutdowns: u32,
    /// The number of evictions of lingering leases.
    pub(super) evictions: u32,
    pub(super) foreigners: u32,
    pub(super) forgettings: u32,
    pub(super) failovers: u32,
    /// Whether commands of a broken connection may still execute, out of order with and long after
    /// the commands of the next connection.
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
        // Some kinds of faults, and a few of each.
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
        let inboxes_elsewhere = if matches!(variant, Variant::Faults | Variant::Mixed) {
            some(3, 0.3)
        } else {
            0
        };
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
        let min_holds = match rng.random_range(0..4) {
            0 | 1 => vec![Duration::ZERO],
            2 => vec![Duration::ZERO, Duration::ZERO, base / 4],
            _ => vec![Duration::ZERO, Duration::ZERO, base / 8, base * 3 / 2],
        };
        let plan = Self {
            variant,
            rules: Rules {
                max_burst: [1, 2, 3, 8, u32::MAX, u32::MAX][rng.random_range(0..6)],
                max_slice: Duration::from_millis([2, 10, 1000][rng.random_range(0..3)]),
                renew_fraction: 0.1,
                flaw,
            },
            managers: rng.random_range(2..=4),
            keys: [1, 1, 2, 3][rng.random_range(0..4)],
            tasks: rng.random_range(1..=5),
            ttls,
            lingers,
            min_holds,
            misses_remote_waiters: variant == Variant::Unheard,
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
            unknown_script_chance: 0.0,
            limits: Vec::new(),
        };
        let plan = if variant.is_mixed() {
            let limits = (0..rng.random_range(1..=2)).map(|_| rng.random_range(1..=4)).collect();
            Self { limits, ..plan }
        } else {
            plan
        };
        match variant {
            Variant::Faults | Variant::Mixed | Variant::Forgetting | Variant::Failover => plan,
            Variant::Prompt | Variant::MixedPrompt => plan.without_faults(1_000),
            Variant::Turns => {
                let crowded = Self {
                    tasks: rng.random_range(1..=12),
                    keys: 1,
                    think_max: plan.think_max / [1, 10, 1_000][rng.random_range(0..3)],
                    min_holds: vec![Duration::ZERO],
                    ..plan.without_faults(1_000)
                };
                Self {
                    rules: Rules {
                        max_burst: u32::MAX,
                        max_slice: Duration::from_secs(3_600),
                        ..crowded.rules
                    },
                    ..crowded
                }
            }
            // A TTL contains ten renewals, so waiting for a lease to expire is noticed here too.
            Variant::Unheard => plan.without_faults(10),
        }
    }

    /// Draws whether the server does not know some scripts. From numbers of its own, so that the
    /// other seeds run as if there were no such fault.
    pub(super) fn draw_unknown_scripts(&mut self, seed: u64) {
        let mut rng = SmallRng::seed_from_u64(!seed);
        if !self.variant.is_faultless() && rng.random_bool(0.3) {
            self.unknown_script_chance = 0.05;
        }
    }

    /// Keeps only what tasks do on their own: they still give up, drop requests and try.
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
        let ttls = self.ttls.iter().chain(&self.min_holds);
        ttls.max().copied().unwrap_or_default()
    }

    pub(super) fn longest_min_hold(&self) -> Duration {
        self.min_holds.iter().max().copied().unwrap_or_default()
    }

    /// How long after its connection broke, or while its connection is slow, a command may still be
    /// executed.
    pub(super) fn late_max(&self) -> Duration {
        self.longest_ttl() * 4
    }

    /// The retry rules of production, in which no pause is longer than a lease.
    pub(super) fn orphan_rules(&self) -> OrphanRules {
        let rules = OrphanRules::new(self.late_max());
        OrphanRules {
            pause_max: rules.pause_max.min(self.longest_ttl()),
            pause_later: rules.pause_later.min(self.longest_ttl()),
            flaw: self.rules.flaw,
            ..rules
        }
    }

    pub(super) fn longest_linger(&self) -> Duration {
        self.lingers.iter().max().copied().unwrap_or_default()
    }

    /// The time after the end of the faults within which everything must have finished. Each holder
    /// and each dead owner may take its time in turn, although hardly all of them do.
    pub(super) fn patience(&self) -> Nanos {
        // A waiter asks again 2 ms after the end of a lease, and 2 ms later for each one ahead.
        let min_hold = nanos(self.longest_min_hold()) * 102 / 100 + 2_000_000 * self.managers as Nanos;
        let min_hold = if self.longest_min_hold().is_zero() { 0 } else { min_hold };
        if self.variant.is_prompt() {
            let one = self.hold_max.max(min_hold) + 10 * self.message_max + 1_000_000;
            return one * (self.managers * self.tasks + 2) as Nanos;
        }
        if self.variant == Variant::Unheard {
            let renewal = nanos(self.rules.renew_every(self.longest_ttl()));
            let one = self.hold_max.max(min_hold) + 10 * self.message_max + 1_000_000 + renewal * 3 / 2;
            return one * (self.managers * self.tasks + 2) as Nanos;
        }
        let one = self.long_hold_max + self.slow_max + nanos(self.timeout) + 2 * nanos(self.longest_ttl());
        one * (self.managers * self.tasks + 2) as Nanos / 4
    }
}
