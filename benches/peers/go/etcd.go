package main

import (
	"context"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.uber.org/zap"
)

// etcd's own mutex. A session is the holder of the lock, so each task has its own; the client, and
// with it the connection, is shared.
type etcdPeer struct {
	client *clientv3.Client
	ttl    time.Duration
}

func openEtcd(o options) (peer, error) {
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{o.server}, DialTimeout: 10 * time.Second, Logger: zap.NewNop()})
	if err != nil {
		return nil, err
	}
	return etcdPeer{client, o.ttl}, nil
}

type etcdTask struct{ session *concurrency.Session }

func (p etcdPeer) task(context.Context) (locker, error) {
	session, err := concurrency.NewSession(p.client, concurrency.WithTTL(int(p.ttl/time.Second)))
	if err != nil {
		return nil, err
	}
	return etcdTask{session}, nil
}

func (t etcdTask) lock(ctx context.Context, key string) (func(context.Context) error, error) {
	mutex := concurrency.NewMutex(t.session, key)
	if err := mutex.Lock(ctx); err != nil {
		return nil, err
	}
	return mutex.Unlock, nil
}
