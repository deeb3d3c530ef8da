package main

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	recipe "go.etcd.io/etcd/client/v3/experimental/recipes"
	"go.uber.org/zap"
)

// etcd's own mutex and its lock for readers and writers. A session is the holder of the lock, so
// each task has its own; the client, and with it the connection, is shared.
type etcdPeer struct {
	client *clientv3.Client
	ttl    time.Duration
	locker func(*concurrency.Session) locker
}

func openEtcd(o options) (peer, error) {
	return openEtcdWith(o, func(session *concurrency.Session) locker { return etcdMutex{session} })
}

func openEtcdRW(o options) (peer, error) {
	return openEtcdWith(o, func(session *concurrency.Session) locker { return etcdRWMutex{session} })
}

func openEtcdWith(o options, locker func(*concurrency.Session) locker) (peer, error) {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{o.server}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return nil, err
	}
	return etcdPeer{client, o.ttl, locker}, nil
}

func (p etcdPeer) task(context.Context) (locker, error) {
	session, err := concurrency.NewSession(p.client, concurrency.WithTTL(int(p.ttl/time.Second)))
	if err != nil {
		return nil, err
	}
	return p.locker(session), nil
}

type etcdMutex struct{ session *concurrency.Session }

func (m etcdMutex) lock(ctx context.Context, key string, _ bool) (func(context.Context) error, error) {
	mutex := concurrency.NewMutex(m.session, key)
	if err := mutex.Lock(ctx); err != nil {
		return nil, err
	}
	return mutex.Unlock, nil
}

type etcdRWMutex struct{ session *concurrency.Session }

func (m etcdRWMutex) lock(_ context.Context, key string, shared bool) (func(context.Context) error, error) {
	mutex := recipe.NewRWMutex(m.session, key)
	enter, leave := mutex.Lock, mutex.Unlock
	if shared {
		enter, leave = mutex.RLock, mutex.RUnlock
	}
	if err := enter(); err != nil {
		return nil, err
	}
	return func(context.Context) error { return leave() }, nil
}
