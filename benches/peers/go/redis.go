package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/bsm/redislock"
	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"
	"github.com/redis/rueidis"
	"github.com/redis/rueidis/rueidislock"
)

// rueidislock: one Locker per process, as its documentation recommends, so that its tasks share the
// gates and the client-side cache.
type rueidislockPeer struct{ locker rueidislock.Locker }

func openRueidislock(o options) (peer, error) {
	l, err := rueidislock.NewLocker(rueidislock.LockerOption{
		ClientOption: rueidis.ClientOption{InitAddress: []string{o.server}},
		// One server: the majority of 1*2-1 keys.
		KeyMajority: 1,
		// Recommended for servers from 7.0.5 on.
		NoLoopTracking: true,
		KeyValidity:    o.ttl,
		// There is no next key to try. With the default of 20 ms, one slower answer leaves a waiter that
		// is never woken.
		TryNextAfter: time.Second,
	})
	if err != nil {
		return nil, err
	}
	return rueidislockPeer{l}, nil
}

func (p rueidislockPeer) task(context.Context) (locker, error) { return p, nil }

func (p rueidislockPeer) lock(ctx context.Context, key string, _ bool) (func(context.Context) error, error) {
	_, cancel, err := p.locker.WithContext(ctx, key)
	if err != nil {
		return nil, err
	}
	// It returns when the key is deleted.
	return func(context.Context) error { cancel(); return nil }, nil
}

func openGoRedis(o options) *redis.Client {
	return redis.NewClient(&redis.Options{
		Addr:     o.server,
		PoolSize: o.pool,
		// With hundreds of tasks on a pool, its default (ReadTimeout + 1 s) would be an error of the
		// load, not of the lock.
		PoolTimeout: time.Minute,
	})
}

func retry(o options) time.Duration {
	spread := o.retryMax - o.retryMin
	if spread <= 0 {
		return o.retryMin
	}
	return o.retryMin + rand.N(spread)
}

type redsyncPeer struct {
	redsync *redsync.Redsync
	options []redsync.Option
}

func openRedsync(o options) (peer, error) {
	p := redsyncPeer{redsync: redsync.New(goredis.NewPool(openGoRedis(o)))}
	p.options = []redsync.Option{
		redsync.WithExpiry(o.ttl),
		// Its default of 32 tries gives up on a hot key.
		redsync.WithTries(1 << 30),
	}
	if o.retryMin > 0 {
		p.options = append(p.options, redsync.WithRetryDelayFunc(func(int) time.Duration { return retry(o) }))
	}
	return p, nil
}

func (p redsyncPeer) task(context.Context) (locker, error) { return p, nil }

func (p redsyncPeer) lock(ctx context.Context, key string, _ bool) (func(context.Context) error, error) {
	mutex := p.redsync.NewMutex(key, p.options...)
	if err := mutex.LockContext(ctx); err != nil {
		return nil, err
	}
	return func(ctx context.Context) error {
		ok, err := mutex.UnlockContext(ctx)
		if err == nil && !ok {
			err = errors.New("the lock was no longer ours at its release")
		}
		return err
	}, nil
}

type redislockPeer struct {
	client *redislock.Client
	o      options
}

func openRedislock(o options) (peer, error) {
	return redislockPeer{redislock.New(openGoRedis(o)), o}, nil
}

func (p redislockPeer) task(context.Context) (locker, error) { return p, nil }

// redislockRetry is LinearBackoff with a random part, so that waiters do not retry in step.
type redislockRetry struct{ o options }

func (r redislockRetry) NextBackoff() time.Duration { return retry(r.o) }

func (p redislockPeer) lock(ctx context.Context, key string, _ bool) (func(context.Context) error, error) {
	// The library's own examples wait 100 ms.
	strategy := redislock.LinearBackoff(100 * time.Millisecond)
	if p.o.retryMin > 0 {
		strategy = redislockRetry{p.o}
	}
	// Without a deadline, the library gives up after the TTL.
	waiting, cancel := context.WithTimeout(ctx, time.Hour)
	defer cancel()
	lock, err := p.client.Obtain(waiting, key, p.o.ttl, &redislock.Options{RetryStrategy: strategy})
	if err != nil {
		return nil, err
	}
	return lock.Release, nil
}
