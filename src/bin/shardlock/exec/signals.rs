//! The signals that reach the tool.

use std::future::poll_fn;
use std::io;
use std::task::Poll;

use anyhow::Context;
use rustix::process::{Signal, getpid, kill_process};
use tokio::signal::unix::{self, SignalKind};

/// All that are told to the command, and CHILD, which says that the command stopped or ended.
const HEARD: [Signal; 10] = [
    Signal::TERM,
    Signal::INT,
    Signal::HUP,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::TSTP,
    Signal::CONT,
    Signal::WINCH,
    Signal::CHILD,
];

/// Listens to signals, from its making on: none that comes later is missed.
pub(super) struct Signals {
    streams: Vec<(Signal, unix::Signal)>,
}

impl Signals {
    pub(super) fn listen() -> anyhow::Result<Self> {
        let ignored = ignored();
        let streams = HEARD
            .into_iter()
            // What was ignored when the tool was started, by nohup(1) for example, stays so for it and the command.
            .filter(|&signal| signal == Signal::CHILD || ignored & (1 << (signal.as_raw() - 1)) == 0)
            .map(|signal| Ok((signal, unix::signal(SignalKind::from_raw(signal.as_raw()))?)))
            .collect::<io::Result<_>>()
            .context("signals can't be listened to")?;
        Ok(Self { streams })
    }

    /// The next signal.
    ///
    /// # Cancel safety
    ///
    /// None is lost if it is dropped.
    pub(super) async fn next(&mut self) -> Signal {
        poll_fn(|cx| {
            let came = |(signal, stream): &mut (Signal, unix::Signal)| {
                matches!(stream.poll_recv(cx), Poll::Ready(Some(()))).then_some(*signal)
            };
            self.streams
                .iter_mut()
                .find_map(came)
                .map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }

    /// The next signal that asks the tool to end, while there is no command to tell it to.
    pub(super) async fn ending(&mut self) -> Signal {
        loop {
            match self.next().await {
                signal @ (Signal::TERM | Signal::INT | Signal::HUP | Signal::QUIT) => return signal,
                Signal::TSTP => stop_this_process(),
                signal => tracing::debug!(?signal, "there is no command yet to forward a signal to"),
            }
        }
    }
}

/// Does what TSTP would do if it were not listened to. Returns when the process was continued.
pub(super) fn stop_this_process() {
    // A process can always stop itself.
    kill_process(getpid(), Signal::STOP).ok();
}

/// The signals that are ignored, as a bit mask. Where the system does not tell, none is.
fn ignored() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}
