//! The runtime of the program, as seen from the background thread.

use std::future::Future;

use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// Runs a future on the program's runtime; and another one here, from the beginning, without such a runtime or once it is gone. Dropping this
/// ends it wherever it runs.
pub(crate) async fn run_there<F>(program: Option<&Handle>, make: impl Fn() -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    if let Some(program) = program {
        // Dropping the set ends what it has.
        let mut there = JoinSet::new();
        there.spawn_on(make(), program);
        match there.join_next().await {
            Some(Err(ended)) if ended.is_cancelled() => {
                tracing::debug!("the runtime of the program is gone; the background thread goes on");
            }
            Some(Err(error)) => {
                tracing::error!(%error, "a task on the program's runtime panicked; please report this");
            }
            Some(Ok(())) | None => return,
        }
    }
    make().await;
}
