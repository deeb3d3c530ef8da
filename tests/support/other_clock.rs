//! Workers and servers whose wall clock differs from the test's.

use std::fs::OpenOptions;
use std::io::Write;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A library that shifts the wall clock of a process into which it is preloaded. It is built here, by the C compiler that Rust links
/// with, so nothing has to be installed.
pub struct OtherClock {
    dir: TempDir,
}

const LIBRARY: &str = "other_clock.so";
const SECONDS: &str = "seconds";

impl OtherClock {
    #[track_caller]
    pub fn build() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("shardlock-clock-")
            .tempdir()
            .expect("make a directory");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/other_clock.c");
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(dir.path().join(LIBRARY));
        let output = compiler.arg(source).arg("-ldl").output();
        let output = output.unwrap_or_else(|error| panic!("there is no C compiler called cc, install one: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { dir }
    }

    /// The variables for a worker whose wall clock is that much ahead, or behind.
    pub fn ahead_by(&self, seconds: i64) -> [(&'static str, String); 2] {
        [
            ("LD_PRELOAD", self.path(LIBRARY)),
            ("OTHER_CLOCK_SECONDS", seconds.to_string()),
        ]
    }

    /// The variables for a process whose wall clock is right until [`jump_to`](Self::jump_to) is called.
    #[track_caller]
    pub fn jumping(&self) -> [(&'static str, String); 2] {
        self.jump_to(0);
        [
            ("LD_PRELOAD", self.path(LIBRARY)),
            ("OTHER_CLOCK_FILE", self.path(SECONDS)),
        ]
    }

    /// From now on, the wall clocks of the processes with the variables of [`jumping`](Self::jumping) are that much ahead, or behind.
    #[track_caller]
    pub fn jump_to(&self, seconds: i64) {
        // In place: the processes have mapped the file.
        let options = OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(false)
            .open(self.path(SECONDS));
        let written = options.and_then(|mut file| file.write_all(&seconds.to_ne_bytes()));
        written.expect("write the seconds");
    }

    fn path(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        path.into_os_string().into_string().expect("a path in UTF-8")
    }
}
