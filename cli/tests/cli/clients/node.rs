//! `clients/node`: its own tests, what becomes of it when its agent is killed, and its package.

use std::fs;

use support::RedisServer;

use super::{LONG, copy_of, module, node_folder, program, succeeds};
use crate::serve::Agent;
use crate::tool::Run;

#[test]
fn the_module_passes_its_tests() {
    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut command = program("node");
    command
        .args(["--test", "--test-reporter=tap", "test.mjs"])
        .current_dir(module("node"));
    command.env("SHARDLOCK_AGENT", &agent.socket);
    let ended = succeeds(command);
    let count = |what: &str| {
        let line = ended
            .stdout
            .lines()
            .find_map(|line| line.strip_prefix(&format!("# {what} ")));
        line.and_then(|count| count.parse().ok())
            .unwrap_or_else(|| panic!("{}", ended.stdout))
    };
    let counts: [u32; 3] = ["fail", "skipped", "todo"].map(count);
    assert_eq!(counts, [0, 0, 0], "{}", ended.stdout);
    assert!(count("pass") >= 11, "{}", ended.stdout);
    assert_eq!(agent.info("held"), "0");
}

#[test]
fn killed_agent_is_reported_as_the_loss_of_its_locks() {
    let server = RedisServer::start();
    let mut agent = Agent::start(&server);
    let dir = node_folder();
    let code = "import { once } from 'node:events';
import { Agent, LockLost } from 'shardlock';
const onLost = (reason) => console.log(reason);
const body = async ({ signal }) => {
  console.log('held');
  await once(signal, 'abort');
};
await new Agent().withLock('k', { onLost }, body).catch((error) => console.log(`${error.message}`));
";
    fs::write(dir.path().join("holder.mjs"), code).expect("write a program");
    let mut command = program("node");
    command
        .arg("holder.mjs")
        .current_dir(dir.path())
        .env("SHARDLOCK_AGENT", &agent.socket);
    let mut run = Run::start(command);
    run.wait_until_it_prints("held\n");
    agent.run.kill();
    let ended = run.end_within(LONG);
    assert_eq!(
        ended.stdout, "held\ndisconnected\nthe lock of k was lost (disconnected)\n",
        "{ended:?}"
    );
    assert_eq!((ended.code, &*ended.stderr), (0, ""));
}

#[test]
fn the_package_is_built_and_works() {
    let (source, user) = (copy_of(&module("node")), tempfile::tempdir().expect("make a directory"));
    let npm = || {
        let mut command = program("npm");
        command
            .env("HOME", source.path())
            .env("npm_config_update_notifier", "false");
        command
            .env("npm_config_audit", "false")
            .env("npm_config_fund", "false")
            .env("npm_config_offline", "true");
        command
    };
    let mut pack = npm();
    pack.args(["pack", "--pack-destination"])
        .arg(user.path())
        .current_dir(source.path());
    succeeds(pack);
    let version = env!("CARGO_PKG_VERSION");
    let mut install = npm();
    install
        .args(["install", &format!("shardlock-{version}.tgz")])
        .current_dir(user.path());
    succeeds(install);
    let package = user.path().join("node_modules/shardlock");
    let mut names: Vec<String> = fs::read_dir(&package)
        .expect("the package")
        .map(|entry| entry.expect("an entry").file_name().into_string().expect("UTF-8"))
        .collect();
    names.sort();
    assert_eq!(names, ["README.md", "index.d.ts", "index.mjs", "package.json"]);

    let server = RedisServer::start();
    let agent = Agent::start(&server);
    let mut command = program("node");
    let code = "import { Agent } from 'shardlock';
const lock = await new Agent().lock('k');
console.log(lock.key);
await lock.release();
";
    command
        .args(["--input-type=module", "-e", code])
        .current_dir(user.path())
        .env("SHARDLOCK_AGENT", &agent.socket);
    assert_eq!(succeeds(command).stdout, "k\n");
}
