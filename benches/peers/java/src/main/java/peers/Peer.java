package peers;

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.charset.StandardCharsets;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.CompletionStage;
import java.util.concurrent.ConcurrentHashMap;
import java.util.concurrent.Executors;
import java.util.concurrent.ScheduledExecutorService;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;
import java.util.concurrent.locks.LockSupport;
import java.util.function.Supplier;
import org.redisson.Redisson;
import org.redisson.api.RLock;
import org.redisson.api.RPermitExpirableSemaphore;
import org.redisson.api.RedissonClient;
import org.redisson.config.Config;

/**
 * Redisson's RLock, RFairLock, RReadWriteLock and RPermitExpirableSemaphore under the loads of
 * shardlock's bench.
 *
 * <p>A worker is one process of a load. It warms up, prints "ready", and reads from standard input
 * when the measured time begins and ends ("go START END", milliseconds since 1970). It prints its
 * counts as one line of JSON. See the README.md in benches/peers.
 *
 * <p>Many tasks use the asynchronous calls, whose holder is a number instead of a thread: a
 * thousand waiting threads are slower. A process with one task of an RLock or RFairLock uses the
 * blocking calls, in a thread of its own.
 */
public final class Peer {
    private static final List<String> PEERS =
            List.of("redisson", "redisson-fair", "redisson-rw", "redisson-permits");

    private final Map<String, String> options = new HashMap<>();
    private final RedissonClient client;
    private final ScheduledExecutorService timer = Executors.newScheduledThreadPool(2);
    private final String peer;
    private final boolean blocking;
    private final int permits;
    private final int sharedPercent;
    private final long ttlMs;
    private final Map<String, RPermitExpirableSemaphore> semaphores = new ConcurrentHashMap<>();
    private final int process;
    private final int processes;
    private final int tasks;
    private final int keys;

    private Peer(String[] args) {
        for (int i = 0; i + 1 < args.length; i += 2) {
            options.put(args[i], args[i + 1]);
        }
        process = number("--process", 0);
        processes = number("--processes", 1);
        tasks = number("--tasks", 1);
        keys = number("--keys", 1);
        permits = number("--permits", 0);
        sharedPercent = number("--shared-percent", 0);
        ttlMs = number("--ttl-ms", 30_000);
        peer = options.getOrDefault("--peer", "");
        if (!PEERS.contains(peer)) {
            throw new IllegalArgumentException("--peer is one of " + PEERS + ", not " + peer);
        }
        blocking = tasks == 1 && (peer.equals("redisson") || peer.equals("redisson-fair"));
        Config config = new Config();
        // One process is one client, with the library's own pools: 64 connections, and 50 for
        // subscriptions, 5 each.
        var server = config.useSingleServer().setAddress("redis://" + options.get("--server"));
        int pool = number("--pool", 0);
        if (pool > 0) {
            server.setConnectionPoolSize(pool).setConnectionMinimumIdleSize(Math.min(pool, 24));
        }
        client = Redisson.create(config);
    }

    private int number(String name, int otherwise) {
        String value = options.get(name);
        return value == null ? otherwise : Integer.parseInt(value);
    }

    public static void main(String[] args) throws Exception {
        Peer peer = new Peer(args);
        peer.warmUp();
        System.out.println("ready");
        String line = new BufferedReader(new InputStreamReader(System.in, StandardCharsets.UTF_8)).readLine();
        String[] words = line == null ? new String[0] : line.split(" ");
        if (words.length != 3 || !words[0].equals("go")) {
            throw new IOException("expected go START END, got " + line);
        }
        // The wall clock is the same for all processes of the load. From here on only the monotonic
        // clock counts.
        long offset = System.nanoTime() - TimeUnit.MILLISECONDS.toNanos(System.currentTimeMillis());
        long start = TimeUnit.MILLISECONDS.toNanos(Long.parseLong(words[1])) + offset;
        long end = TimeUnit.MILLISECONDS.toNanos(Long.parseLong(words[2])) + offset;
        System.out.println(peer.measure(start, end));
        System.out.flush();
        // Tasks that still wait end with the process.
        Runtime.getRuntime().halt(0);
    }

    /**
     * Opens the connections, lets the JIT compile the code, and runs the code that waits, on keys
     * of this process alone. Nothing of it is left when the measured time begins.
     */
    private void warmUp() throws InterruptedException {
        long half = TimeUnit.MILLISECONDS.toNanos(number("--warmup-ms", 1000)) / 2;
        warmUp(tasks, half, false);
        warmUp(Math.min(tasks, 8), half, true);
    }

    private void warmUp(int threads, long nanos, boolean oneKey) throws InterruptedException {
        long start = System.nanoTime();
        List<Thread> all = new ArrayList<>();
        for (int task = 0; task < threads; task++) {
            String key = oneKey ? "warm:" + process : "warm:" + process + ":" + task;
            long holder = task + 1;
            if (blocking) {
                all.add(spawn(() -> loop(() -> key, 0, start, start + nanos, new Tally())));
            } else {
                all.add(spawn(() -> loopAsync(holder, () -> key, 0, start, start + nanos, new Tally()).join()));
            }
        }
        for (Thread thread : all) {
            thread.join();
        }
    }

    private static Thread spawn(Runnable task) {
        // A thousand of them: a small stack is enough.
        Thread thread = new Thread(null, task, "task", 256 * 1024);
        thread.setDaemon(true);
        thread.start();
        return thread;
    }

    private String measure(long start, long end) {
        if (permits > 0) {
            for (int key = 0; key < keys; key++) {
                semaphore("bench:" + key);
            }
        }
        List<Tally> tallies = new ArrayList<>();
        long hold = TimeUnit.MICROSECONDS.toNanos(number("--hold-us", 0));
        for (int task = 0; task < tasks; task++) {
            Tally tally = new Tally();
            tallies.add(tally);
            String own = "bench:" + (process * tasks + task);
            Supplier<String> next =
                    keys == processes * tasks ? () -> own : () -> "bench:" + ThreadLocalRandom.current().nextInt(keys);
            if (!blocking) {
                long holder = task + 1;
                timer.schedule(() -> loopAsync(holder, next, hold, start, end, tally), start - System.nanoTime(), TimeUnit.NANOSECONDS);
                continue;
            }
            spawn(() -> {
                sleepUntil(start);
                loop(next, hold, start, end, tally);
            });
        }
        sleepUntil(end);
        return Tally.report(tallies, end);
    }

    /** Like loop, with the asynchronous calls. */
    private CompletableFuture<Void> loopAsync(
            long holder, Supplier<String> next, long hold, long start, long end, Tally tally) {
        var done = new CompletableFuture<Void>();
        begin(holder, next, hold, start, end, tally, done);
        return done;
    }

    private void begin(
            long holder, Supplier<String> next, long hold, long start, long end, Tally tally, CompletableFuture<Void> done) {
        if (System.nanoTime() >= end) {
            done.complete(null);
            return;
        }
        boolean shared = ThreadLocalRandom.current().nextInt(100) < sharedPercent;
        tally.waitsSince(System.nanoTime(), sharedPercent > 0 && !shared);
        acquire(next.get(), holder, shared).whenComplete((release, failed) -> {
            if (failed != null) {
                tally.failed(new RuntimeException(failed), end);
                begin(holder, next, hold, start, end, tally, done);
                return;
            }
            long entered = System.nanoTime();
            tally.waited(Math.min(entered, end));
            Runnable leave = () -> {
                long left = System.nanoTime();
                release.get().whenComplete((gone, refused) -> {
                    if (refused != null) {
                        tally.failed(new RuntimeException(refused), end);
                    } else if (!tally.locked(entered, left, System.nanoTime(), start, end)) {
                        done.complete(null);
                        return;
                    }
                    begin(holder, next, hold, start, end, tally, done);
                });
            };
            if (hold > 0) {
                timer.schedule(leave, hold, TimeUnit.NANOSECONDS);
            } else {
                leave.run();
            }
        });
    }

    /** Waits for the key. The result releases it. */
    private CompletionStage<Supplier<CompletionStage<Void>>> acquire(String key, long holder, boolean shared) {
        if (permits > 0) {
            RPermitExpirableSemaphore semaphore = semaphore(key);
            return semaphore.acquireAsync(ttlMs, TimeUnit.MILLISECONDS).thenApply(id -> () -> semaphore.releaseAsync(id));
        }
        RLock lock = lock(key, shared);
        // Like lock() without a lease time.
        return lock.lockAsync(holder).thenApply(nothing -> () -> lock.unlockAsync(holder));
    }

    private RLock lock(String key, boolean shared) {
        return switch (peer) {
            case "redisson" -> client.getLock(key);
            case "redisson-fair" -> client.getFairLock(key);
            default -> shared ? client.getReadWriteLock(key).readLock() : client.getReadWriteLock(key).writeLock();
        };
    }

    /** The semaphore of a key, which the first process to use it has given its permits. */
    private RPermitExpirableSemaphore semaphore(String key) {
        return semaphores.computeIfAbsent(key, name -> {
            RPermitExpirableSemaphore semaphore = client.getPermitExpirableSemaphore(name);
            semaphore.trySetPermits(permits);
            return semaphore;
        });
    }

    private void loop(Supplier<String> next, long hold, long start, long end, Tally tally) {
        while (System.nanoTime() < end) {
            tally.waitsSince(System.nanoTime(), false);
            RLock lock = lock(next.get(), false);
            while (true) {
                try {
                    // Without a lease time, as at the start of the documentation: the watchdog
                    // renews what is held for long.
                    lock.lock();
                    break;
                } catch (RuntimeException e) {
                    tally.failed(e, end);
                }
                if (System.nanoTime() >= end) {
                    return;
                }
            }
            long entered = System.nanoTime();
            tally.waited(Math.min(entered, end));
            if (hold > 0) {
                sleepUntil(entered + hold);
            }
            long left = System.nanoTime();
            try {
                lock.unlock();
            } catch (RuntimeException e) {
                tally.failed(e, end);
                continue;
            }
            if (!tally.locked(entered, left, System.nanoTime(), start, end)) {
                return;
            }
        }
    }

    static void sleepUntil(long nanoTime) {
        for (long left = nanoTime - System.nanoTime(); left > 0; left = nanoTime - System.nanoTime()) {
            LockSupport.parkNanos(left);
        }
    }
}
