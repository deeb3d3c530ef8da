//! The programs of docs/agent.md, as they are there.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;

use support::repository;

use super::{check_saving, installed, module, node_folder, program, succeeds};
use crate::serve::compatibility::redis_cli_path;

/// The most lines of a program.
const LINES_MAX: usize = 15;

const BUSY: &str = "another worker writes the report";
const LOST: &str = "the lock was lost";

/// The code under a heading.
#[track_caller]
fn recipe(heading: &str, language: &str) -> String {
    let text = fs::read_to_string(repository().join("docs/agent.md")).expect("read the document");
    let (_, section) = text.split_once(&format!("\n### {heading}\n")).expect("the heading");
    let (_, code) = section.split_once(&format!("\n```{language}\n")).expect("its code");
    let (code, _) = code.split_once("\n```\n").expect("the end of the code");
    let lines = code.lines().count();
    assert!(lines <= LINES_MAX, "{heading} has {lines} lines");
    code.to_owned() + "\n"
}

fn python(heading: &str, name: &'static str) -> impl Fn() -> Command {
    let code = recipe(heading, "python");
    move || {
        let mut command = program(name);
        command
            .args(["-W", "error", "-c", &code])
            .env("PYTHONPATH", module("python"));
        command
    }
}

#[track_caller]
fn check_node(heading: &str, busy: &str) {
    let dir = node_folder();
    fs::write(dir.path().join("recipe.mjs"), recipe(heading, "js")).expect("write the recipe");
    let command = || {
        let mut command = program("node");
        command.arg("recipe.mjs").current_dir(dir.path());
        command
    };
    check_saving(command, busy, "was lost");
}

#[test]
fn python_module() {
    check_saving(
        python("Python module", "python"),
        "'nightly-report' was not acquired in time",
        "was lost (",
    );
}

#[test]
fn node_module() {
    check_node("Node.js module", "nightly-report was not acquired in time");
}

#[test]
fn redis_py() {
    check_saving(python("redis-py", "python"), BUSY, LOST);
}

#[test]
fn redis_py_that_is_old() {
    check_saving(python("redis-py", "python-oldest"), BUSY, LOST);
}

#[test]
fn redis_py_with_asyncio() {
    check_saving(python("redis-py with asyncio", "python"), BUSY, LOST);
}

#[test]
fn ioredis() {
    check_node("ioredis", BUSY);
}

#[test]
fn node_redis() {
    check_node("node-redis", BUSY);
}

#[test]
fn go_redis() {
    let dir = tempfile::tempdir().expect("make a directory");
    for name in ["go.mod", "go.sum"] {
        fs::copy(installed("go").join(name), dir.path().join(name)).expect("copy a file");
    }
    let imports = ["context", "fmt", "io", "log", "os", "github.com/redis/go-redis/v9"];
    let imports: Vec<String> = imports.iter().map(|name| format!("\t{name:?}\n")).collect();
    let code = format!(
        "package main\n\nimport (\n{})\n\nfunc main() {{\n\tctx := context.Background()\n{}}}\n",
        imports.concat(),
        recipe("go-redis", "go")
    );
    fs::write(dir.path().join("main.go"), code).expect("write the recipe");
    let mut build = program("go");
    build.args(["build", "-o", "recipe", "."]).current_dir(dir.path());
    build
        .env("GOPROXY", "off")
        .env("GOFLAGS", "-mod=readonly")
        .env("GOTOOLCHAIN", "local");
    build
        .env("GOMODCACHE", installed("go/modules"))
        .env("GOCACHE", installed("go/cache"));
    succeeds(build);
    check_saving(|| Command::new(dir.path().join("recipe")), BUSY, LOST);
}

#[test]
fn redis_cli() {
    let code = recipe("redis-cli", "bash");
    let dir = tempfile::tempdir().expect("make a directory");
    let found = redis_cli_path();
    symlink(found, dir.path().join("redis-cli")).expect("link redis-cli");
    let folders = format!("{}:/usr/local/bin:/usr/bin:/bin", dir.path().display());
    let command = || {
        let mut command = Command::new("bash");
        command.args(["-c", &code]).env("PATH", &folders);
        command
    };
    check_saving(command, BUSY, LOST);
}
