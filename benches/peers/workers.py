"""The processes of one run. Starts them together, sends them the start time, and stops them."""

import json
import queue
import subprocess
import tempfile
import threading
import time

from aggregate import aggregate
from servers import difference


class Failed(Exception):
    """A run without a result, and why."""


class Worker:
    def __init__(self, command, folder):
        self.errors = tempfile.TemporaryFile(dir=folder)
        self.lines = queue.Queue()
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=folder
        )
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            self.lines.put(line.strip())
        self.lines.put(None)

    def line(self, deadline, what):
        try:
            line = self.lines.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise Failed(f"hangs: {what}{self.complaint()}") from None
        if line is None:
            raise Failed(f"ended with {self.process.wait()} before {what}{self.complaint()}")
        return line

    def complaint(self):
        self.errors.seek(0)
        last = self.errors.read().decode(errors="replace").strip().splitlines()[-3:]
        return ": " + " / ".join(last) if last else ""

    def tell(self, line):
        try:
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise Failed(f"ended with {self.process.wait()} before the start{self.complaint()}") from None

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.errors.close()


def run_workers(commands, server, folder, seconds, warmup):
    """Executes one run of a peer, whose processes begin and end together, and returns its line."""
    workers = []
    try:
        # A machine with few cores starts forty virtual machines slowly.
        deadline = time.monotonic() + 60 + warmup + 5 * len(commands)
        for command in commands:
            workers.append(Worker(command, folder))
        for worker in workers:
            said = worker.line(deadline, "it was warm")
            if said != "ready":
                raise Failed(f"printed {said!r} instead of ready")
        start_ms = int(time.time() * 1e3) + 200 + 10 * len(workers)
        end_ms = start_ms + int(seconds * 1e3)
        for worker in workers:
            worker.tell(f"go {start_ms} {end_ms}")
        sleep_until(start_ms)
        before = server.counters()
        sleep_until(end_ms)
        counted = difference(before, server.counters())
        deadline = time.monotonic() + 20
        reports = [json.loads(worker.line(deadline, "it reported")) for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
    return aggregate(reports, seconds, counted)


def run_ours(command, folder, seconds, warmup):
    """Executes one run of our own bench, which starts its processes and reads the server's counters
    itself.
    """
    with tempfile.TemporaryFile(dir=folder) as errors:
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=folder,
                timeout=60 + 2 * (seconds + warmup),
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Failed(f"hangs: no result after {60 + 2 * (seconds + warmup):.0f} s") from None
        errors.seek(0)
        said = " / ".join(errors.read().decode(errors="replace").strip().splitlines()[-3:])
    if done.returncode:
        raise Failed(f"ended with {done.returncode}: {said}")
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not lines:
        raise Failed(f"printed no line of JSON: {said}")
    return json.loads(lines[-1])


def sleep_until(wall_ms):
    time.sleep(max(0.0, wall_ms / 1e3 - time.time()))
