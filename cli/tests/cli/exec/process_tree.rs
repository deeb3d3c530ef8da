//! Everything that the command has started, in whatever process group or session, and how it ends
//! with the tool.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Signal, geteuid, kill_process, kill_process_group};
use support::{PATIENCE, RedisServer, wait_until};

use crate::clients::program;
use crate::tool::{Notes, Run, bare, is_alive, is_held, run, tool, wait_until_dead, wait_until_waiting};

/// A command that starts a grandchild, an orphan, and processes in their own session and process
/// group. Each writes its process id to a note.
const FAMILY: &str = "
    sh -c 'sh -c \"echo \\$\\$ > grandchild; exec sleep 100\"; true' &
    (sh -c 'echo $$ > orphan; exec sleep 100' &)
    setsid sh -c 'echo $$ > session; exec sleep 100' &
    sh -c 'set -m; sh -c \"echo \\$\\$ > group; exec sleep 100\"; true' &
    echo $$ > leader
    sleep 100 | cat
    true";

const MEMBERS: [&str; 5] = ["grandchild", "orphan", "session", "group", "leader"];

fn start(server: &RedisServer, notes: &Notes, options: &[&str], script: &str) -> Run {
    let args = [&["exec"][..], options, &["k", "sh", "-c", script]].concat();
    let mut command = tool(server, &args);
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    Run::start(command)
}

fn start_family(server: &RedisServer, notes: &Notes, options: &[&str]) -> (Run, Vec<String>) {
    let tool = start(server, notes, options, FAMILY);
    let members = MEMBERS.map(|name| notes.line(name)).to_vec();
    (tool, members)
}

#[track_caller]
fn wait_until_all_dead(members: &[String]) {
    for member in members {
        wait_until_dead(member);
    }
}

/// The next holder. It notes which of the members are still running.
fn next_holder(server: &RedisServer, notes: &Notes) -> Run {
    let script = "for name in grandchild orphan session group leader; do
                      kill -0 $(cat $name) 2>/dev/null && echo $name beside
                  done; echo next";
    let mut command = tool(server, &["exec", "k", "sh", "-c", script]);
    command.current_dir(notes.dir());
    let next = Run::start(command);
    wait_until_waiting(server, "k", 1);
    next
}

#[test]
fn processes_of_the_command_die_with_a_killed_tool_before_the_next_holder_enters() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let (mut tool, members) = start_family(&server, &notes, &[]);
    let mut next = next_holder(&server, &notes);
    tool.kill();
    let ended = next.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "next\n"), "{ended:?}");
    wait_until_all_dead(&members);
}

#[test]
fn processes_of_the_command_die_with_the_killed_group_of_the_tool() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let (tool, members) = start_family(&server, &notes, &[]);
    let mut next = next_holder(&server, &notes);
    kill_process_group(tool.pid(), Signal::KILL).unwrap();
    let ended = next.end();
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "next\n"), "{ended:?}");
    wait_until_all_dead(&members);
}

#[test]
fn processes_of_the_command_die_with_a_killed_keeper() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let (mut tool, members) = start_family(&server, &notes, &["--ttl", "1s"]);
    let [keeper] = tool.children()[..] else {
        panic!("{:?}", tool.children())
    };
    kill_process(keeper, Signal::KILL).unwrap();
    let ended = tool.end();
    assert_eq!(ended.code, 137, "{ended:?}");
    assert!(ended.stderr.contains("its command was killed"), "{ended:?}");
    for member in &members {
        assert!(!is_alive(member));
    }
    wait_until("the lease has expired", PATIENCE, || !is_held(&server, "k"));
}

#[test]
fn a_waiting_tool_that_is_killed_leaves_the_queue() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let mut holder = start(&server, &notes, &[], "echo > ready; cat");
    let stdin = holder.take_stdin();
    notes.line("ready");
    let mut waiter = Run::start(tool(&server, &["exec", "k", "true"]));
    wait_until_waiting(&server, "k", 1);
    waiter.kill();
    wait_until_waiting(&server, "k", 0);
    drop(stdin);
    assert_eq!(holder.end().code, 0);
}

#[test]
fn term_and_then_kill_reach_processes_outside_the_group() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "
        setsid sh -c 'trap \"echo > told; exit\" TERM; echo $$ > polite; while :; do sleep 0.01; done' &
        setsid sh -c 'trap \"\" TERM; echo $$ > deaf; while :; do sleep 0.01; done' &
        echo $$ > leader; cat";
    let mut tool = start(&server, &notes, &["--kill-after", "500ms"], script);
    let _stdin = tool.take_stdin();
    let members = ["polite", "deaf", "leader"].map(|name| notes.line(name));
    tool.signal(Signal::TERM);
    let ended = tool.end();
    assert_eq!(ended.code, 143, "{ended:?}");
    assert!(notes.exists("told"));
    for member in &members {
        assert!(!is_alive(member));
    }
    assert!(!is_held(&server, "k"));
}

#[test]
fn background_process_outlives_a_command_that_ends_by_itself() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let script = "sh -c 'echo $$ > left; exec cat < pipe' > /dev/null 2>&1 & until [ -s left ]; do sleep 0.01; done";
    let made = Command::new("mkfifo").arg(notes.path("pipe")).status().unwrap();
    assert!(made.success());
    let mut tool = start(&server, &notes, &[], script);
    let ended = tool.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    let left = notes.line("left");
    assert!(is_alive(&left));
    // The process reads until the end of its input.
    fs::write(notes.path("pipe"), "").unwrap();
    wait_until_dead(&left);
}

#[test]
fn orphans_of_the_command_are_reaped_while_it_runs() {
    let server = RedisServer::start();
    let notes = Notes::new();
    // In its own pid namespace the tool is the first process, as in a container, so no other
    // process reaps orphans.
    let script = "(sh -c 'echo $$ > orphan' &)
                  until [ -s orphan ] && [ ! -e /proc/$(cat orphan) ]; do sleep 0.01; done; echo $PPID > reaped";
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--mount-proc"])
        .args((!geteuid().is_root()).then_some("--map-root-user"))
        .arg(bare(&[]).get_program())
        .args(["exec", "k", "sh", "-c", script])
        .env("SHARDLOCK_SHARDS", server.url())
        .current_dir(notes.dir());
    let ended = run(command);
    assert_eq!(ended.code, 0, "{ended:?}");
    // Process 1 is the tool, and its child is the command's parent.
    assert_eq!(notes.line("reaped"), "2");
}

/// Linux shows a process whose main thread has ended as a zombie, although its other threads run.
#[test]
fn a_process_whose_main_thread_has_ended_is_ended_before_the_lock_is_released() {
    const THREADS: &str = "
import ctypes, os, threading, time
threading.Thread(target=time.sleep, args=(100,)).start()
with open('left', 'w') as note:
    note.write(f'{os.getpid()}\\n')
ctypes.CDLL(None).pthread_exit(None)";
    let server = RedisServer::start();
    let notes = Notes::new();
    fs::write(notes.path("threads.py"), THREADS).unwrap();
    // Outside the command's process group, it is signalled by its PID.
    let script = "setsid \"$PYTHON\" threads.py & cat";
    let mut command = tool(&server, &["exec", "k", "sh", "-c", script]);
    command
        .env("PYTHON", program("python").get_program())
        .current_dir(notes.dir())
        .stdin(Stdio::piped());
    let mut tool = Run::start(command);
    let _stdin = tool.take_stdin();
    let left = Path::new("/proc").join(notes.line("left"));
    wait_until("its main thread has ended", PATIENCE, || {
        fs::read_to_string(left.join("status")).unwrap().contains("State:\tZ")
    });
    tool.signal(Signal::TERM);
    let ended = tool.end();
    assert_eq!(ended.code, 143, "{ended:?}");
    assert!(!left.exists());
    assert!(!is_held(&server, "k"));
}

/// Once the command was reaped, its PID may become that of another process, and its group's ID
/// that of another group.
#[test]
fn a_process_that_reuses_the_pid_of_the_command_is_not_killed() {
    const COMMAND: &str = "
        setsid sh -c 'trap \"\" TERM; echo $$ > deaf; exec sleep 100' &
        echo $$ > leader
        wait";
    // The first process of a PID namespace, which can choose the next PID. It kills the front of
    // the tool, so that the keeper kills what is left of the command.
    const SCRIPT: &str = "
        \"$TOOL\" exec --kill-after 1h k sh command.sh &
        tool=$!
        until [ -s deaf ] && [ -s leader ]; do sleep 0.01; done
        read deaf < deaf
        read leader < leader
        kill -TERM $tool
        while [ -e /proc/$leader ]; do sleep 0.01; done
        echo $((leader - 1)) > /proc/sys/kernel/ns_last_pid
        setsid sleep 100 &
        stranger=$!
        until [ \"$(tr -d '\\0' < /proc/$stranger/cmdline)\" = sleep100 ]; do :; done
        kill -KILL $tool
        while [ -e /proc/$deaf ]; do sleep 0.01; done
        echo $stranger > stranger
        grep -q '^State:.[RSD]' /proc/$stranger/status && echo alive || echo killed";
    let server = RedisServer::start();
    let notes = Notes::new();
    fs::write(notes.path("command.sh"), COMMAND).unwrap();
    let mut command = Command::new("unshare");
    command
        .args(["--pid", "--fork", "--mount-proc"])
        .args((!geteuid().is_root()).then_some("--map-root-user"))
        .args(["sh", "-c", SCRIPT])
        .env("TOOL", bare(&[]).get_program())
        .env("SHARDLOCK_SHARDS", server.url())
        .current_dir(notes.dir());
    let ended = run(command);
    assert_eq!(notes.line("stranger"), notes.line("leader"));
    assert_eq!(ended.stdout, "alive\n", "{ended:?}");
}

/// Runs the tool as a user who may not signal root's processes, with a command that becomes root.
/// Only root can set this up.
struct Unprivileged {
    notes: Notes,
    server: RedisServer,
}

impl Unprivileged {
    const NOBODY: u32 = 65534;

    fn new() -> Option<Self> {
        if !geteuid().is_root() {
            return None;
        }
        let notes = Notes::new();
        fs::set_permissions(notes.dir(), fs::Permissions::from_mode(0o777)).unwrap();
        let copy = |from: &Path, to: &str, mode: u32| {
            fs::copy(from, notes.path(to)).unwrap();
            fs::set_permissions(notes.path(to), fs::Permissions::from_mode(mode)).unwrap();
        };
        let setpriv = String::from_utf8(Command::new("which").arg("setpriv").output().unwrap().stdout).unwrap();
        copy(Path::new(setpriv.trim()), "become", 0o4755);
        copy(Path::new(bare(&[]).get_program()), "tool", 0o755);
        Some(Self {
            notes,
            server: RedisServer::start(),
        })
    }

    /// Starts a command that becomes root and runs until the file `end` exists.
    fn start(&self, options: &[&str]) -> (Run, String) {
        let script = "echo $$ > pid; until [ -e end ]; do sleep 0.01; done; exit 5";
        let mut command = Command::new(self.notes.path("tool"));
        command
            .arg("exec")
            .args(options)
            .arg("k")
            .arg(self.notes.path("become"));
        command.args(["--reuid", "0", "--regid", "0", "--clear-groups", "sh", "-c", script]);
        command.env("SHARDLOCK_SHARDS", self.server.url());
        command
            .current_dir(self.notes.dir())
            .uid(Self::NOBODY)
            .gid(Self::NOBODY);
        let run = Run::start(command);
        (run, self.notes.line("pid"))
    }

    /// Whether another process gets the lock within a time that is longer than any limit used here.
    fn is_free_soon(&self) -> bool {
        run(tool(&self.server, &["exec", "-w", "1500ms", "k", "true"])).code == 0
    }
}

const KEPT: &str = "runs as another user and can't be signalled; the lock is kept until it has ended";
const LOST: &str = "runs as another user and can't be signalled; it continues without the lock";

#[test]
fn command_of_another_user_keeps_the_lock_through_the_grace_and_is_reported() {
    let Some(unprivileged) = Unprivileged::new() else {
        return;
    };
    let (mut tool, command) = unprivileged.start(&["--ttl", "500ms", "--kill-after", "200ms"]);
    tool.signal(Signal::TERM);
    wait_until("the kept lock is reported", PATIENCE, || tool.stderr().contains(KEPT));
    assert!(!unprivileged.is_free_soon());
    assert!(is_alive(&command));
    unprivileged.notes.leave("end");
    let ended = tool.end();
    assert_eq!(ended.code, 5, "{ended:?}");
    assert_eq!(ended.stderr.matches("can't be signalled").count(), 1, "{ended:?}");
    assert!(unprivileged.is_free_soon());
}

#[test]
fn a_command_of_another_user_keeps_the_lock_after_its_tool_was_killed() {
    let Some(unprivileged) = Unprivileged::new() else {
        return;
    };
    let (mut tool, command) = unprivileged.start(&["--ttl", "500ms"]);
    tool.kill();
    assert!(!unprivileged.is_free_soon());
    assert!(is_alive(&command));
    unprivileged.notes.leave("end");
    wait_until_dead(&command);
    assert!(unprivileged.is_free_soon());
}

#[test]
fn command_of_another_user_is_reported_as_running_without_its_lost_lock() {
    for (options, reason) in [
        (&["--ttl", "500ms", "--kill-after", "200ms"][..], "lost"),
        (
            &["--ttl", "500ms", "--max-hold", "1s", "--kill-after", "200ms"],
            "max_hold",
        ),
    ] {
        let Some(unprivileged) = Unprivileged::new() else {
            return;
        };
        let (mut tool, command) = unprivileged.start(options);
        if reason == "lost" {
            unprivileged.server.command(&["DEL", "lock:k"]);
        }
        wait_until("the lost lock is reported", PATIENCE, || tool.stderr().contains(LOST));
        assert!(is_alive(&command));
        assert!(unprivileged.is_free_soon());
        unprivileged.notes.leave("end");
        let ended = tool.end();
        assert_eq!(ended.code, 117, "{ended:?}");
        assert!(
            ended.stderr.contains(reason) && !ended.stderr.contains("is ended"),
            "{ended:?}"
        );
    }
}
