package peers;

import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/** The counts of one task. The task writes, and the report reads while some tasks still wait. */
final class Tally {
    private static final int BUCKETS = 64 * 26 + 128;

    private final Waits waits = new Waits();
    /** The waits for exclusive locks beside shared ones; null if there were none. */
    private Waits writerWaits;
    private long locks;
    private long holdSumUs;
    private long lastUs;
    private long errors;
    private String firstError;
    private boolean waiting;
    private boolean isWriter;
    private long since;

    /** A histogram with its longest wait. */
    private static final class Waits {
        final int[] counts = new int[BUCKETS];
        long maxUs;

        void add(long us) {
            counts[Math.min(bucket(us), BUCKETS - 1)]++;
            maxUs = Math.max(maxUs, us);
        }

        void addTo(Map<Integer, Long> all) {
            for (int i = 0; i < BUCKETS; i++) {
                if (counts[i] > 0) {
                    all.merge(i, (long) counts[i], Long::sum);
                }
            }
        }
    }

    /** Begins a wait, or continues one that an error interrupted. */
    synchronized void waitsSince(long nanoTime, boolean writer) {
        if (!waiting) {
            waiting = true;
            isWriter = writer;
            since = nanoTime;
        }
    }

    void failed(RuntimeException error, long end) {
        synchronized (this) {
            if (System.nanoTime() < end) {
                errors++;
                if (firstError == null) {
                    firstError = error.toString();
                }
            }
        }
        // A peer that fails at once must not keep the machine busy with its failures.
        Peer.sleepUntil(System.nanoTime() + 1_000_000);
    }

    /** Counts a wait once, at its end or at the end of the measured time. */
    synchronized void waited(long until) {
        if (waiting) {
            long wait = Math.max(0, until - since) / 1000;
            waits.add(wait);
            if (isWriter) {
                writerWaits = writerWaits == null ? new Waits() : writerWaits;
                writerWaits.add(wait);
            }
            waiting = false;
        }
    }

    /** Counts a lock. Returns false if it was released after the end. */
    synchronized boolean locked(long entered, long left, long released, long start, long end) {
        if (released > end) {
            return false;
        }
        locks++;
        holdSumUs += (left - entered) / 1000;
        lastUs = (released - start) / 1000;
        return true;
    }

    /** The bucket: exact below 128 us, then 64 for each doubling. The runner uses the same. */
    private static int bucket(long us) {
        if (us < 128) {
            return (int) us;
        }
        int shift = 64 - Long.numberOfLeadingZeros(us) - 7;
        return shift * 64 + (int) (us >> shift);
    }

    static String report(List<Tally> tallies, long end) {
        StringBuilder tasks = new StringBuilder();
        var waits = new TreeMap<Integer, Long>();
        var writerWaits = new TreeMap<Integer, Long>();
        long waitMax = 0;
        long writerWaitMax = 0;
        long holdSum = 0;
        long last = 0;
        long errors = 0;
        String firstError = "";
        for (Tally tally : tallies) {
            synchronized (tally) {
                tally.waited(end);
                tasks.append(tasks.isEmpty() ? "" : ",").append(tally.locks);
                tally.waits.addTo(waits);
                waitMax = Math.max(waitMax, tally.waits.maxUs);
                if (tally.writerWaits != null) {
                    tally.writerWaits.addTo(writerWaits);
                    writerWaitMax = Math.max(writerWaitMax, tally.writerWaits.maxUs);
                }
                holdSum += tally.holdSumUs;
                last = Math.max(last, tally.lastUs);
                errors += tally.errors;
                if (firstError.isEmpty() && tally.firstError != null) {
                    firstError = tally.firstError;
                }
            }
        }
        return "{\"tasks\":[" + tasks + "],\"waits\":" + json(waits) + ",\"wait_max_us\":" + waitMax
                + ",\"writer_waits\":" + json(writerWaits) + ",\"writer_wait_max_us\":" + writerWaitMax
                + ",\"hold_sum_us\":" + holdSum + ",\"last_us\":" + last + ",\"errors\":" + errors
                + ",\"first_error\":" + jsonString(firstError) + "}";
    }

    private static String json(Map<Integer, Long> waits) {
        StringBuilder buckets = new StringBuilder("{");
        waits.forEach((at, count) ->
                buckets.append(buckets.length() == 1 ? "" : ",").append('"').append(at).append("\":").append(count));
        return buckets.append('}').toString();
    }

    private static String jsonString(String text) {
        StringBuilder json = new StringBuilder("\"");
        for (char c : text.toCharArray()) {
            if (c == '"' || c == '\\') {
                json.append('\\').append(c);
            } else if (c < ' ') {
                json.append(String.format("\\u%04x", (int) c));
            } else {
                json.append(c);
            }
        }
        return json.append('"').toString();
    }
}
