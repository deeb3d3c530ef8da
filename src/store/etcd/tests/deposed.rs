//! A leader that was paused, and does not know yet that it was replaced, renews leases from its own
//! memory.

use std::collections::HashMap;

use support::PATIENCE;

use super::*;
use crate::clock::Moment;

const CLUSTERS: usize = 3;
const KEYS: u64 = 12;
/// Longer than the pause, so that the leases have not ended by the count of the paused leader.
const SHORT: Duration = Duration::from_secs(7);
/// How long the leader is paused. Members drop a connection after 5 s of silence, so the leader
/// needs a while to learn of its successor.
const PAUSE: Duration = Duration::from_millis(6_300);
/// When the renewals are sent, after the pause began: the new leader counts the leases from an
/// earlier moment.
const RENEWED_AFTER: Duration = Duration::from_millis(5_300);

fn key(number: u64) -> LockKey {
    LockKey::new(&format!("k{number}")).unwrap()
}

fn request(number: u64, cycle: u64) -> Acquire {
    Acquire {
        key: key(number),
        cycle: Cycle::of(cycle),
        kind: AcquireKind::Enqueue,
        ttl: SHORT,
        tokens: 1,
    }
}

/// In some runs the leader learns of its successor before it answers the first request after the
/// pause, so several clusters run concurrently.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewal_that_only_a_deposed_leader_answered_extends_nothing() {
    let overlaps = futures_util::future::join_all((0..CLUSTERS).map(|_| overlaps())).await;
    assert!(overlaps.iter().all(Vec::is_empty), "two held a key for {overlaps:?}");
}

/// The holders reach only the leader, which is paused, and the waiters reach only the others. By
/// the time a waiter has a key, whatever a renewal promised must have passed. Returns by how much
/// it had not.
async fn overlaps() -> Vec<Duration> {
    let etcd = Etcd::start_members(3).await;
    let leader = etcd.leader().await;
    let others: Vec<String> = (0..3)
        .filter(|&number| number != leader)
        .map(|number| etcd.place(number))
        .collect();
    let store = |manager, hosts: &[String]| {
        let mut options = StoreOptions::for_tests(ManagerId::of("h", 1, manager));
        options.timeout = PATIENCE;
        let store = EtcdStore::new(hosts, None, false, options).unwrap();
        let (sender, receiver) = mpsc::unbounded_channel();
        tokio::spawn(store.run_subscriber(sender));
        (store, receiver)
    };
    let (holder, _pushes) = store(1, &[etcd.place(leader)]);
    let (waiter, mut pushes) = store(2, &others);
    for number in 0..KEYS {
        tokens(holder.acquire(request(number, number)).await.unwrap().reply);
    }
    for number in 0..KEYS {
        let reply = waiter.acquire(request(number, number)).await.unwrap().reply;
        assert!(matches!(reply, AcquireReply::Queued(_)), "{reply:?}");
    }
    let renewals: Vec<Renewal> = (0..KEYS)
        .map(|number| Renewal {
            key: key(number),
            cycle: Cycle::of(number),
            ttl: SHORT,
        })
        .collect();
    // Renews once before the pause, so that the connection for renewals is also from before it.
    let before = holder.renew(renewals.clone(), SHORT).await.unwrap();
    assert!(
        before
            .iter()
            .all(|reply| matches!(reply, Some(RenewReply::Extended { .. })))
    );

    etcd.stop(leader);
    let paused_at = tokio::time::Instant::now();
    tokio::time::sleep_until(paused_at + RENEWED_AFTER).await;
    let sent_at = Moment::now();
    let renewing = tokio::spawn(holder.renew(renewals, PATIENCE));
    tokio::time::sleep_until(paused_at + PAUSE).await;
    etcd.cont(leader);

    let mut entered = HashMap::new();
    let entering = async {
        while entered.len() < KEYS as usize {
            let Some(push) = pushes.recv().await else { break };
            let Push::YourTurn { cycle, .. } = push else { continue };
            let answer = waiter.acquire(request(cycle.number(), cycle.number())).await.unwrap();
            if matches!(answer.reply, AcquireReply::Granted { .. }) {
                entered.entry(cycle.number()).or_insert_with(Moment::now);
            }
        }
    };
    tokio::time::timeout(PATIENCE, entering)
        .await
        .expect("every lease ends");
    let replies = renewing.await.unwrap().unwrap_or_default();
    let mut overlaps = Vec::new();
    for (number, reply) in replies.into_iter().enumerate() {
        let valid_until = match reply {
            Some(RenewReply::Extended { .. }) => sent_at + SHORT.mul_f64(0.98),
            _ => continue,
        };
        let entered = entered[&(number as u64)];
        if entered < valid_until {
            overlaps.push(valid_until.since(entered));
        }
    }
    overlaps
}
