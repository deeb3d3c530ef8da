//! What the command inherits, and what the tool returns.

use std::fs;
use std::io::Write;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Holder, Notes, PATIENT, Run, bare, is_held, patient, run, tool, wait_until_waiting};

#[test]
fn the_exit_code_of_the_command_comes_through() {
    let server = RedisServer::start();
    for code in [0, 1, 3, 64, 117, 127, 255] {
        let ended = run(tool(&server, &["exec", "k", "--", "sh", "-c", &format!("exit {code}")]));
        assert_eq!(ended.code, code, "{ended:?}");
        assert_eq!((ended.stdout.as_str(), ended.stderr.as_str()), ("", ""));
        assert!(!is_held(&server, "k"));
    }
}

#[test]
fn a_command_that_is_killed_gives_128_and_the_signal() {
    let server = RedisServer::start();
    for (signal, code) in [("KILL", 137), ("TERM", 143), ("SEGV", 139)] {
        let ended = run(tool(&server, &["exec", "k", "sh", "-c", &format!("kill -{signal} $$")]));
        assert_eq!(ended.code, code, "{ended:?}");
        assert!(!is_held(&server, "k"));
    }
}

#[test]
fn missing_command_exits_with_127_and_a_non_executable_one_with_126() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let plain = notes.path("plain");
    fs::write(&plain, "#!/bin/sh\n").unwrap();
    fs::set_permissions(&plain, fs::Permissions::from_mode(0o644)).unwrap();
    let plain = plain.to_str().unwrap();
    for (program, code) in [
        ("no-such-command-here", 127),
        ("/no/such/path", 127),
        (plain, 126),
        (notes.dir().to_str().unwrap(), 126),
    ] {
        let ended = run(tool(&server, &["exec", "k", "--", program]));
        assert_eq!(ended.code, code, "{ended:?}");
        assert!(ended.stderr.contains(program), "{ended:?}");
        assert!(!is_held(&server, "k"));
    }
}

#[test]
fn options_end_at_the_key() {
    let server = RedisServer::start();
    for args in [
        &["exec", "k", "printf", "%s ", "-n", "--json", "--", "-w"][..],
        &["exec", "k", "--", "printf", "%s ", "-n", "--json", "--", "-w"],
        &[
            "exec", "--ttl", "5s", "--", "k", "printf", "%s ", "-n", "--json", "--", "-w",
        ],
    ] {
        let ended = run(tool(&server, args));
        assert_eq!(
            (ended.code, ended.stdout.as_str()),
            (0, "-n --json -- -w "),
            "{ended:?}"
        );
    }
}

#[test]
fn option_between_key_and_command_is_refused() {
    for args in [
        &["exec", "k", "-n", "--", "true"][..],
        &["exec", "k", "--timeout", "2s", "true"],
    ] {
        let mut command = bare(args);
        command.env("SHARDLOCK_SHARDS", "redis://127.0.0.1:1");
        let ended = run(command);
        assert_eq!(ended.code, 64, "{ended:?}");
        let expected = format!("{} stands after the key k, where the command begins", args[2]);
        assert!(ended.stderr.contains(&expected), "{ended:?}");
    }
    // A command may have such a name.
    let server = RedisServer::start();
    let ended = run(tool(&server, &["exec", "k", "--", "-n"]));
    assert_eq!(ended.code, 127, "{ended:?}");
}

#[test]
fn store_that_keeps_no_other_command_out_is_refused() {
    let ended = run(bare(&["exec", "--shard", "memory://", "k", "--", "true"]));
    assert_eq!(ended.code, 64, "{ended:?}");
    assert!(ended.stderr.contains("would keep no other command out"), "{ended:?}");
}

#[test]
fn retries_to_connect_count_as_waiting() {
    let ended = run(bare(&[
        "exec",
        "--shard",
        "redis://127.0.0.1:1",
        "-w",
        "1s",
        "k",
        "--",
        "true",
    ]));
    assert_eq!(ended.code, 69, "{ended:?}");
    let (_, waited) = ended
        .stderr
        .trim_end()
        .rsplit_once("(waited ")
        .expect("the time waited");
    let waited = waited.trim_end_matches(')');
    let millis = match waited.strip_suffix("ms") {
        Some(millis) => millis.parse::<f64>().unwrap(),
        None => 1e3 * waited.trim_end_matches('s').parse::<f64>().unwrap(),
    };
    // A pause that would be too long is not begun, so the last attempt may be some time before the
    // limit. It alone takes less than a millisecond.
    assert!(millis > 100.0, "{ended:?}");
}

#[test]
fn time_to_connect_counts_as_waiting() {
    const LIMIT: Duration = Duration::from_secs(8);
    const STOPPED: Duration = Duration::from_secs(5);
    let server = RedisServer::start();
    let _holder = Holder::with(&server, &[&PATIENT[..], &["--ttl", "5m"]].concat(), "k");
    server.stop();
    let mut waiting = Run::start(patient(&server, &["exec", "-w", "8s", "k", "true"]));
    let started = Instant::now();
    wait_until("the tool has waited for the server", PATIENCE, || {
        assert!(waiting.is_running(), "{:?}", waiting.end());
        started.elapsed() >= STOPPED
    });
    server.cont();
    let ended = waiting.end();
    assert_eq!(ended.code, 1, "{ended:?}");
    let waited = started.elapsed();
    assert!(waited < LIMIT + STOPPED, "{waited:?}");
}

#[test]
fn files_of_the_environment_that_are_missing_are_no_mistake_of_the_command_line() {
    let server = RedisServer::start();
    let mut command = tool(&server, &["exec", "k", "--", "true"]);
    command.env("SHARDLOCK_PASSWORD_FILE", "/no/such/file");
    let ended = run(command);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("/no/such/file"), "{ended:?}");
}

#[test]
fn standard_input_reaches_the_command() {
    let server = RedisServer::start();
    let mut command = tool(&server, &["exec", "k", "cat"]);
    command.stdin(Stdio::piped());
    let mut cat = Run::start(command);
    cat.take_stdin().unwrap().write_all(b"one\ntwo").unwrap();
    let ended = cat.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "one\ntwo"), "{ended:?}");
}

#[test]
fn the_command_finds_its_lock_in_the_environment() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "echo \"$LOCK_KEY|$LOCK_TOKEN|$LOCK_OWNER\" > lock; cat";
    let mut command = tool(&server, &["exec", "two words", "sh", "-c", script]);
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    let mut holder = Run::start(command);
    let go = holder.take_stdin();
    let seen = notes.line("lock");
    let seen: Vec<&str> = seen.split('|').collect();
    assert_eq!(seen[0], "two words");
    assert!(seen[1].parse::<u64>().unwrap() > 0);
    assert_eq!(seen[2], server.query::<String>(&["GET", "lock:two words"]));
    drop(go);
    assert_eq!(holder.end().code, 0);

    let ended = run(tool(&server, &["exec", "two words", "sh", "-c", "echo $LOCK_TOKEN"]));
    let later: u64 = ended.stdout.trim().parse().unwrap();
    assert!(later > seen[1].parse().unwrap());
}

#[test]
fn a_nested_command_sees_the_inner_lock() {
    let server = RedisServer::start();
    let script = "echo $LOCK_KEY $LOCK_TOKEN; \"$0\" exec inner sh -c 'echo $LOCK_KEY $LOCK_TOKEN'; echo $LOCK_KEY";
    let binary = env!("CARGO_BIN_EXE_shardlock");
    let ended = run(tool(&server, &["exec", "outer", "sh", "-c", script, binary]));
    assert_eq!(ended.code, 0, "{ended:?}");
    let words: Vec<&str> = ended.stdout.split_whitespace().collect();
    let [outer, outer_token, inner, inner_token, again] = words[..] else {
        panic!("{ended:?}")
    };
    assert_eq!([outer, inner, again], ["outer", "inner", "outer"]);
    assert_ne!(outer_token, inner_token);
    assert!(!is_held(&server, "outer") && !is_held(&server, "inner"));
}

#[test]
fn several_locks_are_held_and_described_in_the_order_of_the_options() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "env | grep ^LOCK_ | sort > locks; echo > ready; cat";
    let args = [
        "exec", "-k", "b", "--key", "a", "-k", "b", "--key=c", "--", "sh", "-c", script,
    ];
    let mut command = tool(&server, &args);
    // Variables of an outer lock.
    command.env("LOCK_KEY_4", "outer").env("LOCK_KEY_OTHER", "kept");
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    let mut holder = Run::start(command);
    let go = holder.take_stdin();
    notes.line("ready");
    let locks = std::fs::read_to_string(notes.path("locks")).unwrap();
    let value = |name: &str| {
        locks
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
    };
    assert_eq!(value("LOCK_COUNT"), Some("3"), "{locks}");
    for (number, key) in [(1, "b"), (2, "a"), (3, "c")] {
        let of_this = |name: &str| value(&format!("{name}_{number}"));
        assert_eq!(of_this("LOCK_KEY"), Some(key), "{locks}");
        assert!(of_this("LOCK_TOKEN").unwrap().parse::<u64>().unwrap() > 0, "{locks}");
        let owner = server.query::<String>(&["GET", &format!("lock:{key}")]);
        assert_eq!(of_this("LOCK_OWNER"), Some(owner.as_str()), "{locks}");
    }
    for name in ["LOCK_KEY", "LOCK_TOKEN", "LOCK_OWNER"] {
        assert_eq!(value(name), value(&format!("{name}_1")), "{locks}");
    }
    assert_eq!(
        (value("LOCK_KEY_4"), value("LOCK_KEY_OTHER")),
        (None, Some("kept")),
        "{locks}"
    );

    // All or none.
    let ended = run(tool(&server, &["exec", "-n", "-k", "free", "-k", "a", "echo", "ran"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{ended:?}");
    assert!(
        ended.stderr.contains("one of the locks \"free\", \"a\" is held"),
        "{ended:?}"
    );
    let ended = run(tool(
        &server,
        &["exec", "-w", "1s", "-k", "free", "-k", "a", "echo", "ran"],
    ));
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""), "{ended:?}");
    assert!(ended.stderr.contains("waiting for lock \"a\""), "{ended:?}");
    assert!(!is_held(&server, "free"));
    drop(go);
    assert_eq!(holder.end().code, 0);
    for key in ["a", "b", "c"] {
        assert!(!is_held(&server, key));
    }

    // A single key behaves as before, and arguments of the command are no options.
    let script = "env | grep -c '^LOCK_'; echo \"$LOCK_COUNT$LOCK_KEY $1\"";
    let ended = run(tool(&server, &["exec", "k", "sh", "-c", script, "sh", "-k"]));
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "3\nk -k\n"), "{ended:?}");
}

#[test]
fn errors_before_the_command_have_codes_of_their_own() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let ran = notes.path("ran");
    let touch = ["touch", ran.to_str().unwrap()];
    let with = |args: &[&str]| run(tool(&server, &[&["exec"][..], args, &touch].concat()));

    for (args, word) in [
        (&["--ttl", "1ms", "k"][..], "ttl"),
        (&["--ttl", "soon", "k"], "ttl"),
        (&["--kill-after", "soon", "k"], "kill-after"),
        (&["--shard", "nonsense", "k"], "shards"),
        (&["--set", "tll=5s", "k"], "tll"),
        (&["-n", "-w", "1s", "k"], "--timeout"),
        (&[""], "key"),
    ] {
        let ended = with(args);
        assert_eq!(ended.code, 64, "{args:?}: {ended:?}");
        assert!(ended.stderr.contains(word), "{args:?}: {ended:?}");
    }
    for args in [
        &["exec"][..],
        &["exec", "k"],
        &["exec", "k", "--"],
        &["exec", "-k", "k"],
        &["exec", "-k", "k", "--"],
        &["exec", "-k", "", "true"],
        &["lock"],
    ] {
        assert_eq!(run(tool(&server, args)).code, 64, "{args:?}");
    }
    assert_eq!(run(bare(&["exec", "k", "true"])).code, 64);

    let mut misspelt = tool(&server, &["exec", "k", "true"]);
    misspelt.env("SHARDLOCK_TLL", "5s");
    let ended = run(misspelt);
    assert_eq!(ended.code, 78, "{ended:?}");
    assert!(ended.stderr.contains("SHARDLOCK_TLL"), "{ended:?}");

    server.kill();
    let ended = with(&["k"]);
    assert_eq!(ended.code, 69, "{ended:?}");
    assert_eq!(ended.stderr.matches(&server.address()).count(), 1, "{ended:?}");
    assert!(!ran.exists());
}

#[test]
fn a_wait_that_begins_during_an_outage_survives_it() {
    let server = RedisServer::start();
    server.kill();
    let nobody = TcpListener::bind(server.address()).expect("its port is free");
    let mut waiting = Run::start(tool(&server, &["exec", "-w", "1h", "k", "echo", "ran"]));
    // Once this connection is closed, the tool's first attempt has failed.
    drop(nobody.accept().expect("the tool connects"));
    drop(nobody);
    server.restart();
    let ended = waiting.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
    assert!(ended.stderr.contains(&server.address()), "{ended:?}");

    server.kill();
    let ended = run(tool(&server, &["exec", "-w", "100ms", "k", "true"]));
    assert_eq!(ended.code, 69, "{ended:?}");
}

#[test]
fn wait_ends_in_time_if_the_server_is_gone() {
    let server = RedisServer::start();
    let _holder = Holder::with(&server, &PATIENT, "k");
    let mut waiting = Run::start(patient(&server, &["exec", "-w", "2s", "k", "true"]));
    wait_until_waiting(&server, "k", 1);
    server.kill();
    let since = Instant::now();
    let ended = waiting.end();
    assert_eq!(ended.code, 69, "{ended:?}");
    // Its place in the queue could not be given up, for which it might have waited 40 s.
    assert!(since.elapsed() < Duration::from_secs(20), "{:?}", since.elapsed());
}

#[test]
fn retries_to_connect_to_a_quorum_are_logged_once() {
    let servers = [(); 3].map(|()| RedisServer::start());
    let addresses = servers.each_ref().map(RedisServer::address).join(",");
    drop(servers);
    let shard = format!("redlock://{addresses}");
    let ended = run(bare(&["exec", "-w", "500ms", "--shard", &shard, "k", "true"]));
    assert_eq!(ended.code, 69, "{ended:?}");
    assert_eq!(ended.stderr.matches("retrying").count(), 1, "{ended:?}");
    assert_eq!(
        ended.stderr.matches("a node of the quorum is down").count(),
        0,
        "{ended:?}"
    );
}

#[test]
fn variables_without_a_value_count_as_unset() {
    let server = RedisServer::start();
    for name in [
        "SHARDLOCK_AGENT",
        "SHARDLOCK_METRICS",
        "SHARDLOCK_LOG",
        "SHARDLOCK_CONFIG",
        "SHARDLOCK_TTL",
    ] {
        let mut command = tool(&server, &["exec", "k", "echo", "ran"]);
        command.env(name, "");
        let ended = run(command);
        assert_eq!(
            (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
            (0, "ran\n", ""),
            "{name}: {ended:?}"
        );
    }
}

#[test]
fn unknown_log_level_does_not_keep_the_command_from_running() {
    let server = RedisServer::start();
    let mut command = tool(&server, &["exec", "k", "echo", "ran"]);
    command.env("SHARDLOCK_LOG", "verbose");
    let ended = run(command);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
    assert!(ended.stderr.contains("SHARDLOCK_LOG is \"verbose\""), "{ended:?}");
}

#[test]
fn service_variables_of_kubernetes_do_not_keep_the_command_from_running() {
    let server = RedisServer::start();
    let mut command = tool(&server, &["exec", "k", "echo", "ran"]);
    command
        .env("SHARDLOCK_SERVICE_HOST", "10.96.0.12")
        .env("SHARDLOCK_PORT", "tcp://10.96.0.12:9187")
        .env("SHARDLOCK_PORT_9187_TCP_PROTO", "tcp")
        .env("SHARDLOCK_REDIS_SERVICE_HOST", "10.96.0.13");
    let ended = run(command);
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
}

#[test]
fn the_command_does_not_inherit_a_password() {
    let server = RedisServer::start();
    server.command(&["CONFIG", "SET", "requirepass", "s3cret"]);
    let with_password = server.url().replace("redis://", "redis://:s3cret@");
    let show = ["k", "sh", "-c", "echo \"<$SHARDLOCK_SHARDS>\""];
    let with = |options: &[&str]| {
        let mut command = bare(&[&["exec"], options, &show].concat());
        command.env("SHARDLOCK_SHARDS", &with_password);
        run(command)
    };
    assert_eq!(with(&[]).stdout, "<>\n");
    assert_eq!(with(&["--inherit-password"]).stdout, format!("<{with_password}>\n"));

    // A password beside the URL.
    let show = ["k", "sh", "-c", "echo \"<$SHARDLOCK_PASSWORD> <$SHARDLOCK_SHARDS>\""];
    let with = |options: &[&str]| {
        let mut command = bare(&[&["exec"], options, &show].concat());
        command.env("SHARDLOCK_PASSWORD", "s3cret");
        command.env("SHARDLOCK_SHARDS", server.url());
        run(command)
    };
    assert_eq!(with(&[]).stdout, format!("<> <{}>\n", server.url()));
    assert_eq!(
        with(&["--inherit-password"]).stdout,
        format!("<s3cret> <{}>\n", server.url())
    );

    // A command that needs the password gets an error that explains why it is missing.
    let mut command = bare(&["exec", "k"]);
    command.arg(bare(&[]).get_program()).args(["inspect", "k"]);
    command.env("SHARDLOCK_SHARDS", &with_password);
    let ended = run(command);
    assert_eq!(ended.code, 64, "{ended:?}");
    assert!(ended.stderr.contains("--inherit-password"), "{ended:?}");
}

#[test]
fn a_wait_is_logged_while_it_lasts() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "busy");
    let mut command = tool(&server, &["exec", "busy", "echo", "ran"]);
    command.env("SHARDLOCK_LOG", "info");
    let mut waiter = Run::start(command);
    wait_until("the wait is logged", PATIENCE, || {
        waiter.stderr().contains("waiting for the lock key=\"busy\"")
    });
    holder.go();
    let ended = waiter.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
}
