//! A terminal as standard input.

use crate::support::{PATIENCE, RedisServer, Terminal, wait_until};
use crate::tool::{bare, is_held};

/// A script that leads a session of its own on a terminal, as in a window.
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
fn the_command_reads_from_the_terminal_and_the_script_does_so_after_it() {
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
fn an_interrupt_from_the_keyboard_ends_the_command() {
    let server = RedisServer::start();
    let script = "\"$0\" exec k sh -c 'echo ask; read line; echo no'; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("\x03");
    window.shows("code 130");
    assert!(window.0.process.wait(PATIENCE).success());
    wait_until("the key is free", PATIENCE, || !is_held(&server, "k"));
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
