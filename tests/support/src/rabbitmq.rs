//! A real RabbitMQ.

use std::env;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::directory::directory;
use crate::process::Process;
use crate::server::free_port;
use crate::wait::{PATIENCE, wait_until};

/// Where packages install the program. The one on the `PATH` then runs only as a user of its own.
const INSTALLED: &str = "/usr/lib/rabbitmq/bin/rabbitmq-server";

/// Erlang loads several hundred modules first, which takes seconds on an idle machine.
const START: Duration = PATIENCE.saturating_mul(6);

/// How long a new connection waits for an answer before another one is opened.
const ANSWER: Duration = Duration::from_secs(2);

/// Path of the program: `SHARDLOCK_RABBITMQ`, the one that a package has installed, or the one on
/// the `PATH`.
pub fn binary() -> PathBuf {
    if let Some(path) = env::var_os("SHARDLOCK_RABBITMQ").filter(|path| !path.is_empty()) {
        return PathBuf::from(path);
    }
    let paths = env::var_os("PATH").unwrap_or_default();
    let on_path = env::split_paths(&paths).map(|dir| dir.join("rabbitmq-server"));
    let mut known = std::iter::once(PathBuf::from(INSTALLED)).chain(on_path);
    known.find(|path| path.is_file()).unwrap_or_else(|| {
        panic!(
            "there is no RabbitMQ here: `make test` installs it, or set SHARDLOCK_RABBITMQ to the path of rabbitmq-server"
        )
    })
}

/// A RabbitMQ on a free port, with the user `guest`. Killed when dropped.
pub struct RabbitMq {
    port: u16,
    _process: Process,
    /// Finds the nodes of Erlang by name. One of its own, since the usual one keeps running.
    _names: Process,
    _dir: TempDir,
}

impl RabbitMq {
    /// Starts a server and waits until it accepts connections.
    #[track_caller]
    pub fn start() -> Self {
        let dir = directory("rabbitmq");
        let (port, names_port) = (free_port(), free_port());
        let mut names = Command::new("epmd");
        names
            .args(["-port", &names_port.to_string(), "-address", "127.0.0.1"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let names = Process::spawn(names).expect("start epmd, which comes with Erlang");

        let path = |name: &str| dir.path().join(name);
        fs::write(path("plugins"), "[].").expect("write the list of plugins");
        fs::write(path("rabbitmq.conf"), "").expect("write the configuration");
        let log = File::create(path("log")).expect("create the log");
        let mut server = Command::new(binary());
        server
            .env("HOME", dir.path())
            .env("ERL_EPMD_PORT", names_port.to_string())
            .env("ERL_EPMD_ADDRESS", "127.0.0.1")
            // The script then becomes the server rather than its parent.
            .env("RABBITMQ_ALLOW_INPUT", "1")
            .env("RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS", "-noinput")
            .env("RABBITMQ_NODENAME", format!("test{port}@localhost"))
            .env("RABBITMQ_NODE_IP_ADDRESS", "127.0.0.1")
            .env("RABBITMQ_NODE_PORT", port.to_string())
            .env("RABBITMQ_DIST_PORT", free_port().to_string())
            .env("RABBITMQ_BASE", dir.path())
            .env("RABBITMQ_MNESIA_BASE", path("data"))
            .env("RABBITMQ_LOG_BASE", path("logs"))
            .env("RABBITMQ_LOGS", "-")
            .env("RABBITMQ_PID_FILE", path("pid"))
            .env("RABBITMQ_ENABLED_PLUGINS_FILE", path("plugins"))
            .env("RABBITMQ_CONFIG_FILE", path("rabbitmq"))
            .env("RABBITMQ_CONF_ENV_FILE", path("none"))
            .env("RABBITMQ_GENERATED_CONFIG_DIR", dir.path())
            .current_dir(dir.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone().expect("share the log"))
            .stderr(log);
        let mut process = Process::spawn(server).expect("start rabbitmq-server");
        wait_until("RabbitMQ accepts connections", START, || {
            if process.ended().is_some() {
                panic!(
                    "RabbitMQ ended:\n{}",
                    fs::read_to_string(path("log")).unwrap_or_default()
                );
            }
            answers(port)
        });
        Self {
            port,
            _process: process,
            _names: names,
            _dir: dir,
        }
    }

    /// The URL for a client.
    pub fn url(&self) -> String {
        format!("amqp://127.0.0.1:{}/%2f", self.port)
    }
}

/// Whether the server answers the first bytes of the protocol.
fn answers(port: u16) -> bool {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return false;
    };
    // A connection of the first moments may never get an answer.
    stream.set_read_timeout(Some(ANSWER)).expect("set a time limit");
    stream.write_all(b"AMQP\x00\x00\x09\x01").is_ok() && stream.read_exact(&mut [0]).is_ok()
}
