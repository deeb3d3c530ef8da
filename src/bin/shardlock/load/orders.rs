//! What a parent and its workers say to each other: one JSON value a line, orders on the worker's standard input, answers on
//! its standard output.

use std::io::{BufRead, Write};

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// What a worker says. Each order, and the first line, has one [`Answer::Done`] after any number of [`Answer::Progress`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer<T> {
    /// So much of it is done.
    Progress(u64),
    /// All of it is done, and this is what came of it.
    Done(T),
    Failed(String),
}

/// The orders of the parent.
#[derive(Debug)]
pub(crate) struct Orders(mpsc::UnboundedReceiver<String>);

/// Has a worker do what it is told. What fails is told, too, and makes the exit code 1.
pub(crate) async fn obey(serve: impl AsyncFnOnce(&mut Orders) -> anyhow::Result<()>) -> anyhow::Result<u8> {
    let mut orders = Orders::listen()?;
    let served = serve(&mut orders).await;
    if let Err(error) = &served {
        tell(&Answer::<()>::Failed(format!("{error:#}")))?;
    }
    Ok(u8::from(served.is_err()))
}

impl Orders {
    /// Reads the orders on a thread of their own. When they end without the order to leave, the parent is gone, and so is
    /// this process, at once: its locks run out.
    fn listen() -> anyhow::Result<Self> {
        // It does not grow: the parent waits for each answer.
        let (sender, orders) = mpsc::unbounded_channel();
        let read = move || {
            for line in std::io::stdin().lock().lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
            std::process::exit(1);
        };
        std::thread::Builder::new().name("orders".to_owned()).spawn(read)?;
        Ok(Self(orders))
    }

    /// The next order, or the first line.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let line = self.0.recv().await.context("there are no more orders")?;
        serde_json::from_str(&line).context("an order can't be read")
    }
}

pub(crate) fn tell<T: Serialize>(answer: &Answer<T>) -> anyhow::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    ensure!(!line.contains(&b'\n'), "an answer is one line");
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    out.write_all(&line)?;
    Ok(out.flush()?)
}
