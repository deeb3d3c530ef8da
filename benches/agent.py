#!/usr/bin/env python3
"""Measures what `shardlock bench --agent` cannot: how soon the next worker enters when the holder
is killed, and what connections cost. Needs only Python 3.9 and a Redis server:

    cargo build --release --package shardlock-cli
    benches/agent.py target/release/shardlock $(scripts/ensure-server)
"""

import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time

KILLS = 200
IDLE, WAITING = 10_000, 1_000
NEW_CLIENTS = 1_000


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
        path = f"{folder}/agent.sock"
        most = str(IDLE + WAITING + 100)
        command = [shardlock, "serve", "--shard", f"redis://127.0.0.1:{port}", "--socket", path, "--max-connections", most]
        agent = None
        try:
            deadline = time.monotonic() + 20
            while not os.path.exists(path):
                if agent is None or agent.poll() is not None:
                    agent = subprocess.Popen(command, stderr=subprocess.DEVNULL, **quiet)
                if time.monotonic() > deadline:
                    raise SystemExit("the agent does not start")
                time.sleep(0.1)
            print(json.dumps(kills(path)), flush=True)
            print(json.dumps(connections(path, agent.pid)), flush=True)
        finally:
            for process in (agent, server):
                if process:
                    process.kill()
                    process.wait()


if __name__ == "__main__":
    main()
