//! `--min-hold`: a job that several hosts start at about the same time runs once.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Holder, Notes, Run, is_held, run, tool};

/// Longer than the part of a test in which the key must be locked.
const LONG: &str = "5m";

#[test]
fn three_hosts_run_a_short_job_once() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let start = |_| {
        let args = [
            "exec",
            "-n",
            "-q",
            "--min-hold",
            LONG,
            "k",
            "sh",
            "-c",
            "echo ran >> log",
        ];
        let mut command = tool(&server, &args);
        command.current_dir(notes.dir());
        Run::start(command)
    };
    let mut codes: Vec<i32> = (0..3).map(start).map(|mut host| host.end().code).collect();
    codes.sort_unstable();
    assert_eq!(codes, [0, 1, 1]);
    assert_eq!(fs::read_to_string(notes.path("log")).unwrap(), "ran\n");
    assert!(is_held(&server, "k"));
    let inspected = run(tool(&server, &["inspect", "k"])).stdout;
    assert!(
        inspected.contains("kept by min_hold, its holder has released it; its lease ends in "),
        "{inspected}"
    );
    assert!(!inspected.contains("unless renewed"), "{inspected}");
}

#[test]
fn job_that_could_not_start_leaves_its_other_keys_free() {
    let server = RedisServer::start();
    for (one, other) in [("a", "b"), ("b", "a")] {
        let holder = Holder::of(&server, one);
        let args = ["exec", "-n", "--min-hold", LONG, "-k", "a", "-k", "b", "--", "true"];
        assert_eq!(run(tool(&server, &args)).code, 1);
        wait_until("the other key is free", PATIENCE, || !is_held(&server, other));
        holder.go();
        wait_until("the key is free", PATIENCE, || !is_held(&server, one));
    }
}

#[test]
fn next_command_gets_the_key_after_the_min_hold() {
    let server = RedisServer::start();
    let started = Instant::now();
    let ended = run(tool(&server, &["exec", "--min-hold", "1500ms", "k", "true"]));
    assert_eq!(ended.code, 0, "{ended:?}");
    let ended = run(tool(&server, &["exec", "k", "echo", "ran"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
    assert!(started.elapsed() >= Duration::from_millis(1500));
    // Nothing is left.
    assert!(!is_held(&server, "k"));
}

#[test]
fn min_hold_applies_however_the_command_or_the_tool_ends() {
    let server = RedisServer::start();
    let started = |script: &str| {
        let notes = Notes::new();
        let args = [
            "exec",
            "--kill-after",
            "200ms",
            "--min-hold",
            LONG,
            "k",
            "sh",
            "-c",
            script,
        ];
        let mut command = tool(&server, &args);
        command.current_dir(notes.dir());
        (Run::start(command), notes)
    };
    let check = |how: &str| {
        let ended = run(tool(&server, &["exec", "-n", "-E", "42", "k", "true"]));
        assert_eq!(ended.code, 42, "{how}: {ended:?}");
        server.command(&["DEL", "lock:k"]);
    };

    let (mut tool, _notes) = started("exit 3");
    assert_eq!(tool.end().code, 3);
    check("the command fails");

    let (mut tool, _notes) = started("kill -9 $$");
    assert_eq!(tool.end().code, 128 + 9);
    check("the command is killed");

    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let (mut tool, notes) = started("echo > ready; exec sleep 1000");
        notes.line("ready");
        tool.signal(signal);
        assert_ne!(tool.end().code, 0);
        check("the tool gets a signal");
    }

    let (tool, notes) = started("echo > ready; exec sleep 1000");
    notes.line("ready");
    tool.signal(Signal::KILL);
    // The keeper kills the command and releases the lock: the owner is no cycle any more.
    wait_until("the lock is released", PATIENCE, || {
        let owner: Option<String> = server.query(&["GET", "lock:k"]);
        owner.expect("it is locked").contains(":1-")
    });
    check("the tool is killed");
}

#[test]
fn time_outside_its_bounds_is_refused() {
    let server = RedisServer::start();
    let ended = run(tool(&server, &["exec", "--min-hold", "25h", "k", "echo", "ran"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (64, ""), "{ended:?}");
    assert!(ended.stderr.contains("min_hold"), "{ended:?}");
}
