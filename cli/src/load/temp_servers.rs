//! Throw-away servers: each on a free port of 127.0.0.1, with a temporary directory, and without
//! persistence.

use std::fs::{self, DirBuilder, File};
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use deadpool_redis::redis::cmd;
use rand::Rng;
use tokio::process::Child;

use super::{child, connection};

/// Ports below the usual ephemeral ranges. In those, a client connecting to a server that is not up
/// yet could get the server's own port as its source port, and so connect to itself.
const PORTS: std::ops::Range<u16> = 12_000..22_000;

/// How often another program may take a free port before the server binds it.
const PORT_ATTEMPTS_MAX: u32 = 20;

/// The time limit for a server's first reply after its start.
const START_TIMEOUT: Duration = Duration::from_secs(10);

/// The pause between two attempts to reach a starting server.
const START_POLL: Duration = Duration::from_millis(5);

/// The environment variable with the path of the server's binary.
const BINARY_VARIABLE: &str = "SHARDLOCK_REDIS_SERVER";

/// Running servers. They are killed on drop; [`TempServers::stop`] also waits until they are gone.
#[derive(Debug)]
pub(crate) struct TempServers {
    servers: Vec<TempServer>,
    dir: TempDir,
}

#[derive(Debug)]
struct TempServer {
    port: u16,
    process: Child,
}

impl TempServers {
    /// A set without servers.
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            servers: Vec::new(),
            dir: TempDir::new()?,
        })
    }

    /// Starts this many more servers. If one fails, those already started are kept.
    pub(crate) async fn start(&mut self, count: usize) -> anyhow::Result<()> {
        let binary = find_binary()?;
        for _ in 0..count {
            let server = self.start_one(&binary).await?;
            self.servers.push(server);
        }
        Ok(())
    }

    pub(crate) fn urls(&self) -> impl Iterator<Item = String> {
        self.servers.iter().map(|server| url(server.port))
    }

    async fn start_one(&self, binary: &Path) -> anyhow::Result<TempServer> {
        for _ in 0..PORT_ATTEMPTS_MAX {
            let port = free_port()?;
            if let Some(process) = launch(binary, port, &self.dir.path).await? {
                return Ok(TempServer { port, process });
            }
        }
        bail!(
            "{PORT_ATTEMPTS_MAX} free ports of {} were taken before a server could use them",
            Ipv4Addr::LOCALHOST
        )
    }

    /// Kills the servers, which have no data to save, removes their directory, and waits until they
    /// are gone.
    pub(crate) async fn stop(mut self) -> anyhow::Result<()> {
        for server in &mut self.servers {
            child::kill_and_reap(&mut server.process)
                .await
                .context("a server can't be stopped")?;
        }
        Ok(())
    }
}

fn url(port: u16) -> String {
    format!("redis://{}:{port}", Ipv4Addr::LOCALHOST)
}

/// A port that is currently free.
pub(crate) fn free_port() -> anyhow::Result<u16> {
    let is_free = |port: &u16| TcpListener::bind((Ipv4Addr::LOCALHOST, *port)).is_ok();
    let mut random = rand::rng();
    (0..PORTS.len())
        .map(|_| random.random_range(PORTS))
        .find(is_free)
        .with_context(|| format!("no port of {} from {PORTS:?} is free", Ipv4Addr::LOCALHOST))
}

/// Starts a server and waits until it answers. Returns `None` if the port is taken.
async fn launch(binary: &Path, port: u16, dir: &Path) -> anyhow::Result<Option<Child>> {
    let log_path = dir.join(format!("{port}.log"));
    let log = File::create(&log_path).with_context(|| format!("{} can't be written", log_path.display()))?;
    let mut command = child::command("server")?;
    command
        .arg(binary)
        .args(["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"])
        .args(["--port", &port.to_string()])
        .arg("--dir")
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(log.try_clone()?)
        .stdout(log);
    let mut process = command.spawn().context("a server can't be started")?;
    let log = || fs::read_to_string(&log_path).unwrap_or_default();

    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if let Some(status) = process.try_wait()? {
            let log = log();
            ensure!(
                log.contains("Address already in use"),
                "{} exited during startup with {status}:\n{log}",
                binary.display()
            );
            return Ok(None);
        }
        // Another program's server on the same port would answer, too.
        if pid_of_server_on(port).await == process.id() {
            return Ok(Some(process));
        }
        ensure!(
            Instant::now() < deadline,
            "{} did not answer within {START_TIMEOUT:?}:\n{}",
            binary.display(),
            log()
        );
        tokio::time::sleep(START_POLL).await;
    }
}

/// The process id of the server on this port, if it answers.
async fn pid_of_server_on(port: u16) -> Option<u32> {
    let pool = connection::connect(&url(port)).await.ok()?;
    let mut connection = pool.get().await.ok()?;
    let info: String = cmd("INFO").arg("server").query_async(&mut connection).await.ok()?;
    info.lines()
        .find_map(|line| line.strip_prefix("process_id:")?.parse().ok())
}

fn find_binary() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE).filter(|path| !path.is_empty()) {
        return Ok(path.into());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut candidates =
        std::env::split_paths(&path).flat_map(|dir| ["redis-server", "valkey-server"].map(|name| dir.join(name)));
    candidates.find(|path| path.is_file()).with_context(|| {
        format!(
            "there is no redis-server or valkey-server on the PATH: run `make demo`, which installs one, set \
             {BINARY_VARIABLE} to the path of one, or use running servers with --shard"
        )
    })
}

/// A directory that other users can't read, removed on drop.
#[derive(Debug)]
pub(crate) struct TempDir {
    pub(crate) path: PathBuf,
}

impl TempDir {
    pub(crate) fn new() -> anyhow::Result<Self> {
        let name = format!("shardlock-servers-{}-{:08x}", std::process::id(), rand::random::<u32>());
        let path = std::env::temp_dir().join(name);
        DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("{} can't be created", path.display()))?;
        Ok(Self { path })
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            crate::output::eprint(format_args!("{} can't be removed: {error}", self.path.display()));
        }
    }
}
