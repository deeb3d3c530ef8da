//! Commands that hold a lock together, and those that share permits.

use support::RedisServer;

use crate::tool::{Holder, run, tool};

/// The exit code of a command that runs only if the lock is free for it.
#[track_caller]
fn tried(server: &RedisServer, options: &[&str]) -> i32 {
    let args = [&["exec", "-n", "-E", "42"], options, &["k", "true"]].concat();
    run(tool(server, &args)).code
}

#[test]
fn shared_holders_run_together_and_keep_exclusive_ones_out() {
    let server = RedisServer::start();
    let holders = [(); 2].map(|()| Holder::with(&server, &["--shared"], "k"));
    assert_eq!(tried(&server, &["--shared"]), 0);
    assert_eq!(tried(&server, &[]), 42);
    let inspected = run(tool(&server, &["inspect", "k"])).stdout;
    assert!(
        inspected.contains("holder   2 together, 0 permits in use\n"),
        "{inspected}"
    );
    assert_eq!(inspected.matches("         shared: ").count(), 2, "{inspected}");
    holders.into_iter().for_each(Holder::go);
    assert_eq!(tried(&server, &[]), 0);
}

#[test]
fn commands_share_permits_up_to_their_limit() {
    let server = RedisServer::start();
    let holder = Holder::with(&server, &["--permits", "2/3"], "k");
    assert_eq!(tried(&server, &["--permits", "2/3"]), 42);
    assert_eq!(tried(&server, &["--permits", "1/3"]), 0);
    assert_eq!(tried(&server, &[]), 42);
    let inspected = run(tool(&server, &["inspect", "k"])).stdout;
    assert!(
        inspected.contains("holder   1 together, 2 permits in use\n"),
        "{inspected}"
    );
    assert!(inspected.contains("         permits 2/3: "), "{inspected}");
    holder.go();
    assert_eq!(tried(&server, &["--permits", "3/3"]), 0);
}

#[test]
fn invalid_permits_are_a_command_line_error() {
    let server = RedisServer::start();
    for (permits, names) in [
        ("3", "such as 1/10"),
        ("a/b", "such as 1/10"),
        ("0/3", "weight"),
        ("4/3", "weight"),
        ("1/0", "limit"),
    ] {
        let ended = run(tool(&server, &["exec", "--permits", permits, "k", "true"]));
        assert!(
            [64, 78].contains(&ended.code) && ended.stderr.contains(names),
            "{permits}: {ended:?}"
        );
    }
    for options in [
        ["--shared", "--permits=1/2"],
        ["--shared", "--min-hold=1s"],
        ["--permits=1/2", "--min-hold=1s"],
    ] {
        let args = [&["exec"], &options[..], &["k", "true"]].concat();
        assert_eq!(run(tool(&server, &args)).code, 64, "{options:?}");
    }
}
