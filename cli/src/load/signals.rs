//! The signals that end a run early.

use std::future::poll_fn;
use std::task::Poll;

use rustix::process::Signal;
use tokio::signal::unix::{self, SignalKind};

use crate::disposition;
use crate::exit;

/// Handles the signals from its creation on, so that none of them kills the process before it has
/// cleaned up. Signals that were ignored when the tool was started, for example by nohup(1), stay
/// ignored.
pub(crate) struct Signals(Vec<(Caught, unix::Signal)>);

/// A received signal.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caught {
    pub(crate) name: &'static str,
    /// 128 plus the signal's number, as in shells.
    pub(crate) exit_code: u8,
}

const ENDING: [(Signal, &str); 3] = [
    (Signal::HUP, "SIGHUP"),
    (Signal::INT, "SIGINT"),
    (Signal::TERM, "SIGTERM"),
];

impl Signals {
    pub(crate) fn listen() -> std::io::Result<Self> {
        let listened_to = ENDING
            .into_iter()
            .filter(|&(signal, _)| !disposition::is_ignored(signal));
        let listen = |(signal, name): (Signal, _)| {
            let exit_code = exit::by_signal(signal.as_raw());
            let stream = unix::signal(SignalKind::from_raw(signal.as_raw()))?;
            Ok((Caught { name, exit_code }, stream))
        };
        listened_to.map(listen).collect::<std::io::Result<_>>().map(Self)
    }

    pub(crate) async fn next(&mut self) -> Caught {
        poll_fn(|cx| {
            let came = |(caught, stream): &mut (Caught, unix::Signal)| {
                matches!(stream.poll_recv(cx), Poll::Ready(Some(()))).then_some(*caught)
            };
            self.0.iter_mut().find_map(came).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
