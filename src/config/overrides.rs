//! The settings that a request may override, checked against the same bounds.

use std::time::Duration;

use super::bounds::Bounds;
use super::fields::{LINGER, MAX_HOLD, MIN_HOLD, TIMEOUT, TTL};
use crate::error::InvalidSetting;

/// Checks the settings of a request.
#[inline]
pub(crate) fn check_overrides(
    ttl: Option<Duration>,
    timeout: Option<Duration>,
    max_hold: Option<Duration>,
    min_hold: Option<Duration>,
    linger: Option<Duration>,
) -> Result<(), InvalidSetting> {
    if let Some(ttl) = ttl {
        TTL.check(&ttl).map_err(|problem| problem.of("ttl"))?;
    }
    if let Some(min_hold) = min_hold {
        MIN_HOLD.check(&min_hold).map_err(|problem| problem.of("min_hold"))?;
    }
    if let Some(linger) = linger {
        LINGER.check(&linger).map_err(|problem| problem.of("linger"))?;
    }
    // Most requests override nothing.
    if timeout.is_some() {
        TIMEOUT.check(&timeout).map_err(|problem| problem.of("timeout"))?;
    }
    if max_hold.is_some() {
        MAX_HOLD.check(&max_hold).map_err(|problem| problem.of("max_hold"))?;
    }
    Ok(())
}
