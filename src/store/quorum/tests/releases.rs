//! Releases: which replies a loss needs, and what becomes of a release without an answer.

use super::*;

impl Bench {
    async fn release(&self, cycle: u64) -> Result<bool, StoreError> {
        Ok(self.release_and_requeue(cycle, None).await?.held)
    }

    async fn release_and_requeue(&self, cycle: u64, next: Option<u64>) -> Result<ReleaseReply, StoreError> {
        let release = Release {
            key: key(),
            cycle: Cycle::of(cycle),
            requeue: next.map(Cycle::of),
            tokens: 4,
            nobody_waits: false,
            retire_until: None,
        };
        let answer = self.store.release(Priority::Foreground, release).await?;
        Ok(answer.reply)
    }
}

#[tokio::test]
async fn release_reports_a_loss_only_if_no_majority_can_have_had_the_lease() {
    for (taken, held) in [
        (&[][..], true),
        (&[0][..], true),
        // One of these is not waited for.
        (&[1, 2][..], true),
        (&[0, 1, 2][..], false),
    ] {
        let bench = Bench::new().await;
        bench.hold(2).await;
        taken.iter().for_each(|&node| bench.take(node));
        assert_eq!(bench.release(2).await.unwrap(), held, "taken at {taken:?}");
        let left = bench.owner(0);
        assert_eq!(left.is_some(), taken.contains(&0), "{left:?}");
    }
}

#[tokio::test]
async fn release_does_not_wait_for_a_node_that_hangs() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    bench.servers[2].stop();
    let released = tokio::time::timeout(PATIENCE / 4, bench.release(2)).await;
    bench.servers[2].cont();
    assert!(released.expect("a node may take half of PATIENCE").unwrap());
}

#[tokio::test]
async fn release_without_a_majority_fails_and_stays_pending() {
    let bench = Bench::new().await.with_node_limit(Duration::from_millis(50));
    bench.hold(2).await;
    bench.servers[1].stop();
    bench.servers[2].stop();
    let released = bench.release(2).await;
    assert!(matches!(released, Err(StoreError::Unavailable(_))), "{released:?}");
    let pending = [1, 2].map(|node| bench.nodes[node].has_pending_release(Cycle::of(2)));
    assert_eq!(pending, [true, true]);
    assert!(!bench.store.quorum.holds(Cycle::of(2)));
    [1, 2].iter().for_each(|&node| bench.servers[node].cont());
}

#[tokio::test]
async fn release_dropped_midway_is_pending_at_its_sequencer() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    bench.servers[0].stop();
    let dropped = async {
        while bench.owner(1).is_some() || bench.owner(2).is_some() {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        biased;
        released = bench.release(2) => panic!("an answer of a stopped server: {released:?}"),
        () = dropped => {}
    }
    bench.servers[0].cont();
    assert!(bench.nodes[0].has_pending_release(Cycle::of(2)));
    let is_over = || bench.store.quorum.releasing.load(Ordering::Acquire) == 0;
    eventually("nothing is in flight", PATIENCE, is_over).await;
}

/// A grant by the sequencer alone is no lock.
#[tokio::test]
async fn requeued_cycle_is_not_granted_by_the_sequencer_alone() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    let reply = bench.release_and_requeue(2, Some(4)).await.unwrap();
    assert!(reply.held && reply.requeued.is_none(), "{reply:?}");
    bench.hold(4).await;
    // No message reaches it, but its turn comes.
    bench.servers[0].command(&[
        "ZADD",
        &bench.nodes[0].store.queue_name(&key()),
        "1.5",
        &bench.owner_tag(8).unwrap(),
    ]);
    let reply = bench.release_and_requeue(4, Some(6)).await.unwrap();
    assert!(matches!(reply.requeued, Some(AcquireReply::Queued(_))), "{reply:?}");
}

/// Most outages are short.
#[tokio::test]
async fn release_is_sent_again_until_a_majority_has_answered() {
    let bench = Bench::new().await.with_majority_limit(PATIENCE);
    bench.hold(2).await;
    [1, 2].iter().for_each(|&node| bench.servers[node].kill());
    let (held, ()) = tokio::join!(bench.release(2), bench.come_back([1, 2]));
    // The restarted nodes lack the lease, but the first attempt may have released it.
    assert!(held.unwrap());
    assert_eq!(bench.owner(0), None);
}

/// The request already has an answer of the other nodes, so it need not be sent to them again.
#[tokio::test]
async fn release_goes_on_with_the_next_sequencer() {
    // A failed attempt is not repeated.
    let bench = Bench::new().await.with_majority_limit(Duration::ZERO);
    bench.hold(2).await;
    bench.servers[0].kill();
    assert!(bench.release(2).await.unwrap());
    assert!(bench.nodes[0].has_pending_release(Cycle::of(2)));
}

/// Waiters are in the sequencer's queue alone.
#[tokio::test]
async fn renewal_reports_waiters_that_one_node_has() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    assert_eq!(bench.renew(2).await, Some(RenewReply::Extended { has_waiters: false }));
    bench.servers[0].command(&[
        "ZADD",
        &bench.nodes[0].store.queue_name(&key()),
        "1",
        &bench.owner_tag(8).unwrap(),
    ]);
    // The majority includes the sequencer then.
    bench.servers[2].stop();
    let renewed = bench.renew(2).await;
    bench.servers[2].cont();
    assert_eq!(renewed, Some(RenewReply::Extended { has_waiters: true }));
}

/// A release beside a renewal may be executed after it.
#[tokio::test]
async fn renewal_counts_no_node_that_gets_a_release_meanwhile() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    let others = &bench.nodes[1..];
    let add = || others.iter().for_each(|node| node.add_pending_release(release(2), TTL));
    let remove = || others.iter().for_each(|node| node.remove_pending_release(&release(2)));
    for is_pending_before in [true, false] {
        if is_pending_before {
            add();
        }
        let mut renewing = std::pin::pin!(bench.renew(2));
        assert!(is_pending(renewing.as_mut()).await);
        match is_pending_before {
            true => remove(),
            false => add(),
        }
        assert_eq!(renewing.await, None, "pending before: {is_pending_before}");
        remove();
    }
    assert_eq!(bench.renew(2).await, Some(RenewReply::Extended { has_waiters: false }));
}

/// Of this, half is for a majority, and a quarter of that for the nodes that are not needed.
const LIMIT: Duration = Duration::from_secs(8);

#[tokio::test]
async fn renewal_does_not_wait_long_for_a_node_that_is_not_needed() {
    let bench = Bench::new().await.with_node_limit(LIMIT / 4);
    bench.hold(2).await;
    bench.servers[2].stop();
    let renewed = tokio::time::timeout(LIMIT * 3 / 8, bench.store.renew(vec![renewal(Cycle::of(2))], LIMIT)).await;
    bench.servers[2].cont();
    let renewed = renewed.expect("the two others have answered").unwrap();
    assert_eq!(renewed, [Some(RenewReply::Extended { has_waiters: false })]);
}

#[tokio::test]
async fn renewal_waits_for_a_slow_majority() {
    let bench = Bench::new().await.with_node_limit(LIMIT / 4);
    bench.hold(2).await;
    [1, 2].iter().for_each(|&node| bench.servers[node].stop());
    let slow = async {
        tokio::time::sleep(LIMIT * 3 / 16).await;
        [1, 2].iter().for_each(|&node| bench.servers[node].cont());
    };
    let (renewed, ()) = tokio::join!(bench.store.renew(vec![renewal(Cycle::of(2))], LIMIT), slow);
    assert_eq!(renewed.unwrap(), [Some(RenewReply::Extended { has_waiters: false })]);
}
