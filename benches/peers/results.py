"""Makes the table and the plots from the lines of all runs."""

import pathlib
import textwrap

import plots
from aggregate import middle
from loads import CONTESTANTS, LOADS

BEGIN = "<!-- peers: begin, written by make bench-peers -->"
END = "<!-- peers: end -->"
HEADER = "# Results\n\nMeasurements, each with its command, machine and date.\n"


class Outcome:
    """The outcome of one contestant under one load: the median of its runs, or why there is none.
    """

    def __init__(self, lines):
        good = [line for line in lines if "failed" not in line]
        self.line = middle(good) if good else None
        self.failures = [line["failed"] for line in lines if "failed" in line]
        self.runs = len(lines)
        self.errors = [line["errors"] for line in good if "errors" in line]
        self.stalls = [line["stalled_s"] for line in good if "stalled_s" in line]

    @property
    def locks_per_s(self):
        return self.line["locks_per_s"] if self.line else 0.0

    def remarks(self):
        said = []
        if self.failures:
            said.append(f"**failed** in {len(self.failures)} of {self.runs}: {self.failures[0]}")
        if self.errors:
            said.append(f"{sum(e['count'] for e in self.errors)} errors: {self.errors[0]['first']}")
        if self.stalls:
            said.append(f"stood still at the end for {max(self.stalls):.1f} s")
        return "; ".join(said).replace("|", "\\|").replace("\n", " ")


def outcomes(lines):
    """The outcomes by load and by contestant, in their order. Contains only what was run."""
    found = {}
    for load in LOADS:
        for contestant in CONTESTANTS:
            of_it = [l for l in lines if l.get("contestant") == contestant.name and l.get("load") == load.name]
            if of_it:
                found.setdefault(load, {})[contestant] = Outcome(of_it)
    return found


def best_peer(row):
    """The fastest of the peers under a load, or None if none of them acquired a lock."""
    peers = [c for c in row if c.role == "peer" and row[c].locks_per_s > 0]
    return max(peers, key=lambda c: row[c].locks_per_s) if peers else None


def number(value, digits=0):
    return "–" if value is None else f"{value:,.{digits}f}"


def significant(value):
    """Rounds to three figures, as no measurement here is more precise."""
    if value is None:
        return "–"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def fairness(load, line):
    """The ratio of most to least, with both numbers: by process if there are several, otherwise by
    task.
    """
    counts = line.get("per_process" if load.processes > 1 else "per_task") or {}
    least, most = counts.get("min"), counts.get("max")
    if least is None or most is None or load.processes * load.tasks == 1:
        return "–", "–"
    ratio = f"{most / least:.2f}" if least else "∞"
    index = counts.get("jain")
    return f"{ratio} ({most:,}/{least:,})", "–" if index is None else f"{index:.3f}"


def held(load, line):
    """The mean hold, and the part of the time in which the keys, or their permits, were held. Each
    runtime sleeps a little longer than requested.
    """
    mean = (line.get("hold_ms") or {}).get("mean")
    if not load.hold_us or mean is None:
        return "–"
    return f"{significant(mean)} ({line['locks_per_s'] * mean / 1e3 / (load.keys * max(1, load.permits)):.2f})"


def writers_waits(line):
    """The waits of writers: the median, the longest, and how many times the median it is."""
    waits = (line.get("writers") or {}).get("wait_ms") or {}
    median, longest = waits.get("p50"), waits.get("max")
    if median is None or longest is None:
        return ["–"] * 3
    return [significant(median), significant(longest), significant(longest / median) if median else "–"]


def table(load, row):
    best = best_peer(row)
    head = ["", "locks/s", "to the best peer", "wait p50, ms", "p99", "max", "hold, ms (part of all time)", "scripts per lock", "commands per lock",
            "publishes per lock", "server CPU per lock, us", "most/least " + ("process" if load.processes > 1 else "task"), "Jain",
            "remarks"]  # fmt: skip
    if load.shared_percent:
        head[6:6] = ["writers' wait p50, ms", "max", "max / p50"]
    out = [f"#### {load.title}", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 2) + "---|"]
    for contestant, outcome in row.items():
        title = f"**{contestant.title}**" if contestant.role == "ours" else contestant.title
        if not outcome.line:
            out.append(f"| {title} |" + " – |" * (len(head) - 2) + f" {outcome.remarks()} |")
            continue
        line = outcome.line
        low, high = line["locks_per_s_range"]
        locks = number(line["locks_per_s"]) + (f" ({number(low)} to {number(high)})" if line["runs"] > 1 else "")
        ratio = significant(outcome.locks_per_s / row[best].locks_per_s) if best else "–"
        wait, server = line["wait_ms"], line.get("server") or {}
        cells = [locks, ratio, *(significant(wait.get(q)) for q in ("p50", "p99", "max"))]
        cells += writers_waits(line) if load.shared_percent else []
        cells.append(held(load, line))
        cells += [significant(server.get(f"{name}_per_lock")) for name in ("scripts", "commands", "publishes", "cpu_us")]
        cells += [*fairness(load, line), outcome.remarks()]
        out.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def summary(found):
    """Locks per second of all contestants under all loads, with the ratio to the best peer under
    each load.
    """
    loads = list(found)
    out = ["| locks/s (to the best peer) | " + " | ".join(load.title for load in loads) + " |", "|---|" + "---:|" * len(loads)]
    for contestant in CONTESTANTS:
        cells = []
        for load in loads:
            outcome, best = found[load].get(contestant), best_peer(found[load])
            if not outcome:
                cells.append("–")
            elif not outcome.line:
                cells.append("failed")
            else:
                ratio = f" ({significant(outcome.locks_per_s / found[load][best].locks_per_s)})" if best else ""
                cells.append(number(outcome.locks_per_s) + ratio)
        if set(cells) != {"–"}:
            title = f"**{contestant.title}**" if contestant.role == "ours" else contestant.title
            out.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(out)


def section(lines):
    found = outcomes(lines)
    about = next(line["about"] for line in lines if "about" in line)
    out = ["## Comparison with the peers", ""]
    measured = (
        f"`{about['command']}` on {about['date']}, {about['machine']}, {about['cores']} cores, {' and '.join(about['servers'])} on the same "
        f"machine, {', '.join(about['languages'])}, a fresh "
        f"server for each run, {about['seconds']:g} s measured after the warm-up, the median of {about['repeat']} "
        f"run{'s' if about['repeat'] > 1 else ''} in random order (seed {about['seed']})."
    )
    out += textwrap.wrap(measured, 100, break_long_words=False, break_on_hyphens=False)
    if about["load_average"] > about["cores"] / 2:
        out += ["", f"**The machine was busy with other work (load average {about['load_average']} before the first",
                "run): do not compare these figures with other runs.**"]  # fmt: skip
    out += ["", "[peers/README.md](peers/README.md) describes the setup of each contestant and the meaning of each", "column.", "", summary(found), ""]
    for name, title in PLOTS:
        out += [f"![{title}](plots/{name}.svg)", ""]
    for load, row in found.items():
        out += [table(load, row), ""]
    missing = [(line["contestant"], line["missing"]) for line in lines if "missing" in line]
    if missing:
        out += ["Not run here:", "", *(f"- {name}: {why}" for name, why in missing), ""]
    return "\n".join(out)


PLOTS = [
    ("peers-locks", "Locks per second of each contestant under each load"),
    ("peers-waits", "Waits of each contestant under each load: p50, p99 and the longest"),
    ("peers-fairness", "Locks of the unluckiest as a share of the luckiest's"),
    ("peers-server", "Server CPU per lock of each contestant under each load"),
]


def panels(found):
    """The contents of each plot: (title of the panel, [(title, role, values or None)])."""

    def all_of(value, of=lambda load: True):
        rows = []
        for load, row in found.items():
            if of(load):
                rows.append((load.title, [(c.title, c.role, o.line and value(load, o.line)) for c, o in row.items()]))
        return rows

    def least_to_most(load, line):
        counts = line.get("per_process" if load.processes > 1 else "per_task") or {}
        return [100 * counts["min"] / counts["max"]] if counts.get("max") else None

    def waits(_, line):
        values = [line["wait_ms"].get(q) for q in ("p50", "p99", "max")]
        return None if None in values else values

    def cpu(_, line):
        value = (line.get("server") or {}).get("cpu_us_per_lock")
        return None if value is None else [value]

    return {
        "peers-locks": plots.bars("Locks per second", all_of(lambda _, line: [line["locks_per_s"]]), logarithmic=True),
        "peers-waits": plots.ranges("Wait in milliseconds: p50, p99 and the longest", all_of(waits)),
        "peers-fairness": plots.bars("Locks of the unluckiest in percent of the luckiest's",
                                     all_of(least_to_most, lambda load: load.processes * load.tasks > 1), logarithmic=False),
        "peers-server": plots.bars("Server CPU per lock in microseconds", all_of(cpu), logarithmic=True),
    }  # fmt: skip


def write(lines, out):
    """Replaces the text between the markers of RESULTS.md, or appends it if there are none, and
    writes the plots.
    """
    path = pathlib.Path(out, "RESULTS.md")
    text = path.read_text() if path.exists() else HEADER
    block = f"{BEGIN}\n{section(lines)}{END}"
    if BEGIN in text and END in text:
        before, rest = text.split(BEGIN, 1)
        text = before + block + rest.split(END, 1)[1]
    else:
        text = text.rstrip("\n") + f"\n\n{block}\n"
    folder = pathlib.Path(out, "plots")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, svg in panels(outcomes(lines)).items():
        written.append(folder / f"{name}.svg")
        written[-1].write_text(svg)
    path.write_text(text)
    return [*written, path]
