//! The store alone, request by request, on a real etcd: repeated requests, late requests, and
//! cycles without a record.

mod deposed;
mod modes;

use futures_util::FutureExt;
use support::etcd::Etcd;
use support::proxy::Proxy;
use tokio::sync::mpsc;

use super::*;
use crate::clock::Moment;
use crate::identity::ManagerId;
use crate::protocol::{AcquireKind, Cycle};

const TTL: Duration = Duration::from_secs(10);

struct Bench {
    etcd: Etcd,
    key: LockKey,
}

impl Bench {
    async fn new() -> Self {
        Self {
            etcd: Etcd::start().await,
            key: LockKey::new("k").unwrap(),
        }
    }

    /// The store of a manager, with its background work running.
    fn store(&self, manager: u64) -> (EtcdStore, mpsc::UnboundedReceiver<Push>) {
        Self::store_at(self.etcd.hosts(), manager, Duration::from_secs(5))
    }

    fn store_at(hosts: String, manager: u64, timeout: Duration) -> (EtcdStore, mpsc::UnboundedReceiver<Push>) {
        let mut options = StoreOptions::for_tests(ManagerId::of("h", 1, manager));
        options.timeout = timeout;
        let store = EtcdStore::new(&[hosts], None, false, options).unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(store.run_subscriber(sender));
        (store, receiver)
    }

    fn acquire(&self, cycle: u64, kind: AcquireKind, ttl: Duration) -> Acquire {
        Acquire {
            key: self.key.clone(),
            cycle: Cycle::of(cycle),
            kind,
            ttl,
            tokens: 10,
        }
    }

    fn release(&self, cycle: u64, requeue: Option<u64>) -> Release {
        Release {
            key: self.key.clone(),
            cycle: Cycle::of(cycle),
            requeue: requeue.map(Cycle::of),
            nobody_waits: false,
            tokens: 10,
            retire_until: None,
        }
    }

    async fn join(&self, store: &EtcdStore, cycle: u64) -> AcquireReply {
        store
            .acquire(self.acquire(cycle, AcquireKind::Enqueue, TTL))
            .await
            .unwrap()
            .reply
    }

    /// The lease of the lock's only key.
    async fn only_lease(&self) -> i64 {
        let all = etcd_client::GetOptions::new().with_prefix();
        let found = self.etcd.client().await.get("lock:k/", Some(all)).await.unwrap();
        assert_eq!(found.kvs().len(), 1);
        found.kvs()[0].lease()
    }
}

#[track_caller]
fn tokens(reply: AcquireReply) -> (u64, u64, bool) {
    match reply {
        AcquireReply::Granted { tokens, extended, .. } => (tokens.first(), tokens.last(), extended),
        other => panic!("{other:?} is no grant"),
    }
}

#[tokio::test]
async fn a_repeated_acquire_is_the_same_cycle_with_later_tokens() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    for kind in [AcquireKind::Fast, AcquireKind::Try, AcquireKind::Enqueue] {
        let cycle = 10 * (kind as u64 + 1);
        let (_, mut last, extended) = tokens(store.acquire(bench.acquire(cycle, kind, TTL)).await.unwrap().reply);
        assert!(!extended);
        for again in [kind, AcquireKind::Enqueue, AcquireKind::Fast] {
            let answer = store.acquire(bench.acquire(cycle, again, TTL)).await.unwrap();
            let (first, end, extended) = tokens(answer.reply);
            assert!(extended && first > last && first > answer.floor && end == first + 9);
            last = end;
        }
        assert_eq!((bench.etcd.lock_keys().await.len(), bench.etcd.leases().await), (1, 1));
        let released = store
            .release(Priority::Foreground, bench.release(cycle, None))
            .await
            .unwrap();
        assert!(released.reply.held);
        let released = store
            .release(Priority::Background, bench.release(cycle, None))
            .await
            .unwrap();
        assert!(!released.reply.held);
        store.drain().await.unwrap();
        assert_eq!((bench.etcd.lock_keys().await.len(), bench.etcd.leases().await), (0, 0));
    }
}

#[tokio::test]
async fn late_request_of_a_released_cycle_has_no_effect() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    bench.join(&store, 2).await;
    let lease = bench.only_lease().await;
    store
        .release(Priority::Foreground, bench.release(2, None))
        .await
        .unwrap();
    store.drain().await.unwrap();
    // A transaction of the cycle that was in flight the whole time.
    let attached = etcd_client::PutOptions::new().with_lease(lease);
    let late = bench.etcd.client().await.put("lock:k/late", "1", Some(attached)).await;
    assert!(late.is_err());
    // A lease with the same id would belong to another cycle.
    bench.join(&store, 4).await;
    assert_ne!(bench.only_lease().await, lease);
}

#[tokio::test]
async fn cycle_without_a_record_is_found_on_the_server() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    bench.join(&store, 2).await;
    let (forgetful, _pushes) = bench.store(1);
    let released = forgetful
        .release(Priority::Foreground, bench.release(2, None))
        .await
        .unwrap();
    assert!(released.reply.held);
    forgetful.drain().await.unwrap();
    assert_eq!((bench.etcd.lock_keys().await.len(), bench.etcd.leases().await), (0, 0));
}

#[tokio::test]
async fn lock_ends_with_its_revoked_lease() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    bench.join(&store, 2).await;
    let lease = bench.only_lease().await;
    bench.etcd.client().await.lease_revoke(lease).await.unwrap();
    let renewal = Renewal {
        key: bench.key.clone(),
        cycle: Cycle::of(2),
        ttl: TTL,
    };
    let replies = store.renew(vec![renewal], TTL).await.unwrap();
    assert_eq!(replies, [Some(RenewReply::NotOurs)]);
    // The lock can be acquired again, but not as if it had been held the whole time.
    let (_, _, extended) = tokens(bench.join(&store, 2).await);
    assert!(!extended);
    let (_, _, extended) = tokens(bench.join(&store, 2).await);
    assert!(extended);
}

#[tokio::test]
async fn a_key_moves_to_a_longer_lease_and_never_back() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    bench.join(&store, 2).await;
    let short = bench.only_lease().await;
    let renewal = |ttl| Renewal {
        key: bench.key.clone(),
        cycle: Cycle::of(2),
        ttl,
    };
    let extended = [Some(RenewReply::Extended { has_waiters: false })];
    assert_eq!(store.renew(vec![renewal(TTL * 2)], TTL).await.unwrap(), extended);
    let middle = bench.only_lease().await;
    assert_ne!(middle, short);
    let (_, _, extended_then) = tokens(
        store
            .acquire(bench.acquire(2, AcquireKind::Enqueue, TTL * 3))
            .await
            .unwrap()
            .reply,
    );
    assert!(extended_then);
    let long = bench.only_lease().await;
    assert!(long != middle && long != short);
    assert_eq!(store.renew(vec![renewal(TTL)], TTL).await.unwrap(), extended);
    bench.join(&store, 2).await;
    assert_eq!(bench.only_lease().await, long);
    store.drain().await.unwrap();
    assert_eq!(bench.etcd.leases().await, 1);
    store
        .release(Priority::Foreground, bench.release(2, None))
        .await
        .unwrap();
    store.drain().await.unwrap();
    assert_eq!(bench.etcd.leases().await, 0);
}

/// An extension was in flight with the first lease of its cycle when a renewal moved the key to a
/// longer one. The extension took the new lease for a foreign one and moved the key back, to a
/// lease that was about to be revoked. The key was gone while its manager still relied on it.
#[tokio::test]
async fn a_request_that_began_under_an_earlier_lease_does_not_move_the_key_back() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    bench.join(&store, 2).await;
    let shared = &store.shared;
    let before = shared.cycles.lease(Cycle::of(2)).unwrap();
    store
        .acquire(bench.acquire(2, AcquireKind::Enqueue, TTL * 2))
        .await
        .unwrap();
    let after = bench.only_lease().await;
    let contender = acquire::EtcdContender::new(shared, &bench.key, Cycle::of(2), TTL, 1);
    let reply = bench
        .etcd
        .client()
        .await
        .get(contender.name.as_str(), None)
        .await
        .unwrap();
    let seen = queue::first(&reply).unwrap();
    acquire::move_to(shared, &shared.background, &contender, before, &seen)
        .await
        .unwrap();
    assert_eq!(bench.only_lease().await, after);
    // Nor does a move that executes late.
    let late = queue::Member {
        lease: before.id,
        ..seen
    };
    let current = shared.cycles.lease(Cycle::of(2)).unwrap();
    acquire::move_to(shared, &shared.background, &contender, current, &late)
        .await
        .unwrap();
    assert_eq!(bench.only_lease().await, after);
}

#[tokio::test]
async fn a_requeue_gives_the_lock_to_the_next_and_joins_behind_all() {
    let bench = Bench::new().await;
    let (ours, _our_pushes) = bench.store(1);
    let (theirs, mut pushes) = bench.store(2);
    assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    let (_, last, _) = tokens(bench.join(&ours, 3).await);
    let AcquireReply::Queued(position) = bench.join(&theirs, 3).await else {
        panic!("it is taken")
    };
    assert_eq!(position.ahead, 1);
    assert!(position.enqueue_token >= last);
    let answer = ours
        .release(Priority::Foreground, bench.release(3, Some(5)))
        .await
        .unwrap();
    assert!(answer.reply.held);
    let Some(AcquireReply::Queued(ours_now)) = answer.reply.requeued else {
        panic!("{answer:?}")
    };
    assert_eq!(ours_now.ahead, 1);
    let turn = Push::YourTurn {
        key: bench.key.clone(),
        cycle: Cycle::of(3),
    };
    assert_eq!(pushes.recv().await, Some(turn));
    let (first, ..) = tokens(bench.join(&theirs, 3).await);
    assert!(first > position.enqueue_token);
    // Without other waiters, it is the next.
    theirs
        .release(Priority::Foreground, bench.release(3, None))
        .await
        .unwrap();
    let answer = ours
        .release(Priority::Foreground, bench.release(5, Some(7)))
        .await
        .unwrap();
    let (later, ..) = tokens(answer.reply.requeued.unwrap());
    assert!(answer.reply.held && later > first);
    assert_eq!(bench.etcd.lock_keys().await.len(), 1);
}

#[tokio::test]
async fn waiting_cycle_whose_lease_ended_is_notified_to_retry() {
    let bench = Bench::new().await;
    let (ours, _our_pushes) = bench.store(1);
    let (theirs, mut pushes) = bench.store(2);
    assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    bench.join(&ours, 3).await;
    let request = bench.acquire(3, AcquireKind::Enqueue, TTL);
    theirs.acquire(request.clone()).await.unwrap();
    let all = etcd_client::GetOptions::new().with_prefix();
    let found = bench
        .etcd
        .client()
        .await
        .get("lock:k/h-1-0000000000000002", Some(all))
        .await
        .unwrap();
    bench
        .etcd
        .client()
        .await
        .lease_revoke(found.kvs()[0].lease())
        .await
        .unwrap();
    let turn = Push::YourTurn {
        key: bench.key.clone(),
        cycle: Cycle::of(3),
    };
    assert_eq!(pushes.recv().await, Some(turn));
    let again = theirs.acquire(request).await.unwrap().reply;
    assert!(
        matches!(again, AcquireReply::Queued(position) if position.ahead == 1),
        "{again:?}"
    );
}

#[tokio::test]
async fn a_retired_key_keeps_its_place_under_a_lease_that_nothing_extends_or_ends() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    let (other, _their_pushes) = bench.store(2);
    bench.join(&store, 2).await;
    let before = bench.only_lease().await;
    let retire = Release {
        retire_until: Some(Moment::now() + TTL * 3),
        ..bench.release(2, None)
    };
    let held = async |release| {
        let answer = store.release(Priority::Foreground, release).await.unwrap();
        answer.reply.held
    };
    assert!(held(retire.clone()).await);
    let retired = bench.only_lease().await;
    assert_ne!(retired, before);
    // Repeated releases of the cycle, with or without the rest of the time, change nothing.
    assert!(held(retire).await);
    held(bench.release(2, None)).await;
    store.drain().await.unwrap();
    assert_eq!(bench.only_lease().await, retired);
    assert_eq!(bench.etcd.leases().await, 1);
    assert!(matches!(bench.join(&other, 4).await, AcquireReply::Queued(_)));
    assert!(matches!(
        store
            .acquire(bench.acquire(6, AcquireKind::Try, TTL))
            .await
            .unwrap()
            .reply,
        AcquireReply::Busy
    ));
}

/// Regression: the retirement that was sent again found no key, since the rest of the `min_hold`
/// had passed, and the release reported a loss.
#[tokio::test]
async fn retirement_whose_reply_is_lost_is_no_loss() {
    let bench = Bench::new().await;
    let proxy = Proxy::start(bench.etcd.place(0));
    let (store, _pushes) = Bench::store_at(proxy.address(), 1, Duration::from_secs(30));
    bench.join(&store, 2).await;
    let before = bench.only_lease().await;
    let retire = Release {
        // Longer than the replies to the requests in front of it take.
        retire_until: Some(Moment::now() + Duration::from_secs(6)),
        ..bench.release(2, None)
    };
    // Time to lose the reply once the key was moved.
    proxy.slow_down(Duration::from_secs(1));
    let released = tokio::spawn(store.release(Priority::Foreground, retire));
    while bench.only_lease().await == before {
        tokio::task::yield_now().await;
    }
    proxy.silence();
    proxy.cut_off();
    let opened = proxy.connections();
    while !bench.etcd.lock_keys().await.is_empty() {
        tokio::task::yield_now().await;
    }
    proxy.slow_down(Duration::ZERO);
    proxy.heal(false);
    let answer = released.await.unwrap().unwrap();
    assert!(answer.reply.held);
    assert!(proxy.connections() > opened, "the reply was not lost");
}

/// Regression: the lease was revoked, although the cycle is then sent again under it.
#[tokio::test]
async fn withdrawal_without_a_reply_revokes_nothing() {
    let bench = Bench::new().await;
    let (store, _pushes) = bench.store(1);
    bench.join(&store, 2).await;
    let leaving = acquire::EtcdContender::new(&store.shared, &bench.key, Cycle::of(2), TTL, 10);
    let withdrawing = release::withdraw(&store.shared, &store.callers[0], &leaving);
    assert!(withdrawing.now_or_never().is_none(), "it waits for the reply");
    store.drain().await.unwrap();
    assert_eq!(bench.etcd.leases().await, 1);
}

/// Regression: the connection was abandoned, and the request counted as sent.
#[tokio::test]
async fn request_that_waits_for_its_turn_abandons_no_connection() {
    let bench = Bench::new().await;
    let proxy = Proxy::start(bench.etcd.place(0));
    let (store, _pushes) = Bench::store_at(proxy.address(), 1, Duration::from_secs(3));
    bench.join(&store, 2).await;
    let link = store.link(Priority::Foreground, bench.key.slot());
    let all = link
        .request_slots
        .acquire_many(link::IN_FLIGHT_MAX as u32)
        .await
        .unwrap();
    let before = proxy.connections();
    let failed = store.acquire(bench.acquire(4, AcquireKind::Enqueue, TTL)).await;
    let failed = failed.map(drop).expect_err("there is no room for it").to_string();
    assert!(failed.contains("requests are in flight"), "{failed}");
    drop(all);
    assert!(matches!(bench.join(&store, 4).await, AcquireReply::Queued(_)));
    assert_eq!(proxy.connections(), before);
}
