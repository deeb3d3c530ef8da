//! Clients of an agent in other languages: the recipes of docs/agent.md and the modules of
//! `clients/`, run by real interpreters against real agents.

mod node;
mod python;
mod recipes;

use std::env;
use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::time::Duration;

use support::{RedisServer, repository, wait_until};
use tempfile::TempDir;

use crate::serve::Agent;
use crate::tool::{Ended, Run};

/// Compilers and packagers take seconds of CPU time, on a machine that runs other tests.
const LONG: Duration = Duration::from_secs(180);

/// A path in the folder that `scripts/ensure-clients` has made.
#[track_caller]
fn installed(path: &str) -> PathBuf {
    let home = env::var_os("SHARDLOCK_CLIENTS").filter(|home| !home.is_empty());
    let home = home.expect("SHARDLOCK_CLIENTS is not set: `make test` sets it to what scripts/ensure-clients prints");
    let path = Path::new(&home).join(path);
    assert!(
        path.exists(),
        "{} is missing: run scripts/ensure-clients",
        path.display()
    );
    path
}

/// The folder of a module.
fn module(language: &str) -> PathBuf {
    repository().join("clients").join(language)
}

/// A program of `bin/`, without variables of this process that would change what it does.
#[track_caller]
pub(crate) fn program(name: &str) -> Command {
    let mut command = Command::new(installed("bin").join(name));
    for (name, _) in env::vars_os() {
        let name = name.to_string_lossy();
        if ["SHARDLOCK_", "PYTHON", "NODE_", "npm_", "PIP_", "GO"]
            .iter()
            .any(|own| name.starts_with(own))
        {
            command.env_remove(&*name);
        }
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(installed("bin")).chain(env::split_paths(&path));
    command.env("PATH", env::join_paths(folders).expect("a PATH"));
    command.env("PYTHONDONTWRITEBYTECODE", "1").stdin(Stdio::null());
    command
}

/// Runs the command until it exits, which must be with 0.
#[track_caller]
fn succeeds(command: Command) -> Ended {
    let ended = Run::start(command).end_within(LONG);
    assert_eq!(ended.code, 0, "{}\n{}", ended.stdout, ended.stderr);
    ended
}

/// A copy of the files of a folder, since packagers write into theirs.
#[track_caller]
fn copy_of(folder: &Path) -> TempDir {
    let copy = tempfile::tempdir().expect("make a directory");
    for entry in fs::read_dir(folder).expect("read a directory") {
        let entry = entry.expect("read a directory");
        if entry.file_type().expect("a type").is_file() {
            fs::copy(entry.path(), copy.path().join(entry.file_name())).expect("copy a file");
        }
    }
    copy
}

/// A program in another language that holds the key `nightly-report` until its input ends.
struct Saver {
    run: Run,
    input: Option<ChildStdin>,
}

impl Saver {
    #[track_caller]
    fn start(mut command: Command, agent: &Agent) -> Self {
        command.env("SHARDLOCK_AGENT", &agent.socket).stdin(Stdio::piped());
        let mut run = Run::start(command);
        let input = run.take_stdin();
        Self { run, input }
    }

    /// Waits until it holds the lock.
    #[track_caller]
    fn wait_until_it_saves(&mut self, agent: &Agent) {
        wait_until("the program has the lock", LONG, || {
            assert!(self.run.is_running(), "it has ended: {}", self.run.stderr());
            agent.info("held") == "1"
        });
    }

    /// Passes the report on, and waits for the end.
    #[track_caller]
    fn end(mut self, report: &str) -> Ended {
        let mut input = self.input.take().expect("its input");
        // It may have ended.
        drop(input.write_all(report.as_bytes()));
        drop(input);
        self.run.end_within(LONG)
    }
}

/// The behaviours of all programs that save a report under the lock `nightly-report`.
#[track_caller]
fn check_saving(program: impl Fn() -> Command, busy: &str, lost: &str) {
    let server = RedisServer::start();
    // A busy machine may stop the server for longer than by default.
    let agent = Agent::with(&server, &["--set", "store_timeout=3s"]);
    let mut other = agent.connect();

    // It holds the lock while it saves, and releases it.
    let before = other.integer(&["LOCK", "nightly-report"]);
    other.integer(&["UNLOCK", "nightly-report", &before.to_string()]);
    let mut saver = Saver::start(program(), &agent);
    saver.wait_until_it_saves(&agent);
    assert_eq!(other.call(&["LOCK", "nightly-report", "NOWAIT"]), redis::Value::Nil);
    let ended = saver.end("a report");
    assert_eq!(ended.code, 0, "{ended:?}");
    let token = ended.stdout.trim_end().strip_prefix("saving a report with token ");
    let token: i64 = token
        .and_then(|token| token.parse().ok())
        .unwrap_or_else(|| panic!("{ended:?}"));
    assert!(token > before, "{token} {before}");
    let next = other.integer(&["LOCK", "nightly-report", "NOWAIT"]);
    assert!(next > token, "{next} {token}");

    // It does not enter while another one holds the lock.
    let ended = Saver::start(program(), &agent).end("a report");
    assert_ne!(ended.code, 0, "{ended:?}");
    assert!(ended.stdout.is_empty() && ended.stderr.contains(busy), "{ended:?}");
    assert_eq!(other.integer(&["UNLOCK", "nightly-report", &next.to_string()]), 1);

    // When it is killed, the next one enters.
    let mut saver = Saver::start(program(), &agent);
    saver.wait_until_it_saves(&agent);
    other.send(&["LOCK", "nightly-report"]);
    agent.wait_until_waiting(1);
    saver.run.kill();
    let reply = other.reply();
    let redis::Value::Int(token) = reply else {
        panic!("{reply:?}")
    };
    assert_eq!(other.integer(&["UNLOCK", "nightly-report", &token.to_string()]), 1);

    // It fails if the lock is lost meanwhile.
    let mut saver = Saver::start(program(), &agent);
    saver.wait_until_it_saves(&agent);
    let deleted: u64 = server.query(&["DEL", "lock:nightly-report"]);
    assert_eq!(deleted, 1);
    agent.wait_until_free();
    let ended = saver.end("a report");
    assert_ne!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains(lost), "{ended:?}");
}

/// A folder in which Node.js finds the client libraries and the module.
#[track_caller]
fn node_folder() -> TempDir {
    let dir = tempfile::tempdir().expect("make a directory");
    let modules = dir.path().join("node_modules");
    fs::create_dir(&modules).expect("make a directory");
    for library in ["ioredis", "redis"] {
        symlink(installed("node/node_modules").join(library), modules.join(library)).expect("link a library");
    }
    symlink(module("node"), modules.join("shardlock")).expect("link the module");
    dir
}

#[test]
fn a_module_is_one_short_file() {
    for file in ["python/shardlock.py", "node/index.mjs"] {
        let text = fs::read_to_string(module("").join(file)).expect("read a module");
        assert!(text.lines().count() <= 150, "{file} has {} lines", text.lines().count());
        let wide = text.lines().find(|line| line.chars().count() > 100);
        assert_eq!(wide, None, "{file}");
    }
}
