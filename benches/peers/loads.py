"""The loads, and the contestants with their settings."""

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Load:
    name: str
    title: str
    processes: int
    tasks: int  # of each process
    keys: int
    hold_us: int = 0
    permits: int = 0  # of each key; 0: locks instead of permits
    shared_percent: int = 0  # of the locks; the others are exclusive

    @property
    def free(self):
        """Whether each task has a key of its own, so that none waits."""
        return self.keys == self.processes * self.tasks

    @property
    def mode(self):
        return "permits" if self.permits else "shared" if self.shared_percent else "exclusive"


LOADS = [
    Load("one-task", "One task, one key", 1, 1, 1),
    Load("free-200", "200 tasks, 200 keys, one process", 1, 200, 200),
    Load("fan-in-1", "One key, 1 process x 1,000 tasks, no hold", 1, 1000, 1),
    Load("fan-in-8", "One key, 8 processes x 128 tasks, no hold", 8, 128, 1),
    Load("convoy-40", "One key, 40 processes x 1 task, 5 ms hold", 40, 1, 1, 5_000),
    Load("semaphore-10", "10 permits, 8 processes x 32 tasks, 5 ms hold", 8, 32, 1, 5_000, permits=10),
    Load("readers-95", "95 % readers, 5 % writers, 8 processes x 64 tasks, no hold", 8, 64, 1, shared_percent=95),
]


@dataclass(frozen=True, eq=False)
class Contestant:
    name: str
    title: str
    program: str  # its entry in build.PROGRAMS
    role: str = "peer"  # or "ours", or "limit"
    server: str = "redis"  # or "etcd", or "agent", which has a Redis
    free_only: bool = False  # it cannot wait
    modes: tuple = ("exclusive",)  # of the loads that it can run
    pool: dict = field(default_factory=dict)  # connections by load; without an entry, the library's own number
    warmup_s: float = 0  # at least
    arguments: tuple = ()  # more, only for our own bench

    def runs(self, load):
        return load.mode in self.modes and (load.free or not self.free_only)

    def worker_arguments(self, load, retry_us=None, pool=None):
        arguments = ["--peer", self.name]
        # The delay between two tries of a waiter, (shortest, longest) in microseconds, if it is not
        # the library's own.
        if retry_us:
            arguments += ["--retry-min-us", str(retry_us[0]), "--retry-max-us", str(retry_us[1])]
        pool = pool or self.pool.get(load.name)
        return arguments + (["--pool", str(pool)] if pool else [])


CONTESTANTS = [
    Contestant("shardlock", "shardlock", "shardlock", role="ours", modes=("exclusive", "permits", "shared")),
    Contestant("shardlock-linger", "shardlock, linger 1 s", "shardlock", role="ours", arguments=("--linger", "1s")),
    Contestant("shardlock-agent", "shardlock, agent", "shardlock", role="ours", arguments=("--agent",)),
    Contestant("agent-python", "shardlock, agent, from Python", "python", role="ours", server="agent"),
    Contestant("raw", "raw commands", "rust", role="limit", free_only=True),
    Contestant("redisson", "Redisson RLock", "java", warmup_s=4),
    Contestant("redisson-fair", "Redisson RFairLock", "java", warmup_s=4),
    Contestant("rueidislock", "rueidislock", "go"),
    Contestant("redsync", "redsync", "go"),
    Contestant("redislock", "redislock", "go"),
    Contestant("rslock", "rslock", "rust"),
    Contestant("redis-py", "redis-py", "python", pool={"free-200": 200}),
    Contestant("node-redlock", "node-redlock", "node"),
    Contestant("etcd", "etcd mutex", "go", server="etcd"),
    Contestant("redisson-permits", "Redisson RPermitExpirableSemaphore", "java", warmup_s=4, modes=("permits",)),
    Contestant("redis-semaphore-py", "redis-semaphore (Python)", "python", modes=("permits",)),
    Contestant("redis-semaphore-js", "redis-semaphore (Node.js)", "node", modes=("permits",)),
    Contestant("redisson-rw", "Redisson RReadWriteLock", "java", warmup_s=4, modes=("shared",)),
    Contestant("etcd-rw", "etcd RWMutex", "go", server="etcd", modes=("shared",)),
]
