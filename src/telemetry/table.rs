//! The one table of all metrics. `METRICS.md` is this table, and a test compares the two.

/// A metric that the library exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What can be done with its numbers.
    pub kind: MetricKind,
    /// What its numbers count.
    pub unit: MetricUnit,
    /// The labels that each of its series has.
    pub labels: &'static [&'static str],
    /// What it says.
    pub meaning: &'static str,
    /// What to do when it moves.
    pub action: &'static str,
}

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetricKind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution. Give it the buckets of [`Metric::buckets`].
    Histogram,
}

/// What the numbers of a metric count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetricUnit {
    /// Things.
    Count,
    /// Seconds.
    Seconds,
    /// A part of one.
    Ratio,
}

/// From a round trip on loopback to a wait that is a scandal.
const SECONDS: &[f64] = &[
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25,
    0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
];
const COUNTS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0,
];
const RATIOS: &[f64] = &[0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0];

impl Metric {
    /// The upper bounds of the buckets that fit it; empty unless it is a histogram.
    #[must_use]
    pub const fn buckets(&self) -> &'static [f64] {
        match (self.kind, self.unit) {
            (MetricKind::Histogram, MetricUnit::Seconds) => SECONDS,
            (MetricKind::Histogram, MetricUnit::Count) => COUNTS,
            (MetricKind::Histogram, MetricUnit::Ratio) => RATIOS,
            (MetricKind::Counter | MetricKind::Gauge, _) => &[],
        }
    }
}

/// Makes the constants for the names and the table.
macro_rules! metrics {
    ($($(#[$attribute:meta])* $constant:ident = $name:literal, $kind:ident, $unit:ident, $labels:expr, $meaning:literal, $action:literal;)*) => {
        $($(#[$attribute])* pub(crate) const $constant: &str = $name;)*

        /// All metrics. Durations are in seconds.
        pub const METRICS: &[Metric] = &[$(Metric {
            name: $name,
            kind: MetricKind::$kind,
            unit: MetricUnit::$unit,
            labels: &$labels,
            meaning: $meaning,
            action: $action,
        }),*];
    };
}

metrics! {
    ACQUISITIONS = "shardlock_acquisitions_total", Counter, Count, ["class", "outcome", "path"],
        "lock requests that ended, by outcome (acquired, busy, timeout, queue_full, unavailable, refused, closed, cancelled) and, where acquired, the path: \
         uncontended, local (from a task of this process), remote (from another process) or lingering (under a lease that this process had kept idle)",
        "a growing part of timeout means contention: see the hot keys; unavailable or refused: see the shard's requests and the log";
    WAIT = "shardlock_wait_seconds", Histogram, Seconds, ["class"],
        "time from a lock request to its guard",
        "high: shorten what is done under the lock, split the key, or look at the hot keys; high without contention: see the round trips";
    HOLD = "shardlock_hold_seconds", Histogram, Seconds, ["class"],
        "time from a guard to its release",
        "the work under the lock takes this long; every waiter pays for it, so move out of it what needs no lock";
    WAITERS = "shardlock_waiters", Gauge, Count, ["shard"],
        "tasks of this process that wait for a lock",
        "growing without end: locks are asked for faster than they are given back; shed load or split hot keys";
    LEASES = "shardlock_leases", Gauge, Count, ["shard"],
        "leases that this process holds, those that linger included",
        "growing without end: guards are kept and never dropped; see the held locks, oldest first";
    LINGERING_LEASES = "shardlock_lingering_leases", Gauge, Count, ["shard"],
        "leases without a guard that this process keeps for its next lock of the key, or is just giving back after that; 0 unless linger is set",
        "many, and few locks with the path lingering: keys are not locked again in time; each costs renewals and makes tries elsewhere fail, so lower linger, or set it for some requests only";
    OLDEST_WAITER = "shardlock_oldest_waiter_seconds", Gauge, Seconds, ["shard"],
        "for how long the task that has waited longest has waited; 0 if none waits",
        "above the usual hold time times the length of the line: the holder is stuck; see who holds the key";
    OLDEST_LEASE = "shardlock_oldest_lease_seconds", Gauge, Seconds, ["shard"],
        "for how long the guard that is held longest is held; 0 if none is",
        "above the longest job: a task is stuck under its lock; see the held locks, and set max_hold";
    HAND_OFFS = "shardlock_hand_offs_total", Counter, Count, ["shard", "kind"],
        "locks passed to a waiter: local (same process) or remote (another process)",
        "many remote ones cost a network trip each: send the jobs of one key to one process, or raise max_burst";
    BATCH = "shardlock_local_batch_size", Histogram, Count, ["shard"],
        "guards that were served under one lease before it was given back, those included that came while it lingered",
        "near 1 under contention: merging does not help here, since the waiters are in different processes";
    BYPASS = "shardlock_bypass_limits_total", Counter, Count, ["shard", "limit"],
        "leases passed to another process since max_burst or max_slice was reached while local tasks still waited",
        "it is what keeps processes fair; if throughput matters more, raise the limit that is reached";
    REJECTIONS = "shardlock_rejections_total", Counter, Count, ["limit"],
        "requests refused at once since max_waiters_per_key, max_waiters or max_keys was reached, since more leases are held than renewals keep up with, or since many keys wait for a shard that is down",
        "the process is overloaded: shed load earlier, find the hot key, or raise the limit if there is memory";
    LOST = "shardlock_lost_total", Counter, Count, ["shard", "reason"],
        "leases that were lost while a guard was out",
        "never normal: expired means that renewals failed or the process stood still for a TTL; taken, that somebody deleted the key or the server lost its data; \
         max_hold, that a task was stuck; shard_map, that the shard map was replaced while managers ran";
    VALIDITY_LEFT = "shardlock_validity_left_ratio", Histogram, Ratio, ["shard"],
        "what was left of a lease's validity, as a part of its TTL, when its guard was released",
        "below 0.5: renewals come late or fail; raise the TTL before locks are lost";
    RENEWALS = "shardlock_renewals_total", Counter, Count, ["shard", "outcome"],
        "renewals of leases: extended, not_ours (the lease was gone) or failed (no answer; tried again)",
        "failed: the shard is slow or away; not_ours: leases were lost";
    RENEWAL_LAG = "shardlock_renewal_lag_seconds", Histogram, Seconds, ["shard"],
        "how much later than planned a renewal was sent",
        "near the TTL: the process gets too little CPU; give it more, or raise the TTL";
    CONNECTS = "shardlock_connects_total", Counter, Count, ["shard", "kind"],
        "connections opened, the first ones included: command or subscription",
        "growing: connections break; see the server's log, its client limits and the network";
    RECONNECTS = "shardlock_subscription_reconnects_total", Counter, Count, ["shard"],
        "subscriptions that were cut off and made again; whoever waited asked again then",
        "growing: raise client-output-buffer-limit pubsub, or look for a proxy that cuts idle connections";
    REQUESTS = "shardlock_store_requests_total", Counter, Count, ["shard", "request", "outcome"],
        "round trips to the store: answered or failed",
        "failed: the shard is away, overloaded or says no; see shardlock_shard_up and the log";
    ROUND_TRIP = "shardlock_store_round_trip_seconds", Histogram, Seconds, ["shard", "request"],
        "time of an answered round trip to the store",
        "high on one shard: its server or the way to it is slow (SLOWLOG, fsync, CPU); high on all: this process is short of CPU";
    SHARD_UP = "shardlock_shard_up", Gauge, Count, ["shard"],
        "1 if the last request to the shard was answered and it takes locks, 0 if not; asked every 3 s even if nobody locks, by a write that changes nothing: \
         the primary, each primary of a cluster, a majority of a quorum; by a read: a majority of etcd",
        "0: its keys can't be locked; check the server and the network, and see `shardlock doctor`";
    TOKEN_REGRESSIONS = "shardlock_token_regressions_total", Counter, Count, ["shard"],
        "tokens that were not above earlier ones and so refused",
        "never normal: the server lost its data or an old replica was promoted; locks fail closed, so look at persistence and failovers";
    STALE_GRANTS = "shardlock_stale_grants_total", Counter, Count, ["shard"],
        "grants that came for a cycle that was over, or that had run out; they were given back",
        "a few after reconnects and timeouts are normal; many: grants take as long as the TTL, or tasks give up just as their turn comes";
    ABANDONED = "shardlock_abandoned_cycles_total", Counter, Count, ["shard"],
        "cycles released in the background after their outcome was unknown or unwanted",
        "growing: requests time out or are cancelled under way; raise store_timeout, or look at the shard";
    QUORUM_VOTES = "shardlock_quorum_votes_total", Counter, Count, ["shard", "node", "outcome"],
        "answers of a quorum's nodes to claims: given, refused or unanswered; there for redlock:// shards",
        "refused: another holder, or a lease that a node still has of a dead one; unanswered by one node: see that node";
    QUORUM_SUSPECTS = "shardlock_quorum_suspects", Gauge, Count, ["shard", "node"],
        "1 for a node of a quorum that is down or has no vote, otherwise 0; there for redlock:// shards",
        "one: see that node before the next one goes; a majority: no lock of the shard can be had";
    CLOCK_JUMPS = "shardlock_server_clock_jumps_total", Counter, Count, ["shard"],
        "steps of the clocks of the shard's servers (the primary, each primary of a cluster, each node of a quorum), seen against this process's monotonic \
         clock; stays 0 for etcd:// and memory://, which tell no time",
        "no lock depends on it, but expiry on a Redis server does: a jump forward ends leases early; the log names the server: make NTP slew, and see the host";
    CLOCK_DRIFT = "shardlock_server_clock_drift_seconds", Gauge, Seconds, ["shard"],
        "how far the server's clock has gone ahead of this process's monotonic clock since the first look at this server; of several servers, the one that has \
         moved the most; stays 0 for etcd:// and memory://",
        "growing steadily by more than 1 %: the allowance for drift does not hold; mend the clock of one of the two hosts";
    STALLS = "shardlock_runtime_stalls_total", Counter, Count, [],
        "times that the background thread woke more than 100 ms late",
        "the process or its machine stood still: CPU limits, swapping, a stopped process, a suspended machine; leases may run out meanwhile";
    STALL = "shardlock_runtime_stall_seconds", Histogram, Seconds, [],
        "how late the background thread woke then",
        "compare with the TTL: a stall as long as the TTL loses every lock";
    #[cfg_attr(not(feature = "admin"), allow(dead_code, reason = "the admin endpoint writes it itself"))]
    HOT_KEY = "shardlock_hot_key_contention", Gauge, Count, ["key", "shard"],
        "requests of late that found this key held or wanted, for the keys with most of them; only on the page of the admin endpoint, and only if hot_key_metrics is on. A key that drops out disappears",
        "split the key, shorten what is done under it, or send its jobs to one process";
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::*;

    fn as_markdown() -> String {
        let mut table = String::from(
            "| name | kind | unit | labels | meaning | what to do when it moves |\n|---|---|---|---|---|---|\n",
        );
        for metric in METRICS {
            let labels: Vec<_> = metric.labels.iter().map(|label| format!("`{label}`")).collect();
            writeln!(
                table,
                "| `{}` | {:?} | {:?} | {} | {} | {} |",
                metric.name,
                metric.kind,
                metric.unit,
                labels.join(", "),
                metric.meaning,
                metric.action,
            )
            .unwrap();
        }
        table
    }

    #[test]
    fn the_page_has_the_table_of_the_code() {
        let table = as_markdown();
        assert!(
            include_str!("../../METRICS.md").contains(&table),
            "METRICS.md does not have this table; paste it there:\n\n{table}"
        );
    }

    #[test]
    fn names_follow_the_rules_of_prometheus() {
        for metric in METRICS {
            let unit = match (metric.kind, metric.unit) {
                (MetricKind::Counter, _) => "_total",
                (_, MetricUnit::Seconds) => "_seconds",
                (_, MetricUnit::Ratio) => "_ratio",
                (_, MetricUnit::Count) => "",
            };
            assert!(
                metric.name.starts_with("shardlock_") && metric.name.ends_with(unit),
                "{metric:?}"
            );
            assert!(metric.buckets().is_sorted(), "{metric:?}");
            // No label holds a key but that of the hot ones, of which there are few.
            assert!(!metric.labels.contains(&"key") || metric.name == HOT_KEY);
        }
    }
}
