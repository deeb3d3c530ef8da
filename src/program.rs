//! The runtime of the program, as seen from the background thread.

use std::future::Future;
use std::time::Duration;

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

/// Has something done on the program's runtime, so that what it starts belongs there; and here without such a runtime, once it is gone, or when it
/// has not done it in that time, as one that stands still. Dropping this ends it wherever it runs.
pub(crate) async fn done_there<F, T>(program: Option<&Handle>, patience: Duration, make: impl Fn() -> F) -> T
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    if let Some(program) = program {
        let mut there = JoinSet::new();
        there.spawn_on(make(), program);
        if let Ok(Some(Ok(done))) = tokio::time::timeout(patience, there.join_next()).await {
            return done;
        }
    }
    make().await
}

#[cfg(test)]
mod tests {
    use tokio::runtime::{Builder, Runtime};

    use super::*;

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(3600);

    fn named(name: &str) -> Runtime {
        let mut builder = Builder::new_multi_thread();
        builder
            .worker_threads(1)
            .thread_name(name)
            .enable_all()
            .build()
            .unwrap()
    }

    async fn where_am_i() -> Option<String> {
        std::thread::current().name().map(str::to_owned)
    }

    #[test]
    fn it_is_done_there_while_there_is_such_a_runtime_and_it_runs() {
        let program = named("program");
        let here = Builder::new_current_thread().enable_all().build().unwrap();
        let our_name = here.block_on(where_am_i());
        let handle = program.handle().clone();
        let done = |patience| here.block_on(done_there(Some(&handle), patience, where_am_i));
        assert_eq!(done(LONG).as_deref(), Some("program"));
        // Its only thread stands still until this is told to end.
        let (end, until) = std::sync::mpsc::channel::<()>();
        program.spawn(async move { until.recv().ok() });
        assert_eq!(done(Duration::from_millis(20)), our_name);
        drop(end);
        assert_eq!(done(LONG).as_deref(), Some("program"));
        drop(program);
        assert_eq!(done(LONG), our_name);
        assert_eq!(here.block_on(done_there(None, LONG, where_am_i)), our_name);
    }
}
