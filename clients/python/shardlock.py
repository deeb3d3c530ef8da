"""Locks of a shardlock agent, for threads and for asyncio. README.md describes them."""

import asyncio
import contextlib
import logging
import math
import os
import queue
import threading
import urllib.parse

import redis.asyncio

__version__ = "0.1.0"
_READING = {"push_request": True, "disconnect_on_error": False}


class LockTimeout(Exception):
    """The lock was not acquired in time."""


class LockLost(Exception):
    """The lock ended before its release: another worker may have entered meanwhile."""


class Lock:
    """A lock that is held: its key, its fencing token, and why it was lost, if that is known."""

    def __init__(self, client, key, token, on_lost):
        if token is None:
            raise LockTimeout(f"the lock of {key!r} was not acquired in time")
        self.key = key.decode() if isinstance(key, bytes) else str(key)  # as in messages
        self.token, self.lost, self._pid = token, None, os.getpid()
        self._client, self._on_lost = client, on_lost

    def remaining(self):
        """For how many seconds from now the lock is certainly held. In asyncio, await it."""
        return self._client.execute_command("HELD", self.key, self.token)

    def _lose(self, reason, caught=Exception):
        self.lost, on_lost, self._on_lost = reason, self._on_lost, None
        try:
            if on_lost:
                on_lost(reason)
        except caught:
            logging.getLogger(__name__).exception("on_lost of the lock of %r failed", self.key)

    def _check(self, unlocked):
        if unlocked != 1 and self._pid == os.getpid():
            raise LockLost(f"the lock of {self.key!r} was lost ({self.lost or 'it had ended'})")


def _words(key, timeout=None, ttl=None, shared=False, permits=None, min_hold=None, max_hold=None,
           class_=None):
    times = {"TIMEOUT": timeout, "TTL": ttl, "MINHOLD": min_hold, "MAXHOLD": max_hold}
    given = [(name, math.ceil(round(s * 1000, 3))) for name, s in times.items() if s is not None]
    mode = ["SHARED"] if shared else ["PERMITS", permits[0], "OF", permits[1]] if permits else []
    return ["LOCK", key, *sum(given, ()), *mode, *(["CLASS", class_] if class_ else [])]


class Agent:
    """An agent, by its socket's path or a URL. `client` is a redis.Redis: its `close` ends all."""

    _client_class = redis.Redis

    def __init__(self, address=None, **options):
        address = address or os.environ.get("SHARDLOCK_AGENT") or "/run/shardlock/agent.sock"
        url = address if "://" in address else "unix://" + urllib.parse.quote(address)
        options = {"max_connections": 2**31, **options}
        self.client = self._client_class.from_url(url, protocol=3, decode_responses=True, **options)
        self.client.connection_pool.connection_kwargs["socket_timeout"] = None  # waits are long
        self.client.set_response_callback("HELD", lambda ms, **_: ms / 1000)

    @contextlib.contextmanager
    def lock(self, key, *, on_lost=None, **options):
        """A lock, for a `with` statement or the calls of a decorated function. `timeout`, `ttl`,
        `min_hold` and `max_hold` are in seconds, `permits` is a pair. `on_lost` is called by a
        thread, with the reason."""
        # A lock ends with the connection that took it, so it has one for itself until UNLOCK.
        pool, lock, unlocked = self.client.connection_pool, None, None
        connection = pool.get_connection()
        try:
            connection.send_command(*_words(key, **options))
            lock = Lock(self.client, key, connection.read_response(), on_lost)
            if on_lost:
                replies = queue.SimpleQueue()
                watch = lambda: replies.put(self._read(lock, connection))
                threading.Thread(target=watch, daemon=True).start()
            try:
                yield lock
            finally:
                lock._on_lost = None
                if lock._pid == os.getpid():  # in a forked child, the parent still holds it
                    with contextlib.suppress(redis.ConnectionError):
                        connection.send_command("UNLOCK", key, lock.token, check_health=False)
                        unlocked = replies.get() if on_lost else self._read(lock, connection)
            lock._check(unlocked)
        except BaseException as error:  # also KeyboardInterrupt
            if unlocked is None and (lock or not isinstance(error, LockTimeout)):
                connection.disconnect()
            raise
        finally:
            pool.release(connection)

    def _read(self, lock, connection):
        try:
            while isinstance(reply := connection.read_response(**_READING), list):
                if reply[:3] == ["lost", lock.key, lock.token]:
                    lock._lose(reply[3], BaseException)  # also SystemExit: the statement waits
            return reply
        except Exception:
            lock._lose("disconnected", BaseException)


class AsyncAgent(Agent):
    """An agent, for asyncio: `async with agent.lock(...)`. The event loop calls `on_lost`."""

    _client_class = redis.asyncio.Redis

    @contextlib.asynccontextmanager
    async def lock(self, key, *, on_lost=None, **options):
        pool, lock, unlocked = self.client.connection_pool, None, None
        connection = await pool.get_connection()
        try:
            await connection.send_command(*_words(key, **options))
            lock = Lock(self.client, key, await connection.read_response(), on_lost)
            watcher = asyncio.ensure_future(self._read(lock, connection))
            try:
                yield lock
            finally:
                lock._on_lost = None
                with contextlib.suppress(redis.ConnectionError):
                    await connection.send_command("UNLOCK", key, lock.token, check_health=False)
                    unlocked = await watcher
            lock._check(unlocked)
        except BaseException as error:  # also CancelledError
            if unlocked is None and (lock or not isinstance(error, LockTimeout)):
                await connection.disconnect(nowait=True)
            raise
        finally:
            await pool.release(connection)

    async def _read(self, lock, connection):
        try:
            while isinstance(reply := await connection.read_response(**_READING), list):
                if reply[:3] == ["lost", lock.key, lock.token]:
                    lock._lose(reply[3])
            return reply
        except Exception:
            lock._lose("disconnected")
