//! Erases the namespace of a load.

use std::time::Duration;

use anyhow::Context;
use shardlock::{LockManager, namespace};

/// The maximum number of attempts.
const ATTEMPTS_MAX: u32 = 20;
/// How many of them may fail because a server does not answer, and the pause before the next one.
const UNANSWERED_MAX: u32 = 3;
const PAUSE: Duration = Duration::from_millis(300);

/// Repeats until nothing is left, since a command that a killed worker had already sent may still
/// be executed.
///
/// # Errors
///
/// If a server is unavailable or refuses to erase a key, or if new keys keep appearing.
pub(crate) async fn erase(locks: &LockManager) -> anyhow::Result<()> {
    let mut unanswered = 0;
    let mut last = None;
    for _ in 0..ATTEMPTS_MAX {
        match namespace::erase(locks).await {
            Ok(0) => return Ok(()),
            Ok(_) => last = None,
            // A node of a quorum that was slow for a moment counts as down until it is probed.
            Err(error) if error.is_retryable() && unanswered < UNANSWERED_MAX => {
                unanswered += 1;
                last = Some(error);
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => return Err(error.into()),
        }
    }
    match last {
        Some(error) => Err(error).context("erase the keys of the load"),
        None => anyhow::bail!("new keys keep appearing"),
    }
}
