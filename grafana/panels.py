"""What the dashboard shows: its rows, and in each panel the expressions, and what to do when they move.

`METRICS.md` has the metrics. Expressions use no label that a metric does not have; a test sees to that, and sends each of them to a Prometheus.
"""

from dataclasses import dataclass, field

from grafana_foundation_sdk.models import units

# What the variables of the dashboard choose. Not every metric has a class or a shard.
PROCESS = 'job=~"$job", instance=~"$instance"'
CLASS = PROCESS + ', class=~"$class"'
SHARD = PROCESS + ', shard=~"$shard"'

# What a request came to that was to have a lock and got none. Busy is the answer to a try, and no failure.
FAILED = CLASS + ', outcome=~"timeout|queue_full|unavailable|refused"'
ACQUIRED = CLASS + ', outcome="acquired"'
CONTENDED = ACQUIRED + ', path!="uncontended"'
NOT_ACQUIRED = CLASS + ', outcome!="acquired"'
# All but those that the program itself put an end to.
JUDGED = CLASS + ', outcome!~"closed|cancelled"'
# The requests that pass a lease on to another process.
HANDING_OVER = SHARD + ', request=~"release|requeue"'
UNANSWERED = SHARD + ', outcome="failed"'

PLAIN, BARS, STAT, RANKING = "plain", "bars", "stat", "ranking"


@dataclass
class Panel:
    """A panel: pairs of an expression and the legend of its series."""

    title: str
    description: str
    targets: list[tuple[str, str]]
    unit: str = units.Short
    look: str = PLAIN
    width: int = 8
    # From which value on the number of a stat is orange, and from which red.
    bounds: tuple[float, float] | None = None
    no_value: str | None = None


@dataclass
class Row:
    title: str
    panels: list[Panel] = field(default_factory=list)


def rate(metric: str, labels: str) -> str:
    return f"rate({metric}{{{labels}}}[$__rate_interval])"


def increase(metric: str, labels: str) -> str:
    return f"increase({metric}{{{labels}}}[$__rate_interval])"


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
            "Locks that were had, over all classes that are chosen. It is bad if it falls while requests come as before: see whether waits are longer "
            "(contention), requests fail (the next panel) or a shard is down.",
            [(total(rate("shardlock_acquisitions_total", ACQUIRED)), "locks")],
            unit=units.OpsPerSecond,
            look=STAT,
            width=4,
        ),
        Panel(
            "Requests without a lock",
            "The part of the requests that ended with a timeout, a full queue, a shard that is unavailable or a refusal. Above 1 % users notice. Look below which "
            "outcome it is: timeout means contention (hot keys), queue_full overload (saturation), unavailable or refused the store (last row).",
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
            "Half of the locks were had within this time. Without contention it is one round trip to the shard; if it is much more, see the contended part "
            "and the round trips.",
            [(quantile(0.5, "shardlock_wait_seconds", CLASS), "median")],
            unit=units.Seconds,
            look=STAT,
            width=4,
        ),
        Panel(
            "Wait, 99th percentile",
            "One lock in a hundred took longer than this. When it grows, shorten what is done under the lock, split the hot keys, or find what is stuck: the "
            "oldest guard is under saturation.",
            [(quantile(0.99, "shardlock_wait_seconds", CLASS), "99 %")],
            unit=units.Seconds,
            look=STAT,
            width=4,
        ),
        Panel(
            "Leases lost",
            "Leases that were lost in the time shown while a guard was out. It is to be 0: each is work that went on without its lock, and only the check of the "
            "fencing token kept it from doing harm. The row on safety says why.",
            [(f'sum(increase(shardlock_lost_total{{{SHARD}}}[$__range]))', "lost")],
            look=STAT,
            width=4,
            bounds=(1, 1),
        ),
        Panel(
            "Shards down",
            "Shards to which the last request of some process was not answered. The keys of these shards can't be locked there: check the server, then the network "
            "between, and run `shardlock doctor`.",
            [(f"sum(min by (shard) (shardlock_shard_up{{{SHARD}}}) == bool 0)", "down")],
            look=STAT,
            width=4,
            bounds=(1, 1),
        ),
        Panel(
            "Locks per second, by class",
            "Which work wants the locks. A class that falls to 0 while others go on has a problem of its own; all of them falling together points to the store.",
            [(total(rate("shardlock_acquisitions_total", ACQUIRED), "class"), "{{class}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Requests without a lock, by outcome",
            "busy: a try found the lock held, which is an answer and no failure. timeout: the wait limit passed, see the hot keys. queue_full: a limit on waiters "
            "was reached, shed load. unavailable, refused: see the shard and the log. closed: the manager was shut down. cancelled: the program dropped its request.",
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
            "The time from the request to the guard. A median that stays while the 99th percentile grows means that few keys are contended; if both grow, the "
            "store or this machine is slow.",
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
            "Contended part of the locks",
            "The part of the locks that somebody else held when they were asked for. Near 1 the work of a class is done one after the other, however many workers "
            "there are: split its keys, or do less under the lock.",
            [
                (
                    ratio(
                        rate("shardlock_acquisitions_total", CONTENDED),
                        rate("shardlock_acquisitions_total", ACQUIRED),
                        "class",
                    ),
                    "{{class}}",
                )
            ],
            unit=units.PercentUnit,
        ),
        Panel(
            "Wait, 99th percentile, by class",
            "Whose requests wait. A class whose line is near its wait limit is about to fail: see what holds its keys, and for how long.",
            [(quantile(0.99, "shardlock_wait_seconds", CLASS, "class"), "{{class}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Hold time, 99th percentile, by class",
            "From the guard to its release. Every waiter pays for it: move out of it what needs no lock. Above the TTL a lock depends on its renewals.",
            [(quantile(0.99, "shardlock_hold_seconds", CLASS, "class"), "{{class}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Hand-offs",
            "Locks that were passed to a waiter: local ones stay in the process and cost nothing, remote ones cost a message between processes. If most are remote "
            "and that is too slow, send the jobs of one key to one process, or raise max_burst.",
            [(total(rate("shardlock_hand_offs_total", SHARD), "kind"), "{{kind}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Round trip of what hands over",
            "There is no measure of a hand-off as a whole. This is the nearest: the round trip of the requests that hand a lock to another process (release, and "
            "requeue where local tasks go on waiting), which push the grant from the server half-way through. A hand-off in the process needs none. High: the shard's server or "
            "the way to it is slow; see the last row.",
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
            "How many guards were served under one lease before it was given back. Near 1 while there are many remote hand-offs, merging does not help, as the waiters are "
            "in different processes: send the jobs of one key to one process. Without contention 1 is right.",
            [
                (mean("shardlock_local_batch_size", SHARD), "mean"),
                (quantile(0.99, "shardlock_local_batch_size", SHARD), "99 %"),
            ],
        ),
        Panel(
            "Turns ended by a bound",
            "Leases passed to another process since max_burst or max_slice was reached while local tasks still waited. This keeps processes fair, and is normal "
            "under contention. If throughput matters more than fairness, raise the bound that is reached.",
            [(total(rate("shardlock_bypass_limits_total", SHARD), "limit"), "{{limit}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Hot keys",
            "The keys with the most requests of late that found them held or wanted. Split such a key, shorten what is done under it, or send its jobs to one process. It needs "
            "hot_key_metrics = true; without it /hot of the admin endpoint has the same, and more.",
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
            "Never normal. expired: renewals failed, or the process stood still for a TTL; see the renewal lag and the stalls. taken: somebody deleted the key, or "
            "the server lost its data. max_hold: a task was stuck under its lock. closed: the manager was shut down while guards were out.",
            [(total(increase("shardlock_lost_total", SHARD), "reason"), "{{reason}}")],
            look=BARS,
        ),
        Panel(
            "Renewal lag",
            "How much later than planned renewals were sent. Near the TTL leases are about to be lost: the process gets too little CPU, so give it more, or raise "
            "the TTL.",
            [
                (quantile(0.5, "shardlock_renewal_lag_seconds", SHARD), "median"),
                (quantile(0.99, "shardlock_renewal_lag_seconds", SHARD), "99 %"),
            ],
            unit=units.Seconds,
        ),
        Panel(
            "Validity left at release",
            "What was left of a lease's validity when its guard was given back, as a part of the TTL; the lower line is the worst percent. Below 0.5 renewals "
            "come late or fail: raise the TTL before locks are lost.",
            [
                (quantile(0.5, "shardlock_validity_left_ratio", SHARD), "median"),
                (quantile(0.01, "shardlock_validity_left_ratio", SHARD), "worst 1 %"),
            ],
            unit=units.PercentUnit,
        ),
        Panel(
            "Renewals",
            "extended is the normal case. failed: the shard gave no answer, and it is tried again until the lease runs out; see the last row. not_ours: "
            "the lease was gone, and so lost.",
            [(total(rate("shardlock_renewals_total", SHARD), "outcome"), "{{outcome}}")],
            unit=units.OpsPerSecond,
        ),
        Panel(
            "Token regressions",
            "Tokens that were not above earlier ones, and so refused: the lock failed rather than let an old token pass. Never normal: the server lost its data, or "
            "an old replica was promoted. Look at persistence and at failovers.",
            [(total(increase("shardlock_token_regressions_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
        Panel(
            "Clock jumps of servers",
            "Steps of a server's clock, seen against the monotonic clock of the processes, each of which counts them. No client decides by it, but a Redis server ends leases by "
            "its clock: a jump forward ends them early. Make NTP slew, and see the host.",
            [(total(increase("shardlock_server_clock_jumps_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
        Panel(
            "Clock drift of servers",
            "How far a server's clock has gone from the processes' since their first look at it; the largest of all processes. If it grows steadily by more than 1 % "
            "of the time, the allowance for drift does not hold: mend the clock of one of the two hosts.",
            [(f"max by (shard) (abs(shardlock_server_clock_drift_seconds{{{SHARD}}}))", "{{shard}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Stalls",
            "How often a manager's background thread woke more than 100 ms late: the process or its machine stood still. Look for CPU limits, swapping, a "
            "stopped process, a suspended machine. A stall as long as the TTL loses every lock.",
            [(total(increase("shardlock_runtime_stalls_total", PROCESS), "instance"), "{{instance}}")],
            look=BARS,
        ),
        Panel(
            "Time stood still",
            "Which part of the time the processes stood still, by the stalls beside it. Above 0 for long: give the process more CPU, or the machine more memory.",
            [(total(rate("shardlock_runtime_stall_seconds_sum", PROCESS), "instance"), "{{instance}}")],
            unit=units.PercentUnit,
        ),
        Panel(
            "Stale grants",
            "Grants that came for a cycle that was over, or that had run out; they were given back. A few after reconnects and timeouts are normal. Many: grants take as "
            "long as the TTL, or tasks give up just as their turn comes.",
            [(total(increase("shardlock_stale_grants_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
            width=12,
        ),
        Panel(
            "Abandoned cycles",
            "Cycles that were released in the background, as their outcome was unknown or nobody wanted it any more. Growing: requests time out or are cancelled "
            "under way. Raise store_timeout, or look at the shard.",
            [(total(increase("shardlock_abandoned_cycles_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
            width=12,
        ),
    ],
)

SATURATION = Row(
    "Saturation",
    [
        Panel(
            "Waiters",
            "Tasks that wait for a lock. Growing without end: locks are asked for faster than they are given back. Shed load, or split the hot keys.",
            [(f"sum by (shard) (shardlock_waiters{{{SHARD}}})", "{{shard}}")],
            width=6,
        ),
        Panel(
            "Leases held",
            "Leases that the processes hold. Growing without end: guards are kept and never dropped. /held of the admin endpoint lists them, the oldest first.",
            [(f"sum by (shard) (shardlock_leases{{{SHARD}}})", "{{shard}}")],
            width=6,
        ),
        Panel(
            "Leases that linger",
            "Leases that processes keep although no guard is out, for their next lock of the key. Near max_keys: shorten linger, so that room is not made one key at a time. "
            "Whoever else tries such a key finds it held.",
            [(f"sum by (shard) (shardlock_lingering_leases{{{SHARD}}})", "{{shard}}")],
            width=6,
        ),
        Panel(
            "Requests refused at a limit",
            "max_waiters_per_key, max_waiters or max_keys was reached, and the request refused at once. The process is overloaded: shed load earlier, find "
            "the hot key, or raise the limit if there is memory. `renewals`: more leases are held than are renewed in time. `outage`: many keys wait for a "
            "shard that is down.",
            [(total(rate("shardlock_rejections_total", PROCESS), "limit"), "{{limit}}")],
            unit=units.RequestsPerSecond,
            width=6,
        ),
        Panel(
            "Longest wait now",
            "For how long the task that has waited longest has waited. Above the usual hold time times the length of the line: the holder is stuck. See who "
            "holds the key (`shardlock inspect`, /held).",
            [(f"max by (shard) (shardlock_oldest_waiter_seconds{{{SHARD}}})", "{{shard}}")],
            unit=units.Seconds,
            width=12,
        ),
        Panel(
            "Oldest guard",
            "For how long the guard that is held longest is held. Above the longest job: a task is stuck under its lock. See /held, and set max_hold so that it "
            "ends by itself.",
            [(f"max by (shard) (shardlock_oldest_lease_seconds{{{SHARD}}})", "{{shard}}")],
            unit=units.Seconds,
            width=12,
        ),
    ],
)

REDIS = Row(
    "Redis, and other stores",
    [
        Panel(
            "Shards up",
            "1 if the last request of every process to the shard was answered, 0 if that of one was not. At 0 the keys of the shard can't be locked: check the server and the "
            "network, and run `shardlock doctor`.",
            [(f"min by (shard) (shardlock_shard_up{{{SHARD}}})", "{{shard}}")],
        ),
        Panel(
            "Round trip, 99th percentile, by shard",
            "High on one shard: its server or the way to it is slow (SLOWLOG, fsync, CPU). High on all: the processes are short of CPU themselves.",
            [(quantile(0.99, "shardlock_store_round_trip_seconds", SHARD, "shard"), "{{shard}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Round trip, 99th percentile, by request",
            "Which script or command takes long. If renew is slow while others are not, many leases are renewed at once; if acquire and release are, look "
            "at the server.",
            [(quantile(0.99, "shardlock_store_round_trip_seconds", SHARD, "request"), "{{request}}")],
            unit=units.Seconds,
        ),
        Panel(
            "Requests to the stores",
            "Round trips per second by kind. acquire_free and release are a lock without contention; many of acquire and requeue mean contention between processes, many of "
            "try that somebody polls.",
            [(total(rate("shardlock_store_requests_total", SHARD), "request"), "{{request}}")],
            unit=units.RequestsPerSecond,
        ),
        Panel(
            "Failed requests",
            "Round trips without an answer, or with an error for an answer. The shard is away, overloaded or says no: see the log of the processes, which names the reason.",
            [
                (
                    total(rate("shardlock_store_requests_total", UNANSWERED), "shard, request"),
                    "{{shard}} {{request}}",
                )
            ],
            unit=units.RequestsPerSecond,
        ),
        Panel(
            "Connections opened",
            "The first ones included. It is flat while all is well. Growing: connections break. See the server's log, its client limits and the network.",
            [(total(increase("shardlock_connects_total", SHARD), "shard, kind"), "{{shard}} {{kind}}")],
            look=BARS,
        ),
        Panel(
            "Subscriptions made again",
            "Subscriptions that were cut off; whoever waited asked again then, at the end of the line. Growing: raise client-output-buffer-limit pubsub, or look for a proxy that cuts idle "
            "connections.",
            [(total(increase("shardlock_subscription_reconnects_total", SHARD), "shard"), "{{shard}}")],
            look=BARS,
        ),
        Panel(
            "Votes of a quorum's nodes",
            "There for redlock:// shards. refused: another holder, or a lease that a node still has of a dead one. unanswered by one node: see that node.",
            [(total(rate("shardlock_quorum_votes_total", SHARD), "shard, node, outcome"), "{{shard}}, node {{node}}: {{outcome}}")],
            unit=units.OpsPerSecond,
            no_value="no redlock:// shard",
        ),
        Panel(
            "Suspects of a quorum",
            "There for redlock:// shards: 1 for a node that is down or has no vote. One: see to that node before the next one goes. A majority: no lock of the "
            "shard can be had.",
            [(f"max by (shard, node) (shardlock_quorum_suspects{{{SHARD}}})", "{{shard}}, node {{node}}")],
            no_value="no redlock:// shard",
        ),
    ],
)

ROWS = [AT_A_GLANCE, CONTENTION, SAFETY, SATURATION, REDIS]
