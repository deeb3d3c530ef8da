//! Shared holders and holders of permits: when their leases and the marker end.

use super::*;

/// If it ended before, an exclusive request could take the lease beside a holder. If it ended
/// later, nobody could take a key that nobody holds.
#[test]
fn marker_ends_with_the_lease_of_the_last_holder() {
    let bench = Bench::new();
    let all = [(1, 100_000), (2, 500_000), (3, 300_000)].map(|(manager, ttl)| (in_mode(manager, "-s"), ttl));
    let assert_ends = |expected| {
        assert_eq!(bench.owner().as_deref(), Some(MARKER));
        bench.assert_left("lease", expected);
        bench.assert_left("holders", expected);
    };
    for ((holder, ttl), ends) in all.iter().zip([100_000, 500_000, 500_000]) {
        assert_eq!(bench.acquire_in_mode(holder, *ttl, "try")[0], 1);
        assert_ends(ends);
    }
    // A renewal moves it on, if that is needed, and never back.
    for (ttl, ends) in [(200_000, 500_000), (600_000, 600_000), (100_000, 600_000)] {
        assert_eq!(bench.renew_in_mode(&all[0].0, ttl), [1]);
        assert_ends(ends);
    }
    // So does an extension.
    for (ttl, ends) in [(100_000, 600_000), (700_000, 700_000)] {
        assert_eq!(bench.acquire_in_mode(&all[0].0, ttl, "extend")[3], 1);
        assert_ends(ends);
    }
    assert_eq!(bench.release_in_mode(&all[0].0), [1]);
    assert_ends(500_000);
    assert_eq!(bench.release_in_mode(&all[2].0), [1]);
    assert_ends(500_000);
    assert_eq!(bench.release_in_mode(&all[1].0), [1]);
    assert_eq!((bench.owner(), bench.holders()), (None, vec![]));
}

/// A holder that died leaves its member. By the server's clock it ends, and nobody has to wait for
/// it any longer, while the marker lasts for another holder.
#[test]
fn holder_whose_lease_has_ended_is_not_counted() {
    let bench = Bench::new();
    let (dead, other, me) = (in_mode(1, "-p2-2"), in_mode(2, "-s"), in_mode(3, "-p1-2"));
    bench.hold(&dead, bench.now() + 100_000);
    bench.hold(&other, bench.now() + 200_000);
    assert_eq!(bench.acquire_in_mode(&me, 100_000, "try"), [0]);
    bench.hold(&dead, bench.now());
    assert_eq!(bench.renew_in_mode(&dead, 100_000), [0]);
    assert_eq!(bench.renew_holder_alone(&dead, 100_000), [0]);
    assert_eq!(bench.acquire_in_mode(&dead, 100_000, "extend"), [0]);
    assert_eq!(bench.holders(), [other.as_str()]);
    assert_eq!(bench.acquire_in_mode(&me, 100_000, "try")[0], 1);
    assert_eq!(bench.holders(), [me.as_str(), other.as_str()]);
    // The lease of the last one ends while the marker is still there.
    for holder in [&me, &other] {
        bench.hold(holder, bench.now());
    }
    let exclusive = owner_tag(4, 2);
    assert_eq!(bench.acquire_in_mode(&exclusive, 100_000, "try")[0], 1);
    assert_eq!((bench.owner(), bench.holders()), (Some(exclusive), vec![]));
}

/// An administrator deletes the lease, or another library overwrites it. The members of the set
/// must not become holders again with the next marker.
#[test]
fn holders_whose_marker_is_gone_have_lost_the_key() {
    let bench = Bench::new();
    let (before, next) = (in_mode(1, "-s"), in_mode(2, "-s"));
    for overwritten in [false, true] {
        bench.hold(&before, bench.now() + 300_000);
        bench.server.command(&["DEL", "lease"]);
        if overwritten {
            bench.own("another-library", Some(100_000));
        }
        assert_eq!(bench.renew_in_mode(&before, 100_000), [0]);
        assert_eq!(bench.acquire_in_mode(&before, 100_000, "extend"), [0]);
        assert_eq!(bench.holders(), [""; 0]);
        let reply = bench.acquire_in_mode(&next, 100_000, "try");
        let expected: &[&str] = if overwritten { &[] } else { &[&next] };
        assert_eq!(reply[0], i64::from(!overwritten));
        assert_eq!(bench.holders(), expected);
    }
}

/// An administrator deletes the set of the holders, but not the marker.
#[test]
fn holders_whose_set_is_gone_leave_the_key_to_the_waiters() {
    let bench = Bench::new();
    let (reader, writer) = (in_mode(1, "-s"), owner_tag(2, 2));
    bench.hold(&reader, bench.now() + 300_000);
    assert_eq!(bench.acquire_in_mode(&writer, 100_000, "join")[0], 2);
    bench.server.command(&["DEL", "holders"]);
    assert_eq!(bench.acquire_in_mode(&reader, 100_000, "extend"), [0]);
    assert_eq!(bench.state().1.len(), 2, "the writer still waits");
    assert_eq!(bench.acquire_in_mode(&writer, 100_000, "join")[0], 1);
    assert_eq!(bench.owner(), Some(writer));
}

/// One call renews leases of several keys, each with its own TTL.
#[test]
fn renewal_of_several_keys_gives_each_its_own_end() {
    let bench = Bench::new();
    let (one, other) = (in_mode(1, "-s"), in_mode(1, "-p1-3"));
    let ends = bench.now() + 100_000;
    for (lease, holders, owner) in [("lease", "holders", &one), ("lease2", "holders2", &other)] {
        bench.server.command(&["SET", lease, MARKER, "PX", "100000"]);
        bench.server.command(&["ZADD", holders, &ends.to_string(), owner]);
    }
    // A key of another type is not ours, and no reason to give up the others.
    bench.server.command(&["LPUSH", "lease3", "value"]);
    let keys = [
        "lease", "queue", "holders", "lease2", "queue2", "holders2", "lease3", "queue3", "holders3",
    ];
    let args = [&one, "300000", &other, "400000", &one, "300000"];
    let reply: Vec<u64> = bench.call(bench.scripts.modes.renew.text(), &keys, &args);
    assert_eq!(reply, [1, 1, 0]);
    for (lease, holders, left) in [("lease", "holders", 300_000), ("lease2", "holders2", 400_000)] {
        bench.assert_left(lease, left);
        bench.assert_left(holders, left);
    }
}

/// Renewal while a slot is being moved, by two scripts with one key each.
#[test]
fn renewal_of_a_holder_alone_extends_it_and_never_shortens_it() {
    let bench = Bench::new();
    let (me, other) = (in_mode(1, "-p1-3"), in_mode(2, "-p1-3"));
    let ends = |holder: &str| bench.server.query::<u64>(&["ZSCORE", "holders", holder]) - bench.now();
    bench.hold(&me, bench.now() + 100_000);
    for (ttl, expected) in [(300_000, 300_000), (100_000, 300_000), (400_000, 400_000)] {
        assert_eq!(bench.renew_alone(MARKER, ttl), [1]);
        assert_eq!(bench.renew_holder_alone(&me, ttl), [1]);
        assert!(ends(&me) <= expected && expected - ends(&me) < SLACK);
        bench.assert_left("lease", expected);
        bench.assert_left("holders", expected);
    }
    assert_eq!(bench.renew_holder_alone(&other, 300_000), [0]);
    assert_eq!(bench.holders(), [me.as_str()]);
    bench.server.command(&["DEL", "holders"]);
    assert_eq!(bench.renew_holder_alone(&me, 300_000), [0]);
    assert_eq!(bench.holders(), [""; 0], "a renewal takes nothing");
    bench.server.command(&["LPUSH", "holders", "value"]);
    assert_eq!(bench.renew_holder_alone(&me, 300_000), [0]);
}

/// The scripts of exclusive cycles leave what they can't do to the others. A token or a place in
/// the queue that they left behind would be one too many.
#[test]
fn scripts_of_exclusive_cycles_leave_other_modes_as_they_were() {
    let bench = Bench::new();
    let (me, next, reader) = (owner_tag(1, 2), owner_tag(1, 4), in_mode(2, "-s"));
    let keys = ["lease", "queue", "counter"];
    let acquire = |how: &str| -> Vec<i64> {
        let args = [&next, "100000", "1", "0", how, "inbox:", "key"];
        bench.call(bench.scripts.acquire.text(), &keys, &args)
    };
    let release = |next: &str| -> Vec<i64> {
        let args = [&me, "1", "0", "inbox:", "key", next];
        bench.call(bench.scripts.release.text(), &keys, &args)
    };
    // A reader is next.
    bench.own(&me, Some(100_000));
    assert_eq!(bench.acquire_in_mode(&reader, 100_000, "join")[0], 2);
    let before = bench.state();
    for requeued in ["", &next] {
        assert_eq!(release(requeued), [3]);
        assert_eq!(bench.state(), before);
    }
    // The same after the owner has died.
    bench.server.command(&["DEL", "lease"]);
    let before = bench.state();
    for how in ["join", "try"] {
        assert_eq!(acquire(how), [3]);
        assert_eq!(bench.state(), before);
    }
    assert_eq!(release(""), [3]);
    assert_eq!(release(&next), [3]);
    assert_eq!(bench.state(), before);
    // A reader holds the key.
    assert_eq!(bench.acquire_in_mode(&reader, 100_000, "join")[0], 1);
    let before = bench.state();
    assert_eq!(before.0.as_deref(), Some(MARKER));
    for how in ["join", "try"] {
        assert_eq!(acquire(how), [3]);
    }
    assert_eq!(acquire("extend"), [0]);
    for requeued in ["", &next] {
        assert_eq!(release(requeued), [3]);
    }
    assert_eq!(bench.state(), before);
}

/// The script for all modes may find that the lease has come to the exclusive cycle meanwhile.
#[test]
fn exclusive_owner_is_extended_and_never_shortened() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    for (left, ttl, expected) in [(100_000, 300_000, 300_000), (300_000, 100_000, 300_000)] {
        bench.own(&me, Some(left));
        assert_eq!(
            bench.acquire_in_mode(&me, ttl, "join"),
            [1, bench.counter() as i64, 0, 1]
        );
        assert_eq!(bench.owner().as_ref(), Some(&me));
        bench.assert_left("lease", expected);
    }
}

/// If a waiter's wait lasts until the first of several leases ends, the queue must still be there.
#[test]
fn queue_behind_holders_ends_a_minute_after_the_first_lease() {
    let bench = Bench::new();
    for (manager, ttl) in [(1, 500_000), (2, 200_000), (3, 300_000)] {
        bench.acquire_in_mode(&in_mode(manager, "-s"), ttl, "try");
    }
    let reply = bench.acquire_in_mode(&owner_tag(4, 2), 100_000, "join");
    assert!(reply[2] <= 200_000 && 200_000 - reply[2] < SLACK as i64, "{reply:?}");
    bench.assert_left("queue", 260_000);
}
