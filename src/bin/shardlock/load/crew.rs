//! The worker processes, as the demo sees them.

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

/// All worker processes. Dropping them kills them.
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
    /// The last progress that it told.
    progress: u64,
}

impl Crew {
    /// Nobody yet.
    pub(crate) const fn of(work: &'static str) -> Self {
        Self {
            work,
            members: Vec::new(),
        }
    }

    /// Starts one more worker with this as the first line of its input. It is connected when the next [`Crew::ready`] is.
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

    /// Waits until all workers are connected. Returns what each says of itself.
    pub(crate) async fn ready<T: DeserializeOwned>(&mut self) -> anyhow::Result<Vec<T>> {
        try_join_all(self.members.iter_mut().map(|member| member.answer(|_| {}))).await
    }

    /// Gives all workers an order, as near to at once as can be, and waits for their answers. `progress` hears the sum
    /// of what they tell meanwhile.
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

    /// Looks whether all are there, between orders.
    ///
    /// # Errors
    ///
    /// One has ended, and why, if it said so.
    pub(crate) async fn look(&mut self) -> anyhow::Result<()> {
        for member in &mut self.members {
            if member.process.try_wait()?.is_some() {
                return member.answer::<()>(|_| {}).await;
            }
        }
        Ok(())
    }

    /// Lets the workers shut their managers down by this order, and waits until they are gone.
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

    /// Kills whoever is still there. Done when they are gone.
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

    /// The answer to the last order; `progress` hears how much more was done before it.
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

    /// The error that says how it ended.
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
