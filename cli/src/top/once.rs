//! One frame of plain text or JSON, for scripts, files and pipes.

use std::time::Instant;

use anyhow::anyhow;

use super::draw;
use super::json;
use super::model::{Model, ShardRow, View};
use super::source::Poller;
use crate::exit::{self, Failure};
use crate::output;

/// The number of samples of each source: rates need two.
const SAMPLES_PER_SOURCE: usize = 2;

/// Prints the given view, or all. Unavailable sources and shards that are down are reported on
/// stderr and set the exit code to [`exit::UNAVAILABLE`].
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
    let mut failures: Vec<String> = model
        .unavailable(now)
        .map(|unavailable| format!("{} is unavailable: {}", unavailable.label, unavailable.reason))
        .collect();
    if failures.len() == count {
        return Err(Failure::new(
            exit::UNAVAILABLE,
            anyhow!(
                "{}; give the address of a process that serves metrics, or a --shard",
                failures.join("; ")
            ),
        ));
    }
    if is_json {
        output::print_json(&json::document(&model, views, now))?;
    } else {
        output::print_text(&draw::plain_text(&model, views, now))?;
    }
    failures.extend(model.rows().shards.iter().filter_map(down));
    failures.iter().for_each(output::eprint);
    Ok(if failures.is_empty() {
        exit::OK
    } else {
        exit::UNAVAILABLE
    })
}

/// The message about a shard that is down, for all processes or for some.
fn down(shard: &ShardRow) -> Option<String> {
    // What is known of it may be old.
    if shard.stale || shard.up == shard.of {
        return None;
    }
    Some(match shard.up {
        0 => format!("shard {} is down", shard.name),
        up => format!(
            "shard {} is down for {} of {} processes",
            shard.name,
            shard.of - up,
            shard.of
        ),
    })
}
