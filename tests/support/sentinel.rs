//! A primary, its replicas and three sentinels of a test's own.
//!
//! Everything is as quick as Sentinel lets it be: a primary that does not answer is taken for dead after a few hundred milliseconds.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use redis::{Connection, FromRedisValue, RedisResult};
use tempfile::TempDir;

use super::directory::directory;
use super::process::Process;
use super::server::{PORTS_TRIED_MAX, RedisServer, binary, connect, free_port};
use super::wait::{PATIENCE, wait_until};

const LOG: &str = "sentinel.log";

/// What the sentinels call the primary.
pub const NAME: &str = "mymaster";
const SENTINELS: usize = 3;
const QUORUM: usize = 2;

/// After how long a server that does not answer is down.
pub const DOWN_AFTER: Duration = Duration::from_millis(800);

/// How often a sentinel tells the others what it knows, by default. The old primary of an orderly failover is demoted after four times that.
const PUBLISH_PERIOD: Duration = Duration::from_secs(2);

/// See the module.
pub struct Watched {
    /// The first one was started as the primary.
    servers: Vec<RedisServer>,
    sentinels: Vec<Sentinel>,
}

impl Watched {
    /// Starts all of them and waits until every sentinel knows all others and every replica is in step.
    #[track_caller]
    pub fn start(replicas: usize) -> Self {
        Self::start_with(replicas, &[], &[])
    }

    /// [`start`](Self::start) with more arguments for the first server, and more lines for the configurations of the sentinels.
    #[track_caller]
    pub fn start_with(replicas: usize, args: &[&str], lines: &[&str]) -> Self {
        Self::start_in(replicas, &[], args, lines)
    }

    /// [`start_with`](Self::start_with), with these variables in the environment of all servers but the sentinels.
    #[track_caller]
    pub fn start_in(replicas: usize, vars: &[(&str, String)], args: &[&str], lines: &[&str]) -> Self {
        let mut servers = vec![RedisServer::start_in(
            vars,
            &[&["--repl-diskless-sync-delay", "0"], args].concat(),
        )];
        let port = servers[0].port().to_string();
        for _ in 0..replicas {
            // It may be a primary itself later.
            let args = ["--repl-diskless-sync-delay", "0", "--replicaof", "127.0.0.1", &port];
            servers.push(RedisServer::start_in(vars, &args));
        }
        wait_until("the replicas are in step", PATIENCE, || {
            in_step(&servers[0]) == replicas
        });
        let sentinels: Vec<Sentinel> = (0..SENTINELS)
            .map(|_| Sentinel::start(servers[0].port(), lines))
            .collect();
        for sentinel in &sentinels {
            // The usual periods are seconds. One that was not scheduled for two of them does nothing for the next thirty, and a connection to
            // a server that hung is made anew after fifteen.
            sentinel.debug(&["INFO-PERIOD", "100", "PUBLISH-PERIOD", "50"]);
            sentinel.debug(&["TILT-PERIOD", "500", "MIN-LINK-RECONNECT-PERIOD", "500"]);
        }
        wait_until("the sentinels know everybody", PATIENCE, || {
            sentinels.iter().all(|sentinel| {
                let known = sentinel.of_primary(["num-slaves", "num-other-sentinels"]);
                known.map(|count| count.parse::<usize>().expect("a number")) == [replicas, SENTINELS - 1]
            })
        });
        let watched = Self { servers, sentinels };
        watched.publish_every(PUBLISH_PERIOD);
        watched
    }

    /// All servers that keep data.
    pub fn servers(&self) -> &[RedisServer] {
        &self.servers
    }

    /// How often sentinels tell one another what they know.
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

    /// The server that most sentinels call the primary.
    #[track_caller]
    pub fn primary(&self) -> &RedisServer {
        let mut ports: Vec<u16> = self.sentinels.iter().filter_map(Sentinel::primary).collect();
        ports.sort_unstable();
        let port = ports[ports.len() / 2];
        self.server(port)
    }

    /// All servers but the primary, whether they are up or not.
    #[track_caller]
    pub fn replicas(&self) -> Vec<&RedisServer> {
        let primary = self.primary().port();
        self.servers.iter().filter(|server| server.port() != primary).collect()
    }

    #[track_caller]
    pub fn server(&self, port: u16) -> &RedisServer {
        let mut servers = self.servers.iter();
        servers.find(|server| server.port() == port).expect("one of ours")
    }

    pub fn sentinels(&self) -> &[Sentinel] {
        &self.sentinels
    }

    /// `SENTINEL FAILOVER`. Returns the new primary when every sentinel knows it.
    #[track_caller]
    pub fn failover(&self) -> &RedisServer {
        let (old, leader) = (self.primary().port(), &self.sentinels[0]);
        self.wait("a failover is carried out", || {
            // In one question, since a failover that ends in between would be followed by one back.
            let [port, flags] = leader.of_primary(["port", "flags"]);
            if port != old.to_string() {
                return true;
            }
            if !flags.contains("failover_in_progress") {
                // One that finds no replica in a fit state is refused, or given up without a word, and begun again here.
                let begun: RedisResult<String> = leader.try_query(&["SENTINEL", "FAILOVER", NAME]);
                drop(begun);
            }
            false
        });
        self.switched(old)
    }

    /// Waits until every sentinel calls another server the primary than the one at that port.
    #[track_caller]
    pub fn switched(&self, from: u16) -> &RedisServer {
        let up = || self.sentinels.iter().filter_map(Sentinel::primary);
        self.wait("the sentinels have switched", || up().all(|primary| primary != from));
        self.primary()
    }

    /// Waits until the replicas of the primary are as many as that, and in step.
    #[track_caller]
    pub fn has_replicas(&self, count: usize) {
        self.wait("the primary has its replicas", || in_step(self.primary()) == count);
    }

    /// [`wait_until`], with what the sentinels have to say if it is in vain.
    #[track_caller]
    fn wait(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !condition() {
            let logs = || self.sentinels.iter().map(Sentinel::log).collect::<Vec<_>>().join("\n");
            assert!(
                Instant::now() < deadline,
                "waited {PATIENCE:?} in vain until {what}:\n{}",
                logs()
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Stops the replication from the primary, without the sentinels doing anything about it for some seconds.
    #[track_caller]
    pub fn cut_replication(&self) {
        for replica in self.replicas() {
            // Nobody is there.
            replica.command(&["REPLICAOF", "127.0.0.1", "1"]);
        }
        self.has_replicas(0);
    }
}

/// How many replicas have everything that the primary has. One that is said to be online gets nothing until its first acknowledgement, which
/// takes up to a second.
#[track_caller]
pub fn in_step(primary: &RedisServer) -> usize {
    // Something that they have to acknowledge, and that leaves nothing behind.
    primary.command(&["PUBLISH", "in-step", ""]);
    // Before the first replica asked, nothing is kept for any; all that are online would count as having acknowledged that.
    let replication: String = primary.query(&["INFO", "replication"]);
    if replication.lines().any(|line| line == "master_repl_offset:0") {
        return 0;
    }
    // A server that is no primary, or not yet, refuses.
    primary.try_query(&["WAIT", "100", "50"]).unwrap_or_default()
}

/// One sentinel.
pub struct Sentinel {
    port: u16,
    /// As a server is given its password on the command line.
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
    /// The sentinel's error, or that it can't be reached.
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

    /// The port of the primary as this one knows it; nothing while it is down.
    fn primary(&self) -> Option<u16> {
        let asked: RedisResult<(String, u16)> = self.try_query(&["SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME]);
        asked.ok().map(|(_, port)| port)
    }

    /// What it knows of the primary.
    #[track_caller]
    fn of_primary<const N: usize>(&self, names: [&str; N]) -> [String; N] {
        let fields: Vec<String> = self.try_query(&["SENTINEL", "MASTER", NAME]).expect("SENTINEL MASTER");
        names.map(|name| {
            let mut pairs = fields.chunks(2);
            pairs.find(|pair| pair[0] == name).expect("a field")[1].clone()
        })
    }

    /// What it has logged.
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

/// Starts a sentinel on this port and waits until it answers. Nothing if the port is taken.
#[track_caller]
fn launch(port: u16, primary: u16, lines: &[&str], dir: &Path) -> Option<(Process, Vec<String>)> {
    let config = dir.join("sentinel.conf");
    let has_names = lines.iter().any(|line| line.starts_with("sentinel resolve-hostnames"));
    let host = if has_names { "localhost" } else { "127.0.0.1" };
    // Names have to be allowed before one is named, and what a primary needs comes after it.
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
        // A sentinel of somebody else on the same port knows another primary.
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
