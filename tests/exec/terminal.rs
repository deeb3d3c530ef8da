//! A terminal as standard input.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::support::process::Process;
use crate::support::{PATIENCE, RedisServer, wait_until};
use crate::tool::{bare, is_held};

/// A script that leads a session of its own on a terminal, as in a window.
struct Window {
    script: Process,
    keyboard: File,
    screen: Arc<Mutex<String>>,
}

impl Window {
    fn open(server: &RedisServer, script: &str) -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&control).unwrap();
        unlockpt(&control).unwrap();
        let name = ptsname(&control, Vec::new()).unwrap();
        let name = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let terminal = || -> Stdio { OpenOptions::new().read(true).write(true).open(name).unwrap().into() };
        let mut command = Command::new("sh");
        command
            .args(["-c", script])
            .arg(bare(&[]).get_program())
            .env("SHARDLOCK_SHARDS", server.url())
            .stdin(terminal())
            .stdout(terminal())
            .stderr(terminal());
        let lead_a_session = || {
            setsid()?;
            ioctl_tiocsctty(io::stdin().as_fd())?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes two system calls; it neither allocates nor locks.
        #[expect(unsafe_code, reason = "only the new process can lead its session")]
        unsafe {
            command.pre_exec(lead_a_session);
        }
        let script = Process::spawn(command).unwrap();
        let screen = Arc::default();
        watch(control.try_clone().unwrap(), Arc::clone(&screen));
        Self {
            script,
            keyboard: control.into(),
            screen,
        }
    }

    #[track_caller]
    fn shows(&self, text: &str) {
        let screen = || self.screen.lock().unwrap().clone();
        let deadline = Instant::now() + PATIENCE;
        while !screen().contains(text) {
            assert!(Instant::now() < deadline, "{text:?} is not shown: {:?}", screen());
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn types(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).unwrap();
    }
}

/// Collects what is shown until the terminal is closed.
fn watch(control: OwnedFd, screen: Arc<Mutex<String>>) {
    thread::spawn(move || {
        let mut control = File::from(control);
        let mut buffer = [0; 1024];
        while let Ok(count @ 1..) = control.read(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..count]);
            screen.lock().unwrap().push_str(&text);
        }
    });
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
    assert!(window.script.wait(PATIENCE).success());
}

#[test]
fn an_interrupt_from_the_keyboard_ends_the_command() {
    let server = RedisServer::start();
    let script = "\"$0\" exec k sh -c 'echo ask; read line; echo no'; echo \"code $?\"";
    let mut window = Window::open(&server, script);
    window.shows("ask");
    window.types("\x03");
    window.shows("code 130");
    assert!(window.script.wait(PATIENCE).success());
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
    assert!(window.script.wait(PATIENCE).success());
}
