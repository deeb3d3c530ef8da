// Locks of a shardlock agent. README.md describes them, index.d.ts has the types.
import { connect } from 'node:net';

/** The lock was not acquired in time. */
export class LockTimeout extends Error {}

/** The lock ended before its release: another worker may have entered meanwhile. */
export class LockLost extends Error {}

/** An error reply of the agent. Its code is the first word. */
export class AgentError extends Error {
  code = this.message.split(' ', 1)[0];
}

/** A value of RESP3, where it ends, and if it is a message; undefined if it is incomplete. */
function parse(buffer, start) {
  const end = buffer.indexOf('\r\n', start);
  if (end < 0) return undefined;
  const type = String.fromCharCode(buffer[start]);
  const line = buffer.toString('utf8', start + 1, end);
  let next = end + 2;
  if (type === '-') return [new AgentError(line), next];
  if (type === '_') return [null, next];
  if (type === ':') return [Number.isSafeInteger(+line) ? +line : BigInt(line), next];
  if (type === '$') {
    const after = next + Number(line) + 2;
    return buffer.length < after ? undefined : [buffer.toString('utf8', next, after - 2), after];
  }
  const items = [];
  for (let left = Number(line) * (type === '%' ? 2 : 1); left > 0; left -= 1) {
    const item = parse(buffer, next);
    if (item === undefined) return undefined;
    items.push(item[0]);
    [, next] = item;
  }
  return [items, next, type === '>'];
}

/** A connection, which keeps the process running while it is in use. */
class Connection {
  #received = Buffer.alloc(0);
  #expected = [];
  #error = new Error('the connection to the agent has ended');

  constructor(address, hello) {
    this.socket = connect(address);
    this.socket.on('data', (bytes) => this.#receive(bytes));
    this.socket.on('error', (error) => (this.#error = error));
    this.socket.on('close', () => this.#end());
    this.greeting = this.call('HELLO', 3, ...hello);
  }

  call(...words) {
    const bulks = words.map(String).map((word) => `$${Buffer.byteLength(word)}\r\n${word}\r\n`);
    return new Promise((resolve, reject) => {
      this.#expected.push({ resolve, reject });
      if (this.socket.destroyed) this.#end();
      else this.socket.ref().write(`*${words.length}\r\n${bulks.join('')}`);
    });
  }

  #receive(bytes) {
    this.#received = Buffer.concat([this.#received, bytes]);
    for (let found; (found = parse(this.#received, 0)); ) {
      const [value, end, isMessage] = found;
      this.#received = this.#received.subarray(end);
      if (isMessage) this.onMessage?.(value);
      else this.#expected.shift()?.[value instanceof AgentError ? 'reject' : 'resolve'](value);
    }
  }

  #end() {
    for (const { reject } of this.#expected.splice(0)) reject(this.#error);
    this.onEnd?.();
  }
}

/** The lock that this connection has just taken. */
function hold(connection, key, token, onLost, keep) {
  const loss = new AbortController();
  const lost = (reason) => new LockLost(`the lock of ${key} was lost (${reason})`);
  let isReleased = false;
  const lose = (reason) => {
    if (isReleased || loss.signal.aborted) return;
    loss.abort(lost(reason));
    if (onLost) queueMicrotask(() => onLost(reason));
  };
  connection.onEnd = () => lose('disconnected');
  connection.onMessage = ([kind, lostKey, lostToken, reason]) => {
    if (kind === 'lost' && lostKey === key && lostToken === token) lose(reason);
  };
  const remaining = async () => (isReleased ? 0 : connection.call('HELD', key, token));
  const release = async () => {
    if (isReleased) throw new Error(`the lock of ${key} was released before`);
    isReleased = true;
    const reply = await connection.call('UNLOCK', key, token).catch((error) => error);
    if (reply === 1) return keep();
    connection.socket.destroy();
    throw loss.signal.reason ?? lost(reply || 'it had ended');
  };
  return { key, token, signal: loss.signal, remaining, release, [Symbol.asyncDispose]: release };
}

/** An agent. A lock has a connection for itself while it waits and while it is held. */
export class Agent {
  #idle = [];
  #connect;

  constructor({ username = 'default', password, ...address } = {}) {
    const path = process.env.SHARDLOCK_AGENT ?? '/run/shardlock/agent.sock';
    const hello = password === undefined ? [] : ['AUTH', username, password];
    this.#connect = () => new Connection(address.port ? address : { path, ...address }, hello);
  }

  async lock(key, { signal, onLost, shared, permits, ...options } = {}) {
    signal?.throwIfAborted();
    const words = Object.entries(options).filter(([, value]) => value !== undefined);
    if (shared) words.push('SHARED');
    if (permits) words.push('PERMITS', permits[0], 'OF', permits[1]);
    this.#idle = this.#idle.filter((connection) => !connection.socket.destroyed);
    const connection = this.#idle.pop() ?? this.#connect();
    const keep = () => void (connection.socket.unref() && this.#idle.push(connection));
    const end = () => connection.socket.destroy();
    signal?.addEventListener('abort', end);
    try {
      const locking = connection.call('LOCK', key, ...words.flat());
      const [, token] = await Promise.all([connection.greeting, locking]);
      signal?.throwIfAborted();
      if (token !== null) return hold(connection, String(key), token, onLost, keep);
    } catch (error) {
      end();
      throw signal?.aborted ? signal.reason : error;
    } finally {
      signal?.removeEventListener('abort', end);
    }
    keep();
    throw new LockTimeout(`the lock of ${key} was not acquired in time`);
  }

  /** Runs `body` under a lock. */
  async withLock(key, options, body) {
    const lock = await this.lock(key, options);
    const result = await (async () => body(lock))().catch(async (error) => {
      await lock.release().catch(() => {}); // the error of the body matters more
      throw error;
    });
    await lock.release();
    return result;
  }
}
