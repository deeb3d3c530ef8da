//! Where servers keep their files: in memory where it has room, and gone at the end.
//!
//! Sentinels and etcd stand still until a change is on the disk, which takes seconds while others write much. What is tested is what they do, and
//! not the disk of the machine, and no test cuts the power.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use tempfile::TempDir;

const MEMORY: &str = "/dev/shm";
/// Each member of an etcd reserves 64 MiB from the start.
const ROOM: u64 = 2 << 30;
/// Removes its argument when its standard input ends. Servers may take a moment to die, and write until then.
const REMOVE: &str = r#"cat >/dev/null; for try in 1 2 3 4 5; do rm -rf -- "$1" && exit; sleep 1; done"#;

static LASTING: OnceLock<PathBuf> = OnceLock::new();

/// A directory for a server, removed with the value that stands for it.
#[track_caller]
pub fn directory(of: &str) -> TempDir {
    let parent = LASTING.get().cloned().unwrap_or_else(roomy);
    in_place(&parent, of)
}

/// From here on, the directories of this process are made inside of one that is removed after its end, however it ends.
///
/// Rust drops nothing that a static holds. So a small process of its own waits for the end of a pipe, whose other end only
/// this process has.
pub fn remove_all_at_the_end() {
    LASTING.get_or_init(|| {
        let dir = in_place(&roomy(), "tests").keep();
        let mut command = Command::new("sh");
        command
            .args(["-c", REMOVE, "sh"])
            .arg(&dir)
            .current_dir("/")
            // What ends the test from a terminal must not end this one.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let remover = command.spawn().expect("start a shell");
        // Its standard input is to end with this process, and not before.
        std::mem::forget(remover);
        dir
    });
}

#[track_caller]
fn in_place(parent: &Path, of: &str) -> TempDir {
    let prefix = format!("shardlock-{of}-");
    let made = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent);
    made.unwrap_or_else(|error| panic!("no directory for {of} can be made in {}: {error}", parent.display()))
}

fn roomy() -> PathBuf {
    let has_room = rustix::fs::statvfs(MEMORY).is_ok_and(|found| found.f_bavail * found.f_frsize >= ROOM);
    match has_room {
        true => PathBuf::from(MEMORY),
        false => std::env::temp_dir(),
    }
}
