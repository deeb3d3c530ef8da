"""The rows and panels of the dashboard: expressions, and descriptions that say what to do.

`METRICS.md` describes the metrics. A test checks that expressions only use labels that the metrics
have, and sends each expression to a Prometheus.
"""

from dataclasses import dataclass, field

from grafana_foundation_sdk.models import units

# Filters by the dashboard's variables. Not every metric has a class or a shard.
PROCESS = 'job=~"$job", instance=~"$instance"'
CLASS = PROCESS + ', class=~"$class"'
SHARD = PROCESS + ', shard=~"$shard"'
CLASS_OF_SHARD = CLASS + ', shard=~"$shard"'
READERS_AND_WRITERS = CLASS_OF_SHARD + ', mode=~"shared|exclusive"'

# Filters of series that recording rules record, which are over all processes of a job.
JOB = 'job=~"$job"'
JOB_CLASS = JOB + ', class=~"$class"'
JOB_SHARD = JOB + ', shard=~"$shard"'

# Outcomes of requests that should have got a lock and did not. Busy is the answer to a try, not a
# failure.
FAILED = CLASS + ', outcome=~"timeout|queue_full|unavailable|refused"'
ACQUIRED = CLASS + ', outcome="acquired"'
# Locks that another holder passed on. The others were free, or shared with those who had them.
CONTENDED = ACQUIRED + ', path=~"local|remote"'
NOT_ACQUIRED = CLASS + ', outcome!="acquired"'
# All outcomes except those caused by the application itself.
JUDGED = CLASS + ', outcome!~"closed|cancelled"'
# The requests that hand a lease to another process.
HANDING_OVER = SHARD + ', request=~"release|requeue"'
UNANSWERED = SHARD + ', outcome="failed"'

# Shown in place of a graph if its recording rules are not loaded.
NOT_RECORDED = "needs config/prometheus/recording.rules.yml"

PLAIN, BARS, STAT, RANKING = "plain", "bars", "stat", "ranking"


@dataclass
class Panel:
    """A panel. Each target is an expression and the legend of its series."""

    title: str
    description: str
    targets: list[tuple[str, str]]
    unit: str = units.Short
    look: str = PLAIN
    width: int = 8
    # The values from which the number of a stat is orange, and red.
    bounds: tuple[float, float] | None = None
    no_value: str | None = None


@dataclass
class Row:
    title: str
    panels: list[Panel] = field(default_factory=list)
    # Whether only the title is shown until someone opens the row. Its panels ask nothing until then.
    is_collapsed: bool = False


@dataclass
class Annotation:
    """Marks on all graphs while the expression has a value of at least 1."""

    name: str
    expression: str
    color: str
    # What the mark shows, with labels of the series.
    title: str
    labels: str


def rate(metric: str, labels: str) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def increase(metric: str, labels: str) -> str:
    return f"increase({metric}{{{labels}}}[$__rate_interval])"


def recorded(series: str, labels: str) -> str:
    return f"{series}{{{labels}}}"


def total(series: str, by: str = "") -> str:
    return f"sum by ({by}) ({series})" if by else f"sum({series})"


def ratio(series: str, of: str, by: str = "") -> str:
    return f"{total(series, by)} / {total(of, by)}"


def quantile(part: float, metric: str, labels: str, by: str = "") -> str:
    by = f"le, {by}" if by else "le"
    return f"histogram_quantile({part}, sum by ({by}) ({rate(metric + '_bucket', labels)}))"


def mean(metric: str, labels: str) -> str:
    return ratio(rate(metric + "_sum", labels), rate(metric + "_count", labels))


AT_A_GLANCE = Row(
    "At a glance",
    [
        Panel(
            "Locks per second",
            "Locks acquired, over the selected classes. A drop is bad if requests keep arriving: "
            "check whether waits are longer (contention), requests fail (the next panel) or a "
            "shard is down.",
            [(total(rate("shardlock_acquisitions_total", ACQUIRED)), "locks")],
            unit=units.OpsPerSecond,
            look=STAT,
            width=4,
        ),
        Panel(
            "Requests without a lock",
            "The share of requests that ended with a timeout, a full queue, an unavailable shard "
            "or a refusal. Above 1 %, users notice. The outcomes below show the cause: timeout "
            "means contention (hot keys), queue_full overload (saturation), unavailable or "
            "refused the store (the row Redis and other stores).",
            [
                (
                    ratio(rate("shardlock_acquisitions_total", FAILED), rate("shardlock_acquisitions_total", JUDGED)),
                    "failed",
                )
            ],
            unit=units.PercentUnit,
            look=STAT,
            width=4,
            bounds=(0.01, 0.05),
        ),
        Panel(
            "Wait, median",
            "Half of the locks were acquired within this time. Without contention it is one round "
            "trip to the shard; if it is much longer, see the contended share and the round "
            "trips.",
            [(quantile(0.5, "shardlock_wait_seconds", CLASS), "median")],
            unit=units.Seconds,
            look=STAT,
            width=4,
        ),
        Panel(
            "Wait, 99th percentile",
            "One lock in a hundred took longer than this. If it grows, shorten the work under the "
            "lock, split the hot keys, or find what is stuck: the oldest guard is under "
            "saturation.",
            [(quantile(0.99, "shardlock_wait_seconds", CLASS), "99 %")],
            unit=units.Seconds,
            look=STAT,
            width=4,
        ),
        Panel(
            "Leases lost",
            "Leases lost in the selected time range while a guard was outstanding, but for those "
            "that a shutdown ended. Must be 0: each means that work continued without its lock, "
            "and only a check of the fencing token kept it from doing harm. The safety row shows "
            "the reasons.",
            [
                (
                    f'sum(increase(shardlock_lost_total{{{SHARD}, reason!="closed"}}[$__range]))',
                    "lost",
                )
            ],
            look=STAT,
            width=4,
            bounds=(1, 1),
        ),
        Panel(
            "Shards down",
            "Shards that did not answer the last request of some process, or do not accept locks. "
            "Their keys can't be locked there: check the server, then the network in between, and "
            "run `shardlock doctor`.",
            [(f"sum(min by (shard) (shardlock_shard_up{{{SHARD}}}) == bool 0)", "down")],
            look=STAT,
            width=4,
            bounds=(1, 1),
        ),
        Panel(
            "Locks per second, by class",
            "Which work requests locks. A class that drops to 0 while others continue has a "
            "problem of its own; if all drop together, check the store.",
            [(total(rate("shardlock_acquisitions_total", ACQUIRED), "class"), "{{class}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Requests without a lock, by outcome",
            "busy: a try found the lock held, which is an answer, not a failure. timeout: the "
            "timeout of the request has passed, see the hot keys. queue_full: a limit on waiters "
            "was reached, shed load. unavailable, refused: see the shard and the log. closed: the manager was "
            "shut down. cancelled: the application dropped its request.",
            [
                (
                    total(rate("shardlock_acquisitions_total", NOT_ACQUIRED), "outcome"),
                    "{{outcome}}",
                )
            ],
            unit=units.RequestsPerSecond,
        ),
        Panel(
            "Wait",
            "The time from the request to the guard. If the median stays flat while the 99th "
            "percentile grows, few keys are contended; if both grow, the store or this machine is "
            "slow.",
            [
                (quantile(0.5, "shardlock_wait_seconds", CLASS), "median"),
                (quantile(0.99, "shardlock_wait_seconds", CLASS), "99 %"),
            ],
            unit=units.Seconds,
        ),
    ],
)

CONTENTION = Row(
    "Contention",
    [
        Panel(
            "Contended share of locks",
            "The share of locks that were held by someone else when they were requested. Near 1, "
            "the work of a class runs serially, however many workers there are: split its keys, "
            "or do less under the lock. Of all processes, over 5 minutes.",
            [(recorded("job_class:shardlock_contended:ratio_rate5m", JOB_CLASS), "{{job}} {{class}}")],
            unit=units.PercentUnit,
            no_value=NOT_RECORDED,
        ),
        Panel(
            "Wait, 99th percentile, by class",
            "Which class waits. A class close to its timeout is about to fail: check what "
            "holds its keys, and for how long. Of all processes, over 5 minutes.",
            [(recorded("job_class:shardlock_wait_seconds:p99_rate5m", JOB_CLASS), "{{job}} {{class}}")],
            unit=units.Seconds,
            no_value=NOT_RECORDED,
        ),
        Panel(
            "Hold time, 99th percentile, by class",
            "From the guard to its release. Every waiter pays for it: move work that needs no "
            "lock out of it. Above the TTL, a lock depends on its renewals. Of all processes, over 5 "
            "minutes.",
            [(recorded("job_class:shardlock_hold_seconds:p99_rate5m", JOB_CLASS), "{{job}} {{class}}")],
            unit=units.Seconds,
            no_value=NOT_RECORDED,
        ),
        Panel(
            "Hand-offs",
            "Locks passed to a waiter. Local hand-offs stay in the process and cost nothing; "
            "remote ones cost a message between processes. If most are remote and that is too "
            "slow, route the jobs of a key to one process.",
            [(total(rate("shardlock_hand_offs_total", SHARD), "kind"), "{{kind}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Round trip of hand-off requests",
            "There is no metric for a whole hand-off. The closest is the round trip of the "
            "requests that hand a lock to another process (release, and requeue if local tasks "
            "still wait); the server pushes the grant halfway through. Local hand-offs need no "
            "request. If high, the shard's server or the network to it is slow; see the row Redis "
            "and other stores.",
            [
                (
                    quantile(0.5, "shardlock_store_round_trip_seconds", HANDING_OVER, "request"),
                    "{{request}}, median",
                ),
                (
                    quantile(0.99, "shardlock_store_round_trip_seconds", HANDING_OVER, "request"),
                    "{{request}}, 99 %",
                ),
            ],
            unit=units.Seconds,
        ),
        Panel(
            "Guards per lease",
            "How many guards were served under one lease before it was released. If it is near 1 "
            "with many remote hand-offs, the waiters are in different processes and sharing a "
            "lease does not help: route the jobs of a key to one process. Without contention, 1 "
            "is normal.",
            [
                (mean("shardlock_local_batch_size", SHARD), "mean"),
                (quantile(0.99, "shardlock_local_batch_size", SHARD), "99 %"),
            ],
        ),
        Panel(
            "Turns that left tasks waiting",
            "Leases passed to another process while local tasks still waited. At the gate, all "
            "that waited when the turn began had been served: this is normal under contention. If "
            "max_burst or max_slice is reached often, the tasks of this process get a smaller "
            "share than those of others: raise that limit.",
            [(total(rate("shardlock_bypass_limits_total", SHARD), "limit"), "{{limit}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Hot keys",
            "The keys with the most recent requests that found them held or waited for. Split "
            "such a key, shorten the work under it, or route its jobs to one process. Needs "
            "hot_key_metrics = true; without it, /hot of the admin endpoint shows the same and "
            "more.",
            [(f"topk(20, sum by (key, shard) (shardlock_hot_key_contention{{{SHARD}}}))", "{{key}} ({{shard}})")],
            look=RANKING,
            width=16,
            no_value="no contended key, or hot_key_metrics is off",
        ),
    ],
)

SAFETY = Row(
    "Safety",
    [
        Panel(
            "Leases lost, by reason",
            "Never normal. expired: renewals failed, or the process was stalled for a TTL; see "
            "the renewal lag and the stalls. taken: the key was deleted, or the server lost its "
            "data. max_hold: a task was stuck under its lock. closed: the manager was shut down "
            "with outstanding guards.",
            [(total(increase("shardlock_lost_total", SHARD), "reason"), "{{reason}}")],
            look=BARS,
        ),
        Panel(
            "Renewal lag",
            "How much later than planned renewals were sent. Near the TTL, leases are about to be "
            "lost: the process gets too little CPU. Give it more, or raise the TTL.",
            [
                (quantile(0.5, "shardlock_renewal_lag_seconds", SHARD), "median"),
                (quantile(0.99, "shardlock_renewal_lag_seconds", SHARD), "99 %"),
            ],
            unit=units.Seconds,
        ),
        Panel(
            "Validity left at release",
            "The validity left of a lease when its guard was released, as a share of the TTL; the "
            "lower line is the worst percent. Below 0.5, renewals are late or fail: raise the TTL "
            "before locks are lost.",
            [
                (quantile(0.5, "shardlock_validity_left_ratio", SHARD), "median"),
                (quantile(0.01, "shardlock_validity_left_ratio", SHARD), "worst 1 %"),
            ],
            unit=units.PercentUnit,
        ),
        Panel(
            "Renewals",
            "extended is the normal case. failed: the shard did not answer, and the renewal is "
            "retried until the lease expires; see the row Redis and other stores. not_ours: the "
            "lease was gone, and so was lost.",
            [(total(rate("shardlock_renewals_total", SHARD), "outcome"), "{{outcome}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Renewals that fail",
            "The share of renewals without an answer or with an error, which are retried until the "
            "lease expires. Above 0.2 for minutes, locks are being lost: repair the shard, or find in "
            "the log why the server refuses. Of all processes, over 2 minutes.",
            [(recorded("job_shard:shardlock_renewal_failures:ratio_rate2m", JOB_SHARD), "{{job}} {{shard}}")],
            unit=units.PercentUnit,
            no_value=NOT_RECORDED,
        ),
        Panel(
            "Token regressions",
            "Tokens that were not larger than earlier ones and were therefore refused: the lock "
            "fails rather than accept an old token. Never normal: the server lost its data, or a "
            "stale replica was promoted. Check persistence and failovers.",
            [(total(increase("shardlock_token_regressions_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
        Panel(
            "Server clock jumps",
            "Steps of a server's clock, measured against the monotonic clocks of the processes; "
            "each process counts them. No client decides by this clock, but a Redis server "
            "expires leases by it: a forward jump expires them early. Configure NTP to slew, and "
            "check the host.",
            [(total(increase("shardlock_server_clock_jumps_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
        Panel(
            "Server clock drift",
            "How far a server's clock has drifted from the processes' clocks since they first "
            "read it; the largest value of all processes. If it steadily grows by more than 1 % "
            "of the time, it exceeds the drift allowance: fix the clock of one of the two hosts.",
            [(f"max by (shard) (abs(shardlock_server_clock_drift_seconds{{{SHARD}}}))", "{{shard}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Stalls",
            "How often a manager's background thread woke up more than 100 ms late: the process "
            "or its machine was stalled. Check CPU limits, swapping, stopped processes and "
            "suspended machines. A stall as long as the TTL loses every lock.",
            [(total(increase("shardlock_runtime_stalls_total", PROCESS), "instance"), "{{instance}}")],
            look=BARS,
        ),
        Panel(
            "Time stalled",
            "The share of time that the processes were stalled, from the stalls shown beside it. "
            "If it stays above 0, give the process more CPU, or the machine more memory.",
            [(total(rate("shardlock_runtime_stall_seconds_sum", PROCESS), "instance"), "{{instance}}")],
            unit=units.PercentUnit,
        ),
        Panel(
            "Stale grants",
            "Grants that arrived for a cycle that was over, or that had expired; they were "
            "released. A few after reconnects and timeouts are normal. If there are many, grants "
            "take as long as the TTL, or tasks give up just as their turn comes.",
            [(total(increase("shardlock_stale_grants_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
        Panel(
            "Abandoned cycles",
            "Cycles released in the background because their outcome was unknown or no task "
            "wanted them any more. If growing, requests time out or are cancelled in flight: "
            "raise store_timeout, or check the shard.",
            [(total(increase("shardlock_abandoned_cycles_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
    ],
)

SATURATION = Row(
    "Saturation",
    [
        Panel(
            "Waiters",
            "Tasks waiting for a lock. If they grow without bound, locks are requested faster "
            "than they are released: shed load, or split the hot keys.",
            [(f"sum by (shard) (shardlock_waiters{{{SHARD}}})", "{{shard}}")],
            width=6,
        ),
        Panel(
            "Leases held",
            "Leases that the processes hold. If they grow without bound, guards are kept and "
            "never dropped: /held of the admin endpoint lists them, oldest first.",
            [(f"sum by (shard) (shardlock_leases{{{SHARD}}})", "{{shard}}")],
            width=6,
        ),
        Panel(
            "Lingering leases",
            "Leases that processes keep without a guard, for their next lock of the key. Near "
            "max_keys, shorten linger, so that leases need not be evicted one key at a time. Any "
            "other process that tries such a key finds it held.",
            [(f"sum by (shard) (shardlock_lingering_leases{{{SHARD}}})", "{{shard}}")],
            width=6,
        ),
        Panel(
            "Requests refused at a limit",
            "max_waiters_per_key, max_waiters or max_keys was reached, and the request was "
            "refused at once. The process is overloaded: shed load earlier, find the hot key, or "
            "raise the limit if there is memory. `renewals`: more leases are held than can be "
            "renewed in time. `outage`: many keys wait for a shard that is down.",
            [(total(rate("shardlock_rejections_total", PROCESS), "limit"), "{{limit}}")],
            unit=units.RequestsPerSecond,
            width=6,
        ),
        Panel(
            "Longest current wait",
            "How long the longest-waiting task of each class has waited. Above the usual hold time "
            "times the queue length, the holder is stuck: find out who holds the key (`shardlock "
            "inspect`, /held).",
            [(f"max by (shard, class) (shardlock_oldest_waiter_seconds{{{CLASS_OF_SHARD}}})", "{{shard}} {{class}}")],
            unit=units.Seconds,
            width=12,
        ),
        Panel(
            "Oldest guard",
            "How long the oldest guard of each class has been held. Above the longest job, a task "
            "is stuck under its lock: see /held, and set max_hold so that such a hold ends by "
            "itself.",
            [(f"max by (shard, class) (shardlock_oldest_guard_seconds{{{CLASS_OF_SHARD}}})", "{{shard}} {{class}}")],
            unit=units.Seconds,
            width=12,
        ),
    ],
)

MODES = Row(
    "Readers, writers, permits",
    [
        Panel(
            "Locks per second, by mode",
            "shared: readers. exclusive: writers, and all locks without a mode of their own. If "
            "there are many writers beside readers, shared locks gain little, because each writer "
            "waits for the readers before it and holds up those behind it.",
            [(total(rate("shardlock_acquisitions_total", ACQUIRED), "mode"), "{{mode}}")],
            unit=units.OpsPerSecond,
            width=6,
        ),
        Panel(
            "Wait, 99th percentile, by mode",
            "A writer waits for the readers before it, then readers wait for the writer. If "
            "exclusive is high, look at how long readers hold (the next panel); if permits is "
            "high, at the permits in use.",
            [(quantile(0.99, "shardlock_wait_seconds", CLASS, "mode"), "{{mode}}")],
            unit=units.Seconds,
            width=6,
        ),
        Panel(
            "Hold time, 99th percentile, by mode",
            "The longest reader decides when a writer gets its turn, and with it all readers "
            "behind the writer. Move work that needs no lock out of long holds.",
            [(quantile(0.99, "shardlock_hold_seconds", CLASS, "mode"), "{{mode}}")],
            unit=units.Seconds,
            width=6,
        ),
        Panel(
            "Waiters, by mode",
            "Tasks waiting for a lock in each mode. Waiting readers without a waiting writer mean "
            "that a writer holds the key for long. If permits are waited for all the time, their "
            "limit is what bounds the work.",
            [(f"sum by (mode) (shardlock_waiters{{{SHARD}}})", "{{mode}}")],
            width=6,
        ),
        Panel(
            "Readers and writers",
            "Guards held: shared ones are readers, exclusive ones writers. If they grow without "
            "bound, guards are kept and never dropped: /held of the admin endpoint lists them, "
            "oldest first.",
            [(f"sum by (mode) (shardlock_guards{{{READERS_AND_WRITERS}}})", "{{mode}}")],
        ),
        Panel(
            "Permits in use",
            "Permits held, and the limit that requests state, by class. The limit is right for a "
            "class with the permits of one key. Two processes that state different limits for the "
            "same key show as the larger one here, but the smaller one counts.",
            [
                (total(f"shardlock_permits_in_use{{{CLASS_OF_SHARD}}}", "shard, class"), "{{shard}} {{class}}"),
                (f"max by (shard, class) (shardlock_permits_limit{{{CLASS_OF_SHARD}}})", "{{shard}} {{class}}, limit"),
            ],
        ),
        Panel(
            "Permits in use, share of the limit",
            "Near 1 for long while tasks wait for permits, the limit bounds the work: hold them for "
            "less time, or raise the limit if the protected resource can take it. A holder that died keeps "
            "its permits for up to a TTL, which this does not show.",
            [
                (
                    recorded("job_shard_class:shardlock_permits_in_use:ratio", JOB_SHARD + ', class=~"$class"'),
                    "{{job}} {{shard}} {{class}}",
                )
            ],
            unit=units.PercentUnit,
            no_value=NOT_RECORDED,
        ),
    ],
    is_collapsed=True,
)

REDIS = Row(
    "Redis and other stores",
    [
        Panel(
            "Shards up",
            "1 if the shard answered the last request of every process and accepts locks, otherwise "
            "0. At 0, the shard's keys can't be locked: check the server and the "
            "network, and run `shardlock doctor`.",
            [(f"min by (shard) (shardlock_shard_up{{{SHARD}}})", "{{shard}}")],
        ),
        Panel(
            "Round trip, 99th percentile, by shard",
            "If one shard is high, its server or the network to it is slow (SLOWLOG, fsync, CPU). "
            "If all are high, the processes themselves are short of CPU.",
            [(quantile(0.99, "shardlock_store_round_trip_seconds", SHARD, "shard"), "{{shard}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Round trip, 99th percentile, by request",
            "Which script or command is slow. If renew is slow while others are not, many leases "
            "are renewed at once; if acquire and release are slow, check the server. Of all "
            "processes, over 5 minutes.",
            [
                (
                    recorded("job_shard_request:shardlock_store_round_trip_seconds:p99_rate5m", JOB_SHARD),
                    "{{job}} {{shard}} {{request}}",
                )
            ],
            unit=units.Seconds,
            no_value=NOT_RECORDED,
        ),
        Panel(
            "Store requests",
            "Round trips per second by kind. acquire_fast and release are locks without "
            "contention; many acquire and requeue requests mean contention between processes, "
            "many try requests mean polling.",
            [(total(rate("shardlock_store_requests_total", SHARD), "request"), "{{request}}")],
            unit=units.RequestsPerSecond,
        ),
        Panel(
            "Failed requests",
            "Round trips without an answer, or with an error reply. The shard is unreachable, "
            "overloaded or refuses requests: the log of the processes has the reason.",
            [
                (
                    total(rate("shardlock_store_requests_total", UNANSWERED), "shard, request"),
                    "{{shard}} {{request}}",
                )
            ],
            unit=units.RequestsPerSecond,
        ),
        Panel(
            "Requests that the store fails, by class",
            "The share of lock requests that ended with unavailable or refused. Above 0.5, the class "
            "is out of service: see which shards are up, then the log. If all shards are up, the "
            "user lacks a permission or the store is too slow. Of all processes, over 2 minutes.",
            [(recorded("job_class:shardlock_store_errors:ratio_rate2m", JOB_CLASS), "{{job}} {{class}}")],
            unit=units.PercentUnit,
            no_value=NOT_RECORDED,
        ),
        Panel(
            "Connections opened",
            "Includes the first ones. Flat while all is well. If growing, connections break: "
            "check the server's log, its client limits and the network.",
            [(total(increase("shardlock_connects_total", SHARD), "shard, kind"), "{{shard}} {{kind}}")],
            look=BARS,
        ),
        Panel(
            "Resubscriptions",
            "Subscriptions that were cut off and restored. Waiters then repeat their requests; one "
            "whose turn came meanwhile was skipped and rejoins at the end of the queue. If growing, raise client-output-buffer-limit pubsub, "
            "or look for a proxy that closes idle connections.",
            [(total(increase("shardlock_subscription_reconnects_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
    ],
)

QUORUMS = Row(
    "Quorums (redlock)",
    [
        Panel(
            "Votes of quorum nodes",
            "Only for redlock:// shards. refused: another holder, or a node that still has the "
            "lease of a dead one. unanswered by one node: check that node.",
            [(total(rate("shardlock_quorum_votes_total", SHARD), "shard, node, outcome"), "{{shard}}, node {{node}}: {{outcome}}")],
            unit=units.OpsPerSecond,
            no_value="no redlock:// shard",
            width=12,
        ),
        Panel(
            "Suspect quorum nodes",
            "Only for redlock:// shards: 1 for a node that is down or has no vote. If one is, "
            "repair it before the next one fails. If a majority is, no lock of the shard can be "
            "acquired.",
            [(f"max by (shard, node) (shardlock_quorum_suspects{{{SHARD}}})", "{{shard}}, node {{node}}")],
            no_value="no redlock:// shard",
            width=12,
        ),
    ],
    is_collapsed=True,
)

AGENTS = Row(
    "Agents",
    [
        Panel(
            "Agent connections",
            "Of `shardlock serve`: its clients' connections, and the most that it accepts. At the "
            "limit, new ones are refused, and those workers get no locks: /clients of the agent's "
            "admin endpoint shows which process has how many.",
            [
                (total(f"shardlock_agent_connections{{{PROCESS}}}", "instance"), "{{instance}}"),
                (total(f"shardlock_agent_connections_limit{{{PROCESS}}}", "instance"), "{{instance}}, limit"),
            ],
            no_value="no agent",
        ),
        Panel(
            "Agent requests",
            "Requests per second by command. Many held requests for each lock: clients ask for the "
            "validity more often than they need. unknown: a client takes the agent for a Redis.",
            [(total(rate("shardlock_agent_requests_total", PROCESS), "command"), "{{command}}")],
            unit=units.RequestsPerSecond,
            no_value="no agent",
        ),
        Panel(
            "Agent locks and waiters",
            "Locks that clients hold, and connections that wait for one. Locks that only grow are "
            "never released by a worker; waiters that only grow are more than the keys can serve. "
            "/clients of the agent's admin endpoint shows whose they are.",
            [
                (total(f"shardlock_agent_locks{{{PROCESS}}}", "instance"), "{{instance}}, locks"),
                (total(f"shardlock_agent_waiters{{{PROCESS}}}", "instance"), "{{instance}}, waiters"),
            ],
            no_value="no agent",
        ),
        Panel(
            "Agent locks released with their connection",
            "Workers that end without releasing: they crash, are killed or close their connection "
            "first. The next worker gets the lock at once, but what they did under it may be "
            "incomplete.",
            [(total(increase("shardlock_agent_disconnect_releases_total", PROCESS), "instance"), "{{instance}}")],
            look=BARS,
            width=12,
            no_value="no agent",
        ),
        Panel(
            "Agent connections refused or malformed",
            "refused: there were as many as --max-connections. malformed: something other than "
            "a client connects, or a library has a bug. too_long: a request above "
            "--max-request-bytes. The agent's log has the process.",
            [
                (total(increase("shardlock_agent_connections_refused_total", PROCESS)), "refused"),
                (total(increase("shardlock_agent_protocol_errors_total", PROCESS), "kind"), "{{kind}}"),
            ],
            look=BARS,
            width=12,
            no_value="no agent",
        ),
    ],
    is_collapsed=True,
)

ROWS = [AT_A_GLANCE, CONTENTION, SAFETY, SATURATION, REDIS, MODES, QUORUMS, AGENTS]

# The window of the annotations is fixed, since they have no interval of their own in Grafana.
ANNOTATIONS = [
    Annotation(
        "Shard down",
        f"count by (job, shard) (shardlock_shard_up{{{SHARD}}} == 0)",
        "red",
        "shard {{shard}} is down for processes of {{job}}",
        "job,shard",
    ),
    Annotation(
        "Locks lost",
        f'count by (instance, shard, reason) (increase(shardlock_lost_total{{{SHARD}, reason!="closed"}}[1m]) > 0)',
        "purple",
        "{{instance}} lost locks on shard {{shard}}: {{reason}}",
        "instance,shard,reason",
    ),
    Annotation(
        "Restart",
        f"count by (job, instance) (resets(shardlock_connects_total{{{PROCESS}}}[1m]) > 0)",
        "blue",
        "{{instance}} of {{job}} was restarted",
        "job,instance",
    ),
]

# Pages of the repository to open from the dashboard: title, path, tooltip.
LINKS = [
    ("Operations", "docs/operations.md", "Readiness, alerts, logs"),
    ("Metrics", "METRICS.md", "What each metric means, and what to do when it moves"),
    ("Failures", "docs/failures.md", "What happens when a server, a process or the network fails"),
]
