//! One frame of plain text, for scripts, files and pipes.

use std::io::{self, Write};
use std::time::Instant;

use anyhow::{Context, anyhow};

use super::draw;
use super::model::{Model, View};
use super::source::Asking;
use crate::exit::{self, Failure};
use crate::output;

/// The number of samples of each source: rates need two.
const LOOKS: usize = 2;

/// Prints the given views. Unavailable sources are reported on stderr and set the exit code to
/// [`exit::UNAVAILABLE`].
pub(super) async fn print(mut model: Model, mut asking: Asking, views: &[View]) -> Result<u8, Failure> {
    let count = model.processes().len();
    let mut missing = vec![LOOKS; count];
    while missing.iter().any(|looks| *looks > 0)
        && let Some(answer) = asking.next().await
    {
        if let Some(looks) = missing.get_mut(answer.source) {
            // Don't wait for a source that is unavailable.
            *looks = if answer.look.is_ok() {
                looks.saturating_sub(1)
            } else {
                0
            };
        }
        model.take(answer);
    }
    let now = Instant::now();
    let away: Vec<String> = model
        .away(now)
        .map(|away| format!("{} is unavailable: {}", away.label, away.reason))
        .collect();
    if away.len() == count {
        return Err(Failure::new(exit::UNAVAILABLE, anyhow!(away.join("; "))));
    }
    let mut out = io::stdout().lock();
    let text = draw::text(&model, views, now);
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        // A reader such as `head` that closes the pipe early is not an error.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error)
                .context("the output could not be written")
                .map_err(Failure::system)?;
        }
        _ => {}
    }
    away.iter().for_each(output::eprint);
    Ok(if away.is_empty() { exit::OK } else { exit::UNAVAILABLE })
}
