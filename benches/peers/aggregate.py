"""Turns the counts of a run's workers into the one line of that run."""

import math


def bucket(us):
    """The histogram bucket of a wait, the same in each worker: exact below 128 us, then 64 buckets
    for each doubling.
    """
    if us < 128:
        return us
    shift = us.bit_length() - 7
    return shift * 64 + (us >> shift)


def bucket_top(at):
    """The longest wait of a bucket."""
    if at < 128:
        return at
    shift = at // 64 - 1
    return ((at - shift * 64 + 1) << shift) - 1


def percentile(waits, share):
    """The wait in microseconds that this share of the waits does not exceed, from counts by bucket;
    None if there are none.
    """
    total = sum(waits.values())
    if not total:
        return None
    need = max(1, -(-total * share // 1))
    for at in sorted(waits):
        need -= waits[at]
        if need <= 0:
            return bucket_top(at)
    return bucket_top(max(waits))


def bucket_bottom(at):
    """The shortest wait of a bucket."""
    return bucket_top(at - 1) + 1 if at else 0


def corrected(waits, interval):
    """The waits, corrected for coordinated omission. The interval is in microseconds.

    A load that asks again only when it is served hides the waits of starving tasks: each is one
    sample beside thousands of a lucky neighbour's. The interval is the mean time between two locks
    of a task. A task that waits for longer would have asked again after each interval, and would
    have waited for one interval less each time; these waits are added. `shardlock bench` does the
    same.
    """
    added = dict(waits)
    if not waits:
        return added
    for at, count in waits.items():
        wait = bucket_top(at)
        # Among the waits wait - n * interval, n = 1, 2, ..., that are at least an interval long:
        # the number in each bucket.
        for target in range(bucket(int(interval)), at + 1):
            least, most = max(bucket_bottom(target), interval), bucket_top(target) + 1
            first = max(1, math.floor((wait - most) / interval) + 1)
            number = math.floor((wait - least) / interval) - first + 1
            if number > 0:
                added[target] = added.get(target, 0) + number * count
    return added


def jain(counts):
    """Jain's index: 1 if all counts are equal, 1/n if one has everything."""
    squares = sum(n * n for n in counts)
    return sum(counts) ** 2 / (len(counts) * squares) if squares else None


def spread(counts):
    index = jain(counts)
    return {"min": min(counts), "max": max(counts), "jain": None if index is None else round(index, 4)}


def merged(histograms):
    waits = {}
    for histogram in histograms:
        for at, count in histogram.items():
            waits[int(at)] = waits.get(int(at), 0) + count
    return waits


def ms_at_most(us, most_us):
    return None if us is None else round(min(us, most_us) / 1e3, 3)


def writers(reports):
    """The waits for exclusive locks beside shared ones, as measured. Not corrected: that would add
    waits that were never waited for, and the question is how much longer the longest is than
    another.
    """
    # A process may have had no writer.
    waits = merged(report.get("writer_waits") or {} for report in reports)
    longest = max(report.get("writer_wait_max_us", 0) for report in reports)
    quantiles = {name: ms_at_most(percentile(waits, part), longest) for name, part in (("p50", 0.5), ("p99", 0.99))}
    return {"waits": sum(waits.values()), "wait_ms": {**quantiles, "max": round(longest / 1e3, 3)}}


def aggregate(reports, seconds, server):
    """Makes one run's line from the reports of its processes and the server's counters over the
    measured time.
    """
    waits = merged(report["waits"] for report in reports)
    processes = [sum(report["tasks"]) for report in reports]
    tasks = [locks for report in reports for locks in report["tasks"]]
    locks = sum(processes)
    if locks:
        waits = corrected(waits, seconds * 1e6 * len(tasks) / locks)
    wait_max = max(report["wait_max_us"] for report in reports)

    def ms(us):
        return ms_at_most(us, wait_max)

    def per_lock(count):
        return None if count is None or not locks else round(count / locks, 3)

    line = {
        "locks": locks,
        "seconds": seconds,
        "locks_per_s": round(locks / seconds, 1),
        "per_process": spread(processes),
        "per_task": spread(tasks),
        "wait_ms": {"p50": ms(percentile(waits, 0.5)), "p99": ms(percentile(waits, 0.99)), "max": ms(wait_max)},
        "hold_ms": {"mean": round(sum(r["hold_sum_us"] for r in reports) / locks / 1e3, 3) if locks else None},
        "server": {f"{name}_per_lock": per_lock(server.get(name)) for name in ("scripts", "publishes", "commands", "cpu_us")},
    }
    if any(report.get("writer_waits") for report in reports):
        line["writers"] = writers(reports)
    errors = sum(report["errors"] for report in reports)
    if errors:
        first = next((report["first_error"] for report in reports if report.get("first_error")), "without a text")
        line["errors"] = {"count": errors, "first": first}
    # No task acquired the lock for a good part of the time. A peer that hangs need not report an
    # error.
    idle = seconds - max(report["last_us"] for report in reports) / 1e6
    if idle > max(1.0, seconds / 4):
        line["stalled_s"] = round(idle, 2)
    return line


def middle(lines):
    """The median of several runs by locks per second, with the range of all. If failures leave an
    even number, the lower of the two.
    """
    ordered = sorted(lines, key=lambda line: line["locks_per_s"])
    median = dict(ordered[(len(ordered) - 1) // 2])
    median["runs"] = len(ordered)
    median["locks_per_s_range"] = [ordered[0]["locks_per_s"], ordered[-1]["locks_per_s"]]
    return median
