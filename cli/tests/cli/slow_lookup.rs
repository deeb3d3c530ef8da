//! Host names whose lookup takes longer than any limit of the tool.

use std::process::Command;
use std::time::Duration;

use rustix::process::geteuid;

use crate::clients::program;
use crate::tool::{Notes, Run, bare};

/// Runs a command in a network where the name server answers nothing, and each lookup waits for it.
const NETWORK: &str = "
import fcntl, socket, struct, subprocess, sys
server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
SIOCSIFFLAGS, UP_LOOPBACK_RUNNING = 0x8914, 0x49
fcntl.ioctl(server, SIOCSIFFLAGS, struct.pack('16sH14x', b'lo', UP_LOOPBACK_RUNNING))
server.bind(('127.0.0.1', 53))
with open('resolv.conf', 'w') as file:
    file.write('nameserver 127.0.0.1\\noptions timeout:30 attempts:1\\n')
subprocess.run(['mount', '--bind', 'resolv.conf', '/etc/resolv.conf'], check=True)
sys.exit(subprocess.run(sys.argv[1:]).returncode)";

/// A third of what a lookup takes.
const LIMIT: Duration = Duration::from_secs(10);

#[test]
fn the_tool_does_not_end_later_because_of_a_lookup() {
    let notes = Notes::new();
    let socket = notes.path("agent.sock");
    let socket = socket.to_str().expect("UTF-8");
    for arguments in [
        &["exec", "k", "true"][..],
        &["inspect", "k"],
        &["serve", "--socket", socket],
    ] {
        let tool = bare(&[]);
        let mut command = Command::new("unshare");
        command
            .args(["--net", "--mount"])
            .args((!geteuid().is_root()).then_some("--map-root-user"))
            .arg(program("python").get_program())
            .args(["-c", NETWORK])
            .arg(tool.get_program())
            .args(arguments)
            .env("SHARDLOCK_SHARDS", "redis://silent.example:6379")
            .env("SHARDLOCK_STORE_TIMEOUT", "300ms")
            .current_dir(notes.dir());
        let ended = Run::start(command).end_within(LIMIT);
        assert_eq!(ended.code, 69, "{arguments:?}: {ended:?}");
    }
}
