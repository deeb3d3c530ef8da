//! What is known of a node.

use super::*;
use crate::store::quorum::node::PENDING_RELEASES_MAX;

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

#[tokio::test]
async fn node_is_down_until_it_answers_a_probe_that_began_after_its_last_failure() {
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    assert!(node.is_usable() && node.status().is_none());
    assert!(node.mark_down("broken pipe"));
    let first = node.downs();
    assert!(!node.mark_down("timed out"), "it was down");
    assert!(!node.is_up() && !node.is_usable());
    assert_eq!(node.status(), Some(format!("{}: broken pipe", node.place)));
    node.mark_up(first);
    assert!(!node.is_up(), "it failed again since that probe began");
    node.mark_up(node.downs());
    assert!(node.is_usable() && node.status().is_none());

    node.store.set_vote(false);
    assert!(node.is_up() && !node.is_usable());
    assert!(node.status().unwrap().contains("no vote yet"), "{:?}", node.status());

    assert!(!node.is_foreign());
    node.set_foreign(true);
    assert!(node.is_foreign());
}

#[tokio::test]
async fn pending_releases_are_limited_and_end_with_their_leases() {
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    assert!(node.has_no_pending_releases());
    let count = PENDING_RELEASES_MAX as u64 + 5;
    (1..=count).for_each(|number| node.add_pending_release(release(2 * number), TTL * 100));
    let pending = node.pending_releases();
    assert_eq!(pending.len(), PENDING_RELEASES_MAX);
    assert!(!node.has_no_pending_releases());
    let kept = [5, 6, count].map(|number| node.has_pending_release(Cycle::of(2 * number)));
    assert_eq!(kept, [false, true, true], "the oldest are dropped");
    // Neither takes a place in the queue, nor skips those that wait.
    assert!(
        pending
            .iter()
            .all(|(_, one)| one.requeue.is_none() && !one.nobody_waits)
    );
    for (_, one) in &pending {
        node.remove_pending_release(one);
    }
    assert!(node.has_no_pending_releases());

    node.add_pending_release(release(2), Duration::ZERO);
    while Moment::now() <= node.pending_releases()[0].0 {}
    node.add_pending_release(release(4), TTL * 100);
    node.add_pending_release(release(6), TTL * 100);
    let left = [2, 4, 6].map(|cycle| node.has_pending_release(Cycle::of(cycle)));
    assert_eq!(left, [false, true, true], "the lease of the first has run out");
}
