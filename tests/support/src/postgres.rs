//! A real PostgreSQL.

use std::env;
use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use tempfile::TempDir;

use crate::directory::directory;
use crate::process::Process;
use crate::wait::{PATIENCE, wait_until};

/// The server refuses to run as root; it then runs as the user and group `nobody`.
const NOBODY: u32 = 65534;

/// Where packages install the binaries, by version.
const INSTALLED: &str = "/usr/lib/postgresql";

/// Path of the server binary, with `initdb` beside it: `SHARDLOCK_POSTGRES`, the one on the `PATH`,
/// or the newest that a package has installed.
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("SHARDLOCK_POSTGRES").filter(|path| !path.is_empty()) {
        return PathBuf::from(path);
    }
    let paths = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&paths).map(|dir| dir.join("postgres"));
    let versions = fs::read_dir(INSTALLED).into_iter().flatten().flatten();
    let mut installed: Vec<(u32, PathBuf)> = versions
        .filter_map(|entry| {
            let version = entry.file_name().to_str()?.parse().ok()?;
            Some((version, entry.path().join("bin/postgres")))
        })
        .collect();
    installed.sort_by(|one, other| other.cmp(one));
    let found = on_path
        .chain(installed.into_iter().map(|(_, path)| path))
        .find(|path| path.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "there is no PostgreSQL here: `make test` installs it, or set SHARDLOCK_POSTGRES to the path of postgres"
        )
    })
}

/// A PostgreSQL on a Unix socket, with the superuser `postgres`. Stopped when dropped.
pub struct Postgres {
    process: Process,
    dir: TempDir,
}

impl Postgres {
    /// Starts a server and waits until it listens.
    #[track_caller]
    pub fn start() -> Self {
        let (binary, dir) = (binary(), directory("postgres"));
        if rustix::process::geteuid().is_root() {
            chown(dir.path(), Some(NOBODY), Some(NOBODY)).expect("give the directory away");
        }
        let data = dir.path().join("data");
        let mut init = command(&binary.with_file_name("initdb"), dir.path());
        init.args([
            "--username=postgres",
            "--auth=trust",
            "--no-sync",
            "--locale=C",
            "--encoding=UTF8",
        ])
        .arg("--pgdata")
        .arg(&data);
        let done = init.output().expect("start initdb");
        assert!(
            done.status.success(),
            "initdb: {}",
            String::from_utf8_lossy(&done.stderr)
        );

        let log = fs::File::create(dir.path().join("log")).expect("create the log");
        let mut server = command(&binary, dir.path());
        server
            .arg("-D")
            .arg(&data)
            .args(["-c", "listen_addresses="])
            .args(["-c", "fsync=off"])
            .arg("-c")
            .arg(format!("unix_socket_directories={}", dir.path().display()))
            .stderr(log);
        let process = Process::spawn(server).expect("start postgres");
        let postgres = Self { process, dir };
        wait_until("PostgreSQL listens", PATIENCE, || postgres.is_ready());
        postgres
    }

    /// The settings for a client, as `name=value` pairs.
    pub fn settings(&self) -> String {
        format!("host={} user=postgres dbname=postgres", self.dir.path().display())
    }

    /// The same as a URL.
    pub fn url(&self) -> String {
        format!(
            "postgres://postgres@localhost/postgres?host={}",
            self.dir.path().display()
        )
    }

    /// The last line of this file is `ready` once the server accepts connections.
    fn is_ready(&self) -> bool {
        let state = fs::read_to_string(self.dir.path().join("data/postmaster.pid")).unwrap_or_default();
        state.lines().last().is_some_and(|line| line.trim() == "ready")
    }
}

impl Drop for Postgres {
    /// Killed, it would leave a segment of shared memory behind.
    fn drop(&mut self) {
        self.process.signal(Signal::QUIT);
        self.process.wait(PATIENCE);
    }
}

fn command(program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    if rustix::process::geteuid().is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}
