//! `shardlock exec --agent`: a command under locks of the agent.

use std::fs;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use redis::Value;
use rustix::process::Signal;
use shardlock::LockKey;
use support::{PATIENCE, RedisServer, wait_until};

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

/// The agent answers late, and counts from the lease that it had when it was stopped. What it had
/// answered before still holds, and so does the lock once it has been renewed.
#[test]
fn command_continues_when_the_agent_is_stopped_for_less_than_the_ttl() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut running, _notes, pid) = holder(&agent, &["--ttl", "9s"]);
    agent.signal(Signal::STOP);
    sleep(Duration::from_millis(6_500));
    agent.signal(Signal::CONT);
    // A lost lock would end the command within a second.
    assert_eq!(agent.info("held"), "1");
    sleep(Duration::from_millis(1_500));
    assert!(is_alive(&pid), "{}", running.stderr());
    assert_eq!(agent.info("held"), "1");
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, 128 + 15);
}

#[test]
fn stopped_agent_is_an_error_after_the_time_to_wait() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut holder = agent.connect();
    holder.integer(&["LOCK", "k"]);
    let mut waiting = Run::start(exec(&agent, &["-w", "2s", "k", "true"]));
    agent.wait_until_waiting(1);
    agent.signal(Signal::STOP);
    let ended = waiting.end();
    assert_eq!(ended.code, 69, "{ended:?}");
    assert!(ended.stderr.contains("it does not answer"), "{ended:?}");
    agent.signal(Signal::CONT);
}

#[test]
fn refusal_of_the_server_is_not_a_command_line_error() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    server.command(&["SET", "lock:k", "x"]);
    server.command(&["CONFIG", "SET", "maxmemory", "1"]);
    let error = agent.connect().error(&["LOCK", "free", "NOWAIT"]);
    assert!(error.starts_with("REFUSED ") && error.contains("OOM"), "{error}");
    let ended = run(exec(&agent, &["-n", "free", "true"]));
    assert_eq!(ended.code, 69, "{ended:?}");
}

#[test]
fn command_is_ended_at_the_limit_of_its_hold() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (mut running, _notes, pid) = holder(&agent, &["--max-hold", "300ms"]);
    let ended = running.end();
    assert_eq!(ended.code, 117, "{ended:?}");
    assert!(
        ended.stderr.contains("was lost: it was held for longer than max_hold"),
        "{ended:?}"
    );
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
            &["--ttl", "1us", "k", "true"][..],
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

#[test]
fn several_keys_are_held_together_and_described_in_the_order_of_the_options() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let notes = Notes::new();
    let described = "echo $LOCK_COUNT $LOCK_KEY_1 $LOCK_TOKEN_1 $LOCK_KEY_2 $LOCK_TOKEN_2 $LOCK_KEY > locks; \
                     exec sleep 1000";
    let args = ["-k", "b", "-k", "a", "-k", "b", "sh", "-c", described];
    let mut command = exec(&agent, &args);
    command.current_dir(notes.dir());
    let mut running = Run::start(command);
    let locks = notes.line("locks");
    let words: Vec<&str> = locks.split_whitespace().collect();
    let ["2", "b", token_b, "a", token_a, "b"] = *words else {
        panic!("{locks}")
    };
    let mut client = agent.connect();
    for (key, token) in [("a", token_a), ("b", token_b)] {
        assert!(client.integer(&["HELD", key, token]) > 0, "{locks}");
    }
    assert_eq!(agent.info("held"), "2");
    let ended = run(exec(&agent, &["-n", "-k", "c", "-k", "a", "true"]));
    assert_eq!(ended.code, 1, "{ended:?}");
    assert!(
        ended.stderr.contains("one of the locks \"c\", \"a\" is held"),
        "{ended:?}"
    );
    // Nothing stays locked when not all are free.
    client.integer(&["LOCK", "c", "NOWAIT"]);
    running.signal(Signal::TERM);
    assert_eq!(running.end().code, 128 + 15);
    drop(client);
    agent.wait_until_free();
}

/// Half of the commands name the keys the other way round, and some have a manager of their own.
#[test]
fn commands_with_overlapping_keys_do_not_deadlock() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let keys = ["a", "b", "c", "d", "e"];
    let commands: Vec<Run> = (0..12)
        .map(|number| {
            let (one, other) = (keys[number % keys.len()], keys[(number * 2 + 1) % keys.len()]);
            let third = keys[(number + 3) % keys.len()];
            let args = ["-w", "1h", "-k", one, "-k", other, "-k", third, "sleep", "0.02"];
            let command = if number % 4 == 3 {
                crate::tool::tool(&server, &[&["exec"], &args[..]].concat())
            } else {
                exec(&agent, &args)
            };
            Run::start(command)
        })
        .collect();
    for mut command in commands {
        let ended = command.end();
        assert_eq!(ended.code, 0, "{ended:?}");
    }
    agent.wait_until_free();
}

#[test]
fn several_keys_share_one_time_to_wait() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (first, second) = in_order("a", "b");
    let mut holder = agent.connect();
    holder.integer(&["LOCK", second]);
    holder.integer(&["LOCK", first, "MAXHOLD", "2500"]);
    let started = Instant::now();
    let ended = run(exec(&agent, &["-w", "3s", "-k", "a", "-k", "b", "true"]));
    let took = started.elapsed();
    assert_eq!(ended.code, 1, "{ended:?}");
    // With a time for each key, it would be 5.5 s.
    let range = Duration::from_secs(3)..Duration::from_secs(5);
    assert!(range.contains(&took), "{took:?}");
    assert_eq!(agent.info("held"), "1");
}

#[test]
fn loss_of_one_of_several_keys_ends_the_command() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let notes = Notes::new();
    let args = [
        "-k",
        "a",
        "-k",
        "b",
        "sh",
        "-c",
        "echo $LOCK_TOKEN_2 > token; exec sleep 1000",
    ];
    let mut command = exec(&agent, &args);
    command.current_dir(notes.dir());
    let mut running = Run::start(command);
    let token = notes.line("token");
    // By another connection, as a deletion on the server would be noticed only later.
    assert_eq!(agent.connect().integer(&["UNLOCK", "b", &token]), 1);
    let ended = running.end();
    assert_eq!(ended.code, 117, "{ended:?}");
    let expected = format!("lock \"b\" (token {token}) was lost: the agent does not hold it any more");
    assert!(ended.stderr.contains(&expected), "{ended:?}");
    agent.wait_until_free();
}

/// The one that is locked first, and the other.
fn in_order<'a>(one: &'a str, other: &'a str) -> (&'a str, &'a str) {
    let place = |key: &str| (LockKey::new(key).unwrap().slot(), key.to_owned());
    if place(one) < place(other) {
        (one, other)
    } else {
        (other, one)
    }
}

#[test]
fn command_does_not_start_if_a_lock_ends_during_the_wait_for_another() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (first, second) = in_order("a", "b");
    let mut holder = agent.connect();
    holder.integer(&["LOCK", second]);
    let args = ["--max-hold", "200ms", "-w", "1h", "-k", "a", "-k", "b", "echo", "ran"];
    let ended = run(exec(&agent, &args));
    assert_eq!((ended.code, ended.stdout.as_str()), (69, ""), "{ended:?}");
    let expected = format!("lock \"{first}\" (token ");
    assert!(
        ended.stderr.contains(&expected) && ended.stderr.contains("was lost: it was held for longer than max_hold"),
        "{ended:?}"
    );
    assert_eq!(agent.info("held"), "1");
}

/// The shard forgets the first lock. Another command would get it, so it is locked again.
#[test]
fn lock_that_is_taken_during_the_wait_for_another_is_locked_again() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let (first, second) = in_order("a", "b");
    let mut holder = agent.connect();
    holder.integer(&["LOCK", second]);
    let shown = "echo $LOCK_KEY_1 $LOCK_TOKEN_1 > token";
    let notes = Notes::new();
    let mut command = exec(&agent, &["-w", "1h", "-k", first, "-k", second, "sh", "-c", shown]);
    command.current_dir(notes.dir());
    let mut waiting = Run::start(command);
    // A lease that is deleted while it is being acquired is only acquired again.
    agent.wait_until_info("held", "2");
    let owner = || server.query::<Option<String>>(&["GET", &format!("lock:{first}")]);
    let before = owner();
    assert!(before.is_some());
    server.command(&["DEL", &format!("lock:{first}")]);
    wait_until("the first key is locked again", PATIENCE, || {
        assert!(waiting.is_running(), "{}", waiting.stderr());
        owner().is_some_and(|now| Some(now) != before)
    });
    drop(holder);
    assert_eq!(waiting.end().code, 0);
    assert!(notes.line("token").starts_with(first));
}

#[test]
fn password_of_the_agent_comes_from_a_file_or_the_environment() {
    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let file = dir.path().join(name);
        fs::write(&file, text).unwrap();
        file.to_str().unwrap().to_owned()
    };
    let (right, wrong) = (write("right", "s3cret\nnot this\n"), write("wrong", "other"));
    let agent = Agent::with(&server, &["--password-file", &right]);
    let shown = ["k", "sh", "-c", "echo ${SHARDLOCK_AGENT_PASSWORD-none} $LOCK_KEY"];

    let ended = run(exec(&agent, &[&["--agent-password-file", &right], &shown[..]].concat()));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "none k\n"), "{ended:?}");
    for (variable, value) in [
        ("SHARDLOCK_AGENT_PASSWORD_FILE", right.as_str()),
        ("SHARDLOCK_AGENT_PASSWORD", "s3cret"),
    ] {
        let mut command = exec(&agent, &shown);
        command.env(variable, value);
        let ended = run(command);
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "none k\n"), "{ended:?}");
    }
    let mut command = exec(&agent, &[&["--inherit-password"], &shown[..]].concat());
    command.env("SHARDLOCK_AGENT_PASSWORD", "s3cret");
    assert_eq!(run(command).stdout, "s3cret k\n");

    let missing = dir.path().join("none").to_str().unwrap().to_owned();
    for (options, expected) in [
        (&[][..], "it asks for a password; give --agent-password-file"),
        (&["--agent-password-file", &wrong], "it does not accept the password"),
        (&["--agent-password-file", &missing], "can't be read"),
    ] {
        let ended = run(exec(&agent, &[&["-w", "1h"], options, &["k", "true"]].concat()));
        assert_eq!(ended.code, 78, "{options:?}: {ended:?}");
        assert!(ended.stderr.contains(expected), "{options:?}: {ended:?}");
        assert!(!ended.stderr.contains("s3cret"), "{ended:?}");
    }
    let ended = run(bare(&["exec", "--agent-password-file", &right, "k", "true"]));
    assert_eq!(ended.code, 64, "{ended:?}");
}

#[test]
fn an_agent_that_is_stopped_for_a_while_is_waited_for() {
    /// Longer than the client library waits for a greeting by default.
    const STOPPED: Duration = Duration::from_secs(2);
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    agent.signal(Signal::STOP);
    let mut running = Run::start(exec(&agent, &["k", "true"]));
    let started = Instant::now();
    wait_until("the tool has waited", PATIENCE, || {
        assert!(running.is_running(), "{:?}", running.end());
        started.elapsed() > STOPPED
    });
    agent.signal(Signal::CONT);
    let ended = running.end();
    assert_eq!(ended.code, 0, "{ended:?}");
}
