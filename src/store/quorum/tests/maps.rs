//! The shard map of a quorum, and what connecting to its nodes and probing them finds.

use super::*;
use crate::store::{MapState, MapStep};

impl Bench {
    async fn map(&self, step: MapStep) -> Result<MapState, StoreError> {
        self.store.map(step).await
    }

    /// A quorum whose nodes all have the map. Returns the name of its key too.
    async fn with_map() -> (Self, String) {
        let bench = Box::pin(Self::new()).await;
        assert_eq!(bench.map(MapStep::Confirm).await.unwrap(), MapState::Ours);
        let keys: Vec<String> = bench.servers[0].query(&["KEYS", "*"]);
        let [key] = &keys[..] else { panic!("{keys:?}") };
        let key = key.clone();
        (bench, key)
    }

    /// With a limit of one byte, the server refuses every write; zero is no limit.
    fn set_memory_limit(&self, node: usize, bytes: u64) {
        self.servers[node].command(&["CONFIG", "SET", "maxmemory", &bytes.to_string()]);
    }
}

fn is_mismatch<T>(result: &Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::MapMismatch { .. }))
}

fn is_no_majority<T>(result: &Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::Unavailable(why)) if why.to_string().contains("no majority"))
}

#[tokio::test]
async fn map_is_stored_in_steps_at_all_nodes() {
    let bench = Bench::new().await;
    assert!(!bench.store.has_map() && !bench.store.has_one_map());
    assert_eq!(bench.map(MapStep::Read).await.unwrap(), MapState::None);
    assert_eq!(bench.map(MapStep::Reserve).await.unwrap(), MapState::Reserved);
    assert_eq!(bench.map(MapStep::Read).await.unwrap(), MapState::Reserved);
    assert_eq!(bench.map(MapStep::Confirm).await.unwrap(), MapState::Ours);
    assert!(bench.store.has_map() && !bench.store.has_one_map());
    let mut numbers: Vec<String> = (0..3)
        .map(|node| {
            let keys: Vec<String> = bench.servers[node].query(&["KEYS", "*"]);
            let map: String = bench.servers[node].query(&["GET", &keys[0]]);
            map.split("; ").nth(1).unwrap().to_owned()
        })
        .collect();
    numbers.sort();
    assert_eq!(numbers, ["node 1 of 3", "node 2 of 3", "node 3 of 3"]);
}

/// One node without the map is one that the map was removed from, or that lost its data.
#[tokio::test]
async fn map_that_one_node_lacks_is_not_there() {
    let (bench, key) = Bench::with_map().await;
    bench.servers[1].command(&["DEL", &key]);
    assert_eq!(bench.map(MapStep::Read).await.unwrap(), MapState::None);
    assert_eq!(bench.map(MapStep::Confirm).await.unwrap(), MapState::Ours);
}

/// One node with a different map is left out, as long as the others are a majority and have ours.
#[tokio::test]
async fn different_map_at_one_node_is_ignored_if_the_others_have_ours() {
    let (bench, key) = Bench::with_map().await;
    bench.servers[0].command(&["SET", &key, "another map"]);
    assert_eq!(bench.map(MapStep::Read).await.unwrap(), MapState::Ours);
    assert!(bench.nodes[0].is_foreign() && bench.store.has_map());
    let has_map = [0, 1, 2].map(|node| bench.nodes[node].store.has_map());
    assert_eq!(has_map, [false, true, true]);

    // The others lack it.
    bench.servers[1].command(&["DEL", &key]);
    bench.servers[2].command(&["DEL", &key]);
    let read = bench.map(MapStep::Read).await;
    assert!(is_mismatch(&read), "{read:?}");
}

#[tokio::test]
async fn different_maps_at_two_nodes_leave_no_majority_with_ours() {
    let (bench, key) = Bench::with_map().await;
    let map: String = bench.servers[0].query(&["GET", &key]);
    for node in [0, 2] {
        bench.servers[node].command(&["SET", &key, "another map"]);
    }
    let read = bench.map(MapStep::Read).await;
    assert!(is_mismatch(&read), "{read:?}");
    assert!(!bench.store.has_map());
    let probed = bench.store.probe().await;
    assert!(is_mismatch(&probed.reached), "{:?}", probed.reached);
    let renewal = Renewal {
        key: super::key(),
        cycle: Cycle::of(2),
        ttl: TTL,
    };
    let renewed = bench.store.renew(vec![renewal.clone()], TTL).await;
    assert!(is_mismatch(&renewed), "{renewed:?}");
    bench.servers[0].command(&["SET", &key, &map]);
    let renewed = bench.store.renew(vec![renewal], TTL).await;
    assert!(renewed.is_ok(), "{renewed:?}");
}

#[tokio::test]
async fn map_is_neither_read_nor_stored_without_a_majority_of_votes() {
    let bench = Bench::new().await;
    bench.set_votes(&[0, 1], false);
    let stored = bench.map(MapStep::Confirm).await;
    assert!(is_no_majority(&stored), "{stored:?}");
    let keys: Vec<String> = bench.servers[2].query(&["KEYS", "*"]);
    assert_eq!(keys, [""; 0]);
    let read = bench.store.inspect(key()).await;
    assert!(is_no_majority(&read), "{read:?}");
}

/// Most outages are short.
#[tokio::test]
async fn map_is_read_again_if_nodes_stop_answering_meanwhile() {
    let (bench, _) = Bench::with_map().await;
    let bench = bench.with_majority_limit(PATIENCE);
    [0, 1].iter().for_each(|&node| bench.servers[node].kill());
    let (read, ()) = tokio::join!(bench.map(MapStep::Read), bench.come_back([0, 1]));
    assert_eq!(read.unwrap(), MapState::Ours);
}

#[tokio::test]
async fn quorum_connects_to_a_majority() {
    let bench = Bench::new().await;
    bench.servers[1].kill();
    // Its connection breaks.
    bench.map(MapStep::Read).await.unwrap();
    bench.store.connect().await.unwrap();
    assert_eq!([0, 1, 2].map(|node| bench.nodes[node].is_up()), [true, false, true]);
    bench.servers[2].kill();
    let read = bench.map(MapStep::Read).await;
    assert!(is_no_majority(&read), "{read:?}");
    let connected = bench.store.connect().await;
    assert!(is_no_majority(&connected), "{connected:?}");
}

#[tokio::test]
async fn probe_reports_a_refusal_once_too_few_nodes_take_locks() {
    let (bench, key) = Bench::with_map().await;
    let probed = bench.store.probe().await;
    probed.reached.unwrap();
    assert_eq!(probed.times.len(), 3);
    bench.set_memory_limit(0, 1);
    bench.store.probe().await.reached.unwrap();
    bench.set_memory_limit(1, 1);
    let Err(StoreError::Refused(why)) = bench.store.probe().await.reached else {
        panic!("two nodes are out of memory")
    };
    let places = [0, 1].map(|node| bench.nodes[node].place.to_string());
    assert!(places.iter().any(|place| why.to_string().starts_with(place)), "{why}");

    // One different map costs no more than one node.
    for node in [0, 1] {
        bench.set_memory_limit(node, 0);
    }
    bench.servers[0].command(&["SET", &key, "another map"]);
    bench.store.probe().await.reached.unwrap();
}

#[tokio::test]
async fn probe_and_inspection_wait_for_a_majority_that_comes_back_in_time() {
    let bench = Bench::new().await.with_majority_limit(PATIENCE);
    bench.hold(2).await;
    for inspects in [false, true] {
        bench.set_votes(&[0, 1], false);
        let mut asking = std::pin::pin!(async {
            match inspects {
                true => bench.store.inspect(key()).await.map(|seen| seen.holder.is_some()),
                false => bench.store.probe().await.reached.map(|()| true),
            }
        });
        tokio::select! {
            biased;
            asked = &mut asking => panic!("there is no majority: {asked:?}"),
            () = tokio::task::yield_now() => {}
        }
        bench.set_votes(&[0, 1], true);
        assert!(asking.await.unwrap());
    }
}

#[tokio::test]
async fn erased_keys_are_counted_at_all_nodes() {
    let (bench, _) = Bench::with_map().await;
    bench.hold(2).await;
    let counts = (0..3).map(|node| bench.servers[node].query::<u64>(&["DBSIZE"]));
    let count: u64 = counts.sum();
    assert!(count >= 8, "{count}");
    assert_eq!(bench.store.erase().await.unwrap(), count);
}

#[tokio::test]
async fn time_limits_are_parts_of_the_store_timeout() {
    let endpoint = Endpoint::parse("redlock://a,b,c").unwrap();
    let EndpointKind::Redlock { nodes } = endpoint.kind() else {
        panic!("{endpoint} is no quorum")
    };
    for (timeout, node_limit) in [(1_000, 125), (8_000, 250)] {
        let options = StoreOptions {
            timeout: Duration::from_millis(timeout),
            ..StoreOptions::for_tests(ManagerId::of("h", 1, 1))
        };
        let quorum = QuorumStore::new(nodes, &options).unwrap().quorum;
        let limits = [quorum.node_limit, quorum.connect_limit, quorum.majority_limit];
        let expected = [node_limit, timeout / 2, timeout * 2 / 5];
        assert_eq!(limits, expected.map(Duration::from_millis));
    }
}

#[tokio::test]
async fn sequencer_of_a_slot_is_the_node_with_its_number() {
    let bench = Bench::new().await;
    let quorum = &bench.store.quorum;
    for number in [0, 1, 2, 3, 16_381, 16_383] {
        let slot = Slot::new(number).unwrap();
        let order: Vec<&str> = quorum.order(slot).map(|node| &*node.place).collect();
        let expected = [0, 1, 2].map(|index| &*quorum.nodes[(usize::from(number) + index) % 3].place);
        assert_eq!(order, expected);
    }
}

#[tokio::test]
async fn newest_cycle_is_the_largest_for_which_something_was_sent() {
    let bench = Bench::new().await;
    bench.hold(6).await;
    assert_eq!(bench.store.quorum.newest_cycle(), 6);
    let _ = bench.acquire(4, AcquireKind::Try, TTL).await;
    assert_eq!(bench.store.quorum.newest_cycle(), 6);
}

#[tokio::test]
async fn held_cycles_are_forgotten_once_their_leases_have_run_out() {
    let bench = Bench::new().await;
    let quorum = &bench.store.quorum;
    let held = || [2, 4, 6].map(|cycle| quorum.holds(Cycle::of(cycle)));
    let first = Moment::now();
    let later = first + quorum.max_ttl + Duration::from_nanos(1);
    let confirm = |cycle, now| quorum.confirm(Cycle::of(cycle), Vec::new(), now);
    [2, 4].iter().for_each(|&cycle| confirm(cycle, first));
    [4, 6]
        .iter()
        .for_each(|&cycle| quorum.reconfirm(Cycle::of(cycle), later));
    assert_eq!(held(), [true, true, false], "it was never confirmed");
    (3..=HELD_BETWEEN_SWEEPS as u64).for_each(|number| confirm(2 * number, later));
    assert_eq!(held(), [false, true, true]);
}
