//! Shared locks and permits: who is admitted, who is notified, and what a try leaves behind.

use super::*;
use crate::clock::Moment;

const SHARED: LockMode = LockMode::Shared;

fn cycle(number: u64, mode: LockMode) -> Cycle {
    Cycle::parse(&format!("{}{}", Cycle::of(number), mode.suffix())).unwrap()
}

impl Bench {
    fn acquire_in(&self, cycle: Cycle, kind: AcquireKind) -> Acquire {
        Acquire {
            cycle,
            ..self.acquire(0, kind, TTL)
        }
    }

    async fn enqueue(&self, store: &EtcdStore, cycle: Cycle) -> AcquireReply {
        let request = self.acquire_in(cycle, AcquireKind::Enqueue);
        store.acquire(request).await.unwrap().reply
    }

    async fn release_cycle(&self, store: &EtcdStore, cycle: Cycle) -> bool {
        let release = Release {
            cycle,
            ..self.release(0, None)
        };
        store.release(Priority::Foreground, release).await.unwrap().reply.held
    }

    fn your_turn(&self, cycle: Cycle) -> Push {
        Push::YourTurn {
            key: self.key.clone(),
            cycle,
        }
    }

    fn remote_waiter(&self, cycle: Cycle) -> Push {
        Push::RemoteWaiter {
            key: self.key.clone(),
            cycle,
        }
    }
}

#[track_caller]
fn is_queued(reply: AcquireReply, ahead: u64) {
    assert!(
        matches!(reply, AcquireReply::Queued(position) if position.ahead == ahead),
        "{reply:?}"
    );
}

#[tokio::test]
async fn readers_are_notified_of_a_writer_and_the_writer_of_the_last_release() {
    let bench = Bench::new().await;
    let (one, mut ones) = bench.store(1);
    let (two, mut twos) = bench.store(2);
    let (three, mut threes) = bench.store(3);
    for pushes in [&mut ones, &mut twos, &mut threes] {
        assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    }
    let (reader, writer, late) = (cycle(2, SHARED), cycle(3, LockMode::Exclusive), cycle(5, SHARED));
    let (first, last, _) = tokens(bench.enqueue(&one, reader).await);
    let (second, ..) = tokens(bench.enqueue(&two, reader).await);
    assert!(second > last && first < second);
    is_queued(bench.enqueue(&three, writer).await, 1);
    assert_eq!(ones.recv().await, Some(bench.remote_waiter(reader)));
    assert_eq!(twos.recv().await, Some(bench.remote_waiter(reader)));
    // A reader does not pass the writer, not even one of a manager that reads.
    is_queued(bench.enqueue(&one, late).await, 2);
    let renewal = Renewal {
        key: bench.key.clone(),
        cycle: reader,
        ttl: TTL,
    };
    let extended = [Some(RenewReply::Extended { has_waiters: true })];
    assert_eq!(two.renew(vec![renewal.clone()], TTL).await.unwrap(), extended);
    let state = two.inspect(bench.key.clone()).await.unwrap();
    assert_eq!((state.holder, state.holder_count, state.queue_length), (None, 2, 2));
    assert!(
        state
            .holders
            .iter()
            .all(|holder| holder.mode == SHARED && holder.is_manager)
    );
    assert!(state.queue[0].contains(":3-") && state.queue[1].ends_with("-s"));

    assert!(bench.release_cycle(&one, reader).await);
    assert_eq!(two.renew(vec![renewal.clone()], TTL).await.unwrap(), extended);
    assert!(bench.release_cycle(&two, reader).await);
    assert!(!bench.release_cycle(&two, reader).await);
    assert_eq!(threes.recv().await, Some(bench.your_turn(writer)));
    let (highest, ..) = tokens(bench.enqueue(&three, writer).await);
    assert!(highest > second);
    is_queued(bench.enqueue(&one, late).await, 1);
    assert!(bench.release_cycle(&three, writer).await);
    assert_eq!(ones.recv().await, Some(bench.your_turn(late)));
    assert!(tokens(bench.enqueue(&one, late).await).0 > highest);
    let renewed = two.renew(vec![renewal], TTL).await.unwrap();
    assert_eq!(renewed, [Some(RenewReply::NotOurs)]);
}

#[tokio::test]
async fn permit_waiter_is_notified_when_enough_permits_are_free() {
    let bench = Bench::new().await;
    let (ours, _pushes) = bench.store(1);
    let (theirs, mut pushes) = bench.store(2);
    assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    let permits = |number, weight| cycle(number, LockMode::Permits { weight, limit: 4 });
    let held = [permits(3, 1), permits(5, 2), permits(7, 1)];
    for cycle in held {
        tokens(bench.enqueue(&ours, cycle).await);
    }
    let (many, few) = (permits(9, 3), permits(11, 1));
    is_queued(bench.enqueue(&theirs, many).await, 1);
    is_queued(bench.enqueue(&theirs, few).await, 2);
    let state = theirs.inspect(bench.key.clone()).await.unwrap();
    assert_eq!(
        (state.permits_in_use, state.holder_count, state.queue_length),
        (4, 3, 2)
    );
    assert!(bench.release_cycle(&ours, held[0]).await);
    assert!(bench.release_cycle(&ours, held[1]).await);
    assert_eq!(pushes.recv().await, Some(bench.your_turn(many)));
    // The one behind it waits for the third release: the second was no news to it.
    assert!(bench.release_cycle(&ours, held[2]).await);
    assert_eq!(pushes.recv().await, Some(bench.your_turn(few)));
    tokens(bench.enqueue(&theirs, few).await);
    tokens(bench.enqueue(&theirs, many).await);
    assert!(pushes.try_recv().is_err());
}

#[tokio::test]
async fn busy_try_in_another_mode_leaves_the_queue() {
    let bench = Bench::new().await;
    let (ours, _pushes) = bench.store(1);
    let (theirs, _others) = bench.store(2);
    tokens(bench.enqueue(&ours, cycle(3, SHARED)).await);
    let tried = theirs
        .acquire(bench.acquire_in(cycle(3, SHARED), AcquireKind::Try))
        .await
        .unwrap();
    tokens(tried.reply);
    is_queued(bench.enqueue(&ours, cycle(5, LockMode::Exclusive)).await, 1);
    let late = bench.acquire_in(cycle(7, SHARED), AcquireKind::Try);
    assert_eq!(theirs.acquire(late.clone()).await.unwrap().reply, AcquireReply::Busy);
    // The queue has changed since the try looked: its lease shows that it may have a place.
    theirs.shared.cycles.open(late.cycle, TTL, Moment::now());
    assert_eq!(theirs.acquire(late.clone()).await.unwrap().reply, AcquireReply::Busy);
    assert_eq!(theirs.shared.cycles.lease(late.cycle), None);
    theirs.drain().await.unwrap();
    assert_eq!((bench.etcd.lock_keys().await.len(), bench.etcd.leases().await), (3, 3));
}

#[tokio::test]
async fn shared_requeue_does_not_wait_for_another_shared_holder() {
    let bench = Bench::new().await;
    let (ours, _pushes) = bench.store(1);
    let (theirs, _others) = bench.store(2);
    tokens(bench.enqueue(&ours, cycle(3, SHARED)).await);
    let (before, ..) = tokens(bench.enqueue(&theirs, cycle(3, SHARED)).await);
    let release = Release {
        cycle: cycle(3, SHARED),
        requeue: Some(cycle(5, SHARED)),
        ..bench.release(0, None)
    };
    let reply = ours.release(Priority::Foreground, release).await.unwrap().reply;
    assert!(reply.held && tokens(reply.requeued.unwrap()).0 > before);
    ours.drain().await.unwrap();
    assert_eq!(bench.etcd.lock_keys().await.len(), 2);
}
