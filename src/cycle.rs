//! Cycles: a manager's attempts to acquire and hold a key.

use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::mode::LockMode;

/// One attempt of a manager to acquire and hold a key, from the request to the release. A manager
/// never reuses a number, so a command that executes late can only affect the cycle it was sent
/// for.
///
/// In a store a cycle is written as `<number>-<ttl in ms>-<code>`, followed by the [mode](LockMode)
/// unless that is exclusive: `-s` for a shared lock, `-p<weight>-<limit>` for permits. The TTL
/// tells the manager that passes the lease on how long this cycle's lease lasts. Other clients
/// cannot guess the code (see [`Cycles`]).
///
/// An *odd* number means that the manager expects remote waiters from the start and bounds its
/// bypass. The owner of an *even* cycle is notified when another manager begins to wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Cycle {
    number: u64,
    ttl_ms: u32,
    code: u32,
    mode: LockMode,
}

impl Cycle {
    /// The mode in which the key is to be held.
    pub(crate) const fn mode(self) -> LockMode {
        self.mode
    }

    /// Whether this is the owner of a lease that was released and stays for the rest of its
    /// `min_hold`.
    pub(crate) const fn is_retired(self) -> bool {
        self.number == RETIRED
    }

    /// Whether the owner bounds its bypass without being notified of a waiter.
    pub(crate) const fn expects_remote_waiters(self) -> bool {
        self.number % 2 == 1
    }

    pub(crate) const fn number(self) -> u64 {
        self.number
    }

    /// The owner of this cycle's lease after it was released before its `min_hold` had passed. No
    /// cycle of any manager equals it, so no request for a cycle concerns such a lease.
    pub(crate) const fn retired(self) -> Self {
        Self {
            number: RETIRED,
            ..self
        }
    }

    /// How long the lease lasts when it is passed to this cycle.
    pub(crate) const fn ttl(self) -> Duration {
        Duration::from_millis(self.ttl_ms as u64)
    }

    /// Parses the output of [`Display`](fmt::Display). The Lua scripts apply the same rule.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (number, rest) = text.split_once('-')?;
        let (ttl, rest) = rest.split_once('-')?;
        let (code, mode) = match rest.split_once('-') {
            Some((code, mode)) => (code, LockMode::parse_suffix(mode)?),
            None => (rest, LockMode::Exclusive),
        };
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let hex = code.len() == CODE_DIGITS && code.bytes().all(|byte| byte.is_ascii_hexdigit());
        if !(digits(number) && digits(ttl) && hex) {
            return None;
        }
        Some(Self {
            number: number.parse().ok()?,
            ttl_ms: ttl.parse().ok()?,
            code: u32::from_str_radix(code, 16).ok()?,
            mode,
        })
    }
}

impl Cycle {
    /// Writes the same text as [`Display`](fmt::Display). For the hot path, where formatting is
    /// slow.
    pub(crate) fn write_to(self, writer: &mut impl Write) -> io::Result<()> {
        write!(writer, "{}-{}-", self.number, self.ttl_ms)?;
        let mut code = [0; CODE_DIGITS];
        for (index, digit) in code.iter_mut().rev().enumerate() {
            let nibble = (self.code >> (4 * index)) & 0xf;
            *digit = b"0123456789abcdef"[nibble as usize];
        }
        writer.write_all(&code)?;
        match self.mode {
            LockMode::Exclusive => Ok(()),
            mode => write!(writer, "{}", mode.suffix()),
        }
    }
}

/// The number of a [retired](Cycle::retired) cycle. Odd, so that nobody is notified of waiters, and
/// below all numbers that a manager uses.
const RETIRED: u64 = 1;

/// The number of digits of the code.
const CODE_DIGITS: usize = 8;

impl fmt::Display for Cycle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mode = self.mode.suffix();
        write!(f, "{}-{}-{:08x}{mode}", self.number, self.ttl_ms, self.code)
    }
}

/// Creates the cycles of one manager.
///
/// A client that may publish to a manager's inbox, but cannot read the lock keys, could otherwise
/// forge a grant for a waiting cycle. So each cycle has a code that only its manager can compute: a
/// hash with a secret that never leaves the process.
#[derive(Debug, Default)]
pub(crate) struct Cycles {
    next: AtomicU64,
    secret: [u64; 2],
}

impl Cycles {
    /// For a manager with this secret.
    pub(crate) const fn with_secret(secret: [u64; 2]) -> Self {
        Self {
            next: AtomicU64::new(0),
            secret,
        }
    }

    /// A new cycle, for leases in this mode with this TTL.
    pub(crate) fn open(&self, mode: LockMode, expects_remote_waiters: bool, ttl: Duration) -> Cycle {
        let pair = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        let number = pair * 2 + u64::from(expects_remote_waiters);
        let ttl_ms = u32::try_from(ttl.as_millis()).unwrap_or(u32::MAX).max(1);
        Cycle {
            number,
            ttl_ms,
            code: self.code(number, ttl_ms, mode),
            mode,
        }
    }

    /// An upper bound on the numbers of all cycles so far.
    pub(crate) fn newest(&self) -> u64 {
        self.next.load(Ordering::Acquire) * 2 + 1
    }

    /// Whether the cycle belongs to this manager. If not, it was forged.
    pub(crate) fn has_opened(&self, cycle: Cycle) -> bool {
        cycle.code == self.code(cycle.number, cycle.ttl_ms, cycle.mode)
    }

    /// SipHash, with the secret on both sides of the protected data.
    fn code(&self, number: u64, ttl_ms: u32, mode: LockMode) -> u32 {
        let mut hasher = DefaultHasher::new();
        hasher.write_u64(self.secret[0]);
        hasher.write_u64(number);
        hasher.write_u32(ttl_ms);
        if mode != LockMode::Exclusive {
            mode.hash(&mut hasher);
        }
        hasher.write_u64(self.secret[1]);
        (hasher.finish() >> 32) as u32
    }
}

#[cfg(test)]
impl Cycle {
    /// A cycle with this number, a TTL of one second, and the code of a manager without a secret.
    pub(crate) fn of(number: u64) -> Self {
        Self::with_ttl(number, Duration::from_secs(1))
    }

    pub(crate) fn with_ttl(number: u64, ttl: Duration) -> Self {
        let ttl_ms = u32::try_from(ttl.as_millis()).unwrap();
        Self {
            number,
            ttl_ms,
            code: Cycles::default().code(number, ttl_ms, LockMode::Exclusive),
            mode: LockMode::Exclusive,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycle_is_read_as_it_was_written() {
        let cycles = Cycles::with_secret([7, 8]);
        let cycle = cycles.open(LockMode::Exclusive, true, Duration::from_millis(1_500));
        assert_eq!((cycle.number(), cycle.ttl()), (3, Duration::from_millis(1_500)));
        assert!(cycle.expects_remote_waiters());
        assert_eq!(Cycle::parse(&cycle.to_string()), Some(cycle));
        let mut written = Vec::new();
        cycle.write_to(&mut written).unwrap();
        assert_eq!(String::from_utf8(written).unwrap(), cycle.to_string());
        for nonsense in [
            "",
            "3",
            "3-1500",
            "3-1500-12",
            "3-x-00000000",
            "-1-1500-00000000",
            "3-1500-0000000g",
            // Rust accepts a sign in numbers; the scripts do not.
            "+3-1500-00000000",
            "3-+1500-00000000",
            "3-1500-+0000000",
        ] {
            assert_eq!(Cycle::parse(nonsense), None, "{nonsense:?}");
        }
        let too_large = format!("{}0-1-00000000", u64::MAX);
        assert_eq!(Cycle::parse(&too_large), None);
    }

    #[test]
    fn mode_is_part_of_a_cycle() {
        let cycles = Cycles::with_secret([7, 8]);
        let permits = LockMode::Permits { weight: 3, limit: 10 };
        for (mode, suffix) in [(LockMode::Shared, "-s"), (permits, "-p3-10")] {
            let cycle = cycles.open(mode, false, Duration::from_secs(1));
            assert!(cycle.to_string().ends_with(suffix), "{cycle}");
            assert_eq!(Cycle::parse(&cycle.to_string()), Some(cycle));
            let mut written = Vec::new();
            cycle.write_to(&mut written).unwrap();
            assert_eq!(String::from_utf8(written).unwrap(), cycle.to_string());
            assert!(cycles.has_opened(cycle));
            for other in [
                LockMode::Exclusive,
                LockMode::Shared,
                permits,
                LockMode::Permits { weight: 2, limit: 10 },
            ] {
                let forged = Cycle { mode: other, ..cycle };
                assert_eq!(cycles.has_opened(forged), other == mode, "{forged}");
            }
        }
        for nonsense in ["", "x", "s-", "p", "p1", "p0-1", "p2-1", "p1-65536", "p+1-2", "p1-2-3"] {
            assert_eq!(
                Cycle::parse(&format!("3-1500-00000000-{nonsense}")),
                None,
                "{nonsense:?}"
            );
        }
    }

    #[test]
    fn cycle_of_another_manager_or_with_another_ttl_is_not_ours() {
        let cycles = Cycles::with_secret([7, 8]);
        let cycle = cycles.open(LockMode::Exclusive, false, Duration::from_secs(1));
        assert!(cycles.has_opened(cycle));
        assert!(!Cycles::with_secret([7, 9]).has_opened(cycle));
        assert!(!Cycles::with_secret([6, 8]).has_opened(cycle));
        assert!(!cycles.has_opened(Cycle {
            ttl_ms: 3_600_000,
            ..cycle
        }));
        assert!(!cycles.has_opened(Cycle {
            number: cycle.number + 2,
            ..cycle
        }));
    }

    #[test]
    fn retired_cycle_differs_from_every_opened_cycle() {
        let cycles = Cycles::with_secret([7, 8]);
        let cycle = cycles.open(LockMode::Exclusive, false, Duration::from_secs(1));
        let retired = cycle.retired();
        assert!(!cycle.is_retired() && retired.is_retired());
        assert!(!cycles.has_opened(retired) && retired.expects_remote_waiters());
        assert_eq!(Cycle::parse(&retired.to_string()), Some(retired));
    }

    /// Code that compares a cycle with the newest one must not mistake it for a future cycle.
    #[test]
    fn no_cycle_is_above_the_newest() {
        let cycles = Cycles::default();
        for expects_remote_waiters in [false, true, false, true] {
            let before = cycles.newest();
            let cycle = cycles.open(LockMode::Exclusive, expects_remote_waiters, Duration::from_secs(1));
            assert!(cycle.number() > before, "{cycle} {before}");
            assert_eq!(cycles.newest(), cycle.number() | 1);
        }
    }
}
