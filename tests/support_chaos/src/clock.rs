//! A clock shared by all processes of a machine.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// Nanoseconds of `CLOCK_MONOTONIC`, comparable between processes.
pub type Nanos = u64;

/// The time now.
pub fn now() -> Nanos {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A duration in nanoseconds.
pub fn nanos(duration: Duration) -> Nanos {
    u64::try_from(duration.as_nanos()).expect("less than 584 years")
}

/// A second in nanoseconds.
pub const SECOND: Nanos = 1_000_000_000;
