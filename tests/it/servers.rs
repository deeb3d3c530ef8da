//! The foundation of the other tests: servers and workers of their own that leave nothing behind.

use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread;
use std::time::Duration;

use redis::cluster_routing::Slot;
use support::{ClientType, PATIENCE, RedisServer, eventually, wait_until, worker};

/// Reports a variable, then repeats each line.
pub(crate) fn echo(me: &worker::Current) {
    me.send(me.var("SHARDLOCK_TEST_GREETING"));
    while let Some(line) = me.recv() {
        me.send(&line);
    }
}

/// Runs a server until the test ends it.
#[cfg(target_os = "linux")]
pub(crate) fn serve(me: &worker::Current) {
    let server = RedisServer::start();
    me.send(server.address());
    me.recv();
}

fn is_up(address: &str) -> bool {
    TcpStream::connect(address).is_ok()
}

/// On new cloud machines, automatic updates hold apt's locks for minutes.
#[test]
fn installing_a_server_waits_while_another_process_holds_the_lock_of_apt() {
    const LOCKED: &str = "E: Could not get lock /var/lib/apt/lists/lock. It is held by process 7 (apt-get)";
    let temp = tempfile::tempdir().expect("a directory");
    let apt_get = temp.path().join("apt-get");
    // The third call gets the lock, unless the argument is `forever`.
    let script = format!(
        "#!/bin/sh\necho call >>\"$0.calls\"\n\
         if [ \"$1\" != forever ] && [ \"$(wc -l <\"$0.calls\")\" -ge 3 ]; then echo installed; exit 0; fi\n\
         echo '{LOCKED}' >&2\necho 'E: Unable to lock directory /var/lib/apt/lists/' >&2\nexit 100\n"
    );
    std::fs::write(&apt_get, script).expect("write");
    std::fs::set_permissions(&apt_get, std::fs::Permissions::from_mode(0o755)).expect("permissions");
    let run = |argument: &str, wait: &str| {
        let script = "set -euo pipefail; say() { echo \"say: $*\" >&2; }; source scripts/packages.sh
            as_root() { \"$@\" >&2 </dev/null; }; apt_get \"$1\"";
        let path = format!("{}:{}", temp.path().display(), std::env::var("PATH").expect("a PATH"));
        let mut bash = std::process::Command::new("bash");
        bash.args(["-c", script, "bash", argument])
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .env("PATH", path)
            .env("SHARDLOCK_APT_WAIT", wait);
        let output = bash.output().expect("bash");
        let text = String::from_utf8(output.stderr).expect("text");
        (output.status.code(), text)
    };
    let (code, text) = run("install", "60");
    assert_eq!(code, Some(0), "{text}");
    let waiting = format!("say: another process holds a lock of apt; waiting for it, for up to 60 s: {LOCKED}");
    assert_eq!(text.lines().collect::<Vec<_>>(), [waiting.as_str(), "installed"]);
    let (code, text) = run("forever", "0");
    assert_eq!(code, Some(100), "{text}");
    assert!(text.contains("still held after 0 s"), "{text}");
}

#[test]
fn servers_side_by_side_share_nothing() {
    let starting: Vec<_> = (0..8).map(|_| thread::spawn(RedisServer::start)).collect();
    // The threads that started the servers have ended; the servers are still running.
    let servers: Vec<_> = starting
        .into_iter()
        .map(|thread| thread.join().expect("start"))
        .collect();
    for server in &servers {
        assert_eq!(server.dbsize(), 0);
        server.command(&["SET", "port", &server.port().to_string()]);
    }
    for server in &servers {
        assert_eq!(server.query::<u16>(&["GET", "port"]), server.port());
        assert_eq!(server.keys(), ["port"]);
    }
}

#[test]
fn a_restart_keeps_the_port_and_loses_the_data() {
    let server = RedisServer::start();
    let (port, pid) = (server.port(), server.pid());
    server.command(&["SET", "k", "v"]);
    server.restart();
    assert_eq!((server.port(), server.dbsize()), (port, 0));
    assert_ne!(server.pid(), pid);
}

#[test]
fn a_killed_server_refuses_connections_until_its_restart() {
    let server = RedisServer::start();
    server.kill();
    assert!(!is_up(&server.address()));
    assert!(server.try_query::<String>(&["PING"]).is_err());
    server.restart();
    assert_eq!(server.query::<String>(&["PING"]), "PONG");
}

#[test]
fn a_dropped_server_is_gone() {
    let server = RedisServer::start();
    let (address, dir) = (server.address(), server.dir().to_owned());
    assert!(dir.is_dir() && server.log().contains("Ready to accept connections"));
    drop(server);
    assert!(!is_up(&address));
    assert!(!dir.exists());
}

#[test]
fn stopped_server_answers_again_when_it_is_continued() {
    let server = RedisServer::start();
    server.stop();
    thread::scope(|scope| {
        let ping = scope.spawn(|| server.query::<String>(&["PING"]));
        // The kernel still accepts connections, but there can be no reply.
        assert!(is_up(&server.address()) && !ping.is_finished());
        server.cont();
        assert_eq!(ping.join().expect("an answer"), "PONG");
    });
}

#[test]
fn commands_are_counted_also_inside_of_scripts() {
    let server = RedisServer::start();
    server.reset_stats();
    let script = "redis.call('SET', KEYS[1], 1) return redis.call('PUBLISH', 'c', 'm')";
    assert_eq!(server.query::<u64>(&["EVAL", script, "1", "k"]), 0);
    assert_eq!(server.query::<u64>(&["PUBLISH", "c", "m"]), 0);
    assert!(server.try_query::<()>(&["EVALSHA", &"0".repeat(40), "0"]).is_err());
    assert_eq!(
        (server.calls("eval"), server.calls("evalsha"), server.script_calls()),
        (1, 1, 2)
    );
    assert_eq!(
        (server.calls("set"), server.calls("get"), server.publishes()),
        (1, 0, 2)
    );
    assert_eq!(server.calls("config"), server.commands()["config|resetstat"]);
    server.reset_stats();
    assert_eq!((server.script_calls(), server.publishes()), (0, 0));
}

#[tokio::test]
async fn connections_are_seen_and_cut_by_their_type() {
    let server = RedisServer::start();
    let client = redis::Client::open(server.url()).expect("a good address");
    let mut commands = client.get_connection().expect("connect");
    let mut inbox = client.get_connection().expect("connect");
    let mut inbox = inbox.as_pubsub();
    inbox.subscribe("c").expect("subscribe");
    eventually("the channel is there", PATIENCE, || server.channels() == ["c"]).await;
    assert_eq!(server.connections(), 2);

    assert_eq!(server.client_kill(ClientType::PubSub), 1);
    wait_until("the channel is gone", PATIENCE, || server.channels().is_empty());
    redis::cmd("PING")
        .exec(&mut commands)
        .expect("the other connection is open");

    redis::cmd("CLIENT")
        .arg("SETNAME")
        .arg("spared-1")
        .exec(&mut commands)
        .expect("a name");
    server.client_kill_but(ClientType::Normal, "spared-");
    redis::cmd("PING")
        .exec(&mut commands)
        .expect("the spared connection is open");
    server.client_kill_but(ClientType::Normal, "another-");
    redis::cmd("PING")
        .exec(&mut commands)
        .expect_err("the connection was cut");

    let mut commands = client.get_connection().expect("connect");
    assert_eq!(server.client_kill(ClientType::Normal), 1);
    redis::cmd("PING")
        .exec(&mut commands)
        .expect_err("the connection was cut");
    assert_eq!(server.connections(), 0);
}

#[test]
fn options_reach_the_server() {
    let server = RedisServer::start_with(&["--maxmemory-policy", "noeviction", "--requirepass", "p:@/ %"]);
    let policy: Vec<String> = server.query(&["CONFIG", "GET", "maxmemory-policy"]);
    assert_eq!(policy, ["maxmemory-policy", "noeviction"]);
    server.restart();
    assert_eq!(server.dbsize(), 0);
    let client = redis::Client::open(server.url()).expect("a good address");
    let mut stranger = client.get_connection().expect("connect");
    redis::cmd("DBSIZE")
        .exec(&mut stranger)
        .expect_err("the address has no password");
}

#[test]
fn debug_commands_are_allowed() {
    RedisServer::start().command(&["DEBUG", "SLEEP", "0"]);
}

#[test]
fn error_of_a_server_with_invalid_options_names_the_option() {
    let start = catch_unwind(|| drop(RedisServer::start_with(&["--no-such-option", "1"])));
    let panic = start.expect_err("the server can't have started");
    let message = panic.downcast_ref::<String>().expect("a message");
    assert!(message.contains("no-such-option"), "{message}");
}

#[test]
fn the_servers_slots_are_those_of_the_client_library() {
    let server = RedisServer::start_with(&["--cluster-enabled", "yes"]);
    for key in ["foo", "{foo}shard", "foo{}{bar}"] {
        let slot = server.query(&["CLUSTER", "KEYSLOT", key]);
        assert_eq!(Slot::new(slot), Some(Slot::for_key(key)));
    }
}

#[test]
fn worker_exchanges_lines_and_exits_at_the_end_of_its_input() {
    let mut worker = worker::spawn("echo", &[("SHARDLOCK_TEST_GREETING", "hello")]);
    assert_eq!(worker.line(), "hello");
    for line in ["one", "", "@ three", "  four  "] {
        worker.send(line);
        assert_eq!(worker.line(), line);
    }
    assert!(worker.wait().success());
}

#[test]
fn stopped_worker_is_silent_until_it_is_continued() {
    let mut worker = worker::spawn("echo", &[("SHARDLOCK_TEST_GREETING", "hello")]);
    worker.line();
    for _ in 0..3 {
        worker.stop();
        worker.send("still there?");
        assert_eq!(worker.line_within(Duration::from_millis(20)), None);
        worker.cont();
        assert_eq!(worker.line(), "still there?");
    }
}

#[test]
fn killed_worker_sends_nothing_more() {
    let mut worker = worker::spawn("echo", &[("SHARDLOCK_TEST_GREETING", "hello")]);
    worker.line();
    worker.kill();
    assert_eq!(worker.wait().signal(), Some(9));
    catch_unwind(AssertUnwindSafe(|| worker.line())).expect_err("the worker is dead");
}

#[cfg(target_os = "linux")]
#[test]
fn a_killed_test_process_leaves_no_server() {
    let mut worker = worker::spawn("server", &[]);
    let address = worker.line();
    assert!(is_up(&address));
    worker.kill();
    wait_until("its server is gone", PATIENCE, || !is_up(&address));
}
