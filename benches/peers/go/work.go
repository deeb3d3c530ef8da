package main

import (
	"context"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"time"
)

// report is summed up by the runner over all processes of a load.
type report struct {
	Tasks []uint64 `json:"tasks"`
	// Waits by bucket, see bucket; including those that had not ended at the end.
	Waits     map[string]uint64 `json:"waits"`
	WaitMaxUs uint64            `json:"wait_max_us"`
	HoldSumUs uint64            `json:"hold_sum_us"`
	// When the last lock was released, counted from the start.
	LastUs uint64 `json:"last_us"`
	// The waits for exclusive locks beside shared ones.
	WriterWaits     map[string]uint64 `json:"writer_waits,omitempty"`
	WriterWaitMaxUs uint64            `json:"writer_wait_max_us"`
	Errors          uint64            `json:"errors"`
	FirstError      string            `json:"first_error,omitempty"`
}

// bucket is the histogram bucket: exact below 128 us, then 64 buckets for each doubling. The runner
// uses the same.
func bucket(us uint64) int {
	if us < 128 {
		return int(us)
	}
	shift := bits.Len64(us) - 7
	return shift*64 + int(us>>shift)
}

const buckets = 64*26 + 128

// waits is a histogram with its longest wait.
type waits struct {
	counts [buckets]uint32
	maxUs  uint64
}

func (w *waits) add(us uint64) {
	w.counts[min(bucket(us), buckets-1)]++
	w.maxUs = max(w.maxUs, us)
}

type tally struct {
	// Guards all fields below: the task writes, and the report reads while some tasks still wait.
	mu         sync.Mutex
	locks      uint64
	waits      waits
	writers    *waits // nil unless there are readers
	holdSumUs  uint64
	lastUs     uint64
	errors     uint64
	firstError string
	// When the task began to wait, if it waits, and whether for a shared lock.
	since  time.Time
	shared bool
}

type work struct {
	o       options
	lockers []locker
}

func newWork(p peer, o options) (*work, error) {
	w := &work{o: o}
	for range o.tasks {
		l, err := p.task(context.Background())
		if err != nil {
			return nil, err
		}
		w.lockers = append(w.lockers, l)
	}
	return w, nil
}

// warmUp opens the connections and runs the code that waits, on keys of this process alone. Nothing
// of it is left when the measured time begins.
func (w *work) warmUp() {
	half := w.o.warmup / 2
	w.each(len(w.lockers), half+5*time.Second, func(task int) {
		key := fmt.Sprintf("warm:%d:%d", w.o.process, task)
		w.loop(w.lockers[task], func() string { return key }, 0, time.Now(), time.Now().Add(half), &tally{})
	})
	w.each(min(len(w.lockers), 8), half+5*time.Second, func(task int) {
		key := fmt.Sprintf("warm:%d", w.o.process)
		w.loop(w.lockers[task], func() string { return key }, 0, time.Now(), time.Now().Add(half), &tally{})
	})
}

func (w *work) each(tasks int, limit time.Duration, f func(task int)) {
	var all sync.WaitGroup
	for task := range tasks {
		all.Go(func() { f(task) })
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	select {
	case <-done:
	case <-time.After(limit):
		// No other task uses its key, so a waiter that is never woken disturbs nothing. It is worth
		// reporting, though.
		fmt.Fprintln(os.Stderr, "a waiter of the warm-up was not served in", limit)
	}
}

func (w *work) measure(start, end time.Time) report {
	// The wall clock is the same for all processes of the load. From here on only the monotonic clock
	// counts.
	now := time.Now()
	start, end = now.Add(start.Sub(now)), now.Add(end.Sub(now))
	time.Sleep(time.Until(start))
	tallies := make([]tally, len(w.lockers))
	for task, l := range w.lockers {
		if w.o.sharedPercent > 0 {
			tallies[task].writers = &waits{}
		}
		next := func() string { return "bench:" + strconv.Itoa(rand.IntN(w.o.keys)) }
		if w.o.keys == w.o.processes*w.o.tasks {
			key := "bench:" + strconv.Itoa(w.o.process*w.o.tasks+task)
			next = func() string { return key }
		}
		go w.loop(l, next, w.o.hold, start, end, &tallies[task])
	}
	time.Sleep(time.Until(end))
	return w.report(tallies, end)
}

func (w *work) loop(l locker, next func() string, hold time.Duration, start, end time.Time, t *tally) {
	ctx := context.Background()
	fail := func(err error) {
		t.mu.Lock()
		if time.Now().Before(end) {
			t.errors++
			if t.firstError == "" {
				t.firstError = err.Error()
			}
		}
		t.mu.Unlock()
		// A peer that fails at once must not keep the machine busy with its failures.
		time.Sleep(time.Millisecond)
	}
	for time.Now().Before(end) {
		since, shared := time.Now(), w.o.sharedPercent > 0 && rand.IntN(100) < w.o.sharedPercent
		t.mu.Lock()
		t.since, t.shared = since, shared
		t.mu.Unlock()
		key := next()
		release, err := l.lock(ctx, key, shared)
		for err != nil {
			fail(err)
			if !time.Now().Before(end) {
				return
			}
			release, err = l.lock(ctx, key, shared)
		}
		entered := time.Now()
		t.waited(since, min(entered.Sub(since), end.Sub(since)))
		if hold > 0 {
			time.Sleep(hold)
		}
		left := time.Now()
		err = release(ctx)
		released := time.Now()
		if err != nil {
			fail(err)
			continue
		}
		if released.After(end) {
			return
		}
		t.mu.Lock()
		t.locks++
		t.holdSumUs += micros(left.Sub(entered))
		t.lastUs = micros(released.Sub(start))
		t.mu.Unlock()
	}
}

// waited counts a wait once, at its end or at the end of the measured time.
func (t *tally) waited(since time.Time, wait time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.since.Equal(since) {
		us := micros(wait)
		t.waits.add(us)
		if t.writers != nil && !t.shared {
			t.writers.add(us)
		}
		t.since = time.Time{}
	}
}

func (w *work) report(tallies []tally, end time.Time) report {
	var all, writers [buckets]uint64
	var r report
	for i := range tallies {
		t := &tallies[i]
		t.mu.Lock()
		since := t.since
		t.mu.Unlock()
		if !since.IsZero() {
			t.waited(since, end.Sub(since))
		}
		t.mu.Lock()
		r.Tasks = append(r.Tasks, t.locks)
		for b, n := range t.waits.counts {
			all[b] += uint64(n)
		}
		r.WaitMaxUs = max(r.WaitMaxUs, t.waits.maxUs)
		if t.writers != nil {
			for b, n := range t.writers.counts {
				writers[b] += uint64(n)
			}
			r.WriterWaitMaxUs = max(r.WriterWaitMaxUs, t.writers.maxUs)
		}
		r.HoldSumUs += t.holdSumUs
		r.LastUs = max(r.LastUs, t.lastUs)
		r.Errors += t.errors
		if r.FirstError == "" {
			r.FirstError = t.firstError
		}
		t.mu.Unlock()
	}
	r.Waits, r.WriterWaits = used(all), used(writers)
	return r
}

// used is the buckets that are not empty.
func used(counts [buckets]uint64) map[string]uint64 {
	found := map[string]uint64{}
	for b, n := range counts {
		if n > 0 {
			found[strconv.Itoa(b)] = n
		}
	}
	return found
}

func micros(d time.Duration) uint64 {
	return uint64(max(d, 0) / time.Microsecond)
}
