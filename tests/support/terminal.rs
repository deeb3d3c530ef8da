//! A terminal as in a window: a process leads a session on it, and a test sees what is on the screen and types.

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

use super::process::Process;
use super::wait::{PATIENCE, POLL};

/// A terminal, and the process that was started on it. Dropping it kills the process.
pub struct Terminal {
    pub process: Process,
    keyboard: File,
    shown: Arc<Mutex<Shown>>,
}

struct Shown {
    screen: vt100::Parser,
    /// All that was ever written.
    written: Vec<u8>,
}

impl Terminal {
    /// Starts the command as the leader of a session of its own, with all three streams on a terminal of this size.
    #[track_caller]
    pub fn open(mut command: Command, rows: u16, columns: u16) -> Self {
        let control = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("open a terminal");
        grantpt(&control).expect("grant the terminal");
        unlockpt(&control).expect("unlock the terminal");
        tcsetwinsize(&control, size(rows, columns)).expect("size the terminal");
        let name = ptsname(&control, Vec::new()).expect("ask the terminal's name");
        let name = Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let terminal = || -> Stdio {
            // A test process that leads a session must not become the one that the terminal controls.
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
        // SAFETY: between fork and exec the closure makes two system calls; it neither allocates nor locks.
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

    #[track_caller]
    pub fn types(&self, text: &str) {
        (&self.keyboard).write_all(text.as_bytes()).expect("type");
    }

    /// Gives the window another size, of which the kernel tells the process.
    #[track_caller]
    pub fn resize(&self, rows: u16, columns: u16) {
        let mut shown = self.shown.lock().expect("the watcher lives");
        shown.screen.screen_mut().set_size(some(rows), some(columns));
        tcsetwinsize(&self.keyboard, size(rows, columns)).expect("size the terminal");
    }

    /// The screen as it is now.
    pub fn screen(&self) -> vt100::Screen {
        self.shown.lock().expect("the watcher lives").screen.screen().clone()
    }

    /// The lines of the screen, without blanks at their ends.
    pub fn lines(&self) -> Vec<String> {
        let screen = self.screen();
        let (_, columns) = screen.size();
        screen
            .rows(0, columns.get())
            .map(|line| line.trim_end().to_owned())
            .collect()
    }

    /// All that was written to the terminal so far.
    pub fn written(&self) -> String {
        let shown = self.shown.lock().expect("the watcher lives");
        String::from_utf8_lossy(&shown.written).into_owned()
    }

    /// Waits until the screen is so, and returns its lines.
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
                "waited {PATIENCE:?} in vain until {what}:\n{}",
                lines.join("\n")
            );
            thread::sleep(POLL);
        }
    }

    /// Waits until some line of the screen has this text.
    #[track_caller]
    pub fn shows(&self, text: &str) -> Vec<String> {
        self.until(&format!("{text:?} is shown"), |lines| {
            lines.iter().any(|line| line.contains(text))
        })
    }

    /// Waits until this text was written, whether it is still to be seen or not.
    #[track_caller]
    pub fn has_shown(&self, text: &str) {
        self.until(&format!("{text:?} was written"), |_| self.written().contains(text));
    }

    /// How the terminal treats what is typed and written, to compare it.
    #[track_caller]
    pub fn modes(&self) -> String {
        let modes = tcgetattr(&self.keyboard).expect("ask for the terminal's modes");
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

/// What comes between these is shown at once, so that nobody sees half a frame: "synchronized output", DEC private mode 2026.
const FRAME_BEGINS: &[u8] = b"\x1b[?2026h";
const FRAME_ENDS: &[u8] = b"\x1b[?2026l";

/// Collects what is shown until the terminal is closed.
fn watch(control: OwnedFd, shown: Arc<Mutex<Shown>>) {
    thread::spawn(move || {
        let mut control = File::from(control);
        let mut buffer = [0; 4096];
        let mut held_back = Vec::new();
        while let Ok(count @ 1..) = control.read(&mut buffer) {
            let mut shown = shown.lock().expect("no test panics while it looks");
            shown.written.extend_from_slice(&buffer[..count]);
            held_back.extend_from_slice(&buffer[..count]);
            let whole: Vec<u8> = held_back.drain(..end_of_whole(&held_back)).collect();
            shown.screen.process(&whole);
        }
    });
}

/// Where in the output a frame begins that has not ended yet, or may begin once more of it is there.
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
