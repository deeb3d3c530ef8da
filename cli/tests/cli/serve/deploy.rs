//! The files in `deploy/` parse, and the agent runs with the options that they have.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::process::Signal;
use saphyr::{LoadableYamlNode, YamlOwned};
use support::{PATIENCE, RedisServer, RespClient, wait_until};

use crate::tool::{Run, bare, tool};

fn deploy(path: &str) -> String {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The value of a setting of a unit file, which must have it once.
fn setting<'a>(unit: &'a str, section: &str, name: &str) -> &'a str {
    let mut current = "";
    let mut found = Vec::new();
    for line in unit.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        if let Some(header) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            current = header;
            continue;
        }
        let (key, value) = line.split_once('=').unwrap_or_else(|| panic!("not a setting: {line}"));
        assert!(!current.is_empty() && !key.contains(' '), "{line}");
        if (current, key) == (section, name) {
            found.push(value);
        }
    }
    match *found {
        [value] => value,
        _ => panic!("[{section}] has {} settings {name}", found.len()),
    }
}

/// The agent of the command, with another socket and a free port for metrics. Its configuration
/// file is this one.
fn adapted(words: &[&str], socket: &str, config: &str) -> Vec<String> {
    let adapt = |word: &&str| match *word {
        "/run/shardlock/agent.sock" => socket.to_owned(),
        "--socket=/run/shardlock/agent.sock" => format!("--socket={socket}"),
        "--metrics=0.0.0.0:9187" => "--metrics=127.0.0.1:0".to_owned(),
        "127.0.0.1:9187" => "127.0.0.1:0".to_owned(),
        "/etc/shardlock/shardlock.toml" => config.to_owned(),
        other => other.to_owned(),
    };
    words.iter().map(adapt).collect()
}

/// The command as a service manager starts it: with a socket, and an address for notifications.
fn activated(command: &Command, socket: OwnedFd, notify: &Path) -> Command {
    let script = "exec 3<&0 </dev/null; export LISTEN_PID=$$; exec \"$0\" \"$@\"";
    let mut shell = Command::new("sh");
    shell
        .args(["-c", script])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    shell
        .env("LISTEN_FDS", "1")
        .env("NOTIFY_SOCKET", notify)
        .stdin(Stdio::from(socket));
    shell
}

#[test]
fn systemd_units_start_reload_and_stop_the_agent() {
    let (service, socket) = (deploy("systemd/shardlock.service"), deploy("systemd/shardlock.socket"));
    assert_eq!(setting(&socket, "Socket", "ListenStream"), "/run/shardlock/agent.sock");
    assert_eq!(setting(&service, "Unit", "Requires"), "shardlock.socket");
    assert_eq!(setting(&service, "Service", "Type"), "notify");
    assert_eq!(setting(&service, "Service", "ExecReload"), "/bin/kill -HUP $MAINPID");
    let stop: u64 = setting(&service, "Service", "TimeoutStopSec").parse().unwrap();
    assert!(stop > 30);
    let files: u64 = setting(&service, "Service", "LimitNOFILE").parse().unwrap();
    assert!(files > 10_256);

    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let (path, notify) = (dir.path().join("agent.sock"), dir.path().join("notify"));
    let config = dir.path().join("shardlock.toml");
    fs::write(&config, format!("shards = [{{ url = \"{}\" }}]\n", server.url())).unwrap();
    let words: Vec<&str> = setting(&service, "Service", "ExecStart").split(' ').collect();
    let ["/usr/local/bin/shardlock", arguments @ ..] = &*words else {
        panic!("{words:?}")
    };
    let arguments = adapted(arguments, "no socket is given", config.to_str().unwrap());
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();

    let listener = UnixListener::bind(&path).unwrap();
    let notifications = UnixDatagram::bind(&notify).unwrap();
    notifications.set_read_timeout(Some(PATIENCE)).unwrap();
    let next = || {
        let mut buffer = [0; 512];
        let count = notifications.recv(&mut buffer).expect("a notification");
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    };
    let mut run = Run::start(activated(&bare(&arguments), listener.into(), &notify));
    assert_eq!(next().trim_end(), "READY=1");
    let mut client = RespClient::unix(&path).unwrap();
    client.integer(&["LOCK", "k"]);

    run.signal(Signal::HUP);
    let reloading = next();
    assert!(reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{reloading}");
    assert_eq!(next().trim_end(), "READY=1");
    assert!(client.integer(&["LOCK", "l"]) > 0);

    run.signal(Signal::TERM);
    assert_eq!(next().trim_end(), "STOPPING=1");
    drop(client);
    let ended = run.end();
    assert_eq!(ended.code, 0, "{ended:?}");
    // It belongs to systemd.
    assert!(path.exists());
}

#[test]
fn sockets_of_systemd_replace_those_of_the_options() {
    let server = RedisServer::start();
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("s")).unwrap();
    let command = tool(&server, &["serve", "--socket", "/no/such/folder/s"]);
    let ended = crate::tool::run(activated(&command, listener.into(), Path::new("/no/such/socket")));
    assert_eq!(ended.code, 64, "{ended:?}");
    assert!(ended.stderr.contains("systemd passes sockets"), "{ended:?}");
}

fn at<'a>(node: &'a YamlOwned, path: &[&str]) -> &'a YamlOwned {
    path.iter().fold(node, |node, key| {
        node.as_mapping_get(key)
            .unwrap_or_else(|| panic!("no {key} in {path:?}"))
    })
}

fn texts(node: &YamlOwned) -> Vec<&str> {
    node.as_vec()
        .expect("a list")
        .iter()
        .map(|item| item.as_str().expect("a text"))
        .collect()
}

#[test]
fn agents_of_kubernetes_run_with_their_arguments_and_answer_their_probes() {
    for (file, containers) in [("daemonset.yaml", "containers"), ("sidecar.yaml", "initContainers")] {
        let text = deploy(&format!("kubernetes/{file}"));
        let documents = YamlOwned::load_from_str(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        let [document] = &*documents else {
            panic!("{file}: {} documents", documents.len())
        };
        let pod = at(document, &["spec", "template", "spec"]);
        assert_eq!(
            at(document, &["spec", "selector", "matchLabels"]),
            at(document, &["spec", "template", "metadata", "labels"])
        );
        let grace = at(pod, &["terminationGracePeriodSeconds"]).as_integer();
        assert!(grace.is_some_and(|seconds| seconds > 30), "{file}: {grace:?}");
        let agent = &at(pod, &[containers]).as_vec().unwrap()[0];
        let variable = &at(agent, &["env"]).as_vec().unwrap()[0];
        assert_eq!(at(variable, &["name"]).as_str(), Some("SHARDLOCK_SHARDS"));

        let server = RedisServer::start();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let arguments = adapted(&texts(at(agent, &["args"])), path.to_str().unwrap(), "");
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let run = Run::start(tool(&server, &arguments));
        wait_until("the agent listens", PATIENCE, || run.stderr().contains("listening on"));
        RespClient::unix(&path).unwrap().integer(&["LOCK", "k"]);
        let printed = run.stderr();
        let address = printed.split("http://").nth(1).and_then(|rest| rest.split('/').next());
        let address = address.unwrap_or_else(|| panic!("no address: {printed}"));
        let start = if containers == "containers" {
            "readinessProbe"
        } else {
            "startupProbe"
        };
        for probe in [start, "livenessProbe"] {
            let probed = at(agent, &[probe, "httpGet", "path"]).as_str().unwrap();
            let page = crate::exec::metrics::get(address, probed);
            assert!(page.starts_with("HTTP/1.1 200"), "{file}: {probed}: {page}");
        }
    }
}
