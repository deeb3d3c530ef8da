//! An agent that is scraped, and clients that use all that its panels show.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use support::{PATIENCE, wait_until};

use crate::tool::Run;

/// The most connections that the agent accepts. The load asks for more.
const CONNECTIONS_MAX: usize = 8;
/// How long the clients of the load keep what they have.
const KEPT: Duration = Duration::from_millis(700);

/// The agent and its load, both until this is dropped.
pub(crate) struct LoadedAgent {
    /// Where it is scraped.
    pub(crate) address: String,
    _run: Run,
    over: Arc<AtomicBool>,
    load: Option<JoinHandle<()>>,
}

impl LoadedAgent {
    /// Starts the agent with this command, to which the options of a listener are added, and writes
    /// its address for Prometheus into the file.
    #[track_caller]
    pub(crate) fn start(mut command: Command, dir: &Path, targets: &Path) -> Self {
        let socket = dir.join("agent.sock");
        command
            .args([
                "--metrics",
                "127.0.0.1:0",
                "--max-connections",
                &CONNECTIONS_MAX.to_string(),
            ])
            .arg("--socket")
            .arg(&socket);
        let mut run = Run::start(command);
        wait_until("the agent listens", PATIENCE, || {
            assert!(run.is_running(), "the agent has ended: {}", run.stderr());
            run.stderr().contains("listening on")
        });
        let printed = run.stderr();
        let address = printed.split("http://").nth(1).and_then(|rest| rest.split('/').next());
        let address = address.expect("the agent prints its address").to_owned();
        fs::write(targets, format!("[{{\"targets\": [\"{address}\"]}}]")).expect("write the target");
        let over = Arc::<AtomicBool>::default();
        let load = thread::spawn({
            let over = Arc::clone(&over);
            move || {
                while !over.load(Ordering::Relaxed) {
                    use_everything(&socket);
                }
            }
        });
        Self {
            address,
            _run: run,
            over,
            load: Some(load),
        }
    }
}

impl Drop for LoadedAgent {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(load) = self.load.take() {
            load.join().expect("the load ends");
        }
    }
}

/// A holder, a waiter, nonsense, a request that is too long, and more connections than there may
/// be. Errors do not matter: shards are down while faults are tested.
fn use_everything(socket: &PathBuf) {
    let send = |bytes: &[u8]| {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(KEPT)).ok()?;
        stream.write_all(bytes).ok()?;
        Some(stream)
    };
    let mut holder = send(b"LOCK used-by-agent\r\n");
    if let Some(holder) = &mut holder {
        // Once it has the lock, the next one waits.
        holder.read_exact(&mut [0]).ok();
    }
    let _waiter = send(b"LOCK used-by-agent\r\n");
    send(b"*x\r\n");
    send(b"*1\r\n$1000000\r\n");
    send(b"GET k\r\n");
    let _crowd: Vec<_> = (0..CONNECTIONS_MAX).map(|_| send(b"PING\r\n")).collect();
    thread::sleep(KEPT);
}
