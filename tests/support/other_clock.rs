//! Workers whose wall clock differs from the test's.

use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// A library that shifts the wall clock of a process into which it is preloaded. It is built here, by the C compiler that Rust links
/// with, so nothing has to be installed.
pub struct OtherClock {
    dir: TempDir,
}

const LIBRARY: &str = "other_clock.so";

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
        let library = self.dir.path().join(LIBRARY);
        [
            (
                "LD_PRELOAD",
                library.into_os_string().into_string().expect("a path in UTF-8"),
            ),
            ("OTHER_CLOCK_SECONDS", seconds.to_string()),
        ]
    }
}
