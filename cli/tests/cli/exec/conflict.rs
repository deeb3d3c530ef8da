//! Which command gets the lock, and what happens to the others.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Holder, Notes, Run, is_held, run, tool, wait_until_waiting, waiting};

#[test]
fn a_try_on_a_held_key_gives_the_conflict_exit_code_at_once() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    for (args, code) in [
        (&["exec", "-n", "k", "echo", "ran"][..], 1),
        (&["exec", "--nonblock", "-E", "42", "k", "echo", "ran"], 42),
        (&["exec", "-n", "--conflict-exit-code=0", "k", "echo", "ran"], 0),
        (&["exec", "-w", "0", "-E", "7", "k", "echo", "ran"], 7),
    ] {
        let ended = run(tool(&server, args));
        assert_eq!((ended.code, ended.stdout.as_str()), (code, ""), "{ended:?}");
        assert!(ended.stderr.contains("\"k\""), "{ended:?}");
    }
    assert_eq!(run(tool(&server, &["exec", "-q", "-n", "k", "true"])).stderr, "");
    assert_eq!(run(tool(&server, &["exec", "-n", "other", "true"])).code, 0);
    holder.go();
    assert_eq!(run(tool(&server, &["exec", "-n", "k", "true"])).code, 0);
}

#[test]
fn a_wait_ends_at_its_limit_with_the_conflict_exit_code() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    for (args, code) in [
        (&["exec", "-w", "300ms", "k", "echo", "ran"][..], 1),
        (&["exec", "--timeout", "0.3", "-E", "42", "k", "echo", "ran"], 42),
    ] {
        let started = Instant::now();
        let ended = run(tool(&server, args));
        assert_eq!((ended.code, ended.stdout.as_str()), (code, ""), "{ended:?}");
        assert!(started.elapsed() >= Duration::from_millis(300));
        assert!(ended.stderr.contains("timed out"), "{ended:?}");
        assert_eq!(waiting(&server, "k"), 0);
    }
    holder.go();
}

#[test]
fn a_wait_within_its_limit_gets_the_lock() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    let mut waiter = Run::start(tool(&server, &["exec", "-w", "1h", "k", "echo", "ran"]));
    wait_until_waiting(&server, "k", 1);
    assert_eq!(waiter.stdout(), "");
    holder.go();
    let ended = waiter.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
}

#[test]
fn commands_under_one_lock_exclude_each_other() {
    const RUNS: usize = 8;
    let server = RedisServer::start();
    let notes = Notes::new();
    fs::write(notes.path("count"), "0\n").unwrap();
    // Only one process can create a directory, and the count is read and written in two steps.
    let script = "mkdir inside || echo overlap >> overlaps
                  count=$(cat count)
                  echo $((count + 1)) > count
                  rmdir inside";
    let start = |_| {
        let mut command = tool(&server, &["exec", "k", "sh", "-c", script]);
        command.current_dir(notes.dir());
        Run::start(command)
    };
    let mut runs: Vec<Run> = (0..RUNS).map(start).collect();
    for run in &mut runs {
        let ended = run.end();
        assert_eq!(ended.code, 0, "{ended:?}");
    }
    assert_eq!(notes.line("count"), RUNS.to_string());
    assert!(!notes.exists("overlaps"));
}

#[test]
fn wait_ended_by_a_signal_leaves_the_queue() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    for (signal, code) in [(Signal::TERM, 143), (Signal::INT, 130), (Signal::HUP, 129)] {
        let mut waiter = Run::start(tool(&server, &["exec", "k", "echo", "ran"]));
        wait_until_waiting(&server, "k", 1);
        waiter.signal(signal);
        let ended = waiter.end();
        assert_eq!((ended.code, ended.stdout.as_str()), (code, ""), "{ended:?}");
        assert_eq!(waiting(&server, "k"), 0);
    }
    holder.go();
    wait_until("the key is free", PATIENCE, || !is_held(&server, "k"));
}
