//! A primary, its replicas and three sentinels for one test.
//!
//! All periods are as short as Sentinel allows: an unresponsive primary is considered down after a
//! few hundred milliseconds.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use redis::{Connection, FromRedisValue, RedisResult};
use tempfile::TempDir;

use crate::directory::directory;
use crate::process::Process;
use crate::server::{PORTS_TRIED_MAX, RedisServer, binary, connect, free_port};
use crate::wait::{PATIENCE, wait_until};

const LOG: &str = "sentinel.log";

/// The name of the primary in the sentinels' configuration.
pub const NAME: &str = "mymaster";
const SENTINELS: usize = 3;
const QUORUM: usize = 2;

/// Time after which an unresponsive server is considered down.
pub const DOWN_AFTER: Duration = Duration::from_millis(800);

/// Default period at which a sentinel publishes its view to the others. After an orderly failover
/// the old primary is demoted after four periods.
const PUBLISH_PERIOD: Duration = Duration::from_secs(2);

/// Data servers and the sentinels that watch them.
pub struct Watched {
    /// The first server was started as the primary.
    servers: Vec<RedisServer>,
    sentinels: Vec<Sentinel>,
}

impl Watched {
    /// Starts all servers and waits until every sentinel knows the others and every replica is in
    /// sync.
    #[track_caller]
    pub fn start(replicas: usize) -> Self {
        Self::start_with(replicas, &[], &[])
    }

    /// [`start`](Self::start) with extra arguments for the first server and extra lines for the
    /// sentinels' configuration.
    #[track_caller]
    pub fn start_with(replicas: usize, args: &[&str], lines: &[&str]) -> Self {
        Self::start_in(replicas, &[], args, lines)
    }

    /// [`start_with`](Self::start_with) with extra environment variables for all servers except the
    /// sentinels.
    #[track_caller]
    pub fn start_in(replicas: usize, vars: &[(&str, String)], args: &[&str], lines: &[&str]) -> Self {
        let mut servers = vec![RedisServer::start_in(
            vars,
            &[&["--repl-diskless-sync-delay", "0"], args].concat(),
        )];
        let port = servers[0].port().to_string();
        for _ in 0..replicas {
            // A replica may become the primary later.
            let args = ["--repl-diskless-sync-delay", "0", "--replicaof", "127.0.0.1", &port];
            servers.push(RedisServer::start_in(vars, &args));
        }
        wait_until("the replicas are in sync", PATIENCE, || {
            in_step(&servers[0]) == replicas
        });
        let sentinels: Vec<Sentinel> = (0..SENTINELS)
            .map(|_| Sentinel::start(servers[0].port(), lines))
            .collect();
        for sentinel in &sentinels {
            // The default periods are seconds. A sentinel that was not scheduled for two of them
            // enters TILT mode and does nothing for 30 seconds, and a connection to a hung server
            // is only replaced after 15.
            sentinel.debug(&["INFO-PERIOD", "100", "PUBLISH-PERIOD", "50"]);
            sentinel.debug(&["TILT-PERIOD", "500", "MIN-LINK-RECONNECT-PERIOD", "500"]);
        }
        wait_until("the sentinels know all servers", PATIENCE, || {
            sentinels.iter().all(|sentinel| {
                let known = sentinel.of_primary(["num-slaves", "num-other-sentinels"]);
                known.map(|count| count.parse::<usize>().expect("a number")) == [replicas, SENTINELS - 1]
            })
        });
        let watched = Self { servers, sentinels };
        watched.publish_every(PUBLISH_PERIOD);
        watched
    }

    /// All data servers.
    pub fn servers(&self) -> &[RedisServer] {
        &self.servers
    }

    /// Sets the time after which an unresponsive server is considered down.
    #[track_caller]
    pub fn consider_down_after(&self, period: Duration) {
        let period = period.as_millis().to_string();
        for sentinel in &self.sentinels {
            let words = ["SENTINEL", "SET", NAME, "down-after-milliseconds", &period];
            let _: String = sentinel.try_query(&words).expect("SENTINEL SET");
        }
    }

    /// Sets the period at which sentinels publish their view.
    pub fn publish_every(&self, period: Duration) {
        for sentinel in &self.sentinels {
            sentinel.debug(&["PUBLISH-PERIOD", &period.as_millis().to_string()]);
        }
    }

    /// `redis+sentinel://...`
    pub fn url(&self) -> String {
        let places: Vec<String> = self.sentinels.iter().map(Sentinel::address).collect();
        format!("redis+sentinel://{}/{NAME}", places.join(","))
    }

    /// The server that most sentinels consider the primary.
    #[track_caller]
    pub fn primary(&self) -> &RedisServer {
        let mut ports: Vec<u16> = self.sentinels.iter().filter_map(Sentinel::primary).collect();
        ports.sort_unstable();
        let port = ports[ports.len() / 2];
        self.server(port)
    }

    /// All servers except the primary, whether they are up or not.
    #[track_caller]
    pub fn replicas(&self) -> Vec<&RedisServer> {
        let primary = self.primary().port();
        self.servers.iter().filter(|server| server.port() != primary).collect()
    }

    /// The server on this port.
    #[track_caller]
    pub fn server(&self, port: u16) -> &RedisServer {
        let mut servers = self.servers.iter();
        servers.find(|server| server.port() == port).expect("one of ours")
    }

    /// All sentinels, whether they are up or not.
    pub fn sentinels(&self) -> &[Sentinel] {
        &self.sentinels
    }

    /// Runs `SENTINEL FAILOVER`. Returns the new primary once every sentinel knows it.
    #[track_caller]
    pub fn failover(&self) -> &RedisServer {
        let (old, leader) = (self.primary().port(), &self.sentinels[0]);
        self.wait("the failover is done", || {
            // Both fields are read with one query. With two, a failover that ends in between would
            // trigger another one back.
            let [port, flags] = leader.of_primary(["port", "flags"]);
            if port != old.to_string() {
                return true;
            }
            if !flags.contains("failover_in_progress") {
                // A failover that finds no suitable replica is refused, or abandoned silently, and
                // is retried here.
                let begun: RedisResult<String> = leader.try_query(&["SENTINEL", "FAILOVER", NAME]);
                drop(begun);
            }
            false
        });
        self.switched(old)
    }

    /// Waits until every sentinel reports a primary other than the server at port `from`.
    #[track_caller]
    pub fn switched(&self, from: u16) -> &RedisServer {
        let up = || self.sentinels.iter().filter_map(Sentinel::primary);
        self.wait("the sentinels have switched", || up().all(|primary| primary != from));
        self.primary()
    }

    /// Waits until the primary has exactly `count` replicas in sync.
    #[track_caller]
    pub fn has_replicas(&self, count: usize) {
        self.wait("the primary has its replicas", || in_step(self.primary()) == count);
    }

    /// [`wait_until`] that prints the sentinels' logs on failure.
    #[track_caller]
    fn wait(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            let logs = || self.sentinels.iter().map(Sentinel::log).collect::<Vec<_>>().join("\n");
            assert!(
                Instant::now() < deadline,
                "waited {PATIENCE:?} without success until {what}:\n{}",
                logs()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops replication from the primary. Although the sentinels soon tell the replicas again whom
    /// to follow, it does not resume.
    #[track_caller]
    pub fn cut_replication(&self) {
        for replica in self.replicas() {
            // The primary has no such user.
            replica.command(&["CONFIG", "SET", "masteruser", "nobody"]);
            replica.command(&["CONFIG", "SET", "masterauth", "none"]);
            // Nothing listens on this port.
            replica.command(&["REPLICAOF", "127.0.0.1", "1"]);
        }
        self.has_replicas(0);
    }
}

/// The number of replicas that have received everything from the primary. A replica listed as
/// online receives nothing until its first acknowledgement, which takes up to a second.
#[track_caller]
pub fn in_step(primary: &RedisServer) -> usize {
    // Gives the replicas something to acknowledge that leaves no data behind.
    primary.command(&["PUBLISH", "in-step", ""]);
    // Before the first replica has synchronized, the primary keeps no backlog. All online replicas
    // would then count as having acknowledged the offset 0.
    let replication: String = primary.query(&["INFO", "replication"]);
    if replication.lines().any(|line| line == "master_repl_offset:0") {
        return 0;
    }
    // A server that is not a primary (yet) refuses.
    primary.try_query(&["WAIT", "100", "50"]).unwrap_or_default()
}

/// One sentinel.
pub struct Sentinel {
    port: u16,
    /// In the form in which a server is given its password on the command line.
    password: Vec<String>,
    dir: TempDir,
    process: Mutex<Option<Process>>,
    control: Mutex<Option<Connection>>,
}

impl Sentinel {
    #[track_caller]
    fn start(primary: u16, lines: &[&str]) -> Self {
        let dir = directory("sentinel");
        for _ in 0..PORTS_TRIED_MAX {
            let port = free_port();
            if let Some((process, password)) = launch(port, primary, lines, dir.path()) {
                let (process, control) = (Mutex::new(Some(process)), Mutex::new(None));
                return Self {
                    port,
                    password,
                    dir,
                    process,
                    control,
                };
            }
        }
        panic!("{PORTS_TRIED_MAX} ports that were free were taken a moment later");
    }

    /// `127.0.0.1:<port>`
    pub fn address(&self) -> String {
        format!("{}:{}", Ipv4Addr::LOCALHOST, self.port)
    }

    /// SIGKILL, then reaps.
    pub fn kill(&self) {
        *self.process.lock() = None;
        *self.control.lock() = None;
    }

    /// SIGSTOP.
    #[track_caller]
    pub fn stop(&self) {
        self.process.lock().as_ref().expect("the sentinel is down").stop();
    }

    /// SIGCONT.
    #[track_caller]
    pub fn cont(&self) {
        self.process.lock().as_ref().expect("the sentinel is down").cont();
    }

    /// Sends a command.
    ///
    /// # Errors
    ///
    /// The sentinel's error, or the connection error if the sentinel is unreachable.
    pub fn try_query<T: FromRedisValue>(&self, words: &[&str]) -> RedisResult<T> {
        let mut kept = self.control.lock();
        let mut control = match kept.take() {
            Some(control) => control,
            None => connect(self.port, &self.password)?,
        };
        let reply = redis::cmd(words[0]).arg(&words[1..]).query(&mut control);
        let broken = reply.as_ref().is_err_and(redis::RedisError::is_unrecoverable_error);
        *kept = (!broken).then_some(control);
        reply
    }

    /// The port of the primary as this sentinel knows it; `None` while the sentinel is down.
    fn primary(&self) -> Option<u16> {
        let asked: RedisResult<(String, u16)> = self.try_query(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME]);
        asked.ok().map(|(_, port)| port)
    }

    /// Fields that the sentinel reports about the primary.
    #[track_caller]
    fn of_primary<const N: usize>(&self, names: [&str; N]) -> [String; N] {
        let fields: Vec<String> = self.try_query(&["SENTINEL", "MASTER", NAME]).expect("SENTINEL MASTER");
        names.map(|name| {
            let mut pairs = fields.chunks(2);
            pairs.find(|pair| pair[0] == name).expect("a field")[1].clone()
        })
    }

    /// The sentinel's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join(LOG)).unwrap_or_default()
    }

    #[track_caller]
    fn debug(&self, settings: &[&str]) {
        let mut words = vec!["SENTINEL", "DEBUG"];
        words.extend(settings);
        let _: String = self.try_query(&words).expect("SENTINEL DEBUG, from version 7 on");
    }
}

/// Starts a sentinel on this port and waits until it answers. Returns `None` if the port is taken.
#[track_caller]
fn launch(port: u16, primary: u16, lines: &[&str], dir: &Path) -> Option<(Process, Vec<String>)> {
    let config = dir.join("sentinel.conf");
    let has_names = lines.iter().any(|line| line.starts_with("sentinel resolve-hostnames"));
    let host = if has_names { "localhost" } else { "127.0.0.1" };
    // Host names must be allowed before the first one is used. Lines about a primary must follow
    // its declaration.
    let (before, after): (Vec<&str>, Vec<&str>) = lines.iter().partition(|line| !line.contains(NAME));
    let text = format!(
        "port {port}\nbind 127.0.0.1\ndir {}\n{}\nsentinel monitor {NAME} {host} {primary} {QUORUM}\n\
         sentinel down-after-milliseconds {NAME} {}\nsentinel failover-timeout {NAME} 3000\n{}\n",
        dir.display(),
        before.join("\n"),
        DOWN_AFTER.as_millis(),
        after.join("\n"),
    );
    let password: Vec<String> = lines
        .iter()
        .filter_map(|line| line.strip_prefix("requirepass "))
        .flat_map(|password| ["--requirepass".to_owned(), password.to_owned()])
        .collect();
    fs::write(&config, text).expect("write a configuration");
    let log = dir.join(LOG);
    let log_file = File::create(&log).expect("make a log file");
    let mut command = Command::new(&binary().path);
    command
        .arg(&config)
        .arg("--sentinel")
        .stdin(Stdio::null())
        .stderr(log_file.try_clone().expect("share the log file"))
        .stdout(log_file);
    let mut process = Process::spawn(command).expect("start a sentinel");
    let log = || fs::read_to_string(&log).unwrap_or_default();
    let mut is_up = false;
    wait_until("a sentinel answers or ends", PATIENCE, || {
        // A sentinel of another test on the same port knows another primary.
        let asked = || {
            let mut question = redis::cmd("SENTINEL");
            question.arg("GET-MASTER-ADDR-BY-NAME").arg(NAME);
            question
                .query::<(String, u16)>(&mut connect(port, &password).ok()?)
                .ok()
        };
        is_up = asked().is_some_and(|(_, port)| port == primary);
        is_up || process.ended().is_some()
    });
    if !is_up {
        assert!(
            log().contains("Address already in use"),
            "a sentinel ended at its start:\n{}",
            log()
        );
    }
    is_up.then_some((process, password))
}
