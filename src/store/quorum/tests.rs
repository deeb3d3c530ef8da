//! Which answers count in a quorum, on real servers whose votes a test gives and takes.

mod maps;
mod model;
mod nodes;
mod releases;
mod renewals;
mod repair_worker;
mod shared;

use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use support::RedisServer;
use support::proxy::Proxy;
use support::wait::{PATIENCE, eventually};

use super::*;
use crate::endpoint::{Endpoint, EndpointKind};
use crate::fence::TokenBlock;
use crate::identity::ManagerId;
use crate::protocol::AcquireKind;

const TTL: Duration = Duration::from_secs(5);
/// The year 2035 on the servers' clocks, as a token: no counter is raised to their time.
const FLOOR: u64 = 10 * 365 * 24 * 3600 * 8_000_000;
/// The lease of the key [`key`] on a server.
const LEASE: &str = "lock:k";

fn key() -> LockKey {
    LockKey::new("k").unwrap()
}

/// A release behind which the next cycle enqueues.
fn release(cycle: u64) -> Release {
    Release {
        key: key(),
        cycle: Cycle::of(cycle),
        requeue: Some(Cycle::of(cycle + 2)),
        tokens: 4,
        nobody_waits: true,
        retire_until: None,
    }
}

fn renewal(cycle: Cycle) -> Renewal {
    Renewal {
        key: key(),
        cycle,
        ttl: TTL,
    }
}

/// A quorum of three, in the order in which they are the key's sequencer. All have a vote.
struct Bench {
    store: QuorumStore,
    nodes: [Arc<Node>; 3],
    servers: [RedisServer; 3],
    manager: ManagerId,
}

impl Bench {
    async fn new() -> Self {
        let servers: Vec<_> = (0..3).map(|_| RedisServer::start()).collect();
        let places: Vec<_> = servers.iter().map(RedisServer::address).collect();
        Self::of(servers, &places).await
    }

    /// With a proxy in front of each server, in the order of the nodes.
    async fn behind_proxies() -> (Self, [Proxy; 3]) {
        let servers: Vec<_> = (0..3).map(|_| RedisServer::start()).collect();
        let mut proxies: Vec<_> = servers.iter().map(|server| Proxy::start(server.address())).collect();
        let places: Vec<_> = proxies.iter().map(Proxy::address).collect();
        let bench = Self::of(servers, &places).await;
        let proxies = [0, 1, 2].map(|index| {
            let is_it = |proxy: &Proxy| proxy.address() == bench.nodes[index].place;
            proxies.swap_remove(proxies.iter().position(is_it).unwrap())
        });
        (bench, proxies)
    }

    /// Nodes that are reached at these places.
    async fn of(servers: Vec<RedisServer>, places: &[String]) -> Self {
        let endpoint = Endpoint::parse(&format!("redlock://{}", places.join(","))).unwrap();
        let EndpointKind::Redlock { nodes } = endpoint.kind() else {
            panic!("{endpoint} is no quorum")
        };
        let manager = ManagerId::of("h", 1, 1);
        let options = StoreOptions {
            timeout: PATIENCE,
            ..StoreOptions::for_tests(manager.clone())
        };
        let mut store = QuorumStore::new(nodes, &options).unwrap();
        let limits = Arc::get_mut(&mut store.quorum).unwrap();
        // A late answer on a loaded machine is no outage here, and what must fail need not be tried
        // for long.
        (limits.node_limit, limits.majority_limit) = (PATIENCE / 2, Duration::from_millis(200));
        limits.claim_again_for = Duration::ZERO;
        store.connect().await.unwrap();
        // A connection that is opened later would report the servers' uptime, on which their votes
        // depend.
        store.connect_background().await.unwrap();
        let quorum = &store.quorum;
        let order: Vec<_> = quorum.order(quorum.slot(&key())).map(Arc::clone).collect();
        let nodes: [Arc<Node>; 3] = order.try_into().unwrap_or_else(|_| panic!("not three nodes"));
        let mut servers: Vec<_> = servers.into_iter().map(Some).collect();
        let servers = [0, 1, 2].map(|index| {
            let place = places.iter().position(|place| *place == nodes[index].place);
            servers[place.unwrap()].take().unwrap()
        });
        nodes.iter().for_each(|node| node.store.set_vote(true));
        Self {
            store,
            nodes,
            servers,
            manager,
        }
    }

    /// Requests that find no majority are tried again for this long.
    fn with_majority_limit(mut self, limit: Duration) -> Self {
        Arc::get_mut(&mut self.store.quorum).unwrap().majority_limit = limit;
        self
    }

    /// A node that does not answer for this long is down.
    fn with_node_limit(mut self, limit: Duration) -> Self {
        Arc::get_mut(&mut self.store.quorum).unwrap().node_limit = limit;
        self
    }

    /// A cycle that has its turn claims nodes again for this long.
    fn with_claim_again_for(mut self, limit: Duration) -> Self {
        Arc::get_mut(&mut self.store.quorum).unwrap().claim_again_for = limit;
        self
    }

    fn set_votes(&self, nodes: &[usize], has: bool) {
        nodes.iter().for_each(|&node| self.nodes[node].store.set_vote(has));
    }

    /// Once these nodes are found down, starts their servers again. They are used at once.
    async fn come_back(&self, nodes: [usize; 2]) {
        while nodes.iter().any(|&node| self.nodes[node].is_up()) {
            tokio::task::yield_now().await;
        }
        for node in nodes {
            self.servers[node].restart();
            self.nodes[node].mark_up(self.nodes[node].downs());
        }
        self.set_votes(&nodes, true);
    }

    fn set_counter(&self, node: usize, count: u64) {
        let name = self.nodes[node].store.counter_name(&key());
        self.servers[node].command(&["SET", &name, &count.to_string()]);
    }

    async fn acquire(&self, cycle: u64, kind: AcquireKind, ttl: Duration) -> Result<AcquireReply, StoreError> {
        self.acquire_as(Cycle::of(cycle), kind, ttl).await
    }

    async fn acquire_as(&self, cycle: Cycle, kind: AcquireKind, ttl: Duration) -> Result<AcquireReply, StoreError> {
        let request = Acquire {
            key: key(),
            cycle,
            kind,
            ttl,
            tokens: 4,
        };
        self.store.acquire(request).await.map(|answer| answer.reply)
    }

    /// Acquires the lock for that cycle.
    async fn hold(&self, cycle: u64) -> TokenBlock {
        match self.acquire(cycle, AcquireKind::Enqueue, TTL).await {
            Ok(AcquireReply::Granted { tokens, .. }) => tokens,
            other => panic!("no lock but {other:?}"),
        }
    }

    async fn renew(&self, cycle: u64) -> Option<RenewReply> {
        self.renew_as(Cycle::of(cycle)).await
    }

    async fn renew_as(&self, cycle: Cycle) -> Option<RenewReply> {
        self.store.renew(vec![renewal(cycle)], TTL).await.unwrap()[0]
    }

    /// The owner of the lease at that node.
    fn owner(&self, node: usize) -> Option<String> {
        self.servers[node].query(&["GET", LEASE])
    }

    fn owner_tag(&self, cycle: u64) -> Option<String> {
        Some(self.manager.owner_tag(Cycle::of(cycle)).to_string())
    }

    /// The counter of the key's slot at that node.
    fn counter(&self, node: usize) -> u64 {
        let name = self.nodes[node].store.counter_name(&key());
        self.servers[node]
            .query::<Option<u64>>(&["GET", &name])
            .unwrap_or_default()
    }

    /// Gives the lease at that node to another owner.
    fn take(&self, node: usize) {
        self.servers[node].command(&["SET", LEASE, "another-library"]);
    }
}

/// Whether the future is still pending after it was polled once.
async fn is_pending(mut future: Pin<&mut impl Future>) -> bool {
    std::future::poll_fn(|context| Poll::Ready(future.as_mut().poll(context).is_pending())).await
}

fn is_granted(reply: &Result<AcquireReply, StoreError>) -> bool {
    matches!(reply, Ok(AcquireReply::Granted { .. }))
}

/// A node that restarted may have forgotten a lease that another manager still has. If its claim
/// counted, two managers could each have a majority.
#[tokio::test]
async fn claim_at_a_node_without_a_vote_does_not_count() {
    let bench = Bench::new().await;
    bench.take(1);
    bench.nodes[2].store.set_vote(false);
    for (kind, cycle) in [(AcquireKind::Fast, 2), (AcquireKind::Try, 4), (AcquireKind::Enqueue, 6)] {
        let reply = bench.acquire(cycle, kind, TTL).await;
        let is_right = match kind {
            AcquireKind::Fast => matches!(reply, Ok(AcquireReply::Taken)),
            AcquireKind::Try => matches!(reply, Ok(AcquireReply::Busy)),
            AcquireKind::Enqueue | AcquireKind::Extend => matches!(reply, Ok(AcquireReply::Queued(_))),
        };
        assert!(is_right, "{kind:?}: {reply:?}");
        assert_eq!([bench.owner(0), bench.owner(2)], [None, None], "nothing is left behind");
    }
    // With its vote there is a majority.
    bench.nodes[2].store.set_vote(true);
    bench.hold(8).await;
}

/// The sequencer restarts between the moment at which it is chosen and its answer. It may have
/// forgotten the owner, so that answer is no vote, and the next node becomes the sequencer.
#[tokio::test]
async fn reply_of_a_sequencer_that_lost_its_vote_does_not_count() {
    let bench = Bench::new().await;
    bench.take(2);
    let sequencer = &bench.servers[0];
    sequencer.stop();
    let mut acquiring = std::pin::pin!(bench.acquire(2, AcquireKind::Enqueue, TTL));
    tokio::select! {
        biased;
        reply = &mut acquiring => panic!("an answer of a stopped server: {reply:?}"),
        () = tokio::task::yield_now() => {}
    }
    // The request is in flight.
    bench.nodes[0].store.set_vote(false);
    sequencer.cont();
    let reply = acquiring.await;
    assert!(
        bench.nodes[0].has_pending_release(Cycle::of(2)),
        "it may have the lease"
    );
    assert!(
        matches!(reply, Ok(AcquireReply::Queued(_))),
        "the second node alone is no majority: {reply:?}"
    );
}

/// The first node is asked, but does not lead to a lock. Whatever it has of the cycle is released
/// later, and until then its replies about the cycle do not count. The second node takes its place.
#[tokio::test]
async fn node_that_refuses_is_skipped_and_gets_a_pending_release() {
    let bench = Bench::new().await;
    bench.servers[0].command(&["SET", &bench.nodes[0].store.queue_name(&key()), "not a queue"]);
    bench.hold(2).await;
    assert_eq!(bench.owner(1), bench.owner_tag(2));
    assert_eq!(bench.owner(2), bench.owner_tag(2));
    let pending = [0, 1, 2].map(|node| bench.nodes[node].has_pending_release(Cycle::of(2)));
    assert_eq!(pending, [true, false, false]);
    assert_eq!(bench.owner(0), None, "it is not claimed either");
    assert!(bench.store.quorum.holds(Cycle::of(2)));
}

/// Most outages are short: a request waits for a majority for some time, and not longer.
#[tokio::test]
async fn request_waits_for_a_majority_that_comes_back_in_time() {
    let bench = Bench::new().await;
    let set_votes = |has| bench.nodes[1..].iter().for_each(|node| node.store.set_vote(has));
    set_votes(false);
    let reply = bench.acquire(2, AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Err(StoreError::Unavailable(_))), "{reply:?}");

    let bench = bench.with_majority_limit(PATIENCE);
    let (reply, ()) = tokio::join!(bench.acquire(4, AcquireKind::Enqueue, TTL), async {
        tokio::task::yield_now().await;
        bench.nodes[1..].iter().for_each(|node| node.store.set_vote(true));
    });
    assert!(is_granted(&reply), "{reply:?}");
}

/// Only the first attempt finds that the nodes are down.
#[tokio::test]
async fn acquire_is_sent_again_until_a_majority_has_answered() {
    let bench = Bench::new().await.with_majority_limit(PATIENCE);
    [1, 2].iter().for_each(|&node| bench.servers[node].kill());
    let outage = async {
        bench.come_back([1, 2]).await;
        // Until then their votes do not count.
        for node in &bench.nodes[1..] {
            assert!(repair::finish_pending_releases(&bench.store.quorum, node).await);
        }
    };
    let (reply, ()) = tokio::join!(bench.acquire(2, AcquireKind::Enqueue, TTL), outage);
    assert!(is_granted(&reply), "{reply:?}");
}

/// The nodes count the TTL from the moment they are claimed. If the majority takes as long as the
/// lease lasts, the first of them may have another owner by then.
#[tokio::test]
async fn majority_that_came_too_late_is_no_lock() {
    let bench = Bench::new().await;
    // Two milliseconds are subtracted for clocks that run at different speeds, which leaves nothing
    // of these.
    for millis in [1, 2] {
        let reply = bench
            .acquire(2, AcquireKind::Enqueue, Duration::from_millis(millis))
            .await;
        assert!(matches!(reply, Err(StoreError::Unavailable(_))), "{reply:?}");
    }
    assert!(!bench.store.quorum.holds(Cycle::of(2)));
    bench.hold(4).await;
    for millis in [1, 2] {
        let extended = bench
            .acquire(4, AcquireKind::Extend, Duration::from_millis(millis))
            .await;
        assert!(matches!(extended, Err(StoreError::Unavailable(_))), "{extended:?}");
    }
}

/// A pending release of the cycle may end the lease right after the node has extended it.
#[tokio::test]
async fn extension_at_a_node_with_a_pending_release_does_not_count() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    bench.nodes[2].mark_down("away");
    assert!(is_granted(&bench.acquire(2, AcquireKind::Extend, TTL).await));
    bench.nodes[1].add_pending_release(release(2), TTL);
    let extended = bench.acquire(2, AcquireKind::Extend, TTL).await;
    assert!(matches!(extended, Err(StoreError::Unavailable(_))), "{extended:?}");
}

/// The application's runtime runs nothing, so requests must not use its connections any more.
#[tokio::test]
async fn connections_of_the_application_are_given_up_at_all_nodes() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    bench.store.leave_app_runtime();
    let cuts = [0, 1, 2].map(|node| bench.nodes[node].store.last_cut().is_some());
    assert_eq!(cuts, [true; 3]);
}

/// Another manager got its tokens from another sequencer, whose counter is ahead of this one's.
/// Tokens of this counter would be below those that a resource has already seen, or the same.
#[tokio::test]
async fn tokens_are_above_the_counters_of_a_majority() {
    for ahead in [1, 2, 1_000_000] {
        let bench = Bench::new().await;
        bench.set_counter(0, FLOOR);
        for node in [1, 2] {
            bench.set_counter(node, FLOOR + ahead);
        }
        let tokens = bench.hold(2).await;
        assert_eq!((tokens.first(), tokens.last()), (FLOOR + ahead + 1, FLOOR + ahead + 4));
        // The next manager, at another sequencer, must learn of it from any majority.
        let count = [0, 1, 2].map(|node| bench.counter(node));
        let knowing = count.iter().filter(|&&count| count >= tokens.last()).count();
        assert!(knowing >= 2, "{count:?}");
    }
}

/// The next node becomes the sequencer and has lost its counter. The manager itself has seen larger
/// tokens.
#[tokio::test]
async fn tokens_of_another_sequencer_are_above_earlier_tokens() {
    let bench = Bench::new().await;
    bench.set_counter(0, FLOOR);
    let first = bench.hold(2).await;
    for server in &bench.servers[1..] {
        server.command(&["FLUSHALL"]);
    }
    bench.servers[0].command(&["DEL", LEASE]);
    bench.nodes[0].store.set_vote(false);
    let second = bench.hold(4).await;
    assert!(second.first() > first.last(), "{first:?} {second:?}");
}

/// The sequencer's vote is counted once, however often it reports that the lease is there.
#[tokio::test]
async fn sequencer_alone_is_no_majority() {
    let bench = Bench::new().await.with_node_limit(Duration::from_millis(200));
    bench.servers[1].stop();
    bench.servers[2].kill();
    let reply = bench.acquire(2, AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Err(StoreError::Unavailable(_))), "{reply:?}");
    assert!(!bench.nodes[1].is_up() && !bench.nodes[2].is_up());
    assert!(bench.nodes[1].has_pending_release(Cycle::of(2)) && bench.nodes[2].has_pending_release(Cycle::of(2)));
    bench.servers[1].cont();
}

/// A task may be cancelled at any time. What it has sent is recorded, so that a release follows.
#[tokio::test]
async fn request_dropped_midway_leaves_a_pending_release_at_its_sequencer() {
    let bench = Bench::new().await;
    bench.servers[0].stop();
    tokio::select! {
        biased;
        reply = bench.acquire(2, AcquireKind::Enqueue, TTL) => panic!("an answer of a stopped server: {reply:?}"),
        () = tokio::task::yield_now() => {}
    }
    bench.servers[0].cont();
    assert_eq!(
        [0, 1, 2].map(|node| bench.nodes[node].has_pending_release(Cycle::of(2))),
        [true, false, false]
    );
}

#[tokio::test]
async fn key_of_another_owner_at_the_sequencer_is_reported_for_each_request_kind() {
    let bench = Bench::new().await;
    bench.take(0);
    assert!(matches!(
        bench.acquire(2, AcquireKind::Fast, TTL).await,
        Ok(AcquireReply::Taken)
    ));
    assert!(matches!(
        bench.acquire(4, AcquireKind::Try, TTL).await,
        Ok(AcquireReply::Busy)
    ));
    let reply = bench.acquire(6, AcquireKind::Enqueue, TTL).await;
    assert!(
        matches!(reply, Ok(AcquireReply::Queued(position)) if position.owner_foreign),
        "{reply:?}"
    );
    assert_eq!(
        [1, 2].map(|node| bench.owner(node)),
        [None, None],
        "the others are not asked"
    );
}

/// An extension that finds no majority must not release what the nodes have: the holder still
/// relies on it, until it learns of the loss.
#[tokio::test]
async fn extension_without_a_majority_releases_nothing() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    for node in [1, 2] {
        bench.take(node);
    }
    let reply = bench.acquire(2, AcquireKind::Extend, TTL).await;
    assert!(matches!(reply, Ok(AcquireReply::Busy)), "{reply:?}");
    assert_eq!(bench.owner(0), bench.owner_tag(2));
}

/// If every node refuses, the application receives the reason.
#[tokio::test]
async fn refusal_of_all_nodes_is_reported_with_its_reason() {
    let bench = Bench::new().await;
    for (node, server) in bench.nodes.iter().zip(&bench.servers) {
        server.command(&["SET", &node.store.queue_name(&key()), "not a queue"]);
    }
    let reply = bench.acquire(2, AcquireKind::Enqueue, TTL).await;
    assert!(matches!(reply, Err(StoreError::Refused(_))), "{reply:?}");
}

/// A node that lost its data gets the lease again with the next renewal. Its counter must not start
/// again: it may be the sequencer for the next manager.
#[tokio::test]
async fn restored_lease_brings_a_counter_that_is_not_below_earlier_tokens() {
    let bench = Bench::new().await;
    let tokens = bench.hold(2).await;
    bench.servers[2].command(&["FLUSHALL"]);
    assert_eq!(bench.renew(2).await, Some(RenewReply::Extended { has_waiters: false }));
    eventually("the lease is restored", PATIENCE, || {
        bench.owner(2) == bench.owner_tag(2)
    })
    .await;
    assert!(bench.counter(2) >= tokens.last(), "{} {tokens:?}", bench.counter(2));
}

/// Only a majority of nodes with a vote proves that a lease is still ours, and only refusals prove
/// that it is not.
#[tokio::test]
async fn renewal_counts_no_node_without_a_vote() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    bench.take(1);
    assert_eq!(bench.renew(2).await, Some(RenewReply::Extended { has_waiters: false }));
    bench.nodes[2].store.set_vote(false);
    assert_eq!(bench.renew(2).await, None, "one for, one against, one without a vote");
    assert!(bench.store.quorum.holds(Cycle::of(2)));
    bench.nodes[2].store.set_vote(true);
    bench.take(2);
    assert_eq!(bench.renew(2).await, Some(RenewReply::NotOurs));
    assert!(!bench.store.quorum.holds(Cycle::of(2)));
}

/// If the nodes restart one after another, a majority may have the lease again that did not have it
/// the whole time. Another cycle may have held the lock in between. The extension must then report
/// that, and the lock is lost.
#[tokio::test]
async fn extension_without_a_majority_that_kept_the_lease_is_none() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    for (lost, is_kept) in [
        (&[1][..], true),
        (&[0], true),
        (&[1, 2], false),
        (&[0, 2], false),
        (&[0, 1, 2], false),
    ] {
        for server in &bench.servers {
            server.command(&["SET", LEASE, &bench.owner_tag(2).unwrap(), "PX", "60000"]);
        }
        for &node in lost {
            bench.servers[node].command(&["DEL", LEASE]);
        }
        // Nor may a node that lost the lease count as one that kept it the second time.
        for _ in 0..2 {
            let reply = bench.acquire(2, AcquireKind::Extend, TTL).await;
            match reply {
                Ok(AcquireReply::Granted { extended, .. }) => assert!(extended && is_kept, "{lost:?}"),
                Ok(AcquireReply::Busy) => assert!(!is_kept, "{lost:?}"),
                other => panic!("{lost:?}: {other:?}"),
            }
            for &node in lost {
                assert_eq!(bench.owner(node), None, "{lost:?}");
            }
        }
    }
}

/// One node missed the claim, or has another owner, and one gives no answer. The lease may still
/// have a majority, so it is not lost: that is known only once the silent node has refused.
#[tokio::test]
async fn extension_is_no_loss_while_a_majority_may_have_the_lease() {
    let takes: [fn(&Bench, usize); 2] = [
        |bench, node| drop(bench.servers[node].command(&["DEL", LEASE])),
        Bench::take,
    ];
    for take in takes {
        for (without, silent) in [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)] {
            let bench = Bench::new().await.with_node_limit(Duration::from_millis(200));
            bench.hold(2).await;
            // A claim returns once two nodes have granted it.
            eventually("all have it", PATIENCE, || {
                (0..3).all(|node| bench.owner(node) == bench.owner_tag(2))
            })
            .await;
            take(&bench, without);
            bench.servers[silent].stop();
            for _ in 0..2 {
                let reply = bench.acquire(2, AcquireKind::Extend, TTL).await;
                assert!(
                    matches!(reply, Err(StoreError::Unavailable(_))),
                    "{without} {silent}: {reply:?}"
                );
            }
            bench.servers[silent].cont();
            assert!(bench.store.quorum.holds(Cycle::of(2)));
            bench.nodes[silent].mark_up(bench.nodes[silent].downs());
            let bench = bench.with_node_limit(PATIENCE);
            let reply = bench.acquire(2, AcquireKind::Extend, TTL).await;
            assert!(
                matches!(reply, Ok(AcquireReply::Granted { extended: true, .. })),
                "{without} {silent}: {reply:?}"
            );
        }
    }
}

/// A lease may last no longer than a restarted node stays without a vote.
#[tokio::test]
async fn ttl_above_the_longest_is_refused_and_claims_nothing() {
    let bench = Bench::new().await;
    let longest = bench.store.quorum.max_ttl;
    let reply = bench
        .acquire(2, AcquireKind::Enqueue, longest + Duration::from_millis(1))
        .await;
    assert!(matches!(reply, Err(StoreError::Refused(_))), "{reply:?}");
    assert_eq!([0, 1, 2].map(|node| bench.owner(node)), [None, None, None]);
    let reply = bench.acquire(2, AcquireKind::Enqueue, longest).await;
    assert!(is_granted(&reply), "{reply:?}");
}
