//! What a node of a quorum grants to a manager whose sequencer is another node.

use super::*;

/// Each node of a quorum votes for one owner and rejects all others. A node that voted for two
/// would let two managers reach a majority.
#[test]
fn claim_takes_a_free_lease_and_no_other_owners() {
    let bench = Bench::new();
    let (one, other) = (owner_tag(1, 2), owner_tag(2, 2));
    assert_eq!(bench.claim(&one, 300_000, 7, 0), [1, 0]);
    assert_eq!(bench.owner().as_ref(), Some(&one));
    bench.assert_left("lease", 300_000);
    assert_eq!(bench.counter(), 7);

    // Another cycle of the same manager is a different owner.
    for other in [other, owner_tag(1, 4)] {
        assert_eq!(bench.claim(&other, 600_000, 9, FLOOR), [0]);
        assert_eq!(bench.owner().as_ref(), Some(&one));
        bench.assert_left("lease", 300_000);
        assert_eq!(bench.counter(), 7, "a refusal raises nothing");
    }
    // A lease of another library may never expire.
    bench.own("another-library", None);
    let reply: Vec<i64> = bench.call(
        bench.scripts.claim.text(),
        &CLAIM_KEYS[..3],
        &[&one, "1000", "9", "0", "take"],
    );
    assert_eq!(reply, [0]);
    assert_eq!(bench.owner().as_deref(), Some("another-library"));
}

/// Regression: a cycle that waited here while this node was the sequencer, and then got the lease
/// through another one, was granted the lease again by its own release.
#[test]
fn claimed_cycle_no_longer_waits() {
    for mode in ["", "-s"] {
        let bench = Bench::new();
        let (me, behind) = (in_mode(1, mode), in_mode(2, mode));
        bench.server.command(&["ZADD", "queue", "1.5", &me, "2.5", &behind]);
        let claimed = match mode {
            "" => bench.claim(&me, 300_000, 7, 0)[0],
            _ => bench.claim_shared(&me, 300_000, 7, "take")[0].unsigned_abs(),
        };
        assert_eq!(claimed, 1, "{mode:?}");
        assert_eq!(
            bench.state().1,
            [behind.as_str(), "2.5"],
            "{mode:?}: the others wait on"
        );
        let released = match mode {
            "" => bench.release(&me, ""),
            _ => bench.release_in_mode(&me),
        };
        assert_eq!(released[0], 1, "{mode:?}: {released:?}");
        let is_mine = bench.owner() == Some(me.clone()) || bench.holders().contains(&me);
        assert!(!is_mine, "{mode:?}: {:?} {:?}", bench.owner(), bench.holders());
    }
}

/// The owner relies on the expiry it was last granted, whatever TTL that request had. A claim that
/// shortened the lease would let the next manager in while the owner still considers its lock
/// valid.
#[test]
fn claim_of_the_owner_moves_the_end_of_its_lease_on_and_never_back() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    for (left, ttl, expected) in [
        (Some(100_000), 300_000, 300_000),
        (Some(300_000), 100_000, 300_000),
        (None, 100_000, 100_000),
    ] {
        bench.own(&me, left);
        let reply = bench.claim(&me, ttl, 0, 0);
        assert_eq!(reply[0], 1, "{reply:?}");
        assert_eq!(bench.owner().as_ref(), Some(&me));
        bench.assert_left("lease", expected);
    }
}

/// A node that lost a lease and took it again as an extension would count as one that held it
/// throughout.
#[test]
fn claim_that_extends_acquires_no_new_lease() {
    let bench = Bench::new();
    let (me, other) = (owner_tag(1, 2), owner_tag(2, 2));
    assert_eq!(bench.extend_claim(&me, 300_000, 7), [0]);
    assert_eq!((bench.owner(), bench.counter()), (None, 0));
    bench.own(&me, Some(100_000));
    assert_eq!(bench.extend_claim(&me, 300_000, 7), [1, 0]);
    bench.assert_left("lease", 300_000);
    assert_eq!(bench.counter(), 7);
    assert_eq!(bench.extend_claim(&other, 600_000, 9), [0]);
    assert_eq!(bench.owner().as_ref(), Some(&me));
}

/// The sequencer issues tokens above all counters of a majority. A node whose counter was lost
/// reports the larger of the floor that managers have seen and its own time, so no later token is
/// below an earlier one.
#[test]
fn claim_reports_a_counter_that_is_never_below_the_floor() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    let claim = |least, floor| {
        let reply = bench.claim(&me, 100_000, least, floor);
        (reply[1], bench.counter())
    };
    // Without a floor the counter is reported unchanged, and raised to the sequencer's token.
    assert_eq!(claim(500, 0), (0, 500));
    assert_eq!(claim(400, 500), (500, 500), "the counter never decreases");
    assert_eq!(claim(600, 500), (500, 600));
    // A counter below the floor was lost: the server's time is above every issued token.
    let time: Vec<u64> = bench.server.query(&["TIME"]);
    let before = FencingToken::from_server_time(time[0], time[1]);
    let (counter, stored) = claim(700, 601);
    let time: Vec<u64> = bench.server.query(&["TIME"]);
    let after = FencingToken::from_server_time(time[0], time[1]);
    assert!((before..=after).contains(&counter), "{before} {counter} {after}");
    assert_eq!(stored, counter);
    // If the server's clock is behind, the floor is above its time.
    assert_eq!(claim(0, FLOOR), (FLOOR, FLOOR));
    assert_eq!(claim(FLOOR + 64, FLOOR), (FLOOR, FLOOR + 64));
}

/// A node admits every reader, and no writer beside them: one majority of each has a node in
/// common.
#[test]
fn shared_claims_exclude_an_exclusive_one_and_the_other_way_round() {
    let bench = Bench::new();
    let (writer, one, other) = (owner_tag(1, 2), in_mode(2, "-s"), in_mode(3, "-s"));
    assert_eq!(bench.claim_shared(&one, 100_000, 7, "take"), [1, 0]);
    assert_eq!(bench.claim_shared(&other, 200_000, 5, "take"), [1, 7]);
    assert_eq!((bench.owner().as_deref(), bench.counter()), (Some(MARKER), 7));
    assert_eq!(bench.holders(), [one.as_str(), &other]);
    assert_eq!(bench.claim(&writer, 300_000, 9, 0), [0]);
    assert_eq!(bench.counter(), 7, "a refusal raises nothing");
    // The last one that leaves takes the marker along.
    assert_eq!(bench.release_in_mode(&one), [1]);
    assert_eq!(bench.claim(&writer, 300_000, 9, 0), [0]);
    assert_eq!(bench.release_in_mode(&other), [1]);
    assert_eq!(bench.claim(&writer, 300_000, 9, 0), [1, 7]);
    assert_eq!((bench.owner().as_ref(), bench.holders()), (Some(&writer), vec![]));
    for kind in ["take", "extend"] {
        assert_eq!(bench.claim_shared(&one, 600_000, 11, kind), [0]);
    }
    assert_eq!((bench.owner(), bench.counter()), (Some(writer), 9));
    assert_eq!(bench.holders(), [""; 0]);
}

/// The marker lasts as long as the last holder, and no claim moves an end back: see the same tests
/// of other requests below.
#[test]
fn shared_claim_moves_ends_on_and_never_back() {
    let bench = Bench::new();
    let (one, other) = (in_mode(2, "-s"), in_mode(3, "-s"));
    let ends = |holder: &str| bench.server.query::<u64>(&["ZSCORE", "holders", holder]) - bench.now();
    let assert_ends = |holder: &str, expected: u64| {
        assert!(ends(holder) <= expected && expected - ends(holder) < SLACK, "{holder}");
    };
    for (holder, ttl, own, all) in [
        (&one, 300_000, 300_000, 300_000),
        (&other, 100_000, 100_000, 300_000),
        (&other, 200_000, 200_000, 300_000),
        (&one, 100_000, 300_000, 300_000),
        (&other, 500_000, 500_000, 500_000),
    ] {
        for kind in ["take", "extend"] {
            assert_eq!(bench.claim_shared(holder, ttl, 0, kind)[0], 1);
            assert_ends(holder, own);
            bench.assert_left("lease", all);
            bench.assert_left("holders", all);
        }
    }
    assert_eq!(bench.claim_shared(&one, 700_000, 0, "extend")[0], 1);
    assert_ends(&one, 700_000);
    assert_ends(&other, 500_000);
    bench.assert_left("lease", 700_000);
    bench.assert_left("holders", 700_000);
}

/// As for an exclusive lease: only a node that has had the lease the whole time may count. Its
/// members are no holders any more if an administrator has deleted the marker, or once they have
/// ended.
#[test]
fn shared_claim_that_extends_acquires_no_new_lease() {
    let bench = Bench::new();
    let (me, other) = (in_mode(2, "-s"), in_mode(3, "-s"));
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "extend"), [0]);
    assert_eq!((bench.owner(), bench.counter()), (None, 0));
    bench.hold(&me, bench.now() + 300_000);
    bench.server.command(&["DEL", "lease"]);
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "extend")[0], 0);
    assert_eq!(bench.holders(), [""; 0]);
    // The members of the set must not become holders again with the next marker.
    bench.hold(&other, bench.now() + 300_000);
    bench.server.command(&["DEL", "lease"]);
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "take")[0], 1);
    assert_eq!(bench.holders(), [me.as_str()]);
    // Its lease has ended, while the marker is still there for another holder.
    bench.hold(&in_mode(4, "-s"), bench.now());
    bench.hold(&me, bench.now());
    bench.hold(&other, bench.now() + 300_000);
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "extend")[0], 0);
    assert_eq!(bench.holders(), [other.as_str()], "none that died is left");
    assert_eq!(bench.claim_shared(&me, 300_000, 7, "take")[0], 1);
    // The lease of another library.
    bench.own("another-library", None);
    assert_eq!(bench.claim_shared(&me, 300_000, 9, "take"), [0]);
    assert_eq!(bench.owner().as_deref(), Some("another-library"));
}
