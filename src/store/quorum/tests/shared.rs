//! Shared leases in a quorum: who has a majority beside whom, and with which tokens.

use futures_util::future::join_all;

use super::*;
use crate::protocol::QueuePosition;

/// The marker of shared leases on a server.
const MARKER: &str = "~shared";

fn reader(number: u64) -> Cycle {
    Cycle::parse(&format!("{}{}", Cycle::of(number), LockMode::Shared.suffix())).unwrap()
}

impl Bench {
    async fn read(&self, number: u64) -> TokenBlock {
        match self.acquire_as(reader(number), AcquireKind::Enqueue, TTL).await {
            Ok(AcquireReply::Granted { tokens, .. }) => tokens,
            other => panic!("no shared lock but {other:?}"),
        }
    }

    /// The same while a release is still under way to a node.
    async fn read_soon(&self, number: u64) -> TokenBlock {
        loop {
            match self.acquire_as(reader(number), AcquireKind::Enqueue, TTL).await {
                Ok(AcquireReply::Granted { tokens, .. }) => return tokens,
                Ok(AcquireReply::Queued(_)) => tokio::task::yield_now().await,
                other => panic!("no shared lock but {other:?}"),
            }
        }
    }

    async fn release_as(&self, cycle: Cycle) -> ReleaseReply {
        let release = Release {
            key: key(),
            cycle,
            requeue: None,
            nobody_waits: false,
            tokens: 4,
            retire_until: None,
        };
        let released = self.store.release(Priority::Foreground, release).await;
        released.unwrap().reply
    }

    /// The shared holders at that node, if they hold the key.
    fn readers(&self, node: usize) -> Vec<String> {
        let holders: Vec<String> = self.servers[node].query(&["ZRANGE", HOLDERS, "0", "-1"]);
        match self.owner(node).as_deref() {
            Some(MARKER) => holders,
            _ => Vec::new(),
        }
    }

    fn tag_of(&self, cycle: Cycle) -> String {
        self.manager.owner_tag(cycle).to_string()
    }

    /// Waits until each node has these readers. A request returns once a majority has answered.
    async fn until_all_have(&self, numbers: &[u64]) {
        let mut expected: Vec<String> = numbers.iter().map(|&number| self.tag_of(reader(number))).collect();
        expected.sort();
        eventually("all nodes have the same readers", PATIENCE, || {
            (0..3).all(|node| {
                let mut found = self.readers(node);
                found.sort();
                found == expected
            })
        })
        .await;
    }

    /// Makes a node forget all leases, as a restart does. It keeps its vote.
    fn forget(&self, node: usize) {
        self.servers[node].command(&["FLUSHALL"]);
    }
}

/// The holders of the key [`key`] on a server.
const HOLDERS: &str = "{lock:k}:h";

#[tokio::test]
async fn readers_have_a_majority_together_and_a_writer_has_it_alone() {
    let bench = Bench::new().await;
    let tokens = [bench.read(3).await, bench.read(5).await];
    bench.until_all_have(&[3, 5]).await;
    assert!(tokens[1].first() > tokens[0].last(), "{tokens:?}");
    let reply = bench.acquire(2, AcquireKind::Try, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Busy)), "{reply:?}");
    let reply = bench.acquire(2, AcquireKind::Enqueue, TTL).await;
    let Ok(AcquireReply::Queued(position)) = reply else {
        panic!("{reply:?}")
    };
    assert!(position.owner_ttl.is_some_and(|left| left <= TTL), "{position:?}");
    // With somebody queued, everybody queues.
    let reply = bench.acquire_as(reader(7), AcquireKind::Enqueue, TTL).await;
    assert!(
        matches!(reply, Ok(AcquireReply::Queued(QueuePosition { ahead: 1, .. }))),
        "{reply:?}"
    );
    for number in [3, 5] {
        assert!(bench.release_as(reader(number)).await.held);
    }
    let written = bench.hold(2).await;
    assert!(written.first() > tokens[1].last());
    for kind in [AcquireKind::Try, AcquireKind::Enqueue] {
        let reply = bench.acquire_as(reader(9), kind, TTL).await;
        assert!(
            matches!(reply, Ok(AcquireReply::Busy | AcquireReply::Queued(_))),
            "{reply:?}"
        );
    }
    assert!(bench.release_as(Cycle::of(2)).await.held);
    // Both that waited are admitted together.
    for number in [7, 9] {
        assert!(bench.read(number).await.first() > written.last());
    }
}

/// Managers may disagree about the sequencer. Then only the votes keep a writer and a reader apart.
#[tokio::test]
async fn reader_and_writer_of_different_sequencers_exclude_each_other() {
    let bench = Bench::new().await;
    bench.read(3).await;
    bench.until_all_have(&[3]).await;
    bench.nodes[0].store.set_vote(false);
    let reply = bench.acquire(2, AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Queued(_))), "{reply:?}");
    bench.release_as(Cycle::of(2)).await;
    // The writer's sequencer is free: it missed the claim.
    bench.nodes[0].store.set_vote(true);
    bench.forget(0);
    let reply = bench.acquire(4, AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Queued(_))), "{reply:?}");
    assert_eq!(bench.owner(0), None, "what it had there is released");
    assert_eq!(bench.readers(1), [bench.tag_of(reader(3))]);
    assert!(bench.release_as(reader(3)).await.held, "two of three had it");

    bench.hold(6).await;
    eventually("all have it", PATIENCE, || {
        (0..3).all(|node| bench.owner(node) == bench.owner_tag(6))
    })
    .await;
    bench.forget(0);
    let reply = bench.acquire_as(reader(7), AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Queued(_))), "{reply:?}");
    assert_eq!(bench.owner(0), None);
}

/// Several readers acquire at the same time, at one sequencer or at several. Unlike a writer, none
/// of them can know that nobody else takes tokens.
#[tokio::test]
async fn readers_at_the_same_time_have_different_tokens() {
    let bench = Bench::new().await;
    let mut largest = 0;
    for round in 0..20_u64 {
        // Each round, another node has issued more tokens than the others, and in some the
        // sequencer is another one for half of the readers.
        bench.set_counter(round as usize % 3, FLOOR + round * 1_000_000);
        let numbers: Vec<u64> = (0..8).map(|index| 101 + round * 100 + 2 * index).collect();
        bench.nodes[0].store.set_vote(round % 4 != 0);
        let early = join_all(numbers[..4].iter().map(|&number| bench.read_soon(number)));
        let late = async {
            tokio::task::yield_now().await;
            bench.nodes[0].store.set_vote(true);
            join_all(numbers[4..].iter().map(|&number| bench.read_soon(number))).await
        };
        let (early, late) = tokio::join!(early, late);
        let mut blocks = [early, late].concat();
        blocks.sort_by_key(|block| block.first());
        for pair in blocks.windows(2) {
            assert!(pair[0].last() < pair[1].first(), "round {round}: {blocks:?}");
        }
        for &number in &numbers {
            bench.release_as(reader(number)).await;
        }
        let writer = 2 + 2 * round;
        let written = loop {
            match bench.acquire(writer, AcquireKind::Enqueue, TTL).await {
                Ok(AcquireReply::Granted { tokens, .. }) => break tokens,
                // A release was still under way to a node.
                Ok(AcquireReply::Queued(_)) => tokio::task::yield_now().await,
                other => panic!("{other:?}"),
            }
        };
        assert!(
            blocks
                .iter()
                .all(|block| block.first() > largest && block.last() < written.first())
        );
        largest = written.last();
        bench.release_as(Cycle::of(writer)).await;
    }
}

/// A node that restarted may have forgotten a writer, so its vote for a reader does not count.
#[tokio::test]
async fn shared_claim_at_a_node_without_a_vote_does_not_count() {
    let bench = Bench::new().await;
    bench.take(1);
    bench.nodes[2].store.set_vote(false);
    let reply = bench.acquire_as(reader(3), AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Queued(_))), "{reply:?}");
    assert_eq!([bench.owner(0), bench.owner(2)], [None, None], "nothing is left behind");
    bench.nodes[2].store.set_vote(true);
    bench.read(5).await;
}

/// A renewal counts the nodes that have this reader's own lease, not those of other readers, and
/// restores it at a node that lost it.
#[tokio::test]
async fn shared_lease_is_renewed_by_its_own_majority_and_restored() {
    let bench = Bench::new().await;
    bench.read(3).await;
    bench.until_all_have(&[3]).await;
    bench.forget(2);
    assert_eq!(
        bench.renew_as(reader(3)).await,
        Some(RenewReply::Extended { has_waiters: false })
    );
    bench.until_all_have(&[3]).await;
    // An extension is none if a majority may have had a writer meanwhile.
    bench.forget(1);
    let reply = bench.acquire_as(reader(3), AcquireKind::Extend, TTL).await;
    assert!(is_granted(&reply), "{reply:?}");
    assert_eq!(bench.readers(1), [""; 0], "an extension restores nothing");
    bench.forget(2);
    let reply = bench.acquire_as(reader(3), AcquireKind::Extend, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Busy)), "{reply:?}");
    // Another reader at those nodes proves nothing for this one.
    bench.read(5).await;
    eventually("the other reader is everywhere", PATIENCE, || {
        (0..3).all(|node| bench.readers(node).contains(&bench.tag_of(reader(5))))
    })
    .await;
    assert_eq!(bench.renew_as(reader(3)).await, Some(RenewReply::NotOurs));
    assert!(!bench.store.quorum.holds(reader(3)) && bench.store.quorum.holds(reader(5)));
}

/// The claims of a reader that is cancelled may arrive after its release.
#[tokio::test]
async fn dropped_shared_request_leaves_a_pending_release_at_its_sequencer() {
    let bench = Bench::new().await;
    bench.servers[0].stop();
    tokio::select! {
        biased;
        reply = bench.acquire_as(reader(3), AcquireKind::Enqueue, TTL) => panic!("an answer of a stopped server: {reply:?}"),
        () = tokio::task::yield_now() => {}
    }
    bench.servers[0].cont();
    let pending = [0, 1, 2].map(|node| bench.nodes[node].has_pending_release(reader(3)));
    assert_eq!(pending, [true, false, false]);
}

/// With three nodes that admit two permits each, three holders of one permit have two nodes each.
#[tokio::test]
async fn permits_are_refused_with_the_reason() {
    let bench = Bench::new().await;
    let permits = LockMode::Permits { weight: 1, limit: 2 };
    assert!(
        bench
            .store
            .lacks(permits)
            .is_some_and(|reason| reason.contains("majority"))
    );
    assert_eq!(bench.store.lacks(LockMode::Shared), None);
}
