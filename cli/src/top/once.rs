//! One frame of plain text or JSON, for scripts, files and pipes.

use std::time::Instant;

use anyhow::anyhow;

use super::draw;
use super::json;
use super::model::{Model, View};
use super::source::Poller;
use crate::exit::{self, Failure};
use crate::output;

/// The number of samples of each source: rates need two.
const SAMPLES_PER_SOURCE: usize = 2;

/// Prints the given view, or all. Unavailable sources are reported on stderr and set the exit code
/// to [`exit::UNAVAILABLE`].
pub(super) async fn print(
    mut model: Model,
    mut poller: Poller,
    view: Option<View>,
    is_json: bool,
) -> Result<u8, Failure> {
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
    let views = view.as_ref().map_or(model.views(), std::slice::from_ref);
    let now = Instant::now();
    let unavailable: Vec<String> = model
        .unavailable(now)
        .map(|unavailable| format!("{} is unavailable: {}", unavailable.label, unavailable.reason))
        .collect();
    if unavailable.len() == count {
        return Err(Failure::new(
            exit::UNAVAILABLE,
            anyhow!(
                "{}; give the address of a process that serves metrics, or a --shard",
                unavailable.join("; ")
            ),
        ));
    }
    if is_json {
        output::print_json(&json::document(&model, views, now))?;
    } else {
        output::print_text(&draw::plain_text(&model, views, now))?;
    }
    unavailable.iter().for_each(output::eprint);
    Ok(if unavailable.is_empty() {
        exit::OK
    } else {
        exit::UNAVAILABLE
    })
}
