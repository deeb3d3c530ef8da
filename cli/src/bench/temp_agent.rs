//! The agent that is started for a run.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, bail};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::process::Child;

use super::Args;
use super::figures::HandOffs;
use crate::load::child;
use crate::load::temp_servers::TempDir;
use crate::output::eprint;

/// Connections beyond those of the tasks, such as the one that reads the counts.
const OTHER_CONNECTIONS: u64 = 16;

/// What each line of the agent starts with.
const PREFIX: &str = "shardlock: ";

/// A running agent. It is killed on drop.
#[derive(Debug)]
pub(super) struct TempAgent {
    process: Child,
    pub(super) socket: PathBuf,
    _dir: TempDir,
}

impl TempAgent {
    /// Starts an agent and waits until it listens. `started` are the shards of the run, if it has
    /// started them itself.
    pub(super) async fn start(args: &Args, started: &[String], namespace: &str) -> anyhow::Result<Self> {
        let dir = TempDir::new()?;
        let socket = dir.path.join("agent.sock");
        let mut settings = vec![("namespace", namespace.to_owned())];
        if let Some(linger) = args.linger {
            settings.push((
                "linger",
                humantime::format_duration(linger).to_string().replace(' ', ""),
            ));
        }
        let mut command = child::command("server")?;
        command
            .arg(std::env::current_exe().context("the path of this program can't be determined")?)
            .args(["serve", "--drain", "0s", "--max-connections"])
            .arg((args.total_tasks() + OTHER_CONNECTIONS).to_string())
            .arg("--socket")
            .arg(&socket)
            .args(args.shards.to_words(started, &settings))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut process = command.spawn().context("the agent can't be started")?;
        let errors = process.stderr.take().context("the agent has no pipe")?;
        let mut lines = BufReader::new(errors).lines();
        let mut printed = Vec::new();
        loop {
            let Some(line) = lines.next_line().await? else {
                bail!("the agent did not start: {}", printed.join(", "));
            };
            let line = line.strip_prefix(PREFIX).unwrap_or(&line).to_owned();
            if line.starts_with("listening on") {
                break;
            }
            printed.push(line);
        }
        // Until the agent ends.
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                eprint(format_args!("agent: {}", line.strip_prefix(PREFIX).unwrap_or(&line)));
            }
        });
        Ok(Self {
            process,
            socket,
            _dir: dir,
        })
    }

    /// The number of locks that were acquired so far, by path.
    pub(super) async fn counts(&self) -> anyhow::Result<HandOffs> {
        let mut stream = UnixStream::connect(&self.socket).await?;
        stream.write_all(b"INFO\r\nQUIT\r\n").await?;
        let mut info = String::new();
        stream.read_to_string(&mut info).await?;
        Ok(hand_offs(&info))
    }

    /// Kills the agent and waits until it is gone.
    pub(super) async fn stop(mut self) -> anyhow::Result<()> {
        child::kill_and_reap(&mut self.process)
            .await
            .context("the agent can't be stopped")
    }
}

/// Sums up the lines of INFO about shards.
fn hand_offs(info: &str) -> HandOffs {
    let sum = |name: &str| {
        let fields = info
            .lines()
            .filter(|line| line.starts_with("shard"))
            .flat_map(|line| line.split(','));
        let counts = fields.filter_map(|field| field.strip_prefix(name)?.parse::<u64>().ok());
        counts.fold(0, u64::saturating_add)
    };
    let (acquired, local, remote) = (sum("acquired="), sum("local="), sum("remote="));
    HandOffs {
        local,
        remote,
        uncontended: acquired.saturating_sub(local).saturating_sub(remote),
    }
}

#[cfg(test)]
mod tests {
    use super::hand_offs;

    #[test]
    fn hand_offs_of_all_shards_are_added() {
        let info = "# Shards\r\nshard0:name=a,kind=redis,up=1,leases=1,waiters=0,acquired=10,local=5,remote=2\r\n\
                    shard1:name=b,kind=redis,up=1,leases=0,waiters=0,acquired=3,local=0,remote=0\r\n";
        let found = hand_offs(info);
        assert_eq!((found.local, found.remote, found.uncontended), (5, 2, 6));
    }
}
