//! Renewals: which answers they need, and how long they wait for them.

use super::*;

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
