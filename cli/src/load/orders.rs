//! The protocol between a parent and its workers: one JSON value per line, orders on the worker's
//! standard input, answers on its standard output.

use std::io::{BufRead, Write};

use anyhow::{Context, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// An answer of a worker. Each order, and the first line, is answered with any number of
/// [`Answer::Progress`] and one [`Answer::Done`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Answer<T> {
    /// How much is done so far.
    Progress(u64),
    /// All of it is done, with this result.
    Done(T),
    Failed(String),
}

/// The orders from the parent.
#[derive(Debug)]
pub(crate) struct Orders(mpsc::UnboundedReceiver<String>);

/// Runs a worker. A failure is sent to the parent and makes the exit code 1.
pub(crate) async fn obey(serve: impl AsyncFnOnce(&mut Orders) -> anyhow::Result<()>) -> anyhow::Result<u8> {
    let mut orders = Orders::listen()?;
    let served = serve(&mut orders).await;
    if let Err(error) = &served {
        tell(&Answer::<()>::Failed(format!("{error:#}")))?;
    }
    Ok(u8::from(served.is_err()))
}

impl Orders {
    /// Reads orders on a separate thread. If the input ends without the order to leave, the parent
    /// is gone, and this process exits at once; its leases expire.
    fn listen() -> anyhow::Result<Self> {
        // The channel stays short: the parent waits for each answer.
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

    /// Waits for the next order, or for the first line.
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
