// node-redlock, and the semaphore of redis-semaphore, under the loads of shardlock's bench.
//
// A worker is one process of a load. It warms up, prints "ready", and reads from standard input
// when the measured time begins and ends ("go START END", milliseconds since 1970). It prints its
// counts as one line of JSON. See the README.md one folder up.
import { once } from "node:events";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { parseArgs } from "node:util";
import Redis from "ioredis";
import { Semaphore } from "redis-semaphore";
import Redlock from "redlock";

const defaults = {
  process: 0, processes: 1, tasks: 1, keys: 1, "hold-us": 0, "ttl-ms": 30_000, "retry-min-us": 0, "retry-max-us": 0, pool: 0,
  "warmup-ms": 1_000, permits: 0, "shared-percent": 0,
};
const number = (name) => [name, { type: "string", default: String(defaults[name]) }];
const text = (name) => [name, { type: "string", default: "" }];
const { values } = parseArgs({
  options: Object.fromEntries([...Object.keys(defaults).map(number), ...["server", "peer"].map(text)]),
});
const option = Object.fromEntries(Object.keys(defaults).map((name) => [name, Number(values[name])]));

const [host, port] = values.server.split(":");
// One connection: ioredis itself pipelines what the tasks send at the same time.
const client = new Redis({ host, port: Number(port), enableAutoPipelining: true });
client.on("error", (error) => console.error(error.message));

// The delay between two tries of a waiter, if it is not the library's own.
const [shortest, longest] = [option["retry-min-us"] / 1000, option["retry-max-us"] / 1000];

const settings = { retryCount: -1 }; // the default of 10 retries gives up on a hot key
if (longest > 0) {
  // The library adds a random part of up to retryJitter to either side, in whole milliseconds.
  settings.retryDelay = Math.round((shortest + longest) / 2);
  settings.retryJitter = Math.round((longest - shortest) / 2);
}
const redlock = new Redlock([client], settings);
// Each refusal is also an event, and without a listener an error.
redlock.on("error", () => {});

// Each peer waits for a key and returns a function that releases it.
const peers = {
  "node-redlock": async (key) => {
    const lock = await redlock.acquire([key], option["ttl-ms"]);
    return () => lock.release();
  },
  "redis-semaphore-js": async (key) => {
    const semaphore = new Semaphore(client, key, option.permits, {
      lockTimeout: option["ttl-ms"],
      acquireTimeout: Infinity, // the default of 10 s gives up on a semaphore in use
      // Its delay is the same on each try, so it is random only between permits.
      ...(longest > 0 && { retryInterval: shortest + Math.random() * (longest - shortest) }),
    });
    await semaphore.acquire();
    return () => semaphore.release();
  },
};
const acquire = peers[values.peer];
if (acquire === undefined) throw new Error(`--peer is one of ${Object.keys(peers).join(", ")}, not ${JSON.stringify(values.peer)}`);

// The histogram bucket: exact below 128 us, then 64 buckets for each doubling. The runner uses the
// same.
function bucket(us) {
  if (us < 128) return us;
  const shift = 25 - Math.clz32(us);
  return shift * 64 + (us >>> shift);
}

const micros = (ms) => Math.max(0, Math.floor(ms * 1000));

function tally() {
  return { locks: 0, waits: new Map(), waitMax: 0, holdSum: 0, last: 0, errors: 0, firstError: "", since: null };
}

// Counts a wait once, at its end or at the end of the measured time.
function waited(counted, until) {
  if (counted.since === null) return;
  const wait = micros(until - counted.since);
  const at = bucket(Math.min(wait, 2 ** 32 - 1));
  counted.waits.set(at, (counted.waits.get(at) ?? 0) + 1);
  counted.waitMax = Math.max(counted.waitMax, wait);
  counted.since = null;
}

async function loop(next, hold, start, end, counted) {
  const fail = async (error) => {
    if (performance.now() < end) {
      counted.errors += 1;
      counted.firstError ||= String(error.message ?? error);
    }
    // A peer that fails at once must not keep the machine busy with its failures.
    await sleep(1);
  };
  while (performance.now() < end) {
    counted.since = performance.now();
    const key = next();
    let release;
    while (release === undefined) {
      try {
        release = await acquire(key);
      } catch (error) {
        await fail(error);
        if (performance.now() >= end) return;
      }
    }
    const entered = performance.now();
    waited(counted, Math.min(entered, end));
    if (hold > 0) await sleep(hold);
    const left = performance.now();
    try {
      await release();
    } catch (error) {
      await fail(error);
      continue;
    }
    const released = performance.now();
    if (released > end) return;
    counted.locks += 1;
    counted.holdSum += micros(left - entered);
    counted.last = micros(released - start);
  }
}

// Opens the connection and runs the code that waits, on keys of this process alone. Nothing of it
// is left when the measured time begins.
async function warmUp() {
  const all = (tasks, key) => {
    const start = performance.now();
    const end = start + option["warmup-ms"] / 2;
    return Promise.all(Array.from({ length: tasks }, (_, task) => loop(() => key(task), 0, start, end, tally())));
  };
  await all(option.tasks, (task) => `warm:${option.process}:${task}`);
  await all(Math.min(option.tasks, 8), () => `warm:${option.process}`);
}

function report(tallies, end) {
  const waits = {};
  for (const counted of tallies) waited(counted, end);
  for (const { waits: counts } of tallies) {
    for (const [at, count] of counts) waits[at] = (waits[at] ?? 0) + count;
  }
  const most = (values) => values.reduce((a, b) => Math.max(a, b), 0);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  return {
    tasks: tallies.map((t) => t.locks),
    waits,
    wait_max_us: most(tallies.map((t) => t.waitMax)),
    hold_sum_us: sum(tallies.map((t) => t.holdSum)),
    last_us: most(tallies.map((t) => t.last)),
    errors: sum(tallies.map((t) => t.errors)),
    first_error: tallies.find((t) => t.firstError)?.firstError ?? "",
  };
}

await warmUp();
console.log("ready");
const [line] = await once(createInterface({ input: process.stdin }), "line");
const [, startMs, endMs] = /^go (\d+) (\d+)$/.exec(line) ?? [];
if (endMs === undefined) throw new Error(`expected go START END, got ${JSON.stringify(line)}`);
// The wall clock is the same for all processes of the load. From here on only the monotonic clock
// counts.
const [start, end] = [startMs, endMs].map((ms) => performance.now() + (Number(ms) - Date.now()));
await sleep(Math.max(0, start - performance.now()));
const ownKeys = option.keys === option.processes * option.tasks;
const tallies = Array.from({ length: option.tasks }, tally);
tallies.forEach((counted, task) => {
  const own = `bench:${option.process * option.tasks + task}`;
  const next = ownKeys ? () => own : () => `bench:${Math.floor(Math.random() * option.keys)}`;
  loop(next, option["hold-us"] / 1000, start, end, counted);
});
await sleep(Math.max(0, end - performance.now()));
// Tasks that still wait end with the process.
process.stdout.write(JSON.stringify(report(tallies, end)) + "\n", () => process.exit(0));
