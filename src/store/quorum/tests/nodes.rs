//! What is known of a node.

use super::*;
use crate::store::LATE_MAX;
use crate::store::quorum::node::PENDING_RELEASES_MAX;

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

/// After a connection was given up, a claim of a released cycle may still arrive.
#[tokio::test]
async fn release_is_repeated_once_no_claim_of_its_cycle_can_arrive() {
    const NEWEST: u64 = 10;
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    let done = |cycle, at| node.released(&release(cycle), NEWEST, TTL, at);
    done(2, Moment::now());
    assert!(
        node.due_second_release(Moment::now() + LATE_MAX * 3).is_none(),
        "no cut"
    );

    node.store.leave_callers();
    let cut = node.store.last_cut().unwrap();
    let due = cut + LATE_MAX;
    done(2, due);
    done(NEWEST + 2, cut);
    assert!(
        node.due_second_release(due + LATE_MAX * 3).is_none(),
        "nothing can arrive"
    );

    done(4, cut);
    done(6, cut);
    let just_before = Moment::from_nanos(due.as_nanos() - 1);
    assert!(node.due_second_release(just_before).is_none());
    let second = node.due_second_release(due).unwrap();
    assert_eq!((second.release.cycle, second.end), (Cycle::of(4), due + TTL));
    assert!(second.release.requeue.is_none() && !second.release.nobody_waits);
    node.second_release_done(&second, due);
    let other = node.due_second_release(due).unwrap();
    assert_eq!(other.release.cycle, Cycle::of(6));
    node.second_release_done(&second, due);
    assert!(node.due_second_release(due).is_some(), "another one was repeated");
    node.second_release_done(&other, due);
    assert!(node.due_second_release(due).is_none());

    // Another cut postpones it once.
    done(8, cut);
    node.store.ping_callers().await.unwrap();
    node.store.leave_callers();
    assert!(node.store.last_cut().unwrap() > cut);
    assert!(node.due_second_release(due).is_none());
    assert!(node.due_second_release(due + LATE_MAX).is_some());
}

#[tokio::test]
async fn releases_to_repeat_are_limited() {
    let bench = Bench::new().await;
    let node = &bench.nodes[0];
    node.store.leave_callers();
    let cut = node.store.last_cut().unwrap();
    let count = PENDING_RELEASES_MAX as u64 + 1;
    (1..=count).for_each(|number| node.released(&release(2 * number), 2 * count, TTL, cut));
    let due = cut + LATE_MAX;
    let repeats = std::iter::from_fn(|| {
        let second = node.due_second_release(due)?;
        node.second_release_done(&second, due);
        Some(second)
    });
    assert_eq!(repeats.count(), PENDING_RELEASES_MAX);
}
