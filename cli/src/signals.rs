//! The signals that end a command early.

use std::future::poll_fn;
use std::task::Poll;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind};

use crate::disposition;
use crate::exit;

/// Handles the signals from its creation on, so that none of them kills the process before it has
/// cleaned up. Signals that were ignored when the tool was started, for example by nohup(1), stay
/// ignored.
pub(crate) struct Signals(Vec<(ReceivedSignal, unix::Signal)>);

/// A received signal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ReceivedSignal {
    pub(crate) name: &'static str,
    /// 128 plus the signal's number, as in shells.
    pub(crate) exit_code: u8,
}

/// The signals that end a run early.
pub(crate) const INTERRUPTS: &[(Signal, &str)] = &[
    (Signal::HUP, "SIGHUP"),
    (Signal::INT, "SIGINT"),
    (Signal::TERM, "SIGTERM"),
];

/// The signals that end an interactive view.
pub(crate) const INTERACTIVE_INTERRUPTS: &[(Signal, &str)] = &[
    (Signal::HUP, "SIGHUP"),
    (Signal::INT, "SIGINT"),
    (Signal::QUIT, "SIGQUIT"),
    (Signal::TERM, "SIGTERM"),
];

impl Signals {
    pub(crate) fn install(signals: &'static [(Signal, &'static str)]) -> std::io::Result<Self> {
        let handled = signals.iter().filter(|&&(signal, _)| !disposition::is_ignored(signal));
        let install = |&(signal, name): &(Signal, _)| {
            let exit_code = exit::by_signal(signal.as_raw());
            let stream = unix::signal(SignalKind::from_raw(signal.as_raw()))?;
            Ok((ReceivedSignal { name, exit_code }, stream))
        };
        handled.map(install).collect::<std::io::Result<_>>().map(Self)
    }

    /// Waits for the next signal.
    pub(crate) async fn next(&mut self) -> ReceivedSignal {
        poll_fn(|cx| {
            let poll = |(received, stream): &mut (ReceivedSignal, unix::Signal)| {
                matches!(stream.poll_recv(cx), Poll::Ready(Some(()))).then_some(*received)
            };
            self.0.iter_mut().find_map(poll).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
