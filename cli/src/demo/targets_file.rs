//! The workers' metrics addresses, in a file for `file_sd_configs` of Prometheus, which rereads it
//! when it changes.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::Serialize;

/// An entry of the file.
#[derive(Debug, Serialize)]
struct Group<'a> {
    targets: &'a [SocketAddr],
}

/// The file; removed on drop.
#[derive(Debug)]
pub(super) struct TargetsFile {
    path: PathBuf,
}

impl TargetsFile {
    /// Writes the file atomically: a reader sees all of it or nothing.
    ///
    /// # Errors
    ///
    /// If the file can't be written.
    pub(super) fn write(path: &Path, workers: &[SocketAddr]) -> anyhow::Result<Self> {
        let text = serde_json::to_vec(&[Group { targets: workers }])?;
        let written = || -> io::Result<()> {
            let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let name = format!(".shardlock-targets-{}", std::process::id());
            let beside = directory.unwrap_or(Path::new(".")).join(name);
            let moved = fs::write(&beside, text).and_then(|()| fs::rename(&beside, path));
            if moved.is_err() {
                // The temporary file may not exist; the first error is the one that matters.
                fs::remove_file(&beside).ok();
            }
            moved
        };
        written().with_context(|| format!("{} can't be written", path.display()))?;
        Ok(Self { path: path.to_owned() })
    }
}

impl Drop for TargetsFile {
    fn drop(&mut self) {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                super::eprint(format_args!("{} can't be removed: {error}", self.path.display()));
            }
            // Already removed by another program.
            _ => {}
        }
    }
}
