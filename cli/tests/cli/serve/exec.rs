//! `shardlock exec --agent`: a command under a lock of the agent.

use std::process::Command;

use redis::Value;
use rustix::process::Signal;
use support::RedisServer;

use super::Agent;
use crate::tool::{Notes, Run, bare, is_alive, is_held, run, wait_until_dead};

/// `shardlock exec` with these arguments, through the agent.
fn exec(agent: &Agent, args: &[&str]) -> Command {
    let mut command = bare(&["exec", "--agent"]);
    command.arg(&agent.socket).args(args);
    command
}

/// A running command that holds the key and notes its process id.
fn holder(agent: &Agent, options: &[&str]) -> (Run, Notes, String) {
    let notes = Notes::new();
    let args = [options, &["k", "sh", "-c", "echo $$ > pid; exec sleep 1000"]].concat();
    let mut command = exec(agent, &args);
    command.current_dir(notes.dir());
    let run = Run::start(command);
    let pid = notes.line("pid");
    (run, notes, pid)
}

#[test]
fn command_runs_under_a_lock_of_the_agent() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let redis_key = "echo \"$LOCK_KEY $LOCK_TOKEN ${LOCK_OWNER-none}\"; exit 7";
    let mut command = exec(&agent, &["k", "sh", "-c", redis_key]);
    command.env("LOCK_OWNER", "of an outer one");
    let ended = run(command);
    assert_eq!(ended.code, 7, "{ended:?}");
    let words: Vec<&str> = ended.stdout.split_whitespace().collect();
    assert!(
        matches!(*words, ["k", token, "none"] if token.parse::<u64>().is_ok()),
        "{ended:?}"
    );
    assert_eq!(agent.info("held"), "0");
    assert!(!is_held(&server, "k"));

    let mut command = bare(&["exec", "k", "true"]);
    command.env("SHARDLOCK_AGENT", &agent.socket);
    assert_eq!(run(command).code, 0);
}

#[test]
fn lock_is_held_while_the_command_runs() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut running, _notes, pid) = holder(&agent, &["--shared"]);
    let mut client = agent.connect();
    assert_eq!(client.call(&["LOCK", "k", "NOWAIT"]), Value::Nil);
    client.integer(&["LOCK", "k", "SHARED", "NOWAIT"]);
    for options in [&["-n"][..], &["-w", "50ms"], &["-n", "--permits", "1/1", "-E", "1"]] {
        let ended = run(exec(&agent, &[options, &["k", "true"]].concat()));
        let expected = i32::from(!options.contains(&"--permits"));
        assert_eq!(ended.code, expected, "{options:?}: {ended:?}");
    }
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, 128 + 15);
    wait_until_dead(&pid);
    drop(client);
    agent.wait_until_free();
}

#[test]
fn command_is_ended_when_the_agent_is_killed() {
    let server = RedisServer::start();
    let mut agent = Agent::start(&server);
    let (mut running, _notes, pid) = holder(&agent, &[]);
    assert!(is_alive(&pid));
    agent.run.kill();
    let ended = running.end();
    assert_eq!(ended.code, 117, "{ended:?}");
    assert!(
        ended.stderr.contains("the connection to the agent has ended"),
        "{ended:?}"
    );
    wait_until_dead(&pid);
}

/// Another host may get the key once the lease has ended, and the agent can't report it.
#[test]
fn command_is_ended_when_the_agent_is_stopped_for_longer_than_the_ttl() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut running, _notes, pid) = holder(&agent, &["--ttl", "1s"]);
    agent.signal(Signal::STOP);
    let ended = running.end();
    assert_eq!(ended.code, 117, "{ended:?}");
    assert!(ended.stderr.contains("the agent does not answer"), "{ended:?}");
    wait_until_dead(&pid);
}

#[test]
fn command_is_ended_at_the_limit_of_its_hold() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut running, _notes, pid) = holder(&agent, &["--max-hold", "300ms"]);
    let ended = running.end();
    assert_eq!(ended.code, 117, "{ended:?}");
    assert!(ended.stderr.contains("was lost: max_hold"), "{ended:?}");
    wait_until_dead(&pid);
}

#[test]
fn agent_that_starts_within_the_time_to_wait_is_used() {
    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("agent.sock");
    let socket = socket.to_str().unwrap();
    let ended = run(bare(&["exec", "--agent", socket, "k", "true"]));
    assert_eq!(ended.code, 69, "{ended:?}");
    assert!(ended.stderr.contains(socket), "{ended:?}");
    let mut waiting = Run::start(bare(&["exec", "--agent", socket, "-w", "1h", "k", "true"]));
    let _agent = Agent::started_in(dir, &server, &[]);
    assert_eq!(waiting.end().code, 0);
}

#[test]
fn options_that_an_agent_can_not_express_are_refused() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    for (args, expected) in [
        (
            &["-k", "a", "-k", "b", "true"][..],
            "2 keys are given, but an agent locks one at a time",
        ),
        (
            &["--ttl", "1us", "k", "true"],
            "--ttl is \"1us\", but with --agent it must be",
        ),
        (&["--shard", "redis://127.0.0.1", "k", "true"], "cannot be used with"),
        (&["--set", "ttl=1s", "k", "true"], "cannot be used with"),
        (&["--metrics", "127.0.0.1:0", "k", "true"], "cannot be used with"),
        (&["--ttl", "1ms", "k", "true"], "ttl is 1ms, but must be"),
    ] {
        let ended = run(exec(&agent, args));
        assert_eq!(ended.code, 64, "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(expected), "{args:?}: {ended:?}");
    }
    assert_eq!(agent.info("held"), "0");
}
