//! Who may connect: the socket's file, the password, TCP.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::PathBuf;

use redis::Value;
use support::{RedisServer, RespClient};
use tempfile::TempDir;

use super::Agent;
use crate::tool::{bare, run, tool};

/// A password file.
pub(super) fn password(text: &str) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("password");
    fs::write(&file, text).unwrap();
    (dir, file)
}

#[test]
fn the_socket_has_the_mode_and_the_owner_of_the_options() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let found = fs::metadata(&agent.socket).unwrap();
    assert!(found.file_type().is_socket());
    assert_eq!(found.permissions().mode() & 0o777, 0o660);

    let group = rustix::process::getegid().as_raw();
    let agent = Agent::with(
        &server,
        &["--socket-mode", "0600", "--socket-owner", &format!(":{group}")],
    );
    let found = fs::metadata(&agent.socket).unwrap();
    assert_eq!((found.permissions().mode() & 0o777, found.gid()), (0o600, group));
}

#[test]
fn the_path_of_the_socket_is_also_taken_from_the_environment() {
    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("other.sock");
    let mut command = tool(&server, &["serve"]);
    command.env("SHARDLOCK_AGENT", &path);
    let run = crate::tool::Run::start(command);
    support::wait_until("the agent listens", support::PATIENCE, || {
        run.stderr().contains("listening on")
    });
    assert_eq!(RespClient::unix(&path).unwrap().text(&["PING"]), "PONG");
}

#[test]
fn a_second_agent_on_the_same_path_is_refused() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let path = agent.socket.to_str().unwrap();
    let ended = run(tool(&server, &["serve", "--socket", path]));
    assert_eq!(ended.code, 69, "{ended:?}");
    assert!(ended.stderr.contains("another agent listens on"), "{ended:?}");
    assert_eq!(agent.connect().text(&["PING"]), "PONG");

    let file = agent.dir().join("file");
    fs::write(&file, "precious").unwrap();
    let ended = run(tool(&server, &["serve", "--socket", file.to_str().unwrap()]));
    assert_eq!(ended.code, 69, "{ended:?}");
    assert!(ended.stderr.contains("exists and is not a socket"), "{ended:?}");
    assert_eq!(fs::read_to_string(&file).unwrap(), "precious");
}

#[test]
fn a_password_is_needed_before_any_other_command() {
    let server = RedisServer::start();
    let (_dir, file) = password("s3cret\n");
    let mut agent = Agent::with(
        &server,
        &["--password-file", file.to_str().unwrap(), "--listen", "127.0.0.1:0"],
    );
    let mut client = agent.connect();
    for words in [
        &["PING"][..],
        &["LOCK", "k"],
        &["INFO"],
        &["CLIENT", "INFO"],
        &["COMMAND"],
    ] {
        assert_eq!(client.error(words), "NOAUTH Authentication required.", "{words:?}");
    }
    assert!(client.error(&["HELLO", "3"]).starts_with("NOAUTH HELLO must be called"));
    let wrong = "WRONGPASS invalid username-password pair or user is disabled.";
    assert_eq!(client.error(&["AUTH", "s3cre"]), wrong);
    assert_eq!(client.error(&["AUTH", "root", "s3cret"]), wrong);
    assert_eq!(client.error(&["HELLO", "3", "AUTH", "default", "S3cret"]), wrong);
    assert_eq!(client.error(&["PING"]), "NOAUTH Authentication required.");
    assert_eq!(client.text(&["AUTH", "default", "s3cret"]), "OK");
    client.integer(&["LOCK", "k"]);

    let mut remote = RespClient::tcp(&agent.address()).unwrap();
    assert_eq!(remote.error(&["PING"]), "NOAUTH Authentication required.");
    let hello = remote.call(&["HELLO", "3", "AUTH", "default", "s3cret"]);
    assert!(matches!(hello, Value::Map(_)), "{hello:?}");
    assert!(remote.text(&["CLIENT", "INFO"]).contains(" addr=127.0.0.1:"));
    assert_eq!(remote.call(&["LOCK", "k", "NOWAIT"]), Value::Nil);
    agent.signal(rustix::process::Signal::INT);
    drop(client);
    let ended = agent.end();
    assert!(
        !ended.stderr.contains("s3cret") && ended.stderr.contains("wrong user name or password"),
        "{ended:?}"
    );
}

#[test]
fn without_a_password_none_is_needed_and_one_is_an_error() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut client = agent.connect();
    assert!(
        client
            .error(&["AUTH", "any"])
            .starts_with("ERR AUTH <password> called without any password")
    );
    client.integer(&["LOCK", "k"]);
}

#[test]
fn an_address_that_others_can_reach_needs_a_password() {
    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("s");
    let socket = socket.to_str().unwrap();
    let ended = run(tool(&server, &["serve", "--socket", socket, "--listen", "0.0.0.0:0"]));
    assert_eq!(ended.code, 64, "{ended:?}");
    assert!(ended.stderr.contains("give it a --password-file"), "{ended:?}");
    let (_dir, file) = password("s3cret");
    Agent::with(
        &server,
        &["--listen", "0.0.0.0:0", "--password-file", file.to_str().unwrap()],
    );
}

#[test]
fn options_that_are_wrong_are_reported() {
    let server = RedisServer::start();
    let (dir, empty) = password("\n");
    let socket = dir.path().join("s");
    let socket = socket.to_str().unwrap();
    for (options, code, expected) in [
        (
            &["--password-file", empty.to_str().unwrap()][..],
            78,
            "has 0 bytes, but must have 1 to 512",
        ),
        (
            &["--password-file", "/no/such/file"],
            78,
            "the password file /no/such/file can't be read",
        ),
        (
            &["--socket-owner", "no-such-user"],
            64,
            "names the user \"no-such-user\", which does not exist",
        ),
        (&["--socket-mode", "888"], 64, "must be an octal number such as 0660"),
        (&["--drain", "2days"], 64, "must be a duration such as 500ms or 20s"),
    ] {
        let ended = run(tool(&server, &[&["serve", "--socket", socket], options].concat()));
        assert_eq!(ended.code, code, "{options:?}: {ended:?}");
        assert!(ended.stderr.contains(expected), "{options:?}: {ended:?}");
    }
    let ended = run(bare(&["serve", "--socket", socket]));
    assert_eq!(ended.code, 64, "{ended:?}");
    assert!(ended.stderr.contains("no shard is configured"), "{ended:?}");
    let nowhere = run(tool(&server, &["serve", "--socket", "/no/such/folder/s"]));
    assert!(nowhere.stderr.contains("in a folder that exists"), "{nowhere:?}");
}
