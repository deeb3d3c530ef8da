//! What lasts as long as the test process: directories of servers that its tests share.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

/// Removes its argument when its standard input ends. Servers may take a moment to die, and write until then.
const REMOVE: &str = r#"cat >/dev/null; for try in 1 2 3 4 5; do rm -rf -- "$1" && exit; sleep 1; done"#;

/// From here on, all temporary directories of this process are made inside of one that is removed after its end, however it ends.
///
/// Rust drops nothing that a static holds. So a small process of its own waits for the end of a pipe, whose other end only
/// this process has.
pub fn remove_directories_at_the_end() {
    static REMOVER: OnceLock<Child> = OnceLock::new();
    REMOVER.get_or_init(|| {
        let dir = tempfile::Builder::new()
            .prefix("shardlock-tests-")
            .tempdir()
            .expect("make a directory")
            .keep();
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
        // An error would mean that it was called before, by somebody else.
        tempfile::env::override_temp_dir(&dir).expect("nobody else has done so");
        remover
    });
}
