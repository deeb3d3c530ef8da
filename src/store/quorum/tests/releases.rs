//! Releases: which replies a loss needs, and what becomes of a release without an answer.

use super::*;

impl Bench {
    async fn release(&self, cycle: u64) -> Result<bool, StoreError> {
        Ok(self.release_and_requeue(cycle, None).await?.held)
    }

    async fn release_and_requeue(&self, cycle: u64, next: Option<u64>) -> Result<ReleaseReply, StoreError> {
        self.release_on(Priority::Foreground, cycle, next).await
    }

    async fn release_on(&self, priority: Priority, cycle: u64, next: Option<u64>) -> Result<ReleaseReply, StoreError> {
        let release = Release {
            key: key(),
            cycle: Cycle::of(cycle),
            requeue: next.map(Cycle::of),
            tokens: 4,
            nobody_waits: false,
            retire_until: None,
        };
        let answer = self.store.release(priority, release).await?;
        Ok(answer.reply)
    }
}

#[tokio::test]
async fn release_reports_a_loss_only_if_no_majority_can_have_had_the_lease() {
    for (taken, held) in [
        (&[][..], true),
        (&[0][..], true),
        (&[2][..], true),
        (&[1, 2][..], false),
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

impl Bench {
    /// A lease whose claim is on its way to the last node, and then its release by a guard that is
    /// dropped.
    async fn release_before_a_claim_arrives(&self, proxies: &[Proxy; 3]) {
        // The servers know the scripts from then on.
        self.hold(2).await;
        self.release(2).await.unwrap();
        let is_over = || self.store.quorum.releasing.load(Ordering::Acquire) == 0;
        eventually("nothing is in flight", PATIENCE, is_over).await;
        let last = &self.nodes[2].store;
        last.leave_background();
        proxies[2].withhold();
        last.connect_background().await.unwrap();
        last.set_vote(true);
        self.hold(4).await;
        assert!(self.release_on(Priority::Background, 4, None).await.unwrap().held);
        assert_eq!([0, 1, 2].map(|node| self.owner(node)), [None, None, None]);
    }
}

/// Regression: the node executed the claim after the release, and had a lease that nobody released
/// until its TTL.
#[tokio::test]
async fn release_does_not_overtake_an_unanswered_claim() {
    let (bench, proxies) = Bench::behind_proxies().await;
    bench.release_before_a_claim_arrives(&proxies).await;
    let before = bench.servers[2].script_calls();
    proxies[2].deliver_late();
    let executed = || bench.servers[2].script_calls() - before;
    eventually("claim and release are executed", PATIENCE, || executed() >= 2).await;
    assert_eq!(bench.owner(2), None);
    assert!(bench.nodes[2].has_no_pending_releases());
}

/// The application may block the runtime that carries it.
#[tokio::test]
async fn release_behind_a_claim_marks_no_node_down_and_becomes_pending() {
    let (bench, proxies) = Bench::behind_proxies().await;
    let bench = bench.with_node_limit(Duration::from_secs(2));
    bench.release_before_a_claim_arrives(&proxies).await;
    let is_pending = || bench.nodes[2].has_pending_release(Cycle::of(4));
    eventually("it is pending", PATIENCE, is_pending).await;
    assert!(bench.nodes[2].is_up());
    proxies[2].deliver_late();
    assert!(repair::finish_pending_releases(&bench.store.quorum, &bench.nodes[2]).await);
    assert!(bench.nodes[2].has_no_pending_releases());
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

/// Regression: the next sequencer had often answered before, and its second answer counted as that
/// of one more node.
#[tokio::test]
async fn node_that_answers_twice_counts_once() {
    // A failed attempt is not repeated.
    let bench = Bench::new().await.with_majority_limit(Duration::ZERO);
    bench.hold(2).await;
    bench.nodes[2].mark_down("away");
    bench.servers[0].kill();
    let released = bench.release(2).await;
    assert!(matches!(released, Err(StoreError::Unavailable(_))), "{released:?}");
    let pending = [0, 1, 2].map(|node| bench.nodes[node].has_pending_release(Cycle::of(2)));
    assert_eq!(pending, [true, false, true]);
}

/// Regression: a node that had another lease, or no vote, counted as free. With the third node
/// still to answer, the next owner lost its vote, and with it its turn.
#[tokio::test]
async fn key_is_passed_on_once_a_majority_of_votes_is_free() {
    for (has_another_lease, has_vote) in [(true, true), (false, false)] {
        let bench = Bench::new().await;
        bench.hold(2).await;
        if has_another_lease {
            bench.take(1);
        }
        bench.nodes[1].store.set_vote(has_vote);
        bench.servers[2].stop();
        let before = bench.servers[1].script_calls();
        let mut releasing = std::pin::pin!(bench.release(2));
        while bench.servers[1].script_calls() == before {
            assert!(is_pending(releasing.as_mut()).await);
            tokio::task::yield_now().await;
        }
        for _ in 0..200 {
            assert!(is_pending(releasing.as_mut()).await);
            assert_eq!(bench.owner(0), bench.owner_tag(2), "it is not passed on");
            tokio::task::yield_now().await;
        }
        bench.servers[2].cont();
        assert!(releasing.await.unwrap());
        assert_eq!([bench.owner(0), bench.owner(2)], [None, None]);
    }
}

/// Regression: a waiter lost its turn if the release of the owner before was late at other nodes.
#[tokio::test]
async fn turn_is_kept_while_other_nodes_get_the_release_of_the_owner_before() {
    let bench = Bench::new().await.with_claim_again_for(PATIENCE);
    [1, 2].iter().for_each(|&node| bench.take(node));
    let claims = || [1, 2].map(|node| bench.servers[node].script_calls());
    let before = claims();
    let release = async {
        while (0..2).any(|node| claims()[node] == before[node]) {
            tokio::task::yield_now().await;
        }
        for node in [1, 2] {
            bench.servers[node].command(&["DEL", LEASE]);
        }
    };
    let (reply, ()) = tokio::join!(bench.acquire(2, AcquireKind::Enqueue, 2 * TTL), release);
    assert!(is_granted(&reply), "{reply:?}");
    let owners = [0, 1, 2].map(|node| bench.owner(node));
    assert!(
        owners.iter().filter(|owner| **owner == bench.owner_tag(2)).count() >= 2,
        "{owners:?}"
    );
}
