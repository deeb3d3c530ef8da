#!/usr/bin/env python3
"""Runs shardlock, its peers and raw commands under equal loads, and writes the table and the plots.

Each run has a fresh server. The README.md in this folder describes what is measured and the setup
of each contestant. Needs only Python 3.9; `make bench-peers` calls it.
"""

import argparse
import json
import os
import pathlib
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import build
import results
from loads import CONTESTANTS, LOADS
from servers import Agent, Etcd, Redis
from workers import Failed, run_ours, run_workers


def say(text):
    print(text, file=sys.stderr, flush=True)


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=5, help="how long each run is measured (default 5)")
    parser.add_argument("--warmup", type=float, default=2, help="how long each process warms up at least (default 2)")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each contestant under each load; the median counts (default 3)")
    parser.add_argument("--only", default="", help="names of contestants and loads, separated by commas; see --list")
    parser.add_argument("--list", action="store_true", help="print the names and exit")
    parser.add_argument("--seed", type=int, help="seed of the random order")
    parser.add_argument("--retry-us", help="delay MIN:MAX between two tries of all contestants that retry, instead of the chosen delays")
    parser.add_argument("--pool", type=int, help="connections of all contestants that have a pool, instead of the chosen numbers")
    parser.add_argument("--out", type=pathlib.Path, default=build.ROOT / "benches", help="where RESULTS.md and plots/ are")
    parser.add_argument("--work", type=pathlib.Path, default=build.ROOT / "target" / "peers", help="where everything is built")
    parser.add_argument("--dry", action="store_true", help="write no table and no plots, only the lines")
    parser.add_argument("--from", dest="kept", type=pathlib.Path, help="run nothing and write the table from the lines of this file")
    options = parser.parse_args()
    if options.seconds <= 0 or options.repeat < 1 or options.repeat % 2 == 0:
        parser.error("--seconds must be above 0, and --repeat odd, so that the median is one of the runs")
    return options, parser


def chosen(options, parser):
    names = [name for name in options.only.split(",") if name]
    unknown = set(names) - {c.name for c in CONTESTANTS} - {l.name for l in LOADS}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --list prints the names")
    loads = [l for l in LOADS if l.name in names] or LOADS
    contestants = [c for c in CONTESTANTS if c.name in names] or CONTESTANTS
    # What runs under none of the loads need not be built.
    contestants = [c for c in contestants if any(c.runs(l) for l in loads)]
    if not contestants:
        parser.error(f"nothing to run: --only {options.only} names no contestant that has one of these loads")
    return contestants, loads


def binary_of(script):
    done = subprocess.run([build.ROOT / "scripts" / script], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return None, f"scripts/{script} found no server and could not install one"
    return done.stdout.strip(), None


def run_once(contestant, load, command, binaries, options):
    folder = options.work / "runs"
    warmup = max(options.warmup, contestant.warmup_s)
    with {"redis": Redis, "etcd": Etcd, "agent": Agent}[contestant.server](binaries[contestant.server], folder) as server:
        counts = ["--processes", str(load.processes), "--tasks", str(load.tasks), "--keys", str(load.keys)]
        if contestant.program == "shardlock":
            times = ["--hold", f"{load.hold_us}us", "--duration", f"{int(options.seconds * 1e3)}ms"]
            mode = ["--permits", str(load.permits)] if load.permits else []
            mode += ["--shared", f"{load.shared_percent / 100}"] if load.shared_percent else []
            shard = ["--shard", f"redis://{server.address}", "--json"]
            return run_ours([*command, *counts, *times, *mode, *shard, *contestant.arguments], folder, options.seconds, warmup)
        retry = tuple(int(us) for us in options.retry_us.split(":")) if options.retry_us else None
        arguments = [*counts, "--hold-us", str(load.hold_us), "--server", server.address, "--warmup-ms", str(int(warmup * 1e3))]
        arguments += ["--permits", str(load.permits), "--shared-percent", str(load.shared_percent)] if load.mode != "exclusive" else []
        if contestant.program == "rust":
            # The same number as in our own bench.
            arguments += ["--threads", str(max(1, (os.cpu_count() or 1) // load.processes))]
        arguments += contestant.worker_arguments(load, retry, options.pool)
        commands = [[*command, *arguments, "--process", str(process)] for process in range(load.processes)]
        return run_workers(commands, server, folder, options.seconds, warmup)


def measure(contestants, loads, options, keep):
    # Read before the builds, which are load of our own.
    load_average = round(os.getloadavg()[0], 2)
    missing = {}
    binaries = {}
    for kind, script in (("redis", "ensure-server"), ("etcd", "ensure-etcd")):
        of_it = [c for c in contestants if c.server == kind or (kind, c.server) == ("redis", "agent")]
        if of_it:
            binaries[kind], why = binary_of(script)
            missing.update({c.name: why for c in of_it if why})
    programs = {c.program for c in contestants} | {"shardlock" for c in contestants if c.server == "agent"}
    commands, unbuilt = build.build(sorted(programs), options.work, say)
    missing.update({c.name: unbuilt[c.program] for c in contestants if c.program in unbuilt})
    if "shardlock" in unbuilt:
        missing.update({c.name: unbuilt["shardlock"] for c in contestants if c.server == "agent"})
    binaries["agent"] = (binaries.get("redis"), commands.get("shardlock", [None])[0])
    for name, why in missing.items():
        keep({"contestant": name, "load": None, "missing": why})
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    keep({"about": about(options, seed, binaries, load_average)})
    runs = [(c, l) for c in contestants if c.name not in missing for l in loads if c.runs(l)]
    runs = [run for _ in range(options.repeat) for run in random.Random(seed).sample(runs, len(runs))]
    shutil.rmtree(options.work / "runs", ignore_errors=True)
    (options.work / "runs").mkdir(parents=True)
    began = time.monotonic()
    for done, (contestant, load) in enumerate(runs):
        try:
            line = run_once(contestant, load, commands[contestant.program], binaries, options)
            told = f"{line['locks_per_s']:,.0f} locks/s, wait p99 {line['wait_ms']['p99']} ms, max {line['wait_ms']['max']} ms"
            if line.get("writers"):
                waits = line["writers"]["wait_ms"]
                told += f", writers' wait p50 {waits['p50']} ms, max {waits['max']} ms"
            if "errors" in line:
                told += f", {line['errors']['count']} errors: {line['errors']['first']}"
        # A failure of one run must not end the others.
        except (Failed, RuntimeError, OSError, ValueError) as error:
            line, told = {"failed": str(error)}, f"FAILED: {error}"
        keep({"contestant": contestant.name, "load": load.name, **line})
        left = (time.monotonic() - began) / (done + 1) * (len(runs) - done - 1)
        say(f"[{done + 1}/{len(runs)}, about {left / 60:.0f} min left] {load.name} {contestant.name}: {told}")
    say(f"{len(runs)} runs in {(time.monotonic() - began) / 60:.1f} minutes")


def languages():
    """The versions of the languages that the peers are built with and run on."""
    found = []
    for command in (["rustc", "--version"], ["go", "version"], ["java", "--version"], ["node", "--version"]):
        if shutil.which(command[0]):
            told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
            version = re.search(r"\d+(\.\d+)+", told)
            found += [f"{command[0]} {version[0]}"] if version else []
    return [*found, f"Python {platform.python_version()}"]


def about(options, seed, binaries, load_average):
    versions = []
    for kind, server in (("redis", Redis), ("etcd", Etcd)):
        if binaries.get(kind):
            (options.work / "runs").mkdir(parents=True, exist_ok=True)
            with server(binaries[kind], options.work / "runs") as one:
                versions.append(one.version())
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "machine": f"{platform.system()} on {platform.machine()}",
        "languages": languages(),
        "load_average": load_average,
        "servers": versions,
        "command": " ".join(["benches/peers/run.py", *sys.argv[1:]]),
        "seconds": options.seconds,
        "repeat": options.repeat,
        "seed": seed,
    }


def main():
    options, parser = parse()
    if options.list:
        for one in [*CONTESTANTS, *LOADS]:
            print(f"{one.name:18}{one.title}")
        return
    if options.kept:
        lines = [json.loads(line) for line in options.kept.read_text().splitlines()]
    else:
        # So that servers and workers are stopped in this case, too.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        contestants, loads = chosen(options, parser)
        options.work.mkdir(parents=True, exist_ok=True)
        lines = []
        with open(options.work / "runs.jsonl", "w") as kept:

            def keep(line):
                lines.append(line)
                kept.write(json.dumps(line) + "\n")
                kept.flush()

            measure(contestants, loads, options, keep)
        say(f"every run is in {options.work / 'runs.jsonl'}")
    if not options.dry:
        for path in results.write(lines, options.out):
            say(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
