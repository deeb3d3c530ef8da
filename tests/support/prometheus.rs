//! A real Prometheus, and its promtool.

use std::env;
use std::path::PathBuf;

/// The server's binary: that of `SHARDLOCK_PROMETHEUS`, else the one on the `PATH`.
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("SHARDLOCK_PROMETHEUS").filter(|path| !path.is_empty()) {
        return PathBuf::from(path);
    }
    let paths = env::var_os("PATH").unwrap_or_default();
    let found = env::split_paths(&paths)
        .map(|dir| dir.join("prometheus"))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!("there is no prometheus on the PATH: `make test` installs it, or set SHARDLOCK_PROMETHEUS to its path")
    })
}

/// The promtool that came with it.
pub fn promtool() -> PathBuf {
    let path = binary().with_file_name("promtool");
    assert!(
        path.is_file(),
        "{} is missing: it comes with Prometheus",
        path.display()
    );
    path
}
