//! What takes too long to be seen from outside.

use std::time::Duration;

use tokio::sync::mpsc;

use super::ClusterStore;
use crate::endpoint::{Endpoint, EndpointKind};
use crate::identity::ManagerId;
use crate::key::LockKey;
use crate::protocol::{Acquire, AcquireReply, Ask, Cycle, Push};
use crate::store::{LeaseStore, StoreOptions};

#[path = "../../../../tests/support/mod.rs"]
mod support;

fn store(url: &str, random: u64, inbox_idle_seconds: u32) -> ClusterStore {
    let options = StoreOptions {
        timeout: Duration::from_secs(10),
        ..StoreOptions::for_tests(ManagerId::of("h", 1, random))
    };
    let endpoint = Endpoint::parse(url).unwrap();
    let EndpointKind::Cluster { seeds } = endpoint.kind() else {
        panic!("{endpoint} is no cluster")
    };
    ClusterStore::with_idle_limit(seeds, options, inbox_idle_seconds).unwrap()
}

async fn acquire(store: &ClusterStore, ask: Ask) -> AcquireReply {
    let request = Acquire {
        key: LockKey::new("k").unwrap(),
        cycle: Cycle(1),
        ask,
        ttl: Duration::from_secs(600),
        tokens: 1,
    };
    store.acquire(request).await.unwrap().reply
}

#[tokio::test]
async fn an_inbox_that_is_idle_is_given_up_and_who_waits_there_is_told_to_ask() {
    let cluster = support::Cluster::start(3, 0);
    let (holder, waiter) = (store(&cluster.url(), 1, 60), store(&cluster.url(), 2, 1));
    for store in [&holder, &waiter] {
        store.connect().await.unwrap();
    }
    let (sender, mut pushes) = mpsc::unbounded_channel();
    let listening = tokio::spawn(waiter.listen(sender));
    assert_eq!(pushes.recv().await, Some(Push::Resubscribed { slot: None }));
    // A free key needs no inbox; waiting does.
    assert!(matches!(
        acquire(&holder, Ask::Free).await,
        AcquireReply::Granted { .. }
    ));
    assert!(matches!(acquire(&waiter, Ask::Free).await, AcquireReply::Taken));
    assert_eq!(cluster.shard_channels(), [""; 0]);
    for _ in 0..2 {
        assert!(matches!(acquire(&waiter, Ask::Join).await, AcquireReply::Queued(_)));
        assert_eq!(cluster.shard_channels().len(), 1);
        let slot = Some(waiter.slot_of(&LockKey::new("k").unwrap()));
        let told = tokio::time::timeout(support::PATIENCE, pushes.recv()).await.unwrap();
        assert_eq!(told, Some(Push::Resubscribed { slot }));
        assert_eq!(cluster.shard_channels(), [""; 0]);
    }
    drop(pushes);
    listening.await.unwrap();
}
