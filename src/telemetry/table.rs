//! The table of all metrics. `METRICS.md` contains the same table, and a test compares the two.

/// A metric that the library exports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Metric {
    /// The name of the metric.
    pub name: &'static str,
    /// The kind of the metric.
    pub kind: MetricKind,
    /// The unit of its values.
    pub unit: MetricUnit,
    /// The labels of each of its series.
    pub labels: &'static [&'static str],
    /// What the metric means.
    pub meaning: &'static str,
    /// What to do when the value changes.
    pub action: &'static str,
}

/// The kind of a metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetricKind {
    /// Only increases.
    Counter,
    /// Increases and decreases.
    Gauge,
    /// A distribution. [`Histograms`](super::Histograms) counts it exactly. For another recorder,
    /// configure the buckets of [`Metric::buckets`].
    Histogram,
}

/// The unit of a metric's values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum MetricUnit {
    /// A number of items.
    Count,
    /// Seconds.
    Seconds,
    /// A fraction of one.
    Ratio,
}

/// From a round trip on loopback to an unacceptably long wait.
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
    /// The upper bounds of suitable buckets. Empty unless the metric is a histogram.
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

/// Defines the constants for the names, with this visibility, and the public table.
macro_rules! metric_table {
    ($(#[$doc:meta])* $visibility:vis $table:ident;
     $($(#[$attribute:meta])* $constant:ident = $name:literal, $kind:ident, $unit:ident, $labels:expr, $meaning:literal, $action:literal;)*) => {
        $($(#[$attribute])* $visibility const $constant: &str = $name;)*

        $(#[$doc])*
        pub const $table: &[Metric] = &[$(Metric {
            name: $name,
            kind: MetricKind::$kind,
            unit: MetricUnit::$unit,
            labels: &$labels,
            meaning: $meaning,
            action: $action,
        }),*];
    };
}

pub(super) use metric_table;

metric_table! {
    /// All metrics. Durations are in seconds.
    pub(crate) METRICS;
    ACQUISITIONS = "shardlock_acquisitions_total", Counter, Count, ["class", "mode", "outcome", "path"],
        "completed lock requests, by mode (exclusive, shared or permits), by outcome (acquired, busy, timeout, \
         queue_full, unavailable, refused, closed, cancelled) and, if acquired, by path: uncontended, local (from \
         a task of this process), remote (from another process), lingering (under a lease that this process had \
         kept idle) or joined (beside other shared holders of this process)",
        "a rising share of timeout means contention: look at the hot keys; unavailable or refused: look at the \
         shard's requests and the log";
    WAIT = "shardlock_wait_seconds", Histogram, Seconds, ["class", "mode"],
        "time from a lock request to its guard",
        "high: do less under the lock, split the key, or look at the hot keys; high without contention: look at \
         the round trips; high for exclusive only: readers hold for long, and writers wait for the last of them";
    HOLD = "shardlock_hold_seconds", Histogram, Seconds, ["class", "mode"],
        "time from acquiring a guard to releasing it",
        "every waiter pays for the time spent under the lock; move work that does not need the lock out of it";
    WAITERS = "shardlock_waiters", Gauge, Count, ["shard", "mode"],
        "tasks of this process that are waiting for a lock in this mode",
        "growing without bound: locks are requested faster than they are released; shed load or split hot keys";
    LEASES = "shardlock_leases", Gauge, Count, ["shard"],
        "leases held by this process, including lingering ones",
        "growing without bound: guards are kept and never dropped; look at the held locks, oldest first";
    LINGERING_LEASES = "shardlock_lingering_leases", Gauge, Count, ["shard"],
        "leases without a guard that this process keeps for its next lock of the key, or is releasing after that; \
         0 unless linger is set",
        "many, with few acquisitions on the path lingering: keys are not locked again in time; each such lease \
         costs renewals and makes tries in other processes fail, so lower linger, or set it for some requests only";
    GUARDS = "shardlock_guards", Gauge, Count, ["shard", "class", "mode"],
        "guards that tasks of this process hold: shared ones are readers, and exclusive ones are writers",
        "growing without bound: guards are kept and never dropped; look at the held locks, oldest first";
    PERMITS_IN_USE = "shardlock_permits_in_use", Gauge, Count, ["shard", "class"],
        "permits that tasks of this process hold",
        "the sum over all processes stays at the limit while tasks wait: hold permits for a shorter time, or raise \
         the limit if what it protects allows that";
    PERMITS_LIMIT = "shardlock_permits_limit", Gauge, Count, ["shard", "class"],
        "the limit of the key whose permits tasks of this process hold or wait for, as they state it, or the total \
         if there are several such keys; 0 if there is none",
        "processes show different limits for the same key: some still have an old configuration, and the smallest \
         limit counts";
    OLDEST_WAITER = "shardlock_oldest_waiter_seconds", Gauge, Seconds, ["shard", "class"],
        "how long the longest waiting task of the class has waited; 0 if no task waits",
        "above the usual hold time times the queue length: the holder is stuck; find out who holds the key";
    OLDEST_GUARD = "shardlock_oldest_guard_seconds", Gauge, Seconds, ["shard", "class"],
        "how long the guard of the class that is held longest has been held; 0 if there is none",
        "above the longest job: a task is stuck under its lock; look at the held locks, and set max_hold";
    HAND_OFFS = "shardlock_hand_offs_total", Counter, Count, ["shard", "kind"],
        "locks handed to a waiter: local (same process) or remote (another process)",
        "each remote hand-off costs a network trip: if there are many, route the jobs of a key to one process";
    BATCH = "shardlock_local_batch_size", Histogram, Count, ["shard"],
        "guards served under one lease before it was released, including those served while it lingered",
        "near 1 under contention: merging does not help because the waiters are in different processes";
    BYPASS = "shardlock_bypass_limits_total", Counter, Count, ["shard", "limit"],
        "leases passed to another process while local tasks were still waiting: all that waited when the turn began \
         were served (gate), or max_burst or max_slice was reached first",
        "gate is normal under contention; if max_burst or max_slice is reached often, tasks of this process get a \
         smaller share than those of others: raise the limit";
    REJECTIONS = "shardlock_rejections_total", Counter, Count, ["limit"],
        "requests refused immediately because max_waiters_per_key, max_waiters or max_keys was reached, because \
         more leases are held than renewals can keep up with (renewals), or because too many keys wait for a shard \
         that is down (outage)",
        "the process is overloaded: shed load earlier, find the hot key, or raise the limit if there is enough \
         memory";
    LOST = "shardlock_lost_total", Counter, Count, ["shard", "reason"],
        "leases lost while a guard was held",
        "never normal; expired: renewals failed or the process was paused for a TTL; taken: the key was deleted or \
         the server lost its data; max_hold: a task was stuck; shard_map: the shard map was replaced while \
         managers were running";
    VALIDITY_LEFT = "shardlock_validity_left_ratio", Histogram, Ratio, ["shard"],
        "remaining validity of a lease when its guard was released, as a fraction of its TTL",
        "below 0.5: renewals are late or fail; raise the TTL before locks are lost";
    RENEWALS = "shardlock_renewals_total", Counter, Count, ["shard", "outcome"],
        "lease renewals: extended, not_ours (the lease was gone) or failed (no answer; retried)",
        "failed: the shard is slow or unreachable; not_ours: leases were lost";
    RENEWAL_LAG = "shardlock_renewal_lag_seconds", Histogram, Seconds, ["shard"],
        "how much later than planned a renewal was sent",
        "near the TTL: the process gets too little CPU; give it more, or raise the TTL";
    CONNECTS = "shardlock_connects_total", Counter, Count, ["shard", "kind"],
        "connections opened, including the first ones: command or subscription",
        "growing: connections break; check the server's log, its client limits and the network";
    RECONNECTS = "shardlock_subscription_reconnects_total", Counter, Count, ["shard"],
        "subscriptions that were cut off and restored; waiters then send their requests again",
        "growing: raise client-output-buffer-limit pubsub, or look for a proxy that cuts idle connections";
    REQUESTS = "shardlock_store_requests_total", Counter, Count, ["shard", "request", "outcome"],
        "round trips to the store, answered or failed: acquire_fast (the fast path), acquire, try, release, requeue \
         (release and wait again) or renew",
        "failed: the shard is unreachable, overloaded or refuses requests; see shardlock_shard_up and the log";
    ROUND_TRIP = "shardlock_store_round_trip_seconds", Histogram, Seconds, ["shard", "request"],
        "duration of an answered round trip to the store",
        "high on one shard: its server or the network path to it is slow (SLOWLOG, fsync, CPU); high on all \
         shards: this process is short of CPU";
    SHARD_UP = "shardlock_shard_up", Gauge, Count, ["shard"],
        "1 if the last request to the shard was answered and the shard accepts locks, otherwise 0; probed every 3 \
         s even when idle, with a write that changes nothing (to the primary, each primary of a cluster, or a \
         majority of a quorum) or a read (from a majority of etcd)",
        "0: its keys can't be locked; check the server and the network, and run `shardlock doctor`";
    TOKEN_REGRESSIONS = "shardlock_token_regressions_total", Counter, Count, ["shard"],
        "tokens that were rejected because they were not larger than earlier ones",
        "never normal: the server lost its data or an old replica was promoted; locks fail closed, so check \
         persistence and failovers";
    STALE_GRANTS = "shardlock_stale_grants_total", Counter, Count, ["shard"],
        "grants that arrived for a finished cycle, or after they had expired; they were released",
        "a few after reconnects and timeouts are normal; many: grants take as long as the TTL, or tasks give up \
         just as their turn comes";
    ABANDONED = "shardlock_abandoned_cycles_total", Counter, Count, ["shard"],
        "cycles released in the background because their outcome was unknown or no longer wanted",
        "growing: requests time out or are cancelled in flight; raise store_timeout, or check the shard";
    QUORUM_VOTES = "shardlock_quorum_votes_total", Counter, Count, ["shard", "node", "outcome"],
        "replies of a quorum's nodes to claims: given, refused or unanswered; only present for redlock:// shards",
        "refused: there is another holder, or a node still has the lease of a dead one; unanswered by one node: \
         check that node";
    QUORUM_SUSPECTS = "shardlock_quorum_suspects", Gauge, Count, ["shard", "node"],
        "1 for a quorum node that is down or has no vote, otherwise 0; only present for redlock:// shards",
        "one: check that node before the next one fails; a majority: no lock of the shard can be acquired";
    CLOCK_JUMPS = "shardlock_server_clock_jumps_total", Counter, Count, ["shard"],
        "steps of the clocks of the shard's servers (the primary, each primary of a cluster, each node of a \
         quorum), measured against this process's monotonic clock; stays 0 for etcd:// and memory://, which report \
         no time",
        "no lock decision depends on it, but expiry on a Redis server does: a jump forward ends leases early; the \
         log names the server: configure NTP to slew, and check the host";
    CLOCK_DRIFT = "shardlock_server_clock_drift_seconds", Gauge, Seconds, ["shard"],
        "how far the server's clock has moved ahead of this process's monotonic clock since this server was first \
         probed; of several servers, the one that has moved the most; stays 0 for etcd:// and memory://",
        "growing steadily by more than 1 %: the drift is beyond what is allowed for; fix the clock of one of the \
         two hosts";
    STALLS = "shardlock_runtime_stalls_total", Counter, Count, [],
        "times the background thread woke more than 100 ms late",
        "the process or its machine was paused: CPU limits, swapping, a stopped process, a suspended machine; \
         leases may expire meanwhile";
    STALL = "shardlock_runtime_stall_seconds", Histogram, Seconds, [],
        "how late the background thread woke in each of these stalls",
        "compare with the TTL: a stall as long as the TTL loses every lock";
    #[cfg_attr(not(feature = "admin"), allow(dead_code, reason = "the admin endpoint writes it itself"))]
    HOT_KEY = "shardlock_hot_key_contention", Gauge, Count, ["key", "shard"],
        "recent requests that found this key held or wanted, for the keys with the most of them; only on the \
         metrics page of the admin endpoint, and only if hot_key_metrics is on. A key that drops out disappears",
        "split the key, do less under the lock, or route its jobs to one process";
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use super::super::agent_table::AGENT_METRICS;
    use super::*;

    fn as_markdown(metrics: &[Metric]) -> String {
        let mut table = String::from(
            "| name | kind | unit | labels | meaning | what to do when it moves |\n|---|---|---|---|---|---|\n",
        );
        for metric in metrics {
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
    fn metrics_document_contains_the_tables_of_the_code() {
        for table in [METRICS, AGENT_METRICS].map(as_markdown) {
            assert!(
                include_str!("../../METRICS.md").contains(&table),
                "METRICS.md does not have this table; paste it there:\n\n{table}"
            );
        }
    }

    #[test]
    fn names_follow_the_rules_of_prometheus() {
        for metric in METRICS.iter().chain(AGENT_METRICS) {
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
            // The only label with keys is that of the hottest ones, of which there are few.
            assert!(!metric.labels.contains(&"key") || metric.name == HOT_KEY);
        }
    }
}
