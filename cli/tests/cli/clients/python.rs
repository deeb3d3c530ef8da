//! `clients/python`: its own tests, what becomes of it when its agent is killed, and its package.

use std::fs;
use std::process::Command;

use support::RedisServer;

use super::{LONG, copy_of, module, program, succeeds};
use crate::serve::Agent;
use crate::tool::Run;

/// Runs the tests of the module with a Python.
#[track_caller]
fn passes_its_tests(python: &str) {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut command = program(python);
    command
        .args(["-W", "error", "-m", "unittest", "-v"])
        .current_dir(module("python"));
    command.env("SHARDLOCK_AGENT", &agent.socket);
    let ended = succeeds(command);
    assert!(ended.stderr.trim_end().ends_with("\nOK"), "{}", ended.stderr);
    let count = ended
        .stderr
        .lines()
        .find_map(|line| line.strip_prefix("Ran ")?.split(' ').next()?.parse().ok());
    assert!(count.is_some_and(|count: u32| count >= 19), "{}", ended.stderr);
    assert_eq!(agent.info("held"), "0");
}

#[test]
fn the_module_works_with_the_newest_client() {
    passes_its_tests("python");
}

#[test]
fn the_module_works_with_the_oldest_client() {
    passes_its_tests("python-oldest");
}

/// Prints why the lock was lost.
const BLOCKING: &str = "
import threading
import shardlock

lost = threading.Event()
try:
    with shardlock.Agent().lock('k', on_lost=lambda reason: lost.set()) as lock:
        print('held', flush=True)
        lost.wait()
except shardlock.LockLost as error:
    print(error)
";

const ASYNCHRONOUS: &str = "
import asyncio
import shardlock

async def main():
    lost = asyncio.get_running_loop().create_future()
    try:
        async with shardlock.AsyncAgent().lock('k', on_lost=lost.set_result):
            print('held', flush=True)
            await lost
    except shardlock.LockLost as error:
        print(error)

asyncio.run(main())
";

#[test]
fn killed_agent_is_reported_as_the_loss_of_its_locks() {
    for code in [BLOCKING, ASYNCHRONOUS] {
        let server = RedisServer::start();
        let mut agent = Agent::start(&server);
        let mut command = program("python");
        command.args(["-c", code]).current_dir(module("python"));
        command.env("SHARDLOCK_AGENT", &agent.socket);
        let mut run = Run::start(command);
        run.wait_until_it_prints("held\n");
        agent.run.kill();
        let ended = run.end_within(LONG);
        assert_eq!(
            ended.stdout, "held\nthe lock of 'k' was lost (disconnected)\n",
            "{ended:?}"
        );
        assert_eq!((ended.code, &*ended.stderr), (0, ""));
    }
}

#[test]
fn the_package_is_built_and_works() {
    let (source, dir) = (
        copy_of(&module("python")),
        tempfile::tempdir().expect("make a directory"),
    );
    let (built, site) = (dir.path().join("built"), dir.path().join("site"));
    let pip = |words: &[&str]| -> Command {
        let mut command = program("python");
        command.args(["-m", "pip", "--disable-pip-version-check"]).args(words);
        command
            .env("HOME", source.path())
            .env("PIP_NO_INDEX", "1")
            .env("PIP_NO_CACHE_DIR", "1");
        command
    };
    let built = built.to_str().expect("UTF-8");
    let mut wheel = pip(&["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", built, "."]);
    wheel.current_dir(source.path());
    succeeds(wheel);
    let version = env!("CARGO_PKG_VERSION");
    let name = format!("{built}/shardlock-{version}-py3-none-any.whl");
    let site = site.to_str().expect("UTF-8");
    succeeds(pip(&["install", "--no-deps", "--target", site, &name]));
    assert!(fs::exists(format!("{site}/shardlock.py")).expect("look"));

    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut command = program("python");
    let code = "import importlib.metadata, shardlock\n\
                with shardlock.Agent().lock('k') as lock:\n    \
                    print(lock.key, importlib.metadata.version('shardlock'), shardlock.__file__)\n";
    command
        .args(["-c", code])
        .env("PYTHONPATH", site)
        .env("SHARDLOCK_AGENT", &agent.socket);
    assert_eq!(succeeds(command).stdout, format!("k {version} {site}/shardlock.py\n"));
}
