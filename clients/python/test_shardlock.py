"""Run by cli/tests against an agent at SHARDLOCK_AGENT."""

import asyncio
import concurrent.futures
import os
import signal
import sys
import threading
import time
import unittest
import warnings

import redis
import shardlock

PATIENCE_S = 20


class Fails(Exception):
    """Raised by a body."""


class Blocking(unittest.TestCase):
    def setUp(self):
        self.agent = shardlock.Agent()
        self.addCleanup(self.agent.client.close)

    def assert_free(self, key):
        with self.agent.lock(key, timeout=0):
            pass

    def assert_held(self, key, **options):
        with self.assertRaises(shardlock.LockTimeout):
            with self.agent.lock(key, timeout=0, **options):
                pass

    def wait_until_waiting(self, count):
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.agent.client.info()["blocked_clients"]) != count:
            self.assertLess(time.monotonic(), deadline, f"{found} wait, not {count}")
            time.sleep(0.002)

    def test_a_lock_is_held_until_the_end_of_the_statement(self):
        with self.agent.lock("held", timeout=5, class_="test") as lock:
            self.assertGreater(lock.token, 0)
            self.assertGreater(lock.remaining(), 0)
            self.assert_held("held")
            with self.assertRaisesRegex(shardlock.LockTimeout, "'held' was not acquired in time"):
                with self.agent.lock("held", timeout=0.02):
                    pass
        self.assertEqual(lock.remaining(), 0)
        with self.agent.lock("held", timeout=0) as following:
            self.assertGreater(following.token, lock.token)

    def test_a_decorated_function_runs_under_the_lock(self):
        @self.agent.lock("decorated")
        def double(number):
            """Doubles."""
            self.assert_held("decorated")
            return 2 * number

        self.assertEqual([double(2), double(3)], [4, 6])
        self.assertEqual((double.__name__, double.__doc__), ("double", "Doubles."))

    def test_many_threads_enter_one_after_the_other_with_growing_tokens(self):
        tokens, inside = [], []

        def enter(_):
            with self.agent.lock("threads") as lock:
                inside.append(lock)
                self.assertEqual(inside, [lock])
                tokens.append(lock.token)
                inside.remove(lock)

        with concurrent.futures.ThreadPoolExecutor(20) as threads:
            list(threads.map(enter, range(100)))
        self.assertEqual(len(tokens), 100)
        self.assertEqual(tokens, sorted(tokens))

    def test_all_modes_and_options_are_passed_on(self):
        with self.agent.lock("prices", shared=True), self.agent.lock("prices", shared=True):
            self.assert_held("prices")
        with self.agent.lock("api", permits=(2, 3), ttl=60, max_hold=30) as lock:
            self.assertGreater(lock.remaining(), 20)
            self.assert_held("api", permits=(2, 3))
            with self.agent.lock("api", permits=(1, 3), timeout=0):
                pass
        with self.agent.lock("cron", min_hold=60):
            pass
        self.assert_held("cron")
        with self.assertRaises(TypeError):
            with self.agent.lock("cron", time_out=1):
                pass

    def test_errors_of_the_agent_are_raised(self):
        with self.assertRaisesRegex(redis.ResponseError, "ttl is 1ms, but must be"):
            with self.agent.lock("wrong", ttl=0.001):
                pass
        with self.assertRaises(redis.ConnectionError):
            with shardlock.Agent("/no/such/socket").lock("wrong"):
                pass

    def test_an_exception_of_the_body_is_raised_and_the_lock_is_released(self):
        with self.assertRaises(Fails):
            with self.agent.lock("failing"):
                raise Fails
        self.assert_free("failing")
        with self.assertRaises(Fails):
            with self.agent.lock("failing", max_hold=0.05) as lock:
                while lock.remaining():
                    time.sleep(0.002)
                raise Fails

    def test_a_loss_is_reported_while_it_happens_and_at_the_end(self):
        reasons, lost = [], threading.Event()

        def on_lost(reason):
            reasons.append(reason)
            lost.set()
            raise Fails("is logged")

        with self.assertRaisesRegex(shardlock.LockLost, r"'lost' was lost \(max_hold\)"):
            with self.assertLogs("shardlock", "ERROR") as logs:
                with self.agent.lock("lost", max_hold=0.05, on_lost=on_lost) as lock:
                    self.assertTrue(lost.wait(PATIENCE_S))
                    self.assertEqual((lock.lost, lock.remaining()), ("max_hold", 0))
        self.assertEqual(reasons, ["max_hold"])
        self.assertIn("on_lost of the lock of 'lost' failed", logs.output[0])

        # Without on_lost, the same is known at the end.
        with self.assertRaisesRegex(shardlock.LockLost, r"\(max_hold\)"):
            with self.agent.lock("lost", max_hold=0.05) as lock:
                while lock.remaining():
                    time.sleep(0.002)

    def test_a_loss_is_reported_whatever_type_the_key_has(self):
        for key in (7, 2.5, b"bytes"):
            with self.assertRaisesRegex(shardlock.LockLost, r"\(max_hold\)"):
                with self.agent.lock(key, max_hold=0.05) as lock:
                    while lock.remaining():
                        time.sleep(0.002)

    def test_an_on_lost_that_exits_does_not_hang_the_statement(self):
        with self.assertRaises(shardlock.LockLost), self.assertLogs("shardlock", "ERROR"):
            with self.agent.lock("exiting", max_hold=0.05, on_lost=sys.exit) as lock:
                while lock.remaining():
                    time.sleep(0.002)

    def test_an_on_lost_that_exits_ends_a_program_of_asyncio(self):
        async def enter():
            async with shardlock.AsyncAgent().lock("exiting", max_hold=0.05, on_lost=sys.exit):
                await asyncio.sleep(PATIENCE_S)

        with self.assertRaises(SystemExit):
            asyncio.run(enter())

    def test_a_socket_timeout_ends_neither_a_wait_nor_a_lock(self):
        url = f"unix://{os.environ['SHARDLOCK_AGENT']}?socket_timeout=0.01"
        for agent in (shardlock.Agent(socket_timeout=0.01), shardlock.Agent(url)):
            self.addCleanup(agent.client.close)
            with agent.lock("long", on_lost=self.fail):
                with self.assertRaises(shardlock.LockTimeout):
                    with agent.lock("long", timeout=0.1):
                        pass

    def test_a_forked_child_leaves_the_lock_to_its_parent(self):
        for on_lost in (None, self.fail):
            child = None
            try:
                with self.agent.lock("forked", on_lost=on_lost) as lock:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore", DeprecationWarning)  # for threads
                        child = os.fork()
                    if child:
                        self.assertEqual(os.waitpid(child, 0)[1], 0)
                        self.assertGreater(lock.remaining(), 0)
                        self.assert_held("forked")
                    else:
                        signal.alarm(PATIENCE_S)
            finally:
                if child == 0:
                    os._exit(0 if sys.exc_info()[0] is None else 1)
            self.assert_free("forked")

    def test_a_watched_lock_is_released_without_a_report(self):
        for _ in range(20):
            with self.agent.lock("watched", on_lost=self.fail):
                self.assert_held("watched")
        self.assert_free("watched")

    def test_a_broken_connection_is_a_loss(self):
        reasons, lost = [], threading.Event()

        def on_lost(reason):
            reasons.append(reason)
            lost.set()

        for watching in (None, on_lost):
            agent = shardlock.Agent()
            with self.assertRaises(shardlock.LockLost):
                with agent.lock("broken", on_lost=watching):
                    agent.client.connection_pool.disconnect()
                    if watching:
                        self.assertTrue(lost.wait(PATIENCE_S))
            self.assertEqual(reasons, ["disconnected"] if watching else [])
            with self.agent.lock("broken", timeout=PATIENCE_S):
                pass

    def test_ctrl_c_ends_a_wait_and_a_body(self):
        def interrupt():
            self.wait_until_waiting(1)
            os.kill(os.getpid(), signal.SIGINT)

        with self.agent.lock("interrupted"):
            interrupting = threading.Thread(target=interrupt)
            interrupting.start()
            with self.assertRaises(KeyboardInterrupt):
                with self.agent.lock("interrupted"):
                    self.fail("held twice")
            interrupting.join()
            self.wait_until_waiting(0)
        with self.assertRaises(KeyboardInterrupt):
            with self.agent.lock("interrupted", timeout=0):
                raise KeyboardInterrupt
        self.assert_free("interrupted")

    def test_an_idle_connection_is_used_again(self):
        for _ in range(20):
            self.assert_free("again")
        self.assertLessEqual(len(self.agent.client.connection_pool._available_connections), 1)


class Asynchronous(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.agent = shardlock.AsyncAgent()
        self.addAsyncCleanup(self.agent.client.aclose)

    async def assert_held(self, key):
        with self.assertRaises(shardlock.LockTimeout):
            async with self.agent.lock(key, timeout=0):
                pass

    async def assert_free(self, key):
        async with self.agent.lock(key, timeout=0):
            pass

    async def wait_until_waiting(self, count):
        deadline = time.monotonic() + PATIENCE_S
        while (found := (await self.agent.client.info())["blocked_clients"]) != count:
            self.assertLess(time.monotonic(), deadline, f"{found} wait, not {count}")
            await asyncio.sleep(0.002)

    async def test_a_lock_is_held_until_the_end_of_the_statement(self):
        async with self.agent.lock("a", timeout=5, permits=(1, 1), class_="test") as lock:
            self.assertGreater(await lock.remaining(), 0)
            async with self.agent.lock("another"):
                await self.assert_held("another")
        self.assertEqual(await lock.remaining(), 0)

    async def test_a_decorated_coroutine_runs_under_the_lock(self):
        @self.agent.lock("decorated")
        async def double(number):
            await self.assert_held("decorated")
            return 2 * number

        self.assertEqual(await asyncio.gather(double(2), double(3)), [4, 6])

    async def test_many_tasks_enter_one_after_the_other(self):
        tokens = []

        async def enter():
            async with self.agent.lock("tasks") as lock:
                tokens.append(lock.token)
                await asyncio.sleep(0)
                self.assertEqual(tokens[-1], lock.token)

        await asyncio.gather(*(enter() for _ in range(100)))
        self.assertEqual(len(tokens), 100)
        self.assertEqual(tokens, sorted(tokens))

    async def test_a_cancelled_waiter_leaves_the_queue_at_once(self):
        async def enter():
            async with self.agent.lock("cancelled"):
                self.fail("held twice")

        async with self.agent.lock("cancelled"):
            waiting = asyncio.create_task(enter())
            await self.wait_until_waiting(1)
            waiting.cancel()
            with self.assertRaises(asyncio.CancelledError):
                await waiting
            await self.wait_until_waiting(0)
            with self.assertRaises(asyncio.TimeoutError):
                await asyncio.wait_for(enter(), 0.02)
            await self.wait_until_waiting(0)
        await self.assert_free("cancelled")

    async def test_cancellation_at_any_moment_leaves_nothing(self):
        async def enter():
            async with self.agent.lock("moment"):
                await asyncio.sleep(0)

        for delay in range(200):
            entering = asyncio.create_task(enter())
            await asyncio.sleep(delay * 1e-5)
            entering.cancel()
            await asyncio.wait([entering])
            async with self.agent.lock("moment", timeout=PATIENCE_S):
                pass
        await self.wait_until_waiting(0)

    async def test_a_loss_cancels_the_task_that_asked_for_it(self):
        async def enter():
            task = asyncio.current_task()
            async with self.agent.lock("lost", max_hold=0.05, on_lost=task.cancel):
                await asyncio.sleep(PATIENCE_S)

        with self.assertRaises(asyncio.CancelledError):
            await asyncio.wait_for(enter(), PATIENCE_S / 2)

        loop, reasons = asyncio.get_running_loop(), []
        lost = loop.create_future()
        with self.assertRaisesRegex(shardlock.LockLost, r"\(max_hold\)"):
            async with self.agent.lock("lost", max_hold=0.05, on_lost=lost.set_result) as lock:
                reasons.append(await lost)
        self.assertEqual((lock.lost, reasons), ("max_hold", ["max_hold"]))

    async def test_a_broken_connection_is_a_loss(self):
        agent = shardlock.AsyncAgent()
        lost = asyncio.get_running_loop().create_future()
        with self.assertRaisesRegex(shardlock.LockLost, r"\(disconnected\)"):
            async with agent.lock("broken", on_lost=lost.set_result):
                await agent.client.connection_pool.disconnect()
                self.assertEqual(await lost, "disconnected")
        async with self.agent.lock("broken", timeout=PATIENCE_S):
            pass

    async def test_an_exception_of_the_body_is_raised_and_the_lock_is_released(self):
        with self.assertRaises(Fails):
            async with self.agent.lock("failing"):
                raise Fails
        await self.assert_free("failing")
        with self.assertRaisesRegex(redis.ResponseError, "ttl is 1ms"):
            await self.agent.lock("failing", ttl=0.001).__aenter__()


if __name__ == "__main__":
    unittest.main()
