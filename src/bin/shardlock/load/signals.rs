//! The signals that end a run early.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Listens from its making on, so that no signal kills the process before it could clear up.
pub(crate) struct Signals {
    hangup: Signal,
    interrupt: Signal,
    terminate: Signal,
}

/// A signal that came.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caught {
    pub(crate) name: &'static str,
    /// 128 and the signal's number, as shells have it.
    pub(crate) exit_code: u8,
}

impl Signals {
    pub(crate) fn listen() -> std::io::Result<Self> {
        Ok(Self {
            hangup: signal(SignalKind::hangup())?,
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
        })
    }

    pub(crate) async fn next(&mut self) -> Caught {
        let (name, exit_code) = tokio::select! {
            _ = self.hangup.recv() => ("SIGHUP", 129),
            _ = self.interrupt.recv() => ("SIGINT", 130),
            _ = self.terminate.recv() => ("SIGTERM", 143),
        };
        Caught { name, exit_code }
    }
}
