//! Tests of behaviour that takes too long to observe from outside, and test access for the
//! comparison with the reference implementation.

use std::time::Duration;

use tokio::sync::mpsc;

use super::ClusterStore;
use crate::endpoint::{Endpoint, EndpointKind};
use crate::identity::ManagerId;
use crate::key::{LockKey, SLOTS, Slot};
use crate::protocol::{Acquire, AcquireKind, AcquireReply, Cycle, Push, Release};
use crate::store::redis::Compared;
use crate::store::{LeaseStore, Priority, StoreOptions};

fn store(url: &str, manager: ManagerId, inbox_idle_seconds: u32) -> ClusterStore {
    let options = StoreOptions {
        timeout: Duration::from_secs(10),
        ..StoreOptions::for_tests(manager)
    };
    let endpoint = Endpoint::parse(url).unwrap();
    let EndpointKind::Cluster { seeds } = endpoint.kind() else {
        panic!("{endpoint} is not a cluster")
    };
    ClusterStore::with_idle_limit(seeds, options, inbox_idle_seconds).unwrap()
}

/// A connected store, as users get it. The comparison handles its inboxes itself.
pub(crate) async fn for_comparison(url: &str, manager: &ManagerId) -> ClusterStore {
    let store = store(&url.replace("redis://", "redis+cluster://"), manager.clone(), 60);
    store.connect().await.unwrap();
    for number in 0..SLOTS {
        let slot = Slot::new(number).unwrap();
        store.inbox.set_place(slot, store.shared.topology.owner(slot).as_ref());
    }
    store
}

impl Compared for ClusterStore {
    fn set_floor(&self, key: &LockKey, floor: u64) {
        let slot = self.slot_of(key);
        self.shared.token_floor.set(slot, floor);
        // The plain commands, whose use depends on the time, are compared at a primary.
        self.shared.raised.forget();
    }

    fn lease_name(&self, key: &LockKey) -> String {
        self.shared.commands.names.of(key).lease().to_string()
    }

    fn inboxes(&self, keys: &[LockKey]) -> Vec<String> {
        let commands = &self.shared.commands;
        let inbox = |key| commands.names.inbox_in(self.slot_of(key), &commands.manager);
        let mut inboxes: Vec<String> = keys.iter().map(inbox).collect();
        inboxes.dedup();
        inboxes
    }
}

async fn acquire(store: &ClusterStore, kind: AcquireKind) -> AcquireReply {
    let request = Acquire {
        key: LockKey::new("k").unwrap(),
        cycle: Cycle::of(1),
        kind,
        ttl: Duration::from_secs(600),
        tokens: 1,
    };
    store.acquire(request).await.unwrap().reply
}

/// A store whose subscriber runs, while another store holds the key.
async fn waiter_of_a_held_key(
    cluster: &support::Cluster,
    inbox_idle_seconds: u32,
) -> (ClusterStore, mpsc::UnboundedReceiver<Push>, tokio::task::JoinHandle<()>) {
    let of = |random, idle| store(&cluster.url(), ManagerId::of("h", 1, random), idle);
    let (holder, waiter) = (of(1, 60), of(2, inbox_idle_seconds));
    for store in [&holder, &waiter] {
        store.connect().await.unwrap();
    }
    let (sender, mut pushes) = mpsc::unbounded_channel();
    let listening = tokio::spawn(waiter.run_subscriber(sender));
    assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    assert!(matches!(
        acquire(&holder, AcquireKind::Fast).await,
        AcquireReply::Granted { .. }
    ));
    (waiter, pushes, listening)
}

#[tokio::test]
async fn idle_inbox_is_dropped_and_its_waiters_are_notified_to_retry() {
    let cluster = support::Cluster::start(3, 0);
    // Whole seconds are counted, and the reply to the waiter may take one on a busy machine.
    let (waiter, mut pushes, listening) = waiter_of_a_held_key(&cluster, 2).await;
    // Acquiring a free key needs no inbox; waiting does.
    assert!(matches!(acquire(&waiter, AcquireKind::Fast).await, AcquireReply::Taken));
    assert_eq!(cluster.shard_channels(), [""; 0]);
    for _ in 0..2 {
        assert!(matches!(
            acquire(&waiter, AcquireKind::Enqueue).await,
            AcquireReply::Queued(_)
        ));
        assert_eq!(cluster.shard_channels().len(), 1);
        let slot = Some(waiter.slot_of(&LockKey::new("k").unwrap()));
        let told = tokio::time::timeout(support::PATIENCE, pushes.recv()).await.unwrap();
        assert_eq!(told, Some(Push::Resubscribed { slot }));
        assert_eq!(cluster.shard_channels(), [""; 0]);
    }
    drop(pushes);
    listening.await.unwrap();
}

#[tokio::test]
async fn inbox_at_a_node_missing_from_the_topology_is_opened_again() {
    let cluster = support::Cluster::start(3, 0);
    let (waiter, mut pushes, listening) = waiter_of_a_held_key(&cluster, 60).await;
    assert!(matches!(
        acquire(&waiter, AcquireKind::Enqueue).await,
        AcquireReply::Queued(_)
    ));
    let inbox = cluster.shard_channels();
    assert_eq!(inbox.len(), 1);
    // A node that has just joined knows few others.
    waiter.shared.topology.replace(&[]);
    let slot = Some(waiter.slot_of(&LockKey::new("k").unwrap()));
    let told = tokio::time::timeout(support::PATIENCE, pushes.recv()).await.unwrap();
    assert_eq!(told, Some(Push::Resubscribed { slot }));
    assert_eq!(cluster.shard_channels(), inbox);
    drop(pushes);
    listening.await.unwrap();
}

/// The plain commands must not be trusted if the counter was lost after the script. Whether they or
/// a script are used depends on the time, but the tokens must not. The lease is extended, for which
/// no inbox is needed.
#[tokio::test]
async fn lost_counter_gives_no_smaller_token() {
    let cluster = support::Cluster::start(1, 0);
    let store = store(&cluster.url(), ManagerId::of("h", 1, 1), 60);
    store.connect().await.unwrap();
    let (sender, mut pushes) = mpsc::unbounded_channel();
    let _listening = tokio::spawn(store.run_subscriber(sender));
    assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    let key = LockKey::new("k").unwrap();
    let counter = store.shared.commands.names.of(&key).counter().to_string();
    let node = &cluster.nodes()[0];
    let (mut largest, mut rounds) = (0, 0);
    // On a busy machine the plain commands are often too late to be used.
    while rounds < 20 || node.calls("incrby") == 0 {
        rounds += 1;
        assert!(rounds < 1_000, "no plain command was sent");
        let AcquireReply::Granted { tokens, .. } = acquire(&store, AcquireKind::Fast).await else {
            panic!("the key is free");
        };
        assert!(tokens.first() > largest, "{} after {largest}", tokens.first());
        largest = tokens.last();
        let release = Release {
            key: key.clone(),
            cycle: Cycle::of(1),
            requeue: None,
            nobody_waits: true,
            tokens: 1,
            retire_until: None,
        };
        assert!(store.release(Priority::Foreground, release).await.unwrap().reply.held);
        node.command(&["DEL", &counter]);
    }
    assert_eq!(cluster.shard_channels(), [""; 0]);
}
