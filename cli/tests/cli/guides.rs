//! The commands of docs/getting-started.md do what it shows.

use support::RedisServer;

use super::tool::{bare, run};

const GUIDE: &str = include_str!("../../../docs/getting-started.md");

/// The commands of the guide, each with the output that it shows.
fn sessions() -> Vec<(&'static str, String)> {
    let mut found: Vec<(&str, String)> = Vec::new();
    let blocks = GUIDE.split("```console\n").skip(1);
    for line in blocks.flat_map(|block| block.split("```").next().unwrap().lines()) {
        match (line.strip_prefix("$ "), found.last_mut()) {
            (Some(command), _) => found.push((command, String::new())),
            (None, Some((_, output))) => output.push_str(&format!("{line}\n")),
            (None, None) => panic!("{line:?} is before the first command"),
        }
    }
    found
}

#[test]
fn commands_of_getting_started_print_what_it_shows() {
    let server = RedisServer::start();
    let tool = std::path::PathBuf::from(bare(&[]).get_program());
    let path = format!(
        "{}:{}",
        tool.parent().unwrap().display(),
        std::env::var("PATH").unwrap()
    );
    let sessions = sessions();
    assert!(sessions.len() >= 4, "{sessions:?}");
    for (command, output) in sessions {
        let mut shell = std::process::Command::new("sh");
        for (name, value) in bare(&[]).get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        shell
            .args(["-c", command])
            .env("PATH", &path)
            .env("SHARDLOCK_SHARDS", server.url());
        assert_eq!(run(shell).stdout, output, "{command}");
    }
}
