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
use super::orders::Answer;

/// All worker processes. They are killed on drop.
#[derive(Debug)]
pub(crate) struct Crew {
    /// What they work for, as in the role of the child: `demo` or `bench`.
    work: &'static str,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    number: u32,
    work: &'static str,
    process: Child,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    /// The last progress that the worker reported.
    progress: u64,
}

impl Crew {
    /// A crew without members.
    pub(crate) const fn of(work: &'static str) -> Self {
        Self {
            work,
            members: Vec::new(),
        }
    }

    /// Starts a worker with `setup` as the first line of its input. [`Crew::ready`] waits until it
    /// is connected.
    pub(crate) async fn hire(&mut self, setup: &impl Serialize) -> anyhow::Result<()> {
        let mut process = child::command(&format!("{}-worker", self.work))?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("a worker process can't be started")?;
        let (Some(orders), Some(answers)) = (process.stdin.take(), process.stdout.take()) else {
            bail!("a worker process has no pipes");
        };
        let mut member = Member {
            number: self.members.len() as u32 + 1,
            work: self.work,
            process,
            orders,
            answers: BufReader::new(answers).lines(),
            progress: 0,
        };
        member.send(setup).await?;
        self.members.push(member);
        Ok(())
    }

    /// Waits until all workers are connected. Returns what each reports about itself.
    pub(crate) async fn ready<T: DeserializeOwned>(&mut self) -> anyhow::Result<Vec<T>> {
        try_join_all(self.members.iter_mut().map(|member| member.answer(|_| {}))).await
    }

    /// Sends an order to all workers in quick succession and waits for their answers. `progress` is
    /// called with the sum of the progress they report.
    pub(crate) async fn order<T: DeserializeOwned>(
        &mut self,
        order: &impl Serialize,
        progress: impl Fn(u64),
    ) -> anyhow::Result<Vec<T>> {
        for member in &mut self.members {
            member.progress = 0;
            member.send(order).await?;
        }
        let sum = AtomicU64::new(0);
        let (sum, progress) = (&sum, &progress);
        try_join_all(
            self.members
                .iter_mut()
                .map(|member| member.answer(move |more| progress(sum.fetch_add(more, Ordering::Relaxed) + more))),
        )
        .await
    }

    /// Checks between orders that all workers are alive.
    ///
    /// # Errors
    ///
    /// If a worker has ended; with the reason, if it reported one.
    pub(crate) async fn look(&mut self) -> anyhow::Result<()> {
        for member in &mut self.members {
            if member.process.try_wait()?.is_some() {
                return member.answer::<()>(|_| {}).await;
            }
        }
        Ok(())
    }

    /// Makes the workers shut their managers down by this order, and waits until they have exited.
    pub(crate) async fn dismiss(&mut self, leave: &impl Serialize) -> anyhow::Result<()> {
        self.order::<()>(leave, |_| {}).await?;
        for mut member in self.members.drain(..) {
            let status = member.process.wait().await?;
            if !status.success() {
                bail!("worker process {} ended with {status}", member.number);
            }
        }
        Ok(())
    }

    /// Kills the remaining workers and waits until they are gone.
    pub(crate) async fn kill(&mut self) -> anyhow::Result<()> {
        for mut member in self.members.drain(..) {
            child::end(&mut member.process)
                .await
                .context("a worker can't be stopped")?;
        }
        Ok(())
    }
}

impl Member {
    async fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        match self.orders.write_all(&line).await {
            Ok(()) => Ok(()),
            Err(_) => Err(self.death().await),
        }
    }

    /// Waits for the answer to the last order; `progress` is called with each increment.
    async fn answer<T: DeserializeOwned>(&mut self, progress: impl Fn(u64)) -> anyhow::Result<T> {
        loop {
            let Some(line) = self.answers.next_line().await? else {
                return Err(self.death().await);
            };
            match serde_json::from_str(&line).with_context(|| format!("not an answer: {line:?}"))? {
                Answer::Progress(total) => {
                    progress(total.saturating_sub(self.progress));
                    self.progress = total;
                }
                Answer::Failed(reason) => bail!("worker process {}: {reason}", self.number),
                Answer::Done(answer) => return Ok(answer),
            }
        }
    }

    /// The error that describes how the worker ended.
    async fn death(&mut self) -> anyhow::Error {
        let status = self.process.wait().await;
        let how = status.map_or_else(|error| error.to_string(), |status| status.to_string());
        anyhow!(
            "worker process {} died in the middle of the {}: {how}",
            self.number,
            self.work
        )
    }
}
