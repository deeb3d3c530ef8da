//! Signals to the tool, and the order in which things end.

use std::fs;
use std::process::Stdio;
use std::time::Instant;

use rustix::process::Signal;
use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{
    Holder, Notes, Run, SHORT_GRACE, bare, is_alive, is_held, run, tool, wait_until_dead, wait_until_waiting,
};

/// Starts a script under the lock `k`. Its standard input is what `Run::take_stdin` returns.
fn start(server: &RedisServer, notes: &Notes, options: &[&str], script: &str) -> Run {
    let args = [&["exec"][..], options, &["k", "sh", "-c", script]].concat();
    let mut command = tool(server, &args);
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    Run::start(command)
}

#[test]
fn each_signal_is_forwarded_to_the_command() {
    let server = RedisServer::start();
    for (name, signal) in [
        ("TERM", Signal::TERM),
        ("INT", Signal::INT),
        ("HUP", Signal::HUP),
        ("QUIT", Signal::QUIT),
        ("USR1", Signal::USR1),
        ("USR2", Signal::USR2),
    ] {
        let notes = Notes::new();
        // The shell runs its trap once `cat` has ended, and only the signal ends `cat`. The process
        // that becomes `cat` must report that it is ready: a shell that gets the signal just before
        // it starts another process waits for that process first.
        let mut tool = start(
            &server,
            &notes,
            &[],
            &format!("trap 'exit 7' {name}; sh -c 'echo > ready; exec cat'; exit 9"),
        );
        let _stdin = tool.take_stdin();
        notes.line("ready");
        tool.signal(signal);
        let ended = tool.end();
        assert_eq!(ended.code, 7, "{name}: {ended:?}");
        assert!(!is_held(&server, "k"));
    }
}

#[test]
fn signal_reaches_child_processes_of_the_command() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let grandchild = "trap 'echo > told' USR1; echo $$ > grandchild; sh -c 'echo > ready; exec cat'; exit 0";
    fs::write(notes.path("script"), grandchild).unwrap();
    let script = "trap : USR1; exec 3<&0; sh script <&3 & wait; wait";
    let mut tool = start(&server, &notes, &[], script);
    let stdin = tool.take_stdin();
    notes.line("ready");
    let grandchild = notes.line("grandchild");
    tool.signal(Signal::USR1);
    notes.line("told");
    drop(stdin);
    assert_eq!(tool.end().code, 0);
    wait_until_dead(&grandchild);
}

#[test]
fn a_command_that_ignores_term_is_killed_after_the_grace() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "trap '' TERM; echo $$ > ready; cat";
    let mut tool = start(&server, &notes, &["--kill-after", "300ms"], script);
    let _stdin = tool.take_stdin();
    let child = notes.line("ready");
    let started = Instant::now();
    tool.signal(Signal::TERM);
    let ended = tool.end();
    assert!(started.elapsed() >= SHORT_GRACE);
    assert_eq!(ended.code, 137, "{ended:?}");
    assert!(!is_alive(&child));
    assert!(!is_held(&server, "k"));
}

#[test]
fn the_lock_is_kept_until_the_command_is_gone() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "trap 'echo > ending; cat > /dev/null; exit 5' TERM; sh -c 'echo > ready; exec cat'; exit 9";
    let mut tool = start(&server, &notes, &["--kill-after", "1h"], script);
    let stdin = tool.take_stdin();
    notes.line("ready");
    tool.signal(Signal::TERM);
    notes.line("ending");
    assert!(is_held(&server, "k"));
    assert!(tool.is_running());
    let ended = run(crate::tool::tool(&server, &["exec", "-n", "k", "true"]));
    assert_eq!(ended.code, 1, "{ended:?}");
    drop(stdin);
    assert_eq!(tool.end().code, 5);
    assert!(!is_held(&server, "k"));
}

#[test]
fn grace_ends_early_if_the_command_ends_at_term() {
    let server = RedisServer::start();
    let notes = Notes::new();
    // Both processes end at once. One of them is therefore an orphan, which possibly only the tool
    // can reap.
    let script = "exec 3<&0; sh -c 'echo > ready; exec cat' <&3 & wait";
    let mut tool = start(&server, &notes, &["--kill-after", "1h"], script);
    let _stdin = tool.take_stdin();
    notes.line("ready");
    tool.signal(Signal::TERM);
    let ended = tool.end();
    assert_eq!(ended.code, 143, "{ended:?}");
    assert!(!is_held(&server, "k"));
}

#[test]
fn processes_left_after_term_are_killed_before_the_release() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "exec 3<&0; sh -c 'trap \"\" TERM; echo $$ > grandchild; read line' <&3 & wait";
    let mut tool = start(&server, &notes, &["--kill-after", "300ms"], script);
    let _stdin = tool.take_stdin();
    let grandchild = notes.line("grandchild");
    tool.signal(Signal::TERM);
    let ended = tool.end();
    assert_eq!(ended.code, 143, "{ended:?}");
    assert!(!is_alive(&grandchild));
    assert!(!is_held(&server, "k"));
}

#[test]
fn the_command_dies_with_a_tool_that_is_killed_and_the_lock_is_free_within_its_ttl() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let mut tool = start(&server, &notes, &["--ttl", "1s"], "echo $$ > ready; exec cat");
    let _stdin = tool.take_stdin();
    let child = notes.line("ready");
    assert!(is_alive(&child));
    tool.kill();
    wait_until_dead(&child);
    wait_until("the lease has expired", PATIENCE, || !is_held(&server, "k"));
    let ended = run(crate::tool::tool(&server, &["exec", "-w", "10s", "k", "true"]));
    assert_eq!(ended.code, 0, "{ended:?}");
}

#[test]
fn signals_that_were_ignored_at_the_start_stay_ignored() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "trap '' HUP INT QUIT; exec \"$0\" exec k sh -c 'echo > ready; read line; exit 3'";
    let mut tool = Run::start(through_shell(&server, &notes, script));
    let stdin = tool.take_stdin();
    notes.line("ready");
    for signal in [Signal::HUP, Signal::INT, Signal::QUIT] {
        tool.signal(signal);
    }
    drop(stdin);
    let ended = tool.end();
    assert_eq!(ended.code, 3, "{ended:?}");
}

#[test]
fn a_wait_ignores_the_signals_that_were_ignored_at_the_start() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let holder = Holder::of(&server, "k");
    let mut waiter = Run::start(through_shell(
        &server,
        &notes,
        "trap '' HUP INT; exec \"$0\" exec k echo ran",
    ));
    wait_until_waiting(&server, "k", 1);
    waiter.signal(Signal::HUP);
    waiter.signal(Signal::INT);
    holder.go();
    let ended = waiter.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
}

#[test]
fn the_command_has_the_dispositions_that_the_tool_was_started_with() {
    const SHOW: &str = "grep -E '^Sig(Ign|Blk|Cgt)' /proc/self/status";
    let server = RedisServer::start();
    let notes = Notes::new();
    for ignored in ["HUP", "INT QUIT", "PIPE", "TTOU TTIN", "TERM USR1 USR2 WINCH CONT", ""] {
        let trap = if ignored.is_empty() {
            String::new()
        } else {
            format!("trap '' {ignored}; ")
        };
        let directly = run(through_shell(&server, &notes, &format!("{trap}exec {SHOW}")));
        let under_lock = run(through_shell(
            &server,
            &notes,
            &format!("{trap}exec \"$0\" exec k {SHOW}"),
        ));
        assert_eq!((directly.code, under_lock.code), (0, 0), "{under_lock:?}");
        assert_eq!(directly.stdout, under_lock.stdout, "{ignored}");
    }
}

#[test]
fn demo_keeps_signals_ignored_that_were_ignored_at_the_start() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "trap '' HUP; exec \"$0\" demo --seconds 30 --shard \"$SHARDLOCK_SHARDS\"";
    let mut demo = Run::start(through_shell(&server, &notes, script));
    wait_until("tasks wait for locks", PATIENCE, || {
        server.keys().iter().any(|key| key.ends_with(":q"))
    });
    let status = fs::read_to_string(format!("/proc/{}/status", demo.pid())).unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    assert_eq!(u64::from_str_radix(ignored.trim(), 16).unwrap() & 1, 1, "{status}");
    demo.signal(Signal::TERM);
    assert_eq!(demo.end().code, 143);
}

/// As under `nohup make test &`, or in a script's background job.
#[test]
fn tests_of_the_tool_pass_with_signals_ignored() {
    let tests = [
        "exec::conflict::wait_ended_by_a_signal_leaves_the_queue",
        "exec::signals::each_signal_is_forwarded_to_the_command",
        "exec::signals::the_lock_is_kept_until_the_command_is_gone",
        "exec::terminal::keyboard_interrupt_ends_the_command_and_reaches_its_script",
    ];
    let mut command = std::process::Command::new("sh");
    command
        .args(["-c", "trap '' HUP INT QUIT TERM USR1 USR2; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .arg("--exact")
        .args(tests)
        .stdin(Stdio::null());
    let ended = run(command);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.contains("4 passed"), "{ended:?}");
}

/// A shell script whose `$0` is the tool.
fn through_shell(server: &RedisServer, notes: &Notes, script: &str) -> std::process::Command {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", script]).arg(bare(&[]).get_program());
    command.env("SHARDLOCK_SHARDS", server.url());
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    command
}
