//! The lock is lost while the command runs.

use std::process::Stdio;

use support::RedisServer;

use crate::tool::{Notes, Run, is_alive, is_held, tool};

const LOST: i32 = 117;

/// Starts a script under the lock `k` and returns the process id that the script writes.
fn start(server: &RedisServer, options: &[&str], script: &str) -> (Run, String) {
    let notes = Notes::new();
    let args = [
        &["exec", "--kill-after", "300ms"][..],
        options,
        &["k", "sh", "-c", script],
    ]
    .concat();
    let mut command = tool(server, &args);
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    let run = Run::start(command);
    let pid = notes.line("pid");
    (run, pid)
}

#[track_caller]
fn ends_by_loss(mut run: Run, child: &str, reason: &str) {
    let ended = run.end();
    assert_eq!(ended.code, LOST, "{ended:?}");
    assert!(
        ended.stderr.contains("\"k\"") && ended.stderr.contains(reason),
        "{ended:?}"
    );
    assert!(
        !ended.stderr.contains("a lock was lost"),
        "it is reported twice: {ended:?}"
    );
    assert!(!is_alive(child));
}

#[test]
fn a_deleted_lease_ends_the_command() {
    let server = RedisServer::start();
    let (run, child) = start(&server, &["--ttl", "1s"], "echo $$ > pid; cat");
    server.command(&["DEL", "lock:k"]);
    ends_by_loss(run, &child, "lost");
    assert!(!is_held(&server, "k"));
}

#[test]
fn a_loss_kills_a_command_that_ignores_term() {
    let server = RedisServer::start();
    let (run, child) = start(&server, &["--ttl", "1s"], "trap '' TERM; echo $$ > pid; cat");
    server.command(&["DEL", "lock:k"]);
    ends_by_loss(run, &child, "lost");
}

#[test]
fn a_loss_never_looks_like_a_success_of_the_command() {
    let server = RedisServer::start();
    let (run, child) = start(&server, &["--ttl", "1s"], "trap 'exit 0' TERM; echo $$ > pid; cat");
    server.command(&["DEL", "lock:k"]);
    ends_by_loss(run, &child, "lost");
}

#[test]
fn taken_lock_is_left_to_its_new_holder() {
    let server = RedisServer::start();
    let (run, child) = start(&server, &["--ttl", "1s"], "echo $$ > pid; cat");
    server.command(&["SET", "lock:k", "somebody else"]);
    ends_by_loss(run, &child, "lost");
    assert_eq!(server.query::<String>(&["GET", "lock:k"]), "somebody else");
}

#[test]
fn a_server_that_is_gone_ends_the_command_when_the_lease_has_run_out() {
    let server = RedisServer::start();
    let (run, child) = start(&server, &["--ttl", "1s"], "echo $$ > pid; cat");
    server.kill();
    ends_by_loss(run, &child, "renewed in time");
}

#[test]
fn a_command_that_takes_too_long_is_ended_at_max_hold() {
    let server = RedisServer::start();
    let (run, child) = start(&server, &["--max-hold", "3s"], "echo $$ > pid; cat");
    ends_by_loss(run, &child, "max_hold");
    assert!(!is_held(&server, "k"));
}

#[test]
fn loss_of_one_of_several_locks_ends_the_command() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let args = [
        "exec",
        "--ttl",
        "1s",
        "-k",
        "a",
        "-k",
        "k",
        "sh",
        "-c",
        "echo $$ > pid; cat",
    ];
    let mut command = tool(&server, &args);
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    let run = Run::start(command);
    let child = notes.line("pid");
    server.command(&["DEL", "lock:k"]);
    ends_by_loss(run, &child, "lost");
    assert!(!is_held(&server, "a") && !is_held(&server, "k"));
}
