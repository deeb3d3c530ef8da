//! Exclusive leases, their queue and their counter.

use super::*;

/// While a cluster slot is being moved, a lease is renewed by a script with only its own key, under
/// the same rules.
#[test]
fn renewal_of_one_key_extends_the_owners_lease_alone_and_never_shortens_it() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    for (left, ttl, expected) in [
        (Some(100_000), 300_000, 300_000),
        (Some(300_000), 100_000, 300_000),
        (None, 100_000, 100_000),
    ] {
        bench.own(&me, left);
        assert_eq!(bench.renew_alone(&me, ttl), [1]);
        assert_eq!(bench.owner().as_ref(), Some(&me));
        bench.assert_left("lease", expected);
    }
    // Another cycle of the same manager is a different owner.
    for other in [owner_tag(1, 4), owner_tag(2, 2)] {
        bench.own(&other, Some(100_000));
        assert_eq!(bench.renew_alone(&me, 300_000), [0]);
        assert_eq!(bench.owner().as_ref(), Some(&other));
        bench.assert_left("lease", 100_000);
    }
    bench.server.command(&["DEL", "lease"]);
    assert_eq!(bench.renew_alone(&me, 300_000), [0]);
    assert_eq!(bench.owner(), None, "a renewal takes nothing");
    // A key of a wrong type is not ours.
    bench.server.command(&["LPUSH", "lease", "value"]);
    assert_eq!(bench.renew_alone(&me, 300_000), [0]);
}

/// A key of another type is not ours, and no reason to give up the others of the batch.
#[test]
fn renewal_of_several_leases_skips_a_key_of_another_type() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    bench.own(&me, Some(100_000));
    bench.server.command(&["LPUSH", "lease2", "value"]);
    let keys = ["lease2", "queue2", "lease", "queue"];
    let args = [&me, "300000", &me, "300000"];
    let reply: Vec<u64> = bench.call(bench.scripts.renew.text(), &keys, &args);
    assert_eq!(reply, [0, 1]);
    bench.assert_left("lease", 300_000);
}

/// If an operator removes a permission, held locks must not be reported as lost at once; they are
/// lost when they expire.
#[test]
fn renewal_that_may_not_see_the_owner_is_an_error_and_no_loss() {
    let bench = Bench::new();
    let me = owner_tag(1, 2);
    bench.own(&me, Some(100_000));
    bench.server.command(&[
        "ACL", "SETUSER", "default", "-get", "-zrank", "+eval", "+pttl", "+pexpire", "+exists",
    ]);
    let renew = |script: &str, keys: &[&str]| {
        let count = keys.len().to_string();
        let words = [&["EVAL", script, &count], keys, &[&me, "300000"]].concat();
        bench.server.try_query::<Value>(&words)
    };
    assert!(renew(bench.scripts.renew_alone.text(), &["lease"]).is_err());
    assert!(renew(bench.scripts.renew.text(), &["lease", "queue"]).is_err());
    assert!(renew(bench.scripts.modes.renew.text(), &["lease", "queue", "holders"]).is_err());
    assert!(renew(bench.scripts.modes.renew_alone.text(), &["holders"]).is_err());
}

/// The value that another library wrote may have any length.
#[test]
fn reply_has_the_whole_owner_tag_and_at_most_512_bytes_of_a_foreign_owner() {
    let bench = Bench::new();
    let longest = Cycle::with_ttl(u64::MAX, Duration::from_millis(u32::MAX.into()));
    let longest = ManagerId::of(&"h".repeat(64), u32::MAX, u64::MAX)
        .owner_tag(longest)
        .to_string();
    let foreign = "x".repeat(100_000);
    for (owner, shown) in [(&longest, &longest[..]), (&foreign, &foreign[..512])] {
        bench.own(owner, Some(100_000));
        let other = owner_tag(1, 2);
        let args = [&other, "100000", "1", "0", "join", "inbox:", "key"];
        let reply: Vec<Value> = bench.call(bench.scripts.acquire.text(), &["lease", "queue", "counter"], &args);
        assert_eq!(reply[3], Value::BulkString(shown.into()));
        assert_eq!(is_foreign(&reply[3]), Some(owner == &foreign));
    }
}

/// If all waiters die, no client ever removes their queue entries. The server does, a minute after
/// the owner's lease has expired. While a cycle waits, each of its requests postpones that.
#[test]
fn queue_of_waiters_ends_a_minute_after_the_lease() {
    let bench = Bench::new();
    for ttl in [Some(100_000), Some(300_000), None] {
        bench.server.command(&["DEL", "queue"]);
        bench.own(&owner_tag(1, 2), ttl);
        assert_eq!(bench.join(&owner_tag(2, 2))[0], 2);
        bench.assert_left("queue", ttl.unwrap_or_default() + 60_000);
        // The next request renews a queue that is about to expire.
        bench.server.command(&["PEXPIRE", "queue", "1000"]);
        assert_eq!(bench.join(&owner_tag(2, 2))[0], 2);
        bench.assert_left("queue", ttl.unwrap_or_default() + 60_000);
    }
}

/// The lease is passed on to the head, and the previous owner waits behind: the queue is kept for
/// the new lease.
#[test]
fn queue_that_an_owner_joins_again_ends_a_minute_after_the_next_lease() {
    let bench = Bench::new();
    bench.own(&owner_tag(1, 2), Some(300_000));
    bench.join(&owner_tag(2, 3));
    bench.join(&owner_tag(3, 3));
    let reply = bench.release(&owner_tag(1, 2), &owner_tag(1, 5));
    assert_eq!(reply[..2], [1, 2], "the previous owner waits");
    assert_eq!(bench.owner(), Some(owner_tag(2, 3)));
    // The next owner's inbox has no subscriber, so its lease stays short until it asks.
    bench.assert_left("lease", 1_000);
    bench.assert_left("queue", 61_000);
}

/// The owner has died, and so has the one ahead, whose inbox is gone: it is skipped. The one that
/// asks has the lease with the reply, with the TTL of its request, and those behind keep waiting.
#[test]
fn request_behind_dead_waiters_is_granted_in_the_reply() {
    let bench = Bench::new();
    let (dead, me, behind) = (owner_tag(1, 2), owner_tag(2, 2), owner_tag(3, 2));
    for in_any_mode in [false, true] {
        bench.server.command(&["DEL", "lease", "queue"]);
        // A whole number: its inbox was subscribed.
        bench
            .server
            .command(&["ZADD", "queue", "1", &dead, "2.5", &me, "3.5", &behind]);
        let reply = if in_any_mode {
            bench.acquire_in_mode(&me, 300_000, "join")
        } else {
            bench.acquire(&me, 300_000, "join")
        };
        assert_eq!(reply, [1, bench.counter() as i64, 1, 0]);
        assert_eq!(bench.state().0.as_ref(), Some(&me));
        assert_eq!(bench.state().1, [behind.as_str(), "3.5"]);
        bench.assert_left("lease", 300_000);
    }
}

/// Its inbox was subscribed when it joined and is not any more, so it must not be skipped.
#[test]
fn waiter_that_lost_its_inbox_keeps_its_place() {
    let bench = Bench::new();
    let (me, behind) = (owner_tag(1, 2), owner_tag(2, 2));
    bench.own(&owner_tag(3, 2), Some(100_000));
    bench.server.command(&["ZADD", "queue", "5", &me, "6", &behind]);
    for _ in 0..2 {
        let reply = bench.acquire(&me, 100_000, "join");
        assert_eq!((reply[0], &reply[4..]), (2, &[0, 0][..]));
        assert_eq!(bench.state().1, [me.as_str(), "5.5", &behind, "6"]);
    }
}

/// The inbox of a manager that knows it to be subscribed here is not checked. It counts as reached.
#[test]
fn known_inbox_is_not_checked() {
    let bench = Bench::new();
    bench.own(&owner_tag(3, 2), Some(100_000));
    for (how, score, reached) in [("known", "1", 1), ("join", "2.5", 0)] {
        bench.server.command(&["DEL", "queue"]);
        let me = owner_tag(1, 2);
        let reply = bench.acquire(&me, 100_000, how);
        assert_eq!((reply[0], &reply[4..]), (2, &[0, reached][..]), "{how}");
        assert_eq!(bench.state().1, [me.as_str(), score], "{how}");
    }
}

/// The owner has died, and the first that waits asks. The reply says how many wait behind it.
#[test]
fn head_of_the_queue_takes_a_free_key() {
    let bench = Bench::new();
    let (me, behind) = (owner_tag(1, 2), owner_tag(2, 2));
    bench.server.command(&["ZADD", "queue", "2", &me, "3.5", &behind]);
    assert_eq!(bench.acquire(&me, 300_000, "join"), [1, bench.counter() as i64, 1, 0]);
    assert_eq!(bench.state(), (Some(me), vec![behind, "3.5".to_owned()], 1));
    bench.assert_left("lease", 300_000);
}

/// The owner has died. A try takes the key if all that wait have died too, and passes nobody else.
#[test]
fn try_behind_waiters_takes_the_key_only_if_all_are_dead() {
    let bench = Bench::new();
    let (dead, me, waiting) = (owner_tag(1, 2), owner_tag(2, 2), owner_tag(3, 2));
    // A whole number: its inbox was subscribed.
    bench.server.command(&["ZADD", "queue", "1", &dead]);
    assert_eq!(bench.acquire(&me, 300_000, "try"), [1, bench.counter() as i64, 0, 0]);
    assert_eq!(bench.state(), (Some(me.clone()), Vec::new(), 1));
    bench.assert_left("lease", 300_000);

    bench.server.command(&["DEL", "lease"]);
    bench.server.command(&["ZADD", "queue", "1", &dead, "2.5", &waiting]);
    assert_eq!(bench.acquire(&me, 300_000, "try"), [0]);
    assert_eq!(bench.state(), (Some(waiting), Vec::new(), 2));
    bench.assert_left("lease", 1_000);

    let shared = in_mode(4, "-s");
    bench.server.command(&["DEL", "lease"]);
    bench.server.command(&["ZADD", "queue", "1", &dead, "2.5", &shared]);
    assert_eq!(bench.acquire(&me, 300_000, "try"), [3]);
    assert_eq!(bench.state(), (None, vec![shared.clone(), "2.5".to_owned()], 2));
    // Regression: it had no end, and stayed for ever if the request in this mode never came.
    bench.assert_left("queue", 60_000);
    // One with other members has an end, which may be much later.
    bench.server.command(&["ZADD", "queue", "3.5", &owner_tag(5, 2)]);
    bench.server.command(&["PEXPIRE", "queue", "600000"]);
    assert_eq!(bench.acquire(&me, 300_000, "try"), [3]);
    bench.assert_left("queue", 600_000);
    // Regression: it could end before the lease.
    bench.server.command(&["DEL", "queue"]);
    bench.server.command(&["ZADD", "queue", "2.5", &shared]);
    bench.own(&me, Some(300_000));
    assert_eq!(bench.release(&me, ""), [3]);
    bench.assert_left("queue", 360_000);
}

/// The short release does nothing unless it does everything.
#[test]
fn short_release_ends_the_owners_lease_if_nobody_waits() {
    let bench = Bench::new();
    let (me, other) = (owner_tag(1, 2), owner_tag(2, 2));
    let release = || -> u64 { bench.call(bench.scripts.release_fast.text(), &["lease", "queue"], &[&me]) };
    assert_eq!(release(), 0);
    bench.own(&me, Some(100_000));
    bench.join(&other);
    assert_eq!((release(), bench.owner()), (0, Some(me.clone())));
    bench.server.command(&["DEL", "queue"]);
    assert_eq!((release(), bench.owner()), (1, None));
    bench.own(&other, Some(100_000));
    assert_eq!((release(), bench.owner()), (0, Some(other)));
}

/// The owner wants the lease again, and the only one before it has died: it has the lease at once.
#[test]
fn release_behind_dead_waiters_takes_the_lease_again() {
    let bench = Bench::new();
    let (me, again, dead) = (owner_tag(1, 2), owner_tag(1, 5), owner_tag(2, 2));
    bench.own(&me, Some(300_000));
    bench.server.command(&["ZADD", "queue", "1", &dead]);
    let reply = bench.release(&me, &again);
    assert_eq!(reply, [1, 1, bench.counter() as i64, 0, 0]);
    assert_eq!(bench.state().0.as_ref(), Some(&again));
    assert_eq!(bench.state().1, [""; 0]);
    bench.assert_left("lease", 100_000);
}

/// The reply says how many are ahead once the lease has been passed on.
#[test]
fn release_that_requeues_reports_how_many_are_ahead() {
    let bench = Bench::new();
    let (me, again) = (owner_tag(1, 2), owner_tag(1, 5));
    let others = [2, 3, 4, 5].map(|manager| owner_tag(manager, 3));
    bench.own(&me, Some(300_000));
    for other in &others {
        bench.join(other);
    }
    let ahead = |reply: &[i64]| (reply[..2].to_vec(), reply[4..].to_vec());
    // It joins behind four, of which the first has the lease now.
    let reply = bench.release(&me, &again);
    assert_eq!(ahead(&reply), (vec![1, 2], vec![0, 3, 0]), "{reply:?}");
    assert_eq!(bench.owner().as_ref(), Some(&others[0]));
    // It was in the queue before, among others.
    bench.own(&me, Some(300_000));
    bench.join(&owner_tag(6, 3));
    let reply = bench.release(&me, &again);
    assert_eq!(ahead(&reply), (vec![1, 2], vec![0, 2, 0]), "{reply:?}");
    assert_eq!(bench.owner().as_ref(), Some(&others[1]));
}

/// A promoted replica may lack the latest numbers, and no client can detect that. So the counter of
/// a cluster is above the time of the server, for a while even without the next script. On a single
/// server a client detects a counter that was lost, by its floor.
#[test]
fn counter_follows_the_clock_of_the_server_in_a_cluster_and_after_a_loss() {
    let bench = Bench::new();
    let clock = || {
        let time: Vec<u64> = bench.server.query(&["TIME"]);
        ((time[0] - 1_735_689_600) * 8_000_000 + time[1] * 8, time[1])
    };
    let ahead = u64::try_from(COUNTER_AHEAD.as_micros()).unwrap() * 8;
    for (scripts, floor, ahead) in [
        (Scripts::for_a_cluster("lock:"), "0", ahead),
        (Scripts::for_a_primary("lock:"), "1", 0),
    ] {
        let token = || {
            bench.server.command(&["DEL", "lease"]);
            let args = [&owner_tag(1, 2), "100000", "1", floor, "join", "inbox:", "key"];
            let reply: Vec<u64> = bench.call(scripts.acquire.text(), &["lease", "queue", "counter"], &args);
            assert_eq!(reply[0], 1);
            reply[1]
        };
        // Late in a second, so that the part below a second matters.
        loop {
            bench.server.command(&["DEL", "counter"]);
            let (before, _) = clock();
            let token = token();
            let (after, micros) = clock();
            assert!(
                (before + ahead + 1..=after + ahead + 1).contains(&token),
                "{before} {token} {after}, floor {floor}"
            );
            if micros > 500_000 {
                break;
            }
        }
        // Nor does it go back to that time.
        let later = clock().0 + 1_000_000_000;
        bench.server.command(&["SET", "counter", &later.to_string()]);
        assert_eq!(token(), later + 1);
    }
}

/// A cluster takes a free key by a script of its own.
#[test]
fn short_acquire_takes_a_free_key_that_nobody_waits_for() {
    let bench = Bench::new();
    let (me, other) = (owner_tag(1, 2), owner_tag(2, 2));
    let script = Scripts::for_a_cluster("lock:").acquire_fast;
    let acquire = |floor: u64| -> Vec<u64> {
        let args = [&me, "100000", "3", &floor.to_string()];
        bench.call(script.text(), &["lease", "queue", "counter"], &args)
    };
    // Taken, by others and by itself.
    for owner in [&other, &me] {
        bench.own(owner, Some(300_000));
        assert_eq!((acquire(0), bench.owner().as_ref()), (vec![0], Some(owner)));
        bench.assert_left("lease", 300_000);
    }
    // Free, but somebody waits.
    bench.server.command(&["DEL", "lease"]);
    bench.server.command(&["ZADD", "queue", "1", &other]);
    assert_eq!((acquire(0), bench.state().0, bench.counter()), (vec![0], None, 0));
    bench.server.command(&["DEL", "queue"]);
    for (counter, floor, last) in [
        (0, FLOOR, FLOOR + 3),
        (FLOOR + 10, FLOOR, FLOOR + 13),
        (FLOOR, FLOOR + 10, FLOOR + 13),
    ] {
        bench.server.command(&["SET", "counter", &counter.to_string()]);
        assert_eq!(acquire(floor), [1, last, 0, 0]);
        assert_eq!(bench.state(), (Some(me.clone()), Vec::new(), last));
        bench.assert_left("lease", 100_000);
        bench.server.command(&["DEL", "lease"]);
    }
}

/// Those that wait expect another end, and the first of them may give up. More than ten are not
/// told, so that a long queue costs no more.
#[test]
fn first_ten_waiters_are_notified_of_a_retired_lease() {
    let bench = Bench::new();
    let (me, retired) = (owner_tag(1, 2), owner_tag(1, 1));
    bench.own(&me, Some(300_000));
    for manager in 2..14 {
        bench.join(&owner_tag(manager, 3));
    }
    let client = redis::Client::open(bench.server.url()).unwrap();
    let mut connection = client.get_connection().unwrap();
    connection.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let mut inboxes = connection.as_pubsub();
    inboxes.psubscribe("inbox:*").unwrap();
    let args = [&me, &retired, "100000", "inbox:", "key"];
    let reply: u64 = bench.call(bench.scripts.retire.text(), &["lease", "queue", "counter"], &args);
    assert_eq!(reply, 1);
    bench.server.command(&["PUBLISH", "inbox:", "the end"]);
    let mut told = || {
        let message = inboxes.get_message().unwrap();
        (
            message.get_channel_name().to_owned(),
            message.get_payload::<String>().unwrap(),
        )
    };
    for manager in 2..12 {
        let waiter = owner_tag(manager, 3);
        let (inbox, cycle) = waiter.split_once(':').unwrap();
        assert_eq!(told(), (format!("inbox:{inbox}"), format!("t {cycle} key")));
    }
    assert_eq!(told().1, "the end");
}

/// A lease without an end, which only an administrator can have made so, gets one as well.
#[test]
fn retired_lease_ends_with_the_rest_of_its_time_or_earlier() {
    let bench = Bench::new();
    let (me, retired) = (owner_tag(1, 2), owner_tag(1, 1));
    let retire = |rest: &str| -> u64 {
        let args = [&me, &retired, rest, "inbox:", "key"];
        bench.call(bench.scripts.retire.text(), &["lease", "queue", "counter"], &args)
    };
    for (left, rest, expected) in [
        (Some(300_000), "100000", 100_000),
        (Some(100_000), "300000", 100_000),
        (None, "100000", 100_000),
    ] {
        bench.own(&me, left);
        assert_eq!(retire(rest), 1);
        assert_eq!(bench.owner().as_ref(), Some(&retired));
        bench.assert_left("lease", expected);
    }
    // It is no longer the cycle's.
    assert_eq!(retire("1"), 0);
    let args = [&me, "1", "0", "inbox:", "key", ""];
    let reply: Vec<u64> = bench.call(bench.scripts.release.text(), &["lease", "queue", "counter"], &args);
    assert_eq!(reply, [0]);
    bench.assert_left("lease", 100_000);
}
