"""Fresh servers, one for each run, and their counters."""

import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A process with a folder of its own, which is removed with it."""

    def __init__(self, folder, command):
        self.port = free_port()
        self.folder = tempfile.mkdtemp(dir=folder)
        self.log = open(pathlib.Path(self.folder, "log"), "wb")
        self.process = subprocess.Popen(
            command(self.port, self.folder), stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, cwd=self.folder
        )
        try:
            self.until_it_answers()
        except BaseException:
            self.stop()
            raise

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    def until_it_answers(self):
        deadline = time.monotonic() + 20
        while True:
            try:
                return self.connect()
            except (OSError, urllib.error.URLError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    log = pathlib.Path(self.folder, "log").read_text(errors="replace")[-500:]
                    name = pathlib.Path(self.process.args[0]).name
                    raise RuntimeError(f"{name} did not start on {self.address}: {error}\n{log}") from error
                time.sleep(0.02)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


class Redis(Server):
    """Writes nothing to disk; everything else is at its default."""

    def __init__(self, binary, folder):
        self.connection = None
        super().__init__(
            folder,
            lambda port, _: [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        )

    def connect(self):
        self.connection = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        self.replies = self.connection.makefile("rb")
        self.info("server")

    def info(self, section):
        self.connection.sendall(f"INFO {section}\r\n".encode())
        head = self.replies.readline()
        if not head.startswith(b"$"):
            raise OSError(f"INFO {section} on {self.address} answered {head!r}")
        text = self.replies.read(int(head[1:]) + 2).decode()
        return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)

    def version(self):
        info = self.info("server")
        return f"{info.get('server_name', 'redis').capitalize()} {info.get('valkey_version', info['redis_version'])}"

    def counters(self):
        cpu = self.info("cpu")
        calls = {}
        for name, value in self.info("commandstats").items():
            # Subcommands have names such as cmdstat_client|tracking.
            command = name.removeprefix("cmdstat_").split("|")[0]
            calls[command] = calls.get(command, 0) + int(value.split(",")[0].removeprefix("calls="))
        # Calls from scripts are also counted, under their own names.
        return {
            "scripts": sum(calls.get(c, 0) for c in ("eval", "evalsha", "eval_ro", "evalsha_ro", "fcall", "fcall_ro")),
            "publishes": calls.get("publish", 0) + calls.get("spublish", 0),
            "commands": sum(count for command, count in calls.items() if command != "info"),
            "cpu_us": sum(float(cpu[f"used_cpu_{kind}"]) for kind in ("sys", "user")) * 1e6,
        }

    def stop(self):
        if self.connection:
            self.connection.close()
        super().stop()


class Agent(Redis):
    """A Redis, and an agent for it. The workers connect to the agent."""

    def __init__(self, binaries, folder):
        redis, shardlock = binaries
        # The path of a socket must be short.
        self.own = pathlib.Path(tempfile.mkdtemp(prefix="shardlock-"))
        self.agent = None
        super().__init__(redis, folder)
        command = [shardlock, "serve", "--shard", f"redis://{super().address}", "--socket", self.address]
        try:
            self.agent = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log, cwd=self.folder)
            self.until_the_agent_answers()
        except BaseException:
            self.stop()
            raise

    @property
    def address(self):
        return str(self.own / "agent.sock")

    def until_the_agent_answers(self):
        deadline = time.monotonic() + 20
        while True:
            try:
                with socket.socket(socket.AF_UNIX) as probe:
                    return probe.connect(self.address)
            except OSError as error:
                if self.agent.poll() is not None or time.monotonic() > deadline:
                    log = pathlib.Path(self.folder, "log").read_text(errors="replace")[-500:]
                    raise RuntimeError(f"the agent did not start: {error}\n{log}") from error
                time.sleep(0.02)

    def stop(self):
        if self.agent:
            self.agent.kill()
            self.agent.wait()
        shutil.rmtree(self.own, ignore_errors=True)
        super().stop()


class Etcd(Server):
    """One member, which syncs its log to disk, as etcd does by default."""

    def __init__(self, binary, folder):
        peer = free_port()
        super().__init__(folder, lambda port, own: [
            binary, "--name", "bench", "--data-dir", f"{own}/data", "--log-level", "error",
            "--listen-client-urls", f"http://127.0.0.1:{port}", "--advertise-client-urls", f"http://127.0.0.1:{port}",
            "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-cluster", f"bench=http://127.0.0.1:{peer}",
        ])  # fmt: skip

    def get(self, path):
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=10) as answer:
            return answer.read().decode()

    def connect(self):
        if "true" not in self.get("/health"):
            raise OSError("not healthy yet")

    def version(self):
        return "etcd " + self.get("/version").split('etcdserver":"')[1].split('"')[0]

    def counters(self):
        # Each unary call is one message, and so is each request on a stream, such as a watch.
        received = [l for l in self.get("/metrics").splitlines() if l.startswith("grpc_server_msg_received_total{")]
        counted = {"commands": sum(float(line.rsplit(" ", 1)[1]) for line in received)}
        stat = pathlib.Path(f"/proc/{self.process.pid}/stat")
        if stat.exists():
            fields = stat.read_text().rsplit(")", 1)[1].split()
            counted["cpu_us"] = (int(fields[11]) + int(fields[12])) * 1e6 / os.sysconf("SC_CLK_TCK")
        return counted


def difference(before, after):
    return {name: after[name] - before[name] for name in after}
