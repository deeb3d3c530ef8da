//! Metrics while a command runs.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Stdio;

use support::{PATIENCE, RedisServer, wait_until};

use crate::tool::{Notes, Run, run, tool};

#[test]
fn metrics_are_served_at_the_printed_address() {
    let server = RedisServer::start();
    let notes = Notes::new();
    let mut command = tool(
        &server,
        &["exec", "--metrics", "127.0.0.1:0", "k", "sh", "-c", "echo > ready; cat"],
    );
    command.current_dir(notes.dir()).stdin(Stdio::piped());
    let mut tool = Run::start(command);
    let stdin = tool.take_stdin();
    notes.line("ready");
    let stderr = tool.stderr();
    let address = stderr.split("http://").nth(1).and_then(|rest| rest.split('/').next());
    let address = address.unwrap_or_else(|| panic!("no address in the output: {stderr}"));

    let mut page = String::new();
    wait_until("the acquisition is on the page", PATIENCE, || {
        page = get(address, "/metrics");
        page.contains("outcome=\"acquired\"")
    });
    let bucket = page
        .lines()
        .find(|line| line.contains("_seconds_bucket") && line.contains("le=\"60\""));
    assert!(bucket.is_some(), "{page}");
    // The same address serves the whole admin endpoint.
    assert!(get(address, "/held").contains("\"key\":\"k\""));
    assert!(get(address, "/readyz").contains("\"ready\":true"));
    drop(stdin);
    assert_eq!(tool.end().code, 0);
}

#[test]
fn a_command_does_not_inherit_the_address() {
    let server = RedisServer::start();
    let mut command = tool(&server, &["exec", "k", "sh", "-c", "echo \"<$SHARDLOCK_METRICS>\""]);
    command.env("SHARDLOCK_METRICS", "127.0.0.1:0");
    assert_eq!(run(command).stdout, "<>\n");
}

/// The jobs of one machine share the environment, but only the first one can bind the port.
#[test]
fn unusable_metrics_address_is_fatal_only_on_the_command_line() {
    let server = RedisServer::start();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    for address in [taken.as_str(), "metrics:9187", ":9187"] {
        let mut command = tool(&server, &["exec", "k", "echo", "ran"]);
        command.env("SHARDLOCK_METRICS", address);
        let ended = run(command);
        assert_eq!((ended.code, ended.stdout.as_str()), (0, "ran\n"), "{ended:?}");
        assert!(ended.stderr.contains(address), "{ended:?}");
        assert!(
            ended.stderr.contains("continuing without metrics (SHARDLOCK_METRICS)"),
            "{ended:?}"
        );
        assert_eq!(
            ended.stderr.matches("in use").count(),
            usize::from(address == taken),
            "{ended:?}"
        );
    }
    // If the address is given on the command line, a failure to bind it is fatal.
    for (address, code) in [(taken.as_str(), 69), ("metrics:9187", 64)] {
        let ended = run(tool(&server, &["exec", "--metrics", address, "k", "echo", "ran"]));
        assert_eq!((ended.code, ended.stdout.as_str()), (code, ""), "{ended:?}");
        assert!(ended.stderr.contains("--metrics"), "{ended:?}");
        assert!(ended.stderr.matches("in use").count() <= 1, "{ended:?}");
    }
}

pub(crate) fn get(address: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut page = String::new();
    stream.read_to_string(&mut page).unwrap();
    page
}
