//! One frame of plain text, for scripts, files and pipes.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, anyhow};

use super::draw;
use super::model::{Model, View};
use super::source::Poller;
use crate::exit::{self, Failure};
use crate::output;

/// The number of samples of each source: rates need two.
const SAMPLES_PER_SOURCE: usize = 2;

/// Prints the given views. Unavailable sources are reported on stderr and set the exit code to
/// [`exit::UNAVAILABLE`].
pub(super) async fn print(mut model: Model, mut poller: Poller, views: &[View]) -> Result<u8, Failure> {
    let count = model.sources().len();
    let mut remaining = vec![SAMPLES_PER_SOURCE; count];
    while remaining.iter().any(|samples| *samples > 0)
        && let Some(polled) = poller.next().await
    {
        if let Some(samples) = remaining.get_mut(polled.source) {
            // Don't wait for a source that is unavailable.
            *samples = if polled.sample.is_ok() {
                samples.saturating_sub(1)
            } else {
                0
            };
        }
        model.apply_sample(polled);
    }
    let now = Instant::now();
    let unavailable: Vec<String> = model
        .unavailable(now)
        .map(|unavailable| format!("{} is unavailable: {}", unavailable.label, unavailable.reason))
        .collect();
    if unavailable.len() == count {
        return Err(Failure::new(exit::UNAVAILABLE, anyhow!(unavailable.join("; "))));
    }
    let mut out = io::stdout().lock();
    let text = draw::plain_text(&model, views, now);
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A reader such as `head` that closes the pipe early is not an error.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error)
                .context("the output could not be written")
                .map_err(Failure::system)?;
        }
        _ => {}
    }
    unavailable.iter().for_each(output::eprint);
    Ok(if unavailable.is_empty() {
        exit::OK
    } else {
        exit::UNAVAILABLE
    })
}
