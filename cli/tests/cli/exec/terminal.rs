//! A terminal as standard input.

use support::{PATIENCE, RedisServer, Terminal, wait_until};

use crate::tool::{Holder, bare, is_held, run, tool, wait_until_waiting, waiting};

/// A script that leads a session on a terminal, as in a window.
struct Window(Terminal);

impl Window {
    fn open(server: &RedisServer, script: &str) -> Self {
        let mut command = std::process::Command::new("sh");
        command
            .args(["-c", script])
            .arg(bare(&[]).get_program())
            .env("SHARDLOCK_SHARDS", server.url());
        Self(Terminal::open(command, 24, 80))
    }

    #[track_caller]
    fn shows(&self, text: &str) {
        self.0.has_shown(text);
    }

    fn types(&self, text: &str) {
        self.0.types(text);
    }
}

#[test]
fn command_and_then_its_script_read_from_the_terminal() {
    let server = RedisServer::start();
    let script = "\"$0\" exec k sh -c 'echo ask; read line; echo \"command: $line\"'; \
                  echo \"code $?\"; read line; echo \"script: $line\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("one\n");
    window.shows("command: one");
    window.shows("code 0");
    window.types("two\n");
    window.shows("script: two");
    assert!(window.0.process.wait(PATIENCE).success());
}

#[test]
fn keyboard_interrupt_ends_the_command_and_reaches_its_script() {
    let server = RedisServer::start();
    let script = "trap 'echo script: interrupted' INT; \
                  \"$0\" exec k sh -c 'echo ask; read line; echo no'; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("\x03");
    window.shows("script: interrupted");
    window.shows("code 130");
    assert!(window.0.process.wait(PATIENCE).success());
    wait_until("the key is free", PATIENCE, || !is_held(&server, "k"));
}

#[test]
fn an_interrupt_from_the_keyboard_ends_a_wait() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    let script = "trap : INT; \"$0\" exec k echo no; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    wait_until_waiting(&server, "k", 1);
    window.types("\x03");
    window.shows("code 130");
    assert!(window.0.process.wait(PATIENCE).success());
    assert_eq!(waiting(&server, "k"), 0);
    holder.go();
}

/// The pager also reads keys. A wrapper that makes only its command the terminal's foreground
/// process group would stop the pager.
#[test]
fn a_pager_at_the_end_of_the_pipeline_reads_from_the_terminal() {
    let server = RedisServer::start();
    let script = "\"$0\" exec k yes | sh -c 'read page; echo \"shown $page\"; read line < /dev/tty; echo \"pager: $line\"'; \
                  echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("shown y");
    assert!(is_held(&server, "k"));
    window.types("q\n");
    window.shows("pager: q");
    window.shows("code 0");
    assert!(window.0.process.wait(PATIENCE).success());
}

#[test]
fn command_with_redirected_input_can_prompt_on_the_terminal() {
    let server = RedisServer::start();
    let script = "echo data | \"$0\" exec k sh -c 'read data; echo ask; read line < /dev/tty; echo \"$data: $line\"'; \
                  echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("password\n");
    window.shows("data: password");
    window.shows("code 0");
    assert!(window.0.process.wait(PATIENCE).success());
}

#[test]
fn a_command_that_is_stopped_from_the_keyboard_can_be_continued_by_its_shell() {
    let server = RedisServer::start();
    let script = "set -m; \"$0\" exec k sh -c 'echo ask; read line; echo \"command: $line\"'; \
                  echo \"stopped $?\"; fg; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("\x1a");
    window.shows("stopped");
    window.types("one\n");
    window.shows("command: one");
    window.shows("code 0");
    assert!(window.0.process.wait(PATIENCE).success());
}

#[test]
fn a_command_that_is_stopped_keeps_its_lock() {
    let server = RedisServer::start();
    let script = "set -m; \"$0\" exec --ttl 1s k sh -c 'echo ask; read line; echo \"command: $line\"'; \
                  echo \"stopped $?\"; read go; fg; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("\x1a");
    window.shows("stopped");
    // Longer than the TTL.
    let ended = run(tool(&server, &["exec", "-w", "1500ms", "k", "true"]));
    assert_eq!(ended.code, 1, "{ended:?}");
    window.types("\n");
    window.types("one\n");
    window.shows("command: one");
    window.shows("code 0");
    assert!(window.0.process.wait(PATIENCE).success());
}

#[test]
fn wait_stopped_from_the_keyboard_resumes_when_its_shell_continues_it() {
    let server = RedisServer::start();
    let holder = Holder::of(&server, "k");
    let script = "set -m; \"$0\" exec k sh -c 'echo ask; read line; echo \"command: $line\"'; \
                  echo \"stopped $?\"; read go; fg; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    wait_until_waiting(&server, "k", 1);
    window.types("\x1a");
    window.shows("stopped");
    window.types("\n");
    holder.go();
    window.shows("ask");
    window.types("one\n");
    window.shows("command: one");
    window.shows("code 0");
    assert!(window.0.process.wait(PATIENCE).success());
}

/// An interactive shell makes its own process group the foreground group. It can't undo that when
/// it is killed.
#[test]
fn the_script_reads_from_the_terminal_after_a_shell_that_was_killed() {
    let server = RedisServer::start();
    let script = "\"$0\" exec k sh -c 'set -m; sh -c \"echo ask; kill -KILL \\$PPID; exec true\"'; \
                  echo \"code $?\"; read line; echo \"script: $line\"";
    let mut window = Window::open(&server, script);
    window.shows("code 137");
    window.types("two\n");
    window.shows("script: two");
    assert!(window.0.process.wait(PATIENCE).success());
}
