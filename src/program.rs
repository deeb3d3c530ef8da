//! The runtime of the program: having something done there, and here where that can't be.

use std::future::Future;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::task::JoinSet;

/// Runs a future on the program's runtime; and another one here, from the beginning, without such a runtime or once it is gone. Dropping this
/// ends it wherever it runs.
///
/// # Panics
///
/// If the future does, wherever it runs.
pub(crate) async fn run_there<F, T>(program: Option<&Handle>, make: impl Fn() -> F) -> T
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    if let Some(program) = program {
        // Dropping the set ends what it has.
        let mut there = JoinSet::new();
        there.spawn_on(make(), program);
        match there.join_next().await {
            Some(Ok(done)) => return done,
            Some(Err(ended)) if ended.is_cancelled() => {
                tracing::debug!("the runtime of the program is gone; what ran there goes on elsewhere");
            }
            Some(Err(error)) => {
                if let Ok(panic) = error.try_into_panic() {
                    std::panic::resume_unwind(panic);
                }
            }
            None => {}
        }
    }
    make().await
}

/// The same for something that ends soon, so that what it starts belongs there. Where that takes longer, perhaps because the program's runtime
/// stands still, another one begins here as well, and whichever is done first counts.
pub(crate) async fn soon_there<F, T>(program: Option<&Handle>, patience: Duration, make: impl Fn() -> F) -> T
where
    F: Future<Output = T> + Send + 'static,
    T: Send + 'static,
{
    let there = run_there(program, &make);
    if program.is_none() {
        return there.await;
    }
    let here = async {
        tokio::time::sleep(patience).await;
        make().await
    };
    tokio::select! {
        done = there => done,
        done = here => done,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::runtime::{Builder, Runtime};
    use tokio::sync::Notify;

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
    fn it_is_soon_there_while_there_is_such_a_runtime_and_it_runs() {
        let program = named("program");
        let here = Builder::new_current_thread().enable_all().build().unwrap();
        let our_name = here.block_on(where_am_i());
        let handle = program.handle().clone();
        let done = |patience| here.block_on(soon_there(Some(&handle), patience, where_am_i));
        assert_eq!(done(LONG).as_deref(), Some("program"));
        // Its only thread stands still until this is told to end.
        let (end, until) = std::sync::mpsc::channel::<()>();
        program.spawn(async move { until.recv().ok() });
        assert_eq!(done(Duration::from_millis(20)), our_name);
        drop(end);
        assert_eq!(done(LONG).as_deref(), Some("program"));
        drop(program);
        assert_eq!(done(LONG), our_name);
        assert_eq!(here.block_on(soon_there(None, LONG, where_am_i)), our_name);
    }

    /// A server that takes long to answer has as much time as before.
    #[test]
    fn what_is_slow_there_is_not_broken_off() {
        let program = named("program");
        let here = Builder::new_current_thread().enable_all().build().unwrap();
        let begun = Arc::new(Notify::new());
        let make = || {
            let begun = Arc::clone(&begun);
            async move {
                let name = where_am_i().await;
                if name.as_deref() == Some("program") {
                    begun.notified().await;
                } else {
                    begun.notify_one();
                    std::future::pending::<()>().await;
                }
                name
            }
        };
        let done = here.block_on(soon_there(Some(program.handle()), Duration::from_millis(1), make));
        assert_eq!(done.as_deref(), Some("program"));
    }
}
