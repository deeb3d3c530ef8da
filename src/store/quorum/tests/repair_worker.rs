//! The repair worker: when a node is used again, and what becomes of the releases that it has not
//! answered.

use tokio::runtime::Builder;

use super::*;
use crate::store::LATE_MAX;

/// A node that was away is not used before its pending releases are done. With thousands, one after
/// the other took many seconds on a busy machine.
#[tokio::test]
async fn pending_releases_of_a_node_are_sent_together() {
    const COUNT: u64 = 1_000;
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    for number in 0..COUNT {
        let key = LockKey::new(&format!("k{number}")).unwrap();
        node.add_pending_release(
            Release {
                key,
                ..release(2 * number)
            },
            TTL,
        );
    }
    // How often the server has read from a connection: once for each release that it gets alone.
    let reads = || {
        let stats: String = bench.servers[0].query(&["INFO", "stats"]);
        let field = stats
            .lines()
            .find_map(|line| line.strip_prefix("total_reads_processed:"));
        field.unwrap().parse::<u64>().unwrap()
    };
    let before = reads();
    assert!(repair::finish_pending_releases(&bench.store.quorum, node).await);
    let count = reads() - before;
    assert!(node.has_no_pending_releases());
    assert!(count < COUNT / 4, "{count} reads for {COUNT} releases");
}

#[tokio::test]
async fn pending_release_whose_lease_has_run_out_is_not_sent() {
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    node.add_pending_release(release(2), Duration::ZERO);
    while Moment::now() <= node.pending_releases()[0].0 {}
    bench.servers[0].kill();
    assert!(repair::finish_pending_releases(&bench.store.quorum, node).await);
    assert!(node.has_no_pending_releases());
    node.add_pending_release(release(2), TTL * 100);
    assert!(!repair::finish_pending_releases(&bench.store.quorum, node).await);
    assert!(!node.has_no_pending_releases());
}

/// A server that accepts no more connections still has that of the background.
#[tokio::test]
async fn pending_release_is_sent_in_the_background_if_the_callers_cannot_connect() {
    let bench = Bench::new().await.with_node_limit(Duration::from_secs(2));
    let node = &bench.nodes[0];
    bench.servers[0].command(&["CONFIG", "SET", "maxclients", "1"]);
    node.store.leave_callers();
    node.add_pending_release(release(2), TTL * 100);
    assert!(repair::finish_pending_releases(&bench.store.quorum, node).await);
    assert!(node.has_no_pending_releases());
}

/// A node may execute later what it refuses now: it may be loading, or have no memory left.
#[tokio::test]
async fn refused_release_stays_pending() {
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    let queue = node.store.queue_name(&key());
    bench.servers[0].command(&["SET", &queue, "not a queue"]);
    node.add_pending_release(release(2), TTL * 100);
    assert!(repair::finish_pending_releases(&bench.store.quorum, node).await);
    assert!(node.has_pending_release(Cycle::of(2)));
    bench.servers[0].command(&["DEL", &queue]);
    assert!(repair::finish_pending_releases(&bench.store.quorum, node).await);
    assert!(node.has_no_pending_releases());
}

#[tokio::test]
async fn release_is_repeated_until_the_node_has_executed_it_or_its_lease_has_run_out() {
    const LONGEST: Duration = Duration::from_secs(600);
    let bench = Bench::new().await;
    bench.hold(2).await;
    let node = &bench.nodes[0];
    let repeat_at = async |now| repair::send_second_releases(&bench.store.quorum, node, now).await;
    node.store.leave_callers();
    let cut = node.store.last_cut().unwrap();
    node.released(&release(2), 2, LONGEST, cut);
    let due = cut + LATE_MAX;
    repeat_at(due).await;
    assert!(node.due_second_release(due).is_none());
    assert_eq!(bench.owner(0), None);

    node.released(&release(2), 2, LONGEST, cut);
    bench.servers[0].kill();
    repeat_at(due).await;
    // The connection that the server closed may have postponed it.
    let later = due + LATE_MAX;
    repeat_at(later).await;
    let left = node.due_second_release(later).expect("the node has not executed it");
    repeat_at(left.end).await;
    assert!(node.due_second_release(left.end).is_none());
}

/// Regression: after an attempt that lost its vote, the same cycle won the next one. The release
/// that followed the first attempt was repeated and ended the lease of the holder.
#[tokio::test]
async fn release_is_not_repeated_once_its_cycle_is_acquired_again() {
    let bench = Bench::new().await;
    let now = Moment::now();
    for node in &bench.nodes {
        node.store.leave_callers();
        node.released(&release(2), 2, TTL * 100, now);
        // Opens new connections, with which the node loses its vote.
        node.store.ping_callers().await.unwrap();
    }
    bench.set_votes(&[0, 1, 2], true);
    bench.hold(2).await;
    for node in &bench.nodes {
        // Long after the connections were given up, so it is not postponed.
        repair::send_second_releases(&bench.store.quorum, node, now + 3 * LATE_MAX).await;
    }
    let held = (0..bench.nodes.len()).filter(|&node| bench.owner(node) == bench.owner_tag(2));
    assert!(held.count() >= 2, "the lease has no majority");
}

#[tokio::test]
async fn nodes_that_are_down_are_probed_until_they_answer() {
    let bench = Bench::new().await;
    let (pushes, _received) = mpsc::unbounded_channel();
    let worker = tokio::spawn(repair::run(Arc::clone(&bench.store.quorum), pushes));
    for node in &bench.nodes {
        node.mark_down("away");
        eventually("it is up", PATIENCE, || node.is_up()).await;
    }
    worker.abort();
}

/// While the application's runtime is blocked, its connections carry nothing. The first probe gives
/// them up, and the next one finds new ones.
#[test]
fn node_is_used_again_once_the_connections_of_the_callers_answer() {
    let application = Builder::new_current_thread().enable_all().build().unwrap();
    let background = Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let bench = application.block_on(async { Bench::new().await.with_node_limit(Duration::from_secs(2)) });
    let (quorum, node) = (&bench.store.quorum, &bench.nodes[0]);
    node.store.leave_background();
    background.block_on(node.store.connect_background()).unwrap();
    node.mark_down("no answer in time");
    background.block_on(repair::probe_node(quorum, node));
    assert!(!node.is_up(), "requests would still find the old connections");
    application.block_on(repair::probe_node(quorum, node));
    assert!(node.is_up());
}

#[tokio::test]
async fn drain_sends_pending_releases_and_waits_for_those_in_flight() {
    let bench = Bench::new().await;
    bench.hold(2).await;
    let quorum = &bench.store.quorum;
    bench.nodes[0].add_pending_release(release(2), TTL * 100);
    bench.nodes[1].mark_down("away");
    bench.nodes[1].add_pending_release(release(2), TTL * 100);
    repair::drain(quorum).await;
    assert!(bench.nodes[0].has_no_pending_releases());
    assert_eq!(bench.owner(0), None);
    assert!(bench.nodes[1].has_pending_release(Cycle::of(2)), "it is down");

    quorum.releasing.fetch_add(1, Ordering::AcqRel);
    let mut draining = std::pin::pin!(repair::drain(quorum));
    assert!(is_pending(draining.as_mut()).await, "one is in flight");
    quorum.releasing.fetch_sub(1, Ordering::AcqRel);
    draining.await;
}
