// The Go peers of shardlock under the loads of its bench: rueidislock, redsync, redislock, and
// etcd's own mutex and lock for readers and writers.
//
// A worker is one process of a load. It warms up, prints "ready", and reads from standard input
// when the measured time begins and ends ("go START END", milliseconds since 1970). It prints its
// counts as one line of JSON. See the README.md one folder up.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"time"
)

// A peer creates the locker of each task. A task takes one lock at a time.
type peer interface {
	task(ctx context.Context) (locker, error)
}

type locker interface {
	// lock waits for the key and returns a function that releases it. When that function returns, the
	// release has reached the server. Only peers for readers and writers are asked for a shared lock.
	lock(ctx context.Context, key string, shared bool) (func(ctx context.Context) error, error)
}

type options struct {
	server    string
	process   int
	processes int
	tasks     int
	keys      int
	hold      time.Duration
	ttl       time.Duration
	retryMin  time.Duration
	retryMax  time.Duration
	pool      int
	warmup    time.Duration
	// The part of the locks that are shared.
	sharedPercent int
}

func main() {
	var o options
	var name string
	var holdUs, ttlMs, retryMinUs, retryMaxUs, warmupMs int64
	flag.StringVar(&name, "peer", "", "rueidislock, redsync, redislock, etcd or etcd-rw")
	flag.StringVar(&o.server, "server", "", "HOST:PORT")
	flag.IntVar(&o.process, "process", 0, "the number of this process")
	flag.IntVar(&o.processes, "processes", 1, "processes in all")
	flag.IntVar(&o.tasks, "tasks", 1, "tasks of this process")
	flag.IntVar(&o.keys, "keys", 1, "keys in all")
	flag.Int64Var(&holdUs, "hold-us", 0, "how long a lock is held, microseconds")
	flag.Int64Var(&ttlMs, "ttl-ms", 30_000, "how long a lock lives on the server, milliseconds")
	flag.Int64Var(&retryMinUs, "retry-min-us", 0, "shortest time between two tries, microseconds; 0: the library's own")
	flag.Int64Var(&retryMaxUs, "retry-max-us", 0, "longest time between two tries, microseconds")
	flag.IntVar(&o.pool, "pool", 0, "connections; 0: the library's own number")
	flag.Int64Var(&warmupMs, "warmup-ms", 1_000, "warm-up, milliseconds")
	flag.IntVar(&o.sharedPercent, "shared-percent", 0, "how many of a hundred locks are shared")
	flag.Int("permits", 0, "permits; no peer here has them")
	flag.Parse()
	o.hold = time.Duration(holdUs) * time.Microsecond
	o.ttl = time.Duration(ttlMs) * time.Millisecond
	o.retryMin = time.Duration(retryMinUs) * time.Microsecond
	o.retryMax = time.Duration(retryMaxUs) * time.Microsecond
	o.warmup = time.Duration(warmupMs) * time.Millisecond
	if err := run(name, o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(name string, o options) error {
	open := map[string]func(options) (peer, error){
		"rueidislock": openRueidislock,
		"redsync":     openRedsync,
		"redislock":   openRedislock,
		"etcd":        openEtcd,
		"etcd-rw":     openEtcdRW,
	}[name]
	if open == nil {
		return fmt.Errorf("no peer is called %q: rueidislock, redsync, redislock, etcd or etcd-rw", name)
	}
	peer, err := open(o)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	work, err := newWork(peer, o)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	work.warmUp()
	fmt.Println("ready")
	var startMs, endMs int64
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil {
		return fmt.Errorf("no start was given: %w", err)
	}
	if _, err := fmt.Sscanf(line, "go %d %d", &startMs, &endMs); err != nil {
		return fmt.Errorf("expected go START END, got %q: %w", line, err)
	}
	report := work.measure(time.UnixMilli(startMs), time.UnixMilli(endMs))
	// Tasks that still wait end with the process.
	return json.NewEncoder(os.Stdout).Encode(report)
}
