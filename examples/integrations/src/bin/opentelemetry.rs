//! Spans of locks in OpenTelemetry: how long each request waited, and how long it held the lock.
//!
//! The spans are printed. To send them to a collector, replace the exporter by that of
//! opentelemetry-otlp, and `with_simple_exporter` by `with_batch_exporter`.
//!
//! ```sh
//! export SHARDLOCK_SHARDS=redis://127.0.0.1
//! cargo run --package shardlock-examples --bin opentelemetry
//! ```

use std::time::Duration;

use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use shardlock::LockManager;
use shardlock::config::Config;
use shardlock::tower::BoxError;
use tracing::{Instrument, info_span};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry};

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let exporter = opentelemetry_stdout::SpanExporter::default();
    let provider = SdkTracerProvider::builder().with_simple_exporter(exporter).build();
    let layer = tracing_opentelemetry::layer().with_tracer(provider.tracer("shop"));
    // The spans of shardlock are at debug level.
    let targets: Targets = "info,shardlock=debug".parse()?;
    Registry::default().with(layer.with_filter(targets)).init();

    let locks = LockManager::builder().config(Config::from_env()?).connect().await?;
    // The second one waits for the first one.
    let (one, two) = tokio::join!(
        checkout(&locks).instrument(info_span!("checkout", user = "anne")),
        checkout(&locks).instrument(info_span!("checkout", user = "bert")),
    );
    one?;
    two?;
    locks.shutdown().await?;
    provider.shutdown()?;
    Ok(())
}

/// The spans `acquire` and `hold` of the library become children of the span of this task.
async fn checkout(locks: &LockManager) -> Result<(), BoxError> {
    let guard = locks.lock("coupon:123").await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    guard.release().await?;
    Ok(())
}
