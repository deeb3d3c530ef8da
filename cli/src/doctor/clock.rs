//! Checks that clocks agree.

use std::time::Duration;

use super::facts::{Clock, Facts, ProbedServer};
use super::finding::Finding;

const CHECK: &str = "clock";

/// The largest difference without a warning, in milliseconds.
const DIFFERENCE_MAX_MS: u64 = 500;

const MEND: &str =
    "run chrony or ntpd on both machines and let it slew the clock, never step it (chronyc tracking, timedatectl)";

/// Compares a server's clock with the clock of this machine.
pub(super) fn compare_with_local(facts: &Facts) -> Option<Finding> {
    let clock = facts.clock.as_ref().ok()?;
    let found = format!("{} this machine's", difference(clock));
    // Give the server the benefit of the doubt for the uncertainty of the round trip.
    let certain = clock.ahead_ms.unsigned_abs().saturating_sub(millis(clock.uncertainty));
    Some(if certain <= DIFFERENCE_MAX_MS {
        Finding::ok(CHECK, found)
    } else {
        Finding::warning(
            CHECK,
            found,
            "locks do not depend on this, but one of the two clocks is wrong: if a server's clock is corrected by a jump, leases end too \
             early or too late, and after a failover or a loss of data, tokens keep growing only if the servers' clocks are close",
            MEND,
        )
    })
}

/// Compares the clocks of the servers of one shard with each other.
pub(super) fn compare_servers<'a>(servers: impl IntoIterator<Item = &'a ProbedServer>) -> Option<Finding> {
    const CHECK: &str = "clocks";
    let mut clocks: Vec<(&str, Clock)> = servers
        .into_iter()
        .filter_map(|server| {
            Some((
                server.address.as_str(),
                *server.facts.as_ref().ok()?.clock.as_ref().ok()?,
            ))
        })
        .collect();
    clocks.sort_by_key(|(_, clock)| clock.ahead_ms);
    let [(slowest, behind), .., (fastest, ahead)] = clocks[..] else {
        return None;
    };
    let apart = behind.ahead_ms.abs_diff(ahead.ahead_ms);
    let certain = apart.saturating_sub(millis(behind.uncertainty + ahead.uncertainty));
    Some(if certain <= DIFFERENCE_MAX_MS {
        Finding::ok(CHECK, format!("at most {apart} ms apart"))
    } else {
        Finding::warning(
            CHECK,
            format!("{fastest} is {apart} ms ahead of {slowest}"),
            "a server that takes over derives tokens from its clock, so tokens keep growing through a failover only if the servers' clocks \
             are close",
            MEND,
        )
    })
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn difference(clock: &Clock) -> String {
    match clock.ahead_ms {
        0 => "within a millisecond of".to_owned(),
        ahead @ 1.. => format!("{ahead} ms ahead of"),
        behind => format!("{} ms behind", behind.unsigned_abs()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    fn facts(ahead_ms: i64, uncertainty_ms: u64) -> Facts {
        let mut facts = Facts::healthy("", &[]);
        facts.clock = Ok(Clock {
            ahead_ms,
            uncertainty: Duration::from_millis(uncertainty_ms),
        });
        facts
    }

    #[test]
    fn a_clock_is_wrong_only_beyond_what_the_round_trip_leaves_open() {
        let level = |ahead, uncertainty| compare_with_local(&facts(ahead, uncertainty)).unwrap().level;
        assert_eq!(level(500, 0), Level::Ok);
        assert_eq!(level(-501, 0), Level::Warning);
        assert_eq!(level(700, 200), Level::Ok);
        let found = compare_with_local(&facts(-501, 0)).unwrap().found;
        assert_eq!(found, "501 ms behind this machine's");
    }

    #[test]
    fn servers_are_compared_with_one_another() {
        let server = |address: &str, ahead| ProbedServer {
            address: address.to_owned(),
            has_login: false,
            encrypted: false,
            facts: Ok(facts(ahead, 0)),
        };
        assert_eq!(compare_servers(&[server("a:1", 0)]), None);
        // `a` and `b` are both close to our clock, but not to each other.
        let finding = compare_servers(&[server("a:1", 300), server("b:1", -300), server("c:1", 0)]).unwrap();
        assert_eq!(
            (finding.level, finding.found.as_str()),
            (Level::Warning, "a:1 is 600 ms ahead of b:1")
        );
        assert_eq!(
            compare_servers(&[server("a:1", 300), server("b:1", 0)]).unwrap().level,
            Level::Ok
        );
    }
}
