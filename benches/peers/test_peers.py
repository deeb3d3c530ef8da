"""Run with `python3 -m unittest` in this folder. Checks that the table shows what the workers
counted.
"""

import pathlib
import re
import tempfile
import unittest
import xml.etree.ElementTree

import plots
import results
from aggregate import aggregate, bucket, bucket_bottom, bucket_top, corrected, jain, middle, percentile
from loads import CONTESTANTS, LOADS
from servers import difference

HERE = pathlib.Path(__file__).resolve().parent


def report(tasks, waits, **more):
    counts = {}
    for us in waits:
        counts[str(bucket(us))] = counts.get(str(bucket(us)), 0) + 1
    base = {"tasks": tasks, "waits": counts, "wait_max_us": max(waits, default=0), "hold_sum_us": 0, "last_us": 2_000_000, "errors": 0}
    return {**base, **more}


class Histogram(unittest.TestCase):
    def test_buckets_follow_each_other_and_are_at_most_one_part_in_64_wide(self):
        last = -1
        for us in [*range(5_000), *(2**power + add for power in range(13, 32) for add in (-1, 0, 1))]:
            at = bucket(us)
            self.assertIn(at - last, (0, 1)) if us < 5_000 else self.assertGreaterEqual(at, last)
            self.assertGreaterEqual(bucket_top(at), us)
            self.assertLessEqual(bucket_top(at) - us, max(0, us // 64))
            self.assertEqual(bucket(bucket_top(at)), at)
            last = at

    def test_every_worker_has_the_same_buckets(self):
        # The shift in each language: the number of bits minus 7.
        told = {
            "go/work.go": r"bits\.Len64\(us\) - 7\s+return shift\*64 \+ int\(us>>shift\)",
            "rust/src/work.rs": r"64 - us\.leading_zeros\(\) as usize - 7;\s+shift \* 64 \+ \(us >> shift\) as usize",
            "java/src/main/java/peers/Tally.java": r"64 - Long\.numberOfLeadingZeros\(us\) - 7;\s+return shift \* 64 \+ \(int\) \(us >> shift\)",
            "node/peer.mjs": r"25 - Math\.clz32\(us\);\s+return shift \* 64 \+ \(us >>> shift\)",
            "python/peer.py": r"us\.bit_length\(\) - 7\s+return shift \* 64 \+ \(us >> shift\)",
        }
        for path, code in told.items():
            self.assertRegex((HERE / path).read_text(), code, path)

    def test_percentiles_are_of_all_waits(self):
        waits = {}
        for us in range(1, 101):
            waits[bucket(us)] = waits.get(bucket(us), 0) + 1
        self.assertEqual(percentile(waits, 0.5), 50)
        self.assertEqual(percentile(waits, 0.99), 99)
        self.assertEqual(percentile(waits, 1), 100)
        self.assertEqual(percentile({bucket(7): 1}, 0.01), 7)
        self.assertIsNone(percentile({}, 0.5))


class Loads(unittest.TestCase):
    def test_every_load_has_ours_and_a_peer_and_every_contestant_a_load(self):
        for load in LOADS:
            self.assertLessEqual({"ours", "peer"}, {c.role for c in CONTESTANTS if c.runs(load)}, load.name)
        for contestant in CONTESTANTS:
            self.assertTrue(any(contestant.runs(load) for load in LOADS), contestant.name)
        names = [one.name for one in (*LOADS, *CONTESTANTS)]
        self.assertEqual(len(set(names)), len(names))

    def test_a_contestant_runs_only_what_it_has(self):
        runs = {load.name: [c.name for c in CONTESTANTS if c.runs(load)] for load in LOADS}
        self.assertEqual(runs["semaphore-10"], ["shardlock", "redisson-permits", "redis-semaphore-py", "redis-semaphore-js"])
        self.assertEqual(runs["readers-95"], ["shardlock", "redisson-rw", "etcd-rw"])
        self.assertIn("raw", runs["free-200"])
        self.assertNotIn("raw", runs["fan-in-1"])

    def test_workers_know_the_options_of_their_modes(self):
        option = {
            "java": (r'"--permits"', r'"--shared-percent"'),
            "go": (None, r'"shared-percent"'),
            "python": (r'"--permits"', None),
            "node": (r"\bpermits: ", None),
        }
        sources = {"java": "java/src/main/java/peers/Peer.java", "go": "go/main.go", "python": "python/peer.py", "node": "node/peer.mjs"}
        for contestant in CONTESTANTS:
            for mode, code in zip(("permits", "shared"), option.get(contestant.program, (None, None))):
                if mode in contestant.modes and contestant.role == "peer":
                    text = (HERE / sources[contestant.program]).read_text()
                    self.assertRegex(text, code, contestant.name)
                    self.assertRegex(text, f'"{contestant.name}"', contestant.name)


class CoordinatedOmission(unittest.TestCase):
    @staticmethod
    def one_by_one(waits, interval):
        added = dict(waits)
        for at, count in waits.items():
            wait = bucket_top(at) - interval
            while wait >= interval:
                added[bucket(int(wait))] = added.get(bucket(int(wait)), 0) + count
                wait -= interval
        return added

    def test_a_long_wait_counts_as_often_as_it_hid_others(self):
        # 90 locks of a lucky task, and one that its neighbour waited for the whole time.
        waits = {bucket(10): 90, bucket(1_000): 1}
        added = corrected(waits, 10)
        self.assertEqual(sum(added.values()), 90 + 100)
        self.assertGreater(percentile(added, 0.74), 450)
        self.assertEqual(percentile(waits, 0.9), 10)

    def test_it_adds_what_adding_one_by_one_does(self):
        for interval in (7, 10.5, 1_000 / 3, 128, 5_000.25):
            waits = {bucket(us): n for n, us in enumerate([0, 3, 127, 128, 129, 700, 4_321, 65_000], 1)}
            self.assertEqual(corrected(waits, interval), self.one_by_one(waits, interval), interval)

    def test_waits_that_take_turns_stay_as_they_are(self):
        waits = {bucket(900): 500, bucket(1_100): 500}
        self.assertEqual(corrected(waits, 1_000), waits)
        self.assertEqual(corrected({}, 1_000), {})

    def test_a_bucket_begins_where_the_one_before_ends(self):
        for at in range(1_500):
            self.assertEqual(bucket(bucket_bottom(at)), at)
            self.assertEqual(bucket(bucket_bottom(at + 1) - 1), at)


class Aggregation(unittest.TestCase):
    def test_one_line_of_two_processes(self):
        first = report([30, 10], [100] * 40, hold_sum_us=200_000)
        second = report([20, 0], [50] * 20, hold_sum_us=100_000, wait_max_us=1_900_000)
        server = {"scripts": 120, "publishes": 60, "commands": 300, "cpu_us": 660.0}
        line = aggregate([first, second], 2.0, server)
        self.assertEqual(line["locks"], 60)
        self.assertEqual(line["locks_per_s"], 30.0)
        self.assertEqual(line["per_process"], {"min": 20, "max": 40, "jain": 0.9})
        self.assertEqual((line["per_task"]["min"], line["per_task"]["max"]), (0, 30))
        self.assertEqual(line["hold_ms"], {"mean": 5.0})
        # The task that got no lock waited the longest.
        self.assertEqual(line["wait_ms"], {"p50": 0.1, "p99": 0.1, "max": 1900.0})
        self.assertEqual(line["server"], {"scripts_per_lock": 2.0, "publishes_per_lock": 1.0, "commands_per_lock": 5.0, "cpu_us_per_lock": 11.0})
        self.assertNotIn("errors", line)
        self.assertNotIn("stalled_s", line)

    def test_nothing_locked_divides_by_nothing(self):
        line = aggregate([report([0, 0], [], last_us=0, wait_max_us=2_000_000)], 2.0, {"commands": 9})
        self.assertEqual((line["locks"], line["locks_per_s"]), (0, 0.0))
        self.assertEqual(line["wait_ms"], {"p50": None, "p99": None, "max": 2000.0})
        self.assertIsNone(line["server"]["commands_per_lock"])
        self.assertIsNone(line["per_process"]["jain"])
        self.assertEqual(line["stalled_s"], 2.0)

    def test_errors_and_standing_still_are_told(self):
        reports = [report([1], [5], last_us=400_000), report([1], [5], last_us=300_000, errors=3, first_error="no")]
        line = aggregate(reports, 2.0, {})
        self.assertEqual(line["errors"], {"count": 3, "first": "no"})
        self.assertEqual(line["stalled_s"], 1.6)

    def test_the_waits_of_writers_are_those_of_all_processes_as_measured(self):
        first = report([40], [10] * 40, writer_waits={str(bucket(100)): 3}, writer_wait_max_us=100)
        second = report([2], [10] * 2, writer_waits={str(bucket(100)): 1, str(bucket(120)): 1}, writer_wait_max_us=120)
        line = aggregate([first, second], 2.0, {})
        self.assertEqual(line["writers"], {"waits": 5, "wait_ms": {"p50": 0.1, "p99": 0.12, "max": 0.12}})
        # A process may have had no writer.
        line = aggregate([first, report([2], [10] * 2)], 2.0, {})
        self.assertEqual(line["writers"]["waits"], 3)
        self.assertNotIn("writers", aggregate([report([2], [10] * 2)], 2.0, {}))

    def test_jain(self):
        self.assertEqual(jain([5, 5, 5]), 1.0)
        self.assertAlmostEqual(jain([9, 0, 0]), 1 / 3)

    def test_the_median_run_counts(self):
        lines = [{"locks_per_s": speed, "of": speed} for speed in (30.0, 10.0, 20.0)]
        self.assertEqual(middle(lines), {"locks_per_s": 20.0, "of": 20.0, "runs": 3, "locks_per_s_range": [10.0, 30.0]})
        self.assertEqual(middle(lines[:2])["locks_per_s"], 10.0)

    def test_counters_are_of_the_measured_time(self):
        self.assertEqual(difference({"scripts": 5, "cpu_us": 10.0}, {"scripts": 9, "cpu_us": 12.5}), {"scripts": 4, "cpu_us": 2.5})


class Document(unittest.TestCase):
    def lines(self):
        def run(contestant, load, locks):
            return {"contestant": contestant, "load": load, **aggregate([report([locks, locks // 2], [200] * 9)] * 8, 2.0, {"cpu_us": locks})}

        about = {"command": "run.py", "date": "2026-11-24", "cores": 2, "servers": ["Redis 7.0.15"], "seconds": 2, "repeat": 1, "seed": 1,
                 "load_average": 0.1, "machine": "Linux on x86_64", "languages": ["go 1.26"]}  # fmt: skip
        return [
            {"about": about},
            {"contestant": "etcd", "load": None, "missing": "no etcd here"},
            run("shardlock", "fan-in-8", 3000),
            run("redsync", "fan-in-8", 100),
            run("rslock", "fan-in-8", 200),
            {"contestant": "redisson-fair", "load": "fan-in-8", "failed": "hangs: it was | warm"},
        ]

    def test_ratios_are_to_the_best_peer_and_no_failure_is_dropped(self):
        text = results.section(self.lines())
        self.assertRegex(text, r"\| \*\*shardlock\*\* \| 18,000 \| 15\.0 \|")
        self.assertRegex(text, r"\| rslock \| 1,200 \| 1\.00 \|")
        self.assertRegex(text, r"\| redsync \| 600 \| 0\.50 \|")
        self.assertRegex(text, r"\| Redisson RFairLock \|.*\*\*failed\*\* in 1 of 1: hangs: it was \\\| warm \|")
        self.assertIn("- etcd: no etcd here", text)
        self.assertNotIn("busy", text)
        rows = [line for line in text.splitlines() if line.startswith("|")]
        for table in ([r for r in rows if r.count("|") < 5], [r for r in rows if r.count("|") >= 5]):
            self.assertEqual(len({len(re.findall(r"(?<!\\)\|", row)) for row in table}), 1, table)

    def test_a_hold_says_what_part_of_the_time_it_is(self):
        line = {"locks_per_s": 160.0, "hold_ms": {"mean": 6.0}}
        convoy, fan_in = (next(load for load in LOADS if load.name == name) for name in ("convoy-40", "fan-in-8"))
        self.assertEqual(results.held(convoy, line), "6.00 (0.96)")
        self.assertEqual(results.held(fan_in, line), "–")
        self.assertEqual(results.held(convoy, {"locks_per_s": 0.0}), "–")

    def test_a_hold_of_permits_is_a_part_of_all_permits(self):
        semaphore = next(load for load in LOADS if load.name == "semaphore-10")
        self.assertEqual(results.held(semaphore, {"locks_per_s": 1_600.0, "hold_ms": {"mean": 6.0}}), "6.00 (0.96)")

    def test_the_table_of_readers_has_the_waits_of_writers(self):
        readers = report([50, 40], [200] * 9, writer_waits={str(bucket(100)): 3}, writer_wait_max_us=250)
        good = {"contestant": "shardlock", "load": "readers-95", **aggregate([readers] * 8, 2.0, {})}
        failed = {"contestant": "redisson-rw", "load": "readers-95", "failed": "hangs"}
        text = results.section([*self.lines()[:1], good, failed])
        rows = [line for line in text.splitlines() if line.count("|") > 5]
        self.assertEqual(len({row.count("|") for row in rows}), 1, rows)
        self.assertIn("writers' wait p50, ms | max | max / p50 | hold", rows[0])
        self.assertIn("| 0.10 | 0.25 | 2.50 | – |", rows[2])
        self.assertIn("**failed** in 1 of 1: hangs", rows[3])

    def test_what_was_written_by_hand_stays(self):
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "RESULTS.md")
            path.write_text(f"# Mine\n\nbefore\n\n{results.BEGIN}\nstale text\n{results.END}\n\nafter\n")
            results.write(self.lines(), folder)
            text = path.read_text()
            self.assertTrue(text.startswith("# Mine\n\nbefore\n\n<!--"))
            self.assertTrue(text.endswith("-->\n\nafter\n"))
            self.assertNotIn("stale text", text)
            again = results.write(self.lines(), folder)
            self.assertEqual(path.read_text(), text)
            for svg in again[:-1]:
                xml.etree.ElementTree.parse(svg)

    def test_an_axis_holds_all_its_values(self):
        axis = plots.Axis([0.02, 5_000.0], logarithmic=True)
        self.assertEqual(axis.ticks, [0.01, 0.1, 1.0, 10.0, 100.0, 1_000.0, 10_000.0])
        self.assertLess(axis.at(0.02), axis.at(5_000.0))
        self.assertLessEqual(axis.at(5_000.0), plots.WIDTH - plots.RIGHT)
        self.assertEqual(axis.at(0.0), plots.LEFT)


if __name__ == "__main__":
    unittest.main()
