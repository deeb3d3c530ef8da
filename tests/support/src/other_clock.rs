//! Workers and servers whose wall clock differs from the test's clock.

use std::fs;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

use crate::directory::repository;

/// A preloaded library that shifts the wall clock of a process. It is built here with the C
/// compiler that Rust links with, so nothing needs to be installed.
pub struct OtherClock {
    dir: TempDir,
}

const LIBRARY: &str = "other_clock.so";
/// File in the process's working directory: the number of seconds that its clock is ahead.
const FILE: &str = "other-clock";

impl OtherClock {
    /// Compiles the library.
    #[track_caller]
    pub fn build() -> Self {
        let dir = tempfile::Builder::new()
            .prefix("shardlock-clock-")
            .tempdir()
            .expect("make a directory");
        let source = repository().join("tests/support/other_clock.c");
        let mut compiler = Command::new("cc");
        compiler
            .args(["-shared", "-fPIC", "-O1", "-o"])
            .arg(dir.path().join(LIBRARY));
        let output = compiler.arg(source).arg("-ldl").output();
        let output = output.unwrap_or_else(|error| panic!("there is no C compiler called cc, install one: {error}"));
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        Self { dir }
    }

    /// Environment of a worker whose wall clock is this far ahead (or behind, if negative).
    pub fn ahead_by(&self, seconds: i64) -> [(&'static str, String); 2] {
        [self.preload(), ("OTHER_CLOCK_SECONDS", seconds.to_string())]
    }

    /// Environment of a process whose wall clock can be [`set`] at any time. Until then it is
    /// correct.
    pub fn settable(&self) -> [(&'static str, String); 2] {
        [self.preload(), ("OTHER_CLOCK_FILE", FILE.to_owned())]
    }

    fn preload(&self) -> (&'static str, String) {
        let library = self.dir.path().join(LIBRARY).into_os_string();
        ("LD_PRELOAD", library.into_string().expect("a path in UTF-8"))
    }
}

/// Sets the wall clock of the process that runs in `dir` to `seconds` ahead of the correct time.
/// The process must have been started with [`OtherClock::settable`].
#[track_caller]
pub fn set(dir: &Path, seconds: i64) {
    // A concurrent reader sees either the old number or the new one.
    let new = dir.join("other-clock.new");
    fs::write(&new, seconds.to_string()).expect("write a file");
    fs::rename(new, dir.join(FILE)).expect("rename a file");
}
