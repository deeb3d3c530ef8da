"""redis-py's lock, the semaphore of redis-semaphore, and the locks of shardlock's agent, under the
loads of shardlock's bench.

A worker is one process of a load. It warms up, prints "ready", and reads from standard input when
the measured time begins and ends ("go START END", milliseconds since 1970). It prints its counts as
one line of JSON. See the README.md one folder up.

Many tasks use the asynchronous lock: with the global interpreter lock, threads of one process only
add switches. A process with one task uses the blocking lock, which costs less. The semaphore has
blocking calls only, so each of its tasks has a thread.
"""

import argparse
import asyncio
import json
import os
import pathlib
import random
import sys
import threading
import time

import redis
import redis.asyncio
import redis_semaphore

now = time.monotonic


def bucket(us):
    """The histogram bucket: exact below 128 us, then 64 buckets for each doubling. The runner uses
    the same.
    """
    if us < 128:
        return us
    shift = us.bit_length() - 7
    return shift * 64 + (us >> shift)


def micros(seconds):
    return max(0, int(seconds * 1e6))


class Tally:
    def __init__(self):
        self.locks = self.wait_max = self.hold_sum = self.last = self.errors = 0
        self.waits = {}
        self.first_error = ""
        self.since = None  # when the task began to wait, if it waits

    def waited(self, until):
        """Counts a wait once, at its end or at the end of the measured time."""
        since, self.since = self.since, None
        if since is not None:
            wait = micros(until - since)
            at = bucket(wait)
            self.waits[at] = self.waits.get(at, 0) + 1
            self.wait_max = max(self.wait_max, wait)

    def fail(self, error, end):
        if now() < end:
            self.errors += 1
            self.first_error = self.first_error or f"{type(error).__name__}: {error}"


class Blocking:
    """A blocking lock in a coroutine that has its own thread."""

    def __init__(self, lock):
        self.lock = lock

    async def acquire(self):
        self.lock.acquire()

    async def release(self):
        self.lock.release()


class OfAgent:
    """A lock of clients/python, which is a context manager: an asynchronous one, or one in a
    coroutine that has its own thread.
    """

    def __init__(self, lock):
        self.lock = lock

    async def acquire(self):
        if hasattr(self.lock, "__aenter__"):
            await self.lock.__aenter__()
        else:
            self.lock.__enter__()

    async def release(self):
        if hasattr(self.lock, "__aexit__"):
            await self.lock.__aexit__(None, None, None)
        else:
            self.lock.__exit__(None, None, None)


class Semaphore:
    """A permit of redis-semaphore in a coroutine that has its own thread."""

    def __init__(self, client, key, options):
        # The permits of a process that died are free again after this time, like an expired lock.
        stale = options.ttl_ms / 1e3
        self.semaphore = redis_semaphore.Semaphore(client, count=options.permits, namespace=key, stale_client_timeout=stale)

    async def acquire(self):
        self.semaphore.acquire()

    async def release(self):
        if not self.semaphore.release():
            raise RuntimeError("the permit was no longer ours at its release")


class Work:
    def __init__(self, options):
        self.options = options
        # Whether each task has a thread of its own.
        self.in_threads = options.tasks == 1 or options.permits > 0
        if options.peer == "agent-python":
            sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[3] / "clients" / "python"))
            import shardlock

            self.agent = (shardlock.Agent if self.in_threads else shardlock.AsyncAgent)(options.server)
            return
        host, port = options.server.split(":")
        if self.in_threads:
            self.client = redis.Redis(host=host, port=int(port))
            return
        # This pool makes its callers wait. The plain pool rejects a task that finds no connection.
        wide = options.pool or 50
        pool = redis.asyncio.BlockingConnectionPool(host=host, port=int(port), max_connections=wide, timeout=None)
        self.client = redis.asyncio.Redis(connection_pool=pool)

    def lock(self, key):
        options = self.options
        if options.peer == "agent-python":
            return OfAgent(self.agent.lock(key))
        if options.permits:
            return Semaphore(self.client, key, options)
        sleep = {}
        if options.retry_max_us:
            # Its loop sleeps for the same time on each try, so the delay is random only between
            # locks.
            sleep["sleep"] = random.uniform(options.retry_min_us, options.retry_max_us) / 1e6
        # The token belongs to the task's own lock object, so nothing is kept per thread.
        lock = self.client.lock(key, timeout=options.ttl_ms / 1e3, thread_local=False, **sleep)
        return Blocking(lock) if self.in_threads else lock

    def run(self, *loop):
        """Starts the loop of a task. Returns an awaitable that waits until it ends."""
        if not self.in_threads:
            return asyncio.create_task(self.loop(*loop))
        thread = threading.Thread(target=lambda: asyncio.run(self.loop(*loop)), daemon=True)
        thread.start()
        return asyncio.to_thread(thread.join)

    async def loop(self, key_of, hold, start, end, tally):
        while now() < end:
            tally.since = now()
            lock = self.lock(key_of())
            while True:
                try:
                    await lock.acquire()
                    break
                except Exception as error:  # any error is reported as the peer's
                    tally.fail(error, end)
                    # A peer that fails at once must not keep the machine busy with its failures.
                    await asyncio.sleep(0.001)
                if now() >= end:
                    return
            entered = now()
            tally.waited(min(entered, end))
            if hold and self.in_threads:
                # asyncio rounds up to whole milliseconds.
                time.sleep(hold)
            elif hold:
                await asyncio.sleep(hold)
            left = now()
            try:
                await lock.release()
            except Exception as error:  # as above
                tally.fail(error, end)
                await asyncio.sleep(0.001)
                continue
            released = now()
            if released > end:
                return
            tally.locks += 1
            tally.hold_sum += micros(left - entered)
            tally.last = micros(released - start)

    async def warm_up(self):
        """Opens the connections and runs the code that waits, on keys of this process alone.
        Nothing of it is left when the measured time begins.
        """
        options = self.options

        async def each(tasks, key):
            start = now()
            end = start + options.warmup_ms / 2e3
            await asyncio.gather(*[self.run(lambda t=t: key(t), 0, start, end, Tally()) for t in range(tasks)])

        await each(options.tasks, lambda task: f"warm:{options.process}:{task}")
        await each(min(options.tasks, 8), lambda _: f"warm:{options.process}")

    async def measure(self, start, end):
        options = self.options
        await asyncio.sleep(max(0, start - now()))
        tallies, running = [], []
        for task in range(options.tasks):
            own = f"bench:{options.process * options.tasks + task}"
            if options.keys == options.processes * options.tasks:
                key_of = lambda own=own: own
            else:
                key_of = lambda: f"bench:{random.randrange(options.keys)}"
            tallies.append(Tally())
            running.append(self.run(key_of, options.hold_us / 1e6, start, end, tallies[-1]))
        await asyncio.sleep(max(0, end - now()))
        return report(tallies, end)


def report(tallies, end):
    waits = {}
    for tally in tallies:
        tally.waited(end)
        for at, count in tally.waits.items():
            waits[at] = waits.get(at, 0) + count
    return {
        "tasks": [t.locks for t in tallies],
        "waits": waits,
        "wait_max_us": max(t.wait_max for t in tallies),
        "hold_sum_us": sum(t.hold_sum for t in tallies),
        "last_us": max(t.last for t in tallies),
        "errors": sum(t.errors for t in tallies),
        "first_error": next((t.first_error for t in tallies if t.first_error), ""),
    }


async def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", required=True)
    for name in ["--process", "--hold-us", "--retry-min-us", "--retry-max-us", "--pool", "--permits", "--shared-percent"]:
        parser.add_argument(name, type=int, default=0)
    for name in ["--processes", "--tasks", "--keys"]:
        parser.add_argument(name, type=int, default=1)
    parser.add_argument("--ttl-ms", type=int, default=30_000)
    parser.add_argument("--warmup-ms", type=int, default=1_000)
    parser.add_argument("--peer", choices=["redis-py", "redis-semaphore-py", "agent-python"], required=True)
    work = Work(parser.parse_args())
    await work.warm_up()
    print("ready", flush=True)
    line = (await asyncio.to_thread(sys.stdin.readline)).split()
    if len(line) != 3 or line[0] != "go":
        raise SystemExit(f"expected go START END, got {line}")
    # The wall clock is the same for all processes of the load. From here on only the monotonic
    # clock counts.
    start, end = (now() + (int(ms) / 1e3 - time.time()) for ms in line[1:])
    print(json.dumps(await work.measure(start, end)), flush=True)
    # Tasks that still wait end with the process.
    os._exit(0)


asyncio.run(main())
