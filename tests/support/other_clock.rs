//! Workers and servers whose wall clock differs from the test's.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A library that shifts the wall clock of a process into which it is preloaded. It is built here, by the C compiler that Rust links
/// with, so nothing has to be installed.
pub struct OtherClock {
    dir: TempDir,
}

const LIBRARY: &str = "other_clock.so";
/// In the directory in which a process runs: by how many seconds its clock is ahead.
const FILE: &str = "other-clock";

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
        [self.preload(), ("OTHER_CLOCK_SECONDS", seconds.to_string())]
    }

    /// The variables for a process whose wall clock can be [`set`] at any time. It is right until then.
    pub fn settable(&self) -> [(&'static str, String); 2] {
        [self.preload(), ("OTHER_CLOCK_FILE", FILE.to_owned())]
    }

    fn preload(&self) -> (&'static str, String) {
        let library = self.dir.path().join(LIBRARY).into_os_string();
        ("LD_PRELOAD", library.into_string().expect("a path in UTF-8"))
    }
}

/// Sets the wall clock of the process that runs in that directory, which was started as [`OtherClock::settable`]: so many seconds ahead of
/// the right time.
#[track_caller]
pub fn set(dir: &Path, seconds: i64) {
    // Whoever reads meanwhile finds the old number or the new one.
    let new = dir.join("other-clock.new");
    fs::write(&new, seconds.to_string()).expect("write a file");
    fs::rename(new, dir.join(FILE)).expect("rename a file");
}
