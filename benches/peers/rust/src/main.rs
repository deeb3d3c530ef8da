//! rslock, and the raw commands as the limit, under the loads of shardlock's bench.
//!
//! A worker is one process of a load. It warms up, prints "ready", and reads from standard input
//! when the measured time begins and ends ("go START END", milliseconds since 1970). It prints its
//! counts as one line of JSON. See the README.md in benches/peers.

// The same hold as in shardlock's bench.
#[path = "../../../../cli/src/bench/hold_timer.rs"]
mod hold_timer;
mod options;
mod peer;
mod work;

use options::Options;
use peer::Peer;
use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::runtime::Builder;

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let options = Options::parse(std::env::args().skip(1))?;
    let runtime = match options.threads {
        1 => Builder::new_current_thread().enable_all().build()?,
        threads => Builder::new_multi_thread().worker_threads(threads).enable_all().build()?,
    };
    runtime.block_on(async {
        // Spawned, so that it runs where its tasks run.
        tokio::spawn(run(options)).await?
    })
}

async fn run(options: Options) -> Result<(), Box<dyn Error + Send + Sync>> {
    let peer = Arc::new(Peer::open(&options).await?);
    work::warm_up(&peer, &options).await;
    println!("ready");
    let mut line = String::new();
    BufReader::new(tokio::io::stdin()).read_line(&mut line).await?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let ["go", start, end] = words[..] else {
        return Err(format!("expected go START END, got {line:?}").into());
    };
    // The wall clock is the same for all processes of the load. From here on only the monotonic
    // clock counts.
    let (now, since_1970) = (
        tokio::time::Instant::now(),
        SystemTime::now().duration_since(UNIX_EPOCH)?,
    );
    let at = |ms: u64| now + Duration::from_millis(ms).saturating_sub(since_1970);
    println!(
        "{}",
        work::measure(&peer, &options, at(start.parse()?), at(end.parse()?)).await
    );
    // Tasks that still wait end with the process.
    std::process::exit(0)
}
