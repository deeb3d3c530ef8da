//! The protocol between a parent and its workers: one JSON value per line, commands on the worker's
//! standard input, replies on its standard output.

use std::io::{BufRead, Write};

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::output::one_line;

/// A reply of a worker. Each command, and the first line, is answered with any number of
/// [`Reply::Progress`] and one [`Reply::Done`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply<T> {
    /// How much is done so far.
    Progress(u64),
    /// All of it is done, with this result.
    Done(T),
    Failed(String),
}

/// The commands from the parent.
#[derive(Debug)]
pub(crate) struct Commands(mpsc::UnboundedReceiver<String>);

/// Runs a worker. A failure is sent to the parent and makes the exit code 1.
pub(crate) async fn run_worker(execute: impl AsyncFnOnce(&mut Commands) -> anyhow::Result<()>) -> anyhow::Result<u8> {
    let mut commands = Commands::from_stdin()?;
    let result = execute(&mut commands).await;
    if let Err(error) = &result {
        send_reply(&Reply::<()>::Failed(one_line(error)))?;
    }
    Ok(u8::from(result.is_err()))
}

impl Commands {
    /// Reads commands on a separate thread. If the input ends without the command to shut down, the
    /// parent is gone, and this process exits at once; its leases expire.
    fn from_stdin() -> anyhow::Result<Self> {
        // The channel stays short: the parent waits for each reply.
        let (sender, commands) = mpsc::unbounded_channel();
        let read = move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
            std::process::exit(1);
        };
        std::thread::Builder::new().name("commands".to_owned()).spawn(read)?;
        Ok(Self(commands))
    }

    /// Waits for the next command, or for the first line.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let line = self.0.recv().await.context("the parent sent no further command")?;
        serde_json::from_str(&line).context("a command can't be parsed")
    }
}

pub(crate) fn send_reply<T: Serialize>(reply: &Reply<T>) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    ensure!(!line.contains(&b'\n'), "an answer is one line");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}
