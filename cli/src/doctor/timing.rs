//! Checks whether leases last long enough for the round trips they need.

use std::time::Duration;

use shardlock::config::Config;

use super::facts::RoundTrips;
use super::finding::Finding;
use super::format::duration;

/// The number of round trips that must fit into a TTL. With fewer, a short delay ends leases.
const ROUND_TRIPS_PER_TTL: u32 = 20;
/// With fewer round trips per TTL than this, not even a renewal and one retry fit.
const ROUND_TRIPS_PER_TTL_MIN: u32 = 4;
/// The number of round trips that must fit into the time limit of a request.
///
/// This is checked against the median, because a single slow reply proves nothing.
const ROUND_TRIPS_PER_TIMEOUT: u32 = 5;

/// Checks the settings against each other.
pub(super) fn settings(config: &Config) -> Finding {
    let Config { ttl, store_timeout, .. } = *config;
    let interval = ttl.mul_f64(config.renew_fraction);
    let found = format!("ttl {ttl:?}, renewed every {interval:?}, store_timeout {store_timeout:?}");
    let left = ttl.saturating_sub(interval);
    if store_timeout >= ttl {
        Finding::warning(
            "ttl",
            found,
            "a reply may take longer than a lease lasts, so one late reply loses the lock, and a new lease may have expired when the reply arrives",
            format!(
                "set store_timeout to less than the ttl, such as {:?}, or raise ttl",
                (ttl / 4).max(Duration::from_millis(10))
            ),
        )
    } else if store_timeout * 2 > left {
        Finding::note(
            "ttl",
            found,
            "a lease does not survive two renewals in a row that time out",
            format!("set store_timeout to {:?} or less, or raise ttl", left / 2),
        )
    } else {
        Finding::ok("ttl", found)
    }
}

/// Checks the settings against the measured round trips.
pub(super) fn measured(times: &RoundTrips, config: &Config) -> Finding {
    const CHECK: &str = "ttl-round-trip";
    let (median, most) = (times.median, times.most);
    let interval = config.ttl.mul_f64(config.renew_fraction);
    let fit = (config.ttl.as_secs_f64() / median.as_secs_f64().max(1e-9)) as u64;
    let found = format!(
        "{fit} round trips of {} fit into the ttl of {:?}",
        duration(median),
        config.ttl
    );
    let enough = median * ROUND_TRIPS_PER_TTL;
    if config.ttl < median * ROUND_TRIPS_PER_TTL_MIN {
        return Finding::error(
            CHECK,
            found,
            "a lease expires before it can be renewed, so locks are lost while they are in use",
            format!(
                "set ttl to {} or more, or move the process closer to the server",
                duration(enough)
            ),
        );
    }
    if config.ttl < enough || interval < median * 2 {
        return Finding::warning(
            CHECK,
            format!("{found}; renewals are due every {interval:?}"),
            "a short delay in the network or the server is enough to lose locks that are in use",
            format!(
                "set ttl to {} or more, or move the process closer to the server",
                duration(enough.max(median.mul_f64(2.0 / config.renew_fraction)))
            ),
        );
    }
    if config.store_timeout < median * ROUND_TRIPS_PER_TIMEOUT {
        return Finding::warning(
            CHECK,
            format!(
                "a round trip takes {}, with store_timeout {:?}",
                duration(median),
                config.store_timeout
            ),
            "requests fail as unavailable even if the server is only slightly slow",
            format!(
                "set store_timeout to {} or more, and less than the ttl",
                duration(median * ROUND_TRIPS_PER_TIMEOUT)
            ),
        );
    }
    if config.store_timeout < most * 2 {
        return Finding::note(
            CHECK,
            format!(
                "one round trip took {}, with store_timeout {:?}",
                duration(most),
                config.store_timeout
            ),
            "if this happens often, requests fail as unavailable; a single case may be caused by this machine",
            "check whether the server or this machine is overloaded: redis-cli --latency, SLOWLOG GET, LATENCY DOCTOR",
        );
    }
    Finding::ok(CHECK, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    fn config(ttl_ms: u64, timeout_ms: u64) -> Config {
        let mut config = Config::default();
        config.ttl = Duration::from_millis(ttl_ms);
        config.store_timeout = Duration::from_millis(timeout_ms);
        config
    }

    #[test]
    fn a_request_must_not_take_longer_than_a_lease_lasts() {
        let level = |ttl, timeout| settings(&config(ttl, timeout)).level;
        assert_eq!(level(10_000, 1_000), Level::Ok);
        assert_eq!(level(1_000, 500), Level::Note);
        assert_eq!(level(1_000, 1_000), Level::Warning);
        assert_eq!(settings(&Config::default()).level, Level::Ok);
    }

    #[test]
    fn many_round_trips_must_fit_into_a_ttl() {
        let level = |ttl, timeout, median, most| {
            let times = RoundTrips {
                count: 20,
                least: Duration::ZERO,
                median: Duration::from_millis(median),
                most: Duration::from_millis(most),
            };
            measured(&times, &config(ttl, timeout)).level
        };
        assert_eq!(level(10_000, 1_000, 1, 3), Level::Ok);
        assert_eq!(level(200, 50, 1, 3), Level::Ok);
        assert_eq!(level(200, 50, 11, 11), Level::Warning);
        assert_eq!(level(200, 50, 51, 51), Level::Error);
        assert_eq!(level(10_000, 20, 5, 5), Level::Warning);
        assert_eq!(level(10_000, 20, 1, 11), Level::Note);
    }
}
