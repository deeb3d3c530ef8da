//! Directories for server files: in memory if there is enough space, and removed at the end.
//!
//! Sentinels and etcd block until a change has been synced to disk, which takes seconds while other
//! processes write heavily. The tests exercise the servers rather than the disk, and no test
//! simulates a power failure.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

const MEMORY: &str = "/dev/shm";
/// Each etcd member preallocates 64 MiB.
const ROOM: u64 = 2 << 30;
/// Removes its argument once its standard input is closed. Retries, since dying servers may still
/// write for a moment.
const REMOVE: &str = r#"cat >/dev/null; for try in 1 2 3 4 5; do rm -rf -- "$1" && exit; sleep 1; done"#;

static LASTING: OnceLock<PathBuf> = OnceLock::new();

/// The root of the repository.
pub fn repository() -> &'static Path {
    let support = Path::new(env!("CARGO_MANIFEST_DIR"));
    support.ancestors().nth(2).expect("this is tests/support")
}

/// A directory for a server, removed when the returned value is dropped.
#[track_caller]
pub fn directory(of: &str) -> TempDir {
    let parent = LASTING.get().cloned().unwrap_or_else(roomy);
    in_place(&parent, of)
}

/// From now on, creates the directories of this process inside a parent that is removed after the
/// process ends, however it ends.
///
/// Rust does not drop statics. A separate small process therefore waits until a pipe is closed;
/// only this process holds the pipe's write end.
pub fn remove_all_at_the_end() {
    LASTING.get_or_init(|| {
        let dir = in_place(&roomy(), "tests").keep();
        let mut command = Command::new("sh");
        command
            .args(["-c", REMOVE, "sh"])
            .arg(&dir)
            .current_dir("/")
            // A signal from the terminal that ends the test must not reach the remover.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let remover = command.spawn().expect("start a shell");
        // Keep the pipe open until this process ends.
        std::mem::forget(remover);
        dir
    });
}

#[track_caller]
fn in_place(parent: &Path, of: &str) -> TempDir {
    let prefix = format!("shardlock-{of}-");
    let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
    made.unwrap_or_else(|error| panic!("cannot create a directory for {of} in {}: {error}", parent.display()))
}

fn roomy() -> PathBuf {
    let has_room = rustix::fs::statvfs(MEMORY).is_ok_and(|found| found.f_bavail * found.f_frsize >= ROOM);
    match has_room {
        true => PathBuf::from(MEMORY),
        false => std::env::temp_dir(),
    }
}
