//! The worker processes, as the parent sees them.

use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, anyhow, bail};
use futures_util::future::try_join_all;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout};

use super::child;
use super::commands::Reply;

/// All worker processes. They are killed on drop.
#[derive(Debug)]
pub(crate) struct Workers {
    /// What they work for, as in the role of the child: `demo` or `bench`.
    purpose: &'static str,
    workers: Vec<Worker>,
}

#[derive(Debug)]
struct Worker {
    number: u32,
    purpose: &'static str,
    process: Child,
    commands: ChildStdin,
    replies: Lines<BufReader<ChildStdout>>,
    /// The last progress that the worker reported.
    progress: u64,
}

impl Workers {
    /// A set without workers.
    pub(crate) const fn new(purpose: &'static str) -> Self {
        Self {
            purpose,
            workers: Vec::new(),
        }
    }

    /// Starts a worker with `settings` as the first line of its input.
    /// [`Workers::wait_until_ready`] waits until it is connected.
    pub(crate) async fn spawn(&mut self, settings: &impl Serialize) -> anyhow::Result<()> {
        let mut process = child::command(&format!("{}-worker", self.purpose))?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("a worker process can't be started")?;
        let (Some(commands), Some(replies)) = (process.stdin.take(), process.stdout.take()) else {
            bail!("a worker process has no pipes");
        };
        let mut worker = Worker {
            number: self.workers.len() as u32 + 1,
            purpose: self.purpose,
            process,
            commands,
            replies: BufReader::new(replies).lines(),
            progress: 0,
        };
        worker.send(settings).await?;
        self.workers.push(worker);
        Ok(())
    }

    /// Waits until all workers are connected. Returns what each reports about itself.
    pub(crate) async fn wait_until_ready<T: DeserializeOwned>(&mut self) -> anyhow::Result<Vec<T>> {
        try_join_all(self.workers.iter_mut().map(|worker| worker.read_reply(|_| {}))).await
    }

    /// Sends a command to all workers in quick succession and waits for their replies. `progress`
    /// is called with the sum of the progress they report.
    pub(crate) async fn run<T: DeserializeOwned>(
        &mut self,
        command: &impl Serialize,
        progress: impl Fn(u64),
    ) -> anyhow::Result<Vec<T>> {
        for worker in &mut self.workers {
            worker.progress = 0;
            worker.send(command).await?;
        }
        let sum = AtomicU64::new(0);
        let (sum, progress) = (&sum, &progress);
        try_join_all(
            self.workers
                .iter_mut()
                .map(|worker| worker.read_reply(move |more| progress(sum.fetch_add(more, Ordering::Relaxed) + more))),
        )
        .await
    }

    /// Checks between commands that all workers are alive.
    ///
    /// # Errors
    ///
    /// If a worker has ended; with the reason, if it reported one.
    pub(crate) async fn check_alive(&mut self) -> anyhow::Result<()> {
        for worker in &mut self.workers {
            if worker.process.try_wait()?.is_some() {
                return worker.read_reply::<()>(|_| {}).await;
            }
        }
        Ok(())
    }

    /// Makes the workers shut their managers down by this command, and waits until they have
    /// exited.
    pub(crate) async fn shut_down(&mut self, command: &impl Serialize) -> anyhow::Result<()> {
        self.run::<()>(command, |_| {}).await?;
        for mut worker in self.workers.drain(..) {
            let status = worker.process.wait().await?;
            if !status.success() {
                bail!("worker process {} ended with {status}", worker.number);
            }
        }
        Ok(())
    }

    /// Kills the remaining workers and waits until they are gone.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        for mut worker in self.workers.drain(..) {
            child::kill_and_reap(&mut worker.process)
                .await
                .context("a worker can't be stopped")?;
        }
        Ok(())
    }
}

impl Worker {
    async fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        match self.commands.write_all(&line).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.exit_error().await),
        }
    }

    /// Waits for the reply to the last command; `progress` is called with each increment.
    async fn read_reply<T: DeserializeOwned>(&mut self, progress: impl Fn(u64)) -> anyhow::Result<T> {
        loop {
            let Some(line) = self.replies.next_line().await? else {
                return Err(self.exit_error().await);
            };
            match serde_json::from_str(&line).with_context(|| format!("not an answer: {line:?}"))? {
                Reply::Progress(total) => {
                    progress(total.saturating_sub(self.progress));
                    self.progress = total;
                }
                Reply::Failed(reason) => bail!("worker process {}: {reason}", self.number),
                Reply::Done(reply) => return Ok(reply),
            }
        }
    }

    /// The error that describes how the worker ended.
    async fn exit_error(&mut self) -> anyhow::Error {
        let status = self.process.wait().await;
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        anyhow!(
            "worker process {} died in the middle of the {}: {how}",
            self.number,
            self.purpose
        )
    }
}
