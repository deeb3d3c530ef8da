// Run by cli/tests against an agent at SHARDLOCK_AGENT.
import assert from 'node:assert/strict';
import { once } from 'node:events';
import { connect, createServer } from 'node:net';
import { mkdtemp } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { test } from 'node:test';
import { Agent, AgentError, LockLost, LockTimeout } from 'shardlock';

const agent = new Agent();

/** A line of INFO, read by a client of its own. */
async function info(name) {
  const socket = connect(process.env.SHARDLOCK_AGENT);
  socket.end('INFO\r\nQUIT\r\n');
  let text = '';
  for await (const bytes of socket.setEncoding('utf8')) text += bytes;
  return new RegExp(`^${name}:(.*?)\r?$`, 'm').exec(text)[1];
}

async function until(name, value) {
  const deadline = Date.now() + 20_000;
  while ((await info(name)) !== value) {
    assert.ok(Date.now() < deadline, `${name} is ${await info(name)}, not ${value}`);
    await new Promise((resolve) => setTimeout(resolve, 2));
  }
}

test('a lock is held until its release', async () => {
  const lock = await agent.lock('held', { timeout: 5000, class: 'test' });
  assert.equal(typeof lock.token, 'number');
  assert.ok((await lock.remaining()) > 0);
  await assert.rejects(agent.lock('held', { timeout: 0 }), LockTimeout);
  await assert.rejects(agent.lock('held', { timeout: 20 }), {
    message: 'the lock of held was not acquired in time',
  });
  assert.ok(!lock.signal.aborted);
  await lock.release();
  assert.equal(await lock.remaining(), 0);
  await assert.rejects(lock.release(), /was released before/);
  const next = await agent.lock('held', { timeout: 0 });
  assert.ok(next.token > lock.token);
  await next[Symbol.asyncDispose]();
});

test('a body runs under the lock, and its result or error is that of the call', async () => {
  const result = await agent.withLock('body', {}, async (lock) => {
    await assert.rejects(agent.lock('body', { timeout: 0 }), LockTimeout);
    return lock.token;
  });
  assert.ok(result > 0);
  const failing = () => {
    throw new RangeError('of the body');
  };
  await assert.rejects(agent.withLock('body', {}, failing), RangeError);
  await (await agent.lock('body', { timeout: 0 })).release();
});

test('many bodies of a key run one after the other, with growing tokens', async () => {
  const tokens = [];
  let inside = 0;
  const body = async ({ token }) => {
    inside += 1;
    assert.equal(inside, 1);
    tokens.push(token);
    await new Promise((resolve) => setImmediate(resolve));
    inside -= 1;
  };
  await Promise.all(Array.from({ length: 50 }, () => agent.withLock('many', {}, body)));
  assert.equal(tokens.length, 50);
  assert.deepEqual(tokens, [...tokens].sort((a, b) => a - b));
});

test('all modes and options are passed on', async () => {
  const shared = await Promise.all([1, 2].map(() => agent.lock('prices', { shared: true })));
  await assert.rejects(agent.lock('prices', { timeout: 0 }), LockTimeout);
  const two = await agent.lock('api', { permits: [2, 3], ttl: 60_000, maxHold: 30_000 });
  assert.ok((await two.remaining()) > 20_000);
  await assert.rejects(agent.lock('api', { permits: [2, 3], timeout: 0 }), LockTimeout);
  const cron = await agent.lock('cron', { minHold: 60_000 });
  await Promise.all([...shared, two, cron].map((lock) => lock.release()));
  await assert.rejects(agent.lock('cron', { timeout: 0 }), LockTimeout);
});

test('errors of the agent have a code', async () => {
  const check = (error) => error instanceof AgentError && error.code === 'ERR';
  await assert.rejects(agent.lock(''), check);
  await assert.rejects(agent.lock('k', { tll: 5 }), /unknown option 'tll'/);
  await assert.rejects(agent.lock('k', { ttl: 1 }), /ttl is 1ms, but must be/);
});

test('a lost lock aborts its signal, calls onLost, and fails its release', async () => {
  const reasons = [];
  const lock = await agent.lock('lost', { maxHold: 50, onLost: (reason) => reasons.push(reason) });
  await once(lock.signal, 'abort');
  assert.ok(lock.signal.reason instanceof LockLost);
  assert.equal(lock.signal.reason.message, 'the lock of lost was lost (max_hold)');
  assert.equal(await lock.remaining(), 0);
  await assert.rejects(lock.release(), LockLost);
  assert.deepEqual(reasons, ['max_hold']);

  // The agent names the key as text.
  const numbered = await agent.lock(7, { maxHold: 50 });
  await once(numbered.signal, 'abort');
  await assert.rejects(numbered.release(), /lost \(max_hold\)/);

  const body = (lock) => once(lock.signal, 'abort');
  await assert.rejects(agent.withLock('lost', { maxHold: 50 }, body), LockLost);
});

test('an aborted wait leaves the queue at once', async () => {
  const lock = await agent.lock('aborted');
  const waits = new AbortController();
  const waiting = agent.lock('aborted', { signal: waits.signal });
  await until('blocked_clients', '1');
  waits.abort(new RangeError('enough'));
  await assert.rejects(waiting, RangeError);
  await until('blocked_clients', '0');
  await assert.rejects(agent.lock('aborted', { signal: waits.signal }), RangeError);
  await lock.release();
  await (await agent.lock('aborted', { timeout: 0 })).release();
});

test('an aborted signal does not end a lock that is held', async () => {
  const waits = new AbortController();
  const lock = await agent.lock('kept', { signal: waits.signal });
  waits.abort();
  assert.ok((await lock.remaining()) > 0);
  await lock.release();
});

test('an idle connection is used again', async () => {
  const fresh = new Agent();
  await (await fresh.lock('again')).release();
  const before = Number(await info('connected_clients'));
  for (let times = 0; times < 20; times += 1) await (await fresh.lock('again')).release();
  assert.ok(Number(await info('connected_clients')) <= before);
});

test('without an agent, the error of the socket is reported', async () => {
  await assert.rejects(new Agent({ path: '/no/such/socket' }).lock('k'), { code: 'ENOENT' });
});

test('replies that arrive in any pieces are read, and large tokens are exact', async (t) => {
  const path = join(await mkdtemp(join(tmpdir(), 'shardlock-')), 'socket');
  const replies = '%1\r\n$5\r\nproto\r\n:3\r\n:9007199254740993\r\n' +
    '>4\r\n$4\r\nlost\r\n$3\r\nk\u00e9\r\n:9007199254740993\r\n$5\r\ntaken\r\n';
  const server = createServer(async (socket) => {
    socket.on('data', (bytes) => bytes.includes('UNLOCK') && socket.destroy());
    for (const byte of Buffer.from(replies)) {
      socket.write(Buffer.of(byte));
      await new Promise((resolve) => setImmediate(resolve));
    }
  });
  t.after(() => server.close());
  await once(server.listen(path), 'listening');
  const lock = await new Agent({ path }).lock('k\u00e9');
  assert.equal(lock.token, 9007199254740993n);
  await once(lock.signal, 'abort');
  await assert.rejects(lock.release(), /taken/);
});
