/** The lock was not acquired in time. */
export class LockTimeout extends Error {}

/** The lock ended before its release: another worker may have entered meanwhile. */
export class LockLost extends Error {}

/** An error reply of the agent. */
export class AgentError extends Error {
  /** The first word of the message, such as `LIMIT`. */
  readonly code: string;
}

/** Why a lock was lost. */
export type LossReason =
  | 'expired' | 'taken' | 'max_hold' | 'closed' | 'shard_map' | 'disconnected' | (string & {});

export interface Lock {
  readonly key: string;
  /** A number, or a bigint if a number can't represent it. The two can be compared. */
  readonly token: number | bigint;
  /** Is aborted with a `LockLost` when the lock is lost. */
  readonly signal: AbortSignal;
  /** For how many milliseconds, from the call on, the lock is certainly held. */
  remaining(): Promise<number>;
  /** Rejects with a `LockLost` if the lock was not held until now. */
  release(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;
}

/** The options of LOCK. Times are in milliseconds. */
export interface LockOptions {
  timeout?: number;
  ttl?: number;
  minHold?: number;
  maxHold?: number;
  class?: string;
  shared?: boolean;
  /** The number of permits to take, and the limit. */
  permits?: [number, number];
  /** Ends the wait. The returned promise is rejected with its reason. */
  signal?: AbortSignal;
  /** Is called when the lock is lost. */
  onLost?: (reason: LossReason) => void;
}

/** A socket's path (by default, of `SHARDLOCK_AGENT`), or a port. */
export interface AgentOptions {
  path?: string;
  host?: string;
  port?: number;
  username?: string;
  password?: string;
}

/** An agent. A lock has a connection for itself while it waits and while it is held. */
export class Agent {
  constructor(options?: AgentOptions);
  /** Rejects with a `LockTimeout` if the lock was not acquired in time. */
  lock(key: string, options?: LockOptions): Promise<Lock>;
  /** Runs `body` under a lock. Rejects with a `LockLost` if the lock was lost meanwhile. */
  withLock<T>(key: string, options: LockOptions, body: (lock: Lock) => T | Promise<T>): Promise<T>;
}
