//! A terminal like that of a window: a process leads a session on it, and the test reads the screen
//! and types.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::num::NonZero;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Instant;

use rustix::process::{ioctl_tiocsctty, setsid};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcgetattr, tcsetwinsize};

use crate::process::Process;
use crate::wait::{PATIENCE, POLL};

/// A terminal and the process started on it. Dropping it kills the process.
pub struct Terminal {
    /// The process.
    pub process: Process,
    keyboard: File,
    shown: Arc<Mutex<Shown>>,
}

struct Shown {
    screen: vt100::Parser,
    /// Everything written so far.
    written: Vec<u8>,
}

impl Terminal {
    /// Starts the command as the leader of its own session, with all three streams on a terminal of
    /// this size.
    #[track_caller]
    pub fn open(mut command: Command, rows: u16, columns: u16) -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("open a terminal");
        grantpt(&control).expect("grant the terminal");
        unlockpt(&control).expect("unlock the terminal");
        tcsetwinsize(&control, size(rows, columns)).expect("size the terminal");
        let name = ptsname(&control, Vec::new()).expect("get the terminal's name");
        let name = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let terminal = || -> Stdio {
            // If the test process leads a session, this must not become its controlling terminal.
            let mut options = OpenOptions::new();
            options.read(true).write(true).custom_flags(libc::O_NOCTTY);
            let opened = options.open(name);
            opened.expect("open the terminal's other side").into()
        };
        command.stdin(terminal()).stdout(terminal()).stderr(terminal());
        command.env("TERM", "xterm-256color");
        let lead_a_session = || {
            setsid()?;
            ioctl_tiocsctty(io::stdin().as_fd())?;
            Ok(())
        };
        // SAFETY: between fork and exec the closure makes two system calls. It neither allocates
        // nor takes a lock.
        #[allow(unsafe_code)]
        unsafe {
            command.pre_exec(lead_a_session);
        }
        let process = Process::spawn(command).expect("start a process on the terminal");
        let shown = Arc::new(Mutex::new(Shown {
            screen: vt100::Parser::new(some(rows), some(columns), 0),
            written: Vec::new(),
        }));
        watch(control.try_clone().expect("share the terminal"), Arc::clone(&shown));
        Self {
            process,
            keyboard: control.into(),
            shown,
        }
    }

    /// Types this text.
    #[track_caller]
    pub fn types(&self, text: &str) {
        (&self.keyboard).write_all(text.as_bytes()).expect("type");
    }

    /// Resizes the window; the kernel notifies the process.
    #[track_caller]
    pub fn resize(&self, rows: u16, columns: u16) {
        let mut shown = self.shown.lock().expect("the watcher lives");
        shown.screen.screen_mut().set_size(some(rows), some(columns));
        tcsetwinsize(&self.keyboard, size(rows, columns)).expect("size the terminal");
    }

    /// The current screen.
    pub fn screen(&self) -> vt100::Screen {
        self.shown.lock().expect("the watcher lives").screen.screen().clone()
    }

    /// The lines of the screen, without trailing blanks.
    pub fn lines(&self) -> Vec<String> {
        let screen = self.screen();
        let (_, columns) = screen.size();
        screen
            .rows(0, columns.get())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    /// Everything written to the terminal so far.
    pub fn written(&self) -> String {
        let shown = self.shown.lock().expect("the watcher lives");
        String::from_utf8_lossy(&shown.written).into_owned()
    }

    /// Waits until the lines of the screen satisfy the condition, and returns them.
    #[track_caller]
    pub fn until(&self, what: &str, mut is_so: impl FnMut(&[String]) -> bool) -> Vec<String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let lines = self.lines();
            if is_so(&lines) {
                return lines;
            }
            assert!(
                Instant::now() < deadline,
                "waited {PATIENCE:?} without success until {what}:\n{}",
                lines.join("\n")
            );
            thread::sleep(POLL);
        }
    }

    /// Waits until some line of the screen contains this text.
    #[track_caller]
    pub fn shows(&self, text: &str) -> Vec<String> {
        self.until(&format!("{text:?} is shown"), |lines| {
            lines.iter().any(|line| line.contains(text))
        })
    }

    /// Waits until this text has been written, whether it is still visible or not.
    #[track_caller]
    pub fn has_shown(&self, text: &str) {
        self.until(&format!("{text:?} was written"), |_| self.written().contains(text));
    }

    /// The terminal's input, output and local modes, as text for comparison.
    #[track_caller]
    pub fn modes(&self) -> String {
        let modes = tcgetattr(&self.keyboard).expect("get the terminal's modes");
        format!(
            "{:?} {:?} {:?}",
            modes.input_modes, modes.output_modes, modes.local_modes
        )
    }
}

#[track_caller]
fn some(count: u16) -> NonZero<u16> {
    NonZero::new(count).expect("a screen has rows and columns")
}

const fn size(rows: u16, columns: u16) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Terminals show the output between these sequences at once, so that no half-drawn frame is
/// visible: "synchronized output", DEC private mode 2026.
const FRAME_BEGINS: &[u8] = b"\x1b[?2026h";
const FRAME_ENDS: &[u8] = b"\x1b[?2026l";

/// Collects the output until the terminal is closed.
fn watch(control: OwnedFd, shown: Arc<Mutex<Shown>>) {
    thread::spawn(move || {
        let mut control = File::from(control);
        let mut buffer = [0; 4096];
        let mut held_back = Vec::new();
        while let Ok(count @ 1..) = control.read(&mut buffer) {
            let mut shown = shown.lock().expect("no test panics while it holds the screen");
            shown.written.extend_from_slice(&buffer[..count]);
            held_back.extend_from_slice(&buffer[..count]);
            let whole: Vec<u8> = held_back.drain(..end_of_whole(&held_back)).collect();
            shown.screen.process(&whole);
        }
    });
}

/// The end of the output that consists of whole frames. The rest is an unfinished frame, or may be
/// the start of one.
fn end_of_whole(output: &[u8]) -> usize {
    let find = |from: usize, what: &[u8]| {
        let at = output[from..].windows(what.len()).position(|seen| seen == what);
        at.map(|at| from + at)
    };
    let mut whole = 0;
    while let Some(begin) = find(whole, FRAME_BEGINS) {
        match find(begin, FRAME_ENDS) {
            Some(end) => whole = end + FRAME_ENDS.len(),
            None => return begin,
        }
    }
    let cut_short = (1..FRAME_BEGINS.len()).rev().map(|length| &FRAME_BEGINS[..length]);
    let cut_short = cut_short
        .filter(|part| output[whole..].ends_with(part))
        .map(<[u8]>::len);
    output.len() - cut_short.max().unwrap_or(0)
}
