//! Checks how a server treats its connections.

use super::facts::Facts;
use super::finding::Finding;

/// The server's default buffer limits for subscribers: the hard limit in bytes, and the soft limit
/// in bytes and seconds.
const PUBSUB_HARD: u64 = 32 << 20;
const PUBSUB_SOFT: u64 = 8 << 20;
const PUBSUB_SECONDS: u64 = 60;

/// From what share of `maxclients` in use, in percent, a warning is given.
const FULL_PERCENT: u64 = 80;

/// The longest time, in seconds, after which a vanished machine should be noticed.
const KEEPALIVE_MAX: u64 = 300;

pub(super) fn pubsub_limits(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "pubsub-limits";
    let limits = facts.setting("client-output-buffer-limit")?;
    let mut fields = limits.split_whitespace().skip_while(|field| *field != "pubsub").skip(1);
    let mut number = || fields.next()?.parse::<u64>().ok();
    let (hard, soft, seconds) = (number()?, number()?, number()?);
    let found = format!("client-output-buffer-limit pubsub {hard} {soft} {seconds}");
    // Zero means no limit.
    let is_low = (1..PUBSUB_HARD).contains(&hard)
        || (1..PUBSUB_SOFT).contains(&soft)
        || (soft > 0 && seconds > 0 && seconds < PUBSUB_SECONDS);
    if !is_low {
        return Some(Finding::ok(CHECK, found));
    }
    Some(Finding::warning(
        CHECK,
        found,
        "a process that reads its grants too slowly is disconnected at these limits; it then reconnects and retries, which takes time",
        "CONFIG SET client-output-buffer-limit \"pubsub 32mb 8mb 60\"",
    ))
}

pub(super) fn idle_timeout(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "timeout";
    let seconds: u64 = facts.setting("timeout")?.parse().ok()?;
    if seconds == 0 {
        return Some(Finding::ok(CHECK, "0: idle connections stay open"));
    }
    Some(Finding::note(
        CHECK,
        format!("{seconds} s"),
        "idle connections are closed, so the next lock after a pause waits for a new connection",
        "CONFIG SET timeout 0",
    ))
}

pub(super) fn keepalive(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "tcp-keepalive";
    let seconds: u64 = facts.setting("tcp-keepalive")?.parse().ok()?;
    if (1..=KEEPALIVE_MAX).contains(&seconds) {
        return Some(Finding::ok(CHECK, format!("{seconds} s")));
    }
    let found = if seconds == 0 {
        "0: never".to_owned()
    } else {
        format!("{seconds} s")
    };
    Some(Finding::note(
        CHECK,
        found,
        "until the server notices that a machine has vanished, it may still grant locks to it, and each such lock is stuck for its TTL",
        "CONFIG SET tcp-keepalive 30 (applies to new connections only)",
    ))
}

pub(super) fn clients(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let most = facts
        .value("maxclients", "maxclients")
        .and_then(|most| most.parse::<u64>().ok());
    if let (Some(most), Some(now)) = (most, facts.number("connected_clients")) {
        let found = format!("{now} connected, at most {most}");
        findings.push(if now.saturating_mul(100) < most.saturating_mul(FULL_PERCENT) {
            Finding::ok("maxclients", found)
        } else {
            Finding::warning(
                "maxclients",
                found,
                "at the limit, new connections are refused, so processes that start or reconnect get no locks",
                "CONFIG SET maxclients to a higher value (for each shard, a process needs the setting `connections` plus two), or find the client that leaks connections: CLIENT LIST",
            )
        });
    }
    if let Some(rejected) = facts.number("rejected_connections").filter(|&rejected| rejected > 0) {
        findings.push(Finding::warning(
            "rejected-connections",
            format!("{rejected} connections were refused since the server started or its statistics were reset"),
            "the limit of connections was reached, and the refused processes got no locks",
            "CONFIG SET maxclients to a higher value; CONFIG RESETSTAT resets the count",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Level;

    #[test]
    fn limits_of_subscribers_below_the_defaults_are_warned_of() {
        let level = |limits: &str| {
            let all = format!("normal 0 0 0 slave 268435456 67108864 60 pubsub {limits}");
            pubsub_limits(&Facts::healthy("", &[("client-output-buffer-limit", &all)]))
                .unwrap()
                .level
        };
        for (limits, expected) in [
            ("33554432 8388608 60", Level::Ok),
            ("0 0 0", Level::Ok),
            ("1048576 8388608 60", Level::Warning),
            ("33554432 1048576 60", Level::Warning),
            ("33554432 8388608 5", Level::Warning),
        ] {
            assert_eq!(level(limits), expected, "{limits}");
        }
    }

    #[test]
    fn idle_connections_are_better_kept_and_dead_ones_found() {
        let facts = |settings: &[_]| Facts::healthy("", settings);
        assert_eq!(idle_timeout(&facts(&[("timeout", "0")])).unwrap().level, Level::Ok);
        assert_eq!(idle_timeout(&facts(&[("timeout", "60")])).unwrap().level, Level::Note);
        assert_eq!(keepalive(&facts(&[("tcp-keepalive", "300")])).unwrap().level, Level::Ok);
        assert_eq!(keepalive(&facts(&[("tcp-keepalive", "0")])).unwrap().level, Level::Note);
    }

    #[test]
    fn room_for_connections_is_checked() {
        let levels = |info: &str| -> Vec<_> {
            let facts = Facts::healthy(info, &[("maxclients", "100")]);
            clients(&facts)
                .into_iter()
                .map(|finding| (finding.check, finding.level))
                .collect()
        };
        assert_eq!(levels("connected_clients:79\n"), [("maxclients", Level::Ok)]);
        assert_eq!(levels("connected_clients:80\n"), [("maxclients", Level::Warning)]);
        assert_eq!(
            levels("rejected_connections:1\n"),
            [("maxclients", Level::Ok), ("rejected-connections", Level::Warning)]
        );
    }
}
