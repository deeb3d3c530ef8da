//! Clients as they are: redis-cli, and the client library of these tests.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use support::server::binary;
use support::{PATIENCE, RedisServer, Terminal, wait_until};

use super::Agent;
use crate::tool::{is_held, run};

/// The path of redis-cli or valkey-cli: beside the server, or on the `PATH`.
#[track_caller]
pub(crate) fn redis_cli_path() -> PathBuf {
    let beside = binary().path.parent().map(PathBuf::from);
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = beside.into_iter().chain(env::split_paths(&path));
    let mut candidates = folders.flat_map(|folder| ["redis-cli", "valkey-cli"].map(|name| folder.join(name)));
    let found = candidates.find(|candidate| candidate.is_file());
    found.expect("redis-cli or valkey-cli is beside the server or on the PATH")
}

fn redis_cli(agent: &Agent) -> Command {
    let mut command = Command::new(redis_cli_path());
    command.arg("-s").arg(&agent.socket).stdin(Stdio::null());
    command
}

#[test]
fn redis_cli_runs_commands_unmodified() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    for options in [&["-2"][..], &["-3"]] {
        let mut command = redis_cli(&agent);
        command.args(options).args(["LOCK", "a key", "NOWAIT"]);
        let ended = run(command);
        assert_eq!(ended.code, 0, "{ended:?}");
        let token: u64 = ended.stdout.trim().parse().expect("a token");
        assert!(token > 0);
        // The lock has ended with the connection.
        wait_until("the key is free", PATIENCE, || !is_held(&server, "a key"));
    }
    let mut command = redis_cli(&agent);
    command.args(["INFO", "server"]);
    assert!(run(command).stdout.contains("shardlock_version:"));
}

#[test]
fn redis_cli_is_used_by_hand() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut command = redis_cli(&agent);
    command.arg("-3").env("HOME", agent.dir());
    let terminal = Terminal::open(command, 40, 120);
    terminal.shows("agent.sock>");
    terminal.types("lock k maxhold 300\r");
    terminal.has_shown("(integer) ");
    assert_eq!(agent.info("held"), "1");
    // The push of the loss, which redis-cli shows before the next prompt.
    agent.wait_until_free();
    terminal.types("ping\r");
    terminal.has_shown("\"max_hold\"");
    terminal.until("the reply and the next prompt are shown", |lines| {
        let reply = lines.iter().position(|line| line == "PONG");
        reply.is_some_and(|reply| lines[reply + 1..].iter().any(|line| line.ends_with("agent.sock>")))
    });
    terminal.types("help unlock\r");
    terminal.has_shown("Releases a lock by its token");
}

#[test]
fn client_library_connects_unmodified() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let socket = agent.socket.display();
    for url in [format!("unix://{socket}"), format!("unix://{socket}?protocol=resp3")] {
        let client = redis::Client::open(url.as_str()).expect("a URL");
        let mut connection = client.get_connection().expect("connect");
        let token: u64 = redis::cmd("LOCK").arg("k").query(&mut connection).expect("lock");
        let busy: Option<u64> = redis::cmd("LOCK")
            .arg(&["k", "NOWAIT"])
            .query(&mut connection)
            .expect("try");
        assert_eq!(busy, None);
        let released: bool = redis::cmd("UNLOCK")
            .arg("k")
            .arg(token)
            .query(&mut connection)
            .expect("unlock");
        assert!(released);
        let error = redis::cmd("LOCK").arg("").query::<u64>(&mut connection).unwrap_err();
        assert!(error.to_string().contains("key is empty"), "{error}");
    }
}
