#!/usr/bin/env python3
"""Measures what `shardlock bench --agent` cannot: how soon the next worker enters when the holder
is killed, what connections cost, the shares of workers of two agents, and how many locks workers
with a blocking socket take. Needs only Python 3.9 and a Redis server:

    cargo build --release --package shardlock-cli
    benches/agent.py target/release/shardlock $(scripts/ensure-server)
"""

import heapq
import json
import os
import pathlib
import resource
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time

KILLS = 200
IDLE, WAITING = 10_000, 1_000
NEW_CLIENTS = 1_000
WORKERS_OF_TWO_AGENTS = [(20, 20), (40, 1)]
HOLD, SHARES_OVER = 0.005, 30
PROCESSES, CONVOY_OVER = 40, 5


class Client:
    """A connection to the agent."""

    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)

    def send(self, line):
        self.socket.sendall(line.encode() + b"\r\n")

    def reply(self):
        line = b""
        while not line.endswith(b"\r\n"):
            more = self.socket.recv(4096)
            if not more:
                raise SystemExit("the agent closed a connection")
            line += more
        return line.decode().strip()

    def reply_text(self):
        """A reply of several lines, whose length comes first."""
        text = b""
        while b"\r\n" not in text:
            text += self.socket.recv(65536)
        head, text = text.split(b"\r\n", 1)
        while len(text) < int(head[1:]) + 2:
            text += self.socket.recv(65536)
        return text.decode()

    def token(self, line):
        self.send(line)
        reply = self.reply()
        if not reply.startswith(":"):
            raise SystemExit(f"{line}: {reply}")
        return reply[1:]


def percentiles(seconds):
    seconds = sorted(seconds)
    at = lambda part: round(1e3 * seconds[min(len(seconds) - 1, int(part * len(seconds)))], 3)
    return {"p50": at(0.5), "p99": at(0.99), "max": at(1)}


def memory(pid):
    """Bytes of the process that are in memory and not shared with others."""
    lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) * 1024


def until_waiting(client, count):
    while True:
        client.send("INFO")
        head = client.reply_text()
        if f"blocked_clients:{count}\r\n" in head:
            return
        time.sleep(0.005)


def kills(path):
    """How long after the kill of the holder the next worker has the lock."""
    observer, took = Client(path), []
    for _ in range(KILLS):
        reader, writer = os.pipe()
        holder = os.fork()
        if holder == 0:
            # Open until the process is killed.
            mine = Client(path)
            mine.token("LOCK killed")
            os.write(writer, b"x")
            signal.pause()
        os.close(writer)
        os.read(reader, 1)
        os.close(reader)
        following = Client(path)
        following.send("LOCK killed")
        until_waiting(observer, 1)
        began = time.perf_counter()
        os.kill(holder, signal.SIGKILL)
        token = following.reply()
        took.append(time.perf_counter() - began)
        os.waitpid(holder, 0)
        following.token(f"UNLOCK killed {token[1:]}")
        following.socket.close()
    return {"kills": KILLS, "next_worker_ms": percentiles(took)}


def convoy(path, shardlock, shard):
    """The locks of processes that compete for one key without a hold: of workers with a blocking
    socket to the agent, as most client libraries have, and with a manager in each instead.
    """
    counts, begin = os.pipe(), time.monotonic() + 1
    for _ in range(PROCESSES):
        if os.fork() == 0:
            client, locks = Client(path), 0
            time.sleep(max(0, begin - time.monotonic()))
            while time.monotonic() < begin + CONVOY_OVER:
                token = client.token("LOCK convoy")
                client.token(f"UNLOCK convoy {token}")
                locks += 1
            os.write(counts[1], locks.to_bytes(8, "big"))
            os._exit(0)
    locks = [int.from_bytes(os.read(counts[0], 8), "big") for _ in range(PROCESSES)]
    for _ in range(PROCESSES):
        os.wait()
    command = [shardlock, "bench", "--json", "--shard", shard, "--processes", str(PROCESSES), "--tasks", "1"]
    command += ["--duration", f"{CONVOY_OVER}s"]
    managers = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    each = round(sum(locks) / CONVOY_OVER)
    return {
        "processes": PROCESSES,
        "locks_per_s": each,
        "locks_of_a_worker": {"min": min(locks), "max": max(locks)},
        "locks_per_s_with_a_manager_in_each": round(managers["locks_per_s"]),
        "ratio": round(each / managers["locks_per_s"], 2),
    }


def connections(path, pid):
    """The memory of idle and of waiting connections, and the time to a lock beside them."""
    observer = Client(path)
    before = memory(pid)
    idle = [Client(path) for _ in range(IDLE)]
    for client in idle:
        client.send("PING")
        client.reply()
    with_idle = memory(pid)
    holder = Client(path)
    token = holder.token("LOCK crowded")
    waiting = [Client(path) for _ in range(WAITING)]
    for client in waiting:
        client.send("LOCK crowded")
    until_waiting(observer, WAITING)
    with_waiting = memory(pid)
    took = []
    for number in range(NEW_CLIENTS):
        began = time.perf_counter()
        client = Client(path)
        token_of = client.token(f"LOCK quiet-{number}")
        took.append(time.perf_counter() - began)
        client.token(f"UNLOCK quiet-{number} {token_of}")
        client.socket.close()
    holder.token(f"UNLOCK crowded {token}")
    return {
        "idle": IDLE,
        "bytes_per_idle_connection": round((with_idle - before) / IDLE),
        "waiting": WAITING,
        "bytes_per_waiting_connection": round((with_waiting - with_idle) / WAITING),
        "lock_of_a_new_client_ms": percentiles(took),
    }


def shares(paths, workers):
    """The locks of each worker, if the workers of two agents hold one key for 5 ms each in turn."""
    clients = [Client(path) for path, count in zip(paths, workers) for _ in range(count)]
    locks = [0] * len(clients)
    selector, ends = selectors.DefaultSelector(), []
    for number, client in enumerate(clients):
        selector.register(client.socket, selectors.EVENT_READ, number)
        client.send("LOCK shared-out")
    began = time.perf_counter()
    # The first turns are of agents that do not know of each other yet.
    counted_from, until = began + 1, began + 1 + SHARES_OVER
    while (now := time.perf_counter()) < until:
        while ends and ends[0][0] <= now:
            _, number, token = heapq.heappop(ends)
            selector.unregister(clients[number].socket)
            clients[number].token(f"UNLOCK shared-out {token}")
            clients[number].send("LOCK shared-out")
            selector.register(clients[number].socket, selectors.EVENT_READ, number)
        for key, _ in selector.select(max(0, ends[0][0] - now) if ends else 0.1):
            reply = clients[key.data].reply()
            if not reply.startswith(":"):
                raise SystemExit(reply)
            now = time.perf_counter()
            locks[key.data] += now >= counted_from
            heapq.heappush(ends, (now + HOLD, key.data, reply[1:]))
    for client in clients:
        client.socket.close()
    each = [locks[: workers[0]], locks[workers[0] :]]
    return {
        "workers_of_two_agents": workers,
        "locks_of_a_worker": [{"min": min(part), "max": max(part)} for part in each],
        "most_to_least": round(max(locks) / min(locks), 3),
    }


def main():
    shardlock, redis = sys.argv[1:]
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with tempfile.TemporaryDirectory(prefix="shardlock-") as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
        probe.close()
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        server = subprocess.Popen([redis, "--port", port, "--bind", "127.0.0.1", "--save", ""], cwd=folder, **quiet)
        paths = [f"{folder}/agent-{number}.sock" for number in (1, 2)]
        most = str(IDLE + WAITING + 100)
        shard = f"redis://127.0.0.1:{port}"
        options = ["--shard", shard, "--max-connections", most]
        agents = [None, None]
        try:
            deadline = time.monotonic() + 20
            while not all(map(os.path.exists, paths)):
                for number, path in enumerate(paths):
                    if agents[number] is None or agents[number].poll() is not None:
                        command = [shardlock, "serve", "--socket", path, *options]
                        agents[number] = subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)
                if time.monotonic() > deadline:
                    raise SystemExit("the agents do not start")
                time.sleep(0.1)
            print(json.dumps(kills(paths[0])), flush=True)
            print(json.dumps(convoy(paths[0], shardlock, shard)), flush=True)
            for workers in WORKERS_OF_TWO_AGENTS:
                print(json.dumps(shares(paths, workers)), flush=True)
            print(json.dumps(connections(paths[0], agents[0].pid)), flush=True)
        finally:
            for process in (*agents, server):
                if process:
                    process.kill()
                    process.wait()


if __name__ == "__main__":
    main()
