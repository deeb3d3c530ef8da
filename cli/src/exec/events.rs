//! The events that the keeper handles: ended children, and messages from the front, one byte for
//! each signal that the front received. If the front dies, its pipe closes.

use std::os::fd::OwnedFd;

use anyhow::Context;
use rustix::process::{Pid, Signal};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{self, SignalKind};

use super::keeper::Keeper;
use super::signals::{FORWARDED, Sender, stop_this_process};
use super::terminal::leads_own_session;
use crate::disposition;
use crate::exit;

/// An event that the keeper must handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// The front received a signal.
    Signal(Signal, Sender),
    /// The front was killed.
    FrontDied,
    /// A child of the keeper ended or stopped.
    ChildChanged,
}

/// The stream of events. None that arrives after its creation is missed.
pub(super) struct Events {
    pipe: Receiver,
    is_closed: bool,
    front: Pid,
    children: unix::Signal,
    /// Handlers that discard signals sent to the keeper itself. Only signals to the front count.
    _discarded: Vec<unix::Signal>,
}

impl Events {
    pub(super) fn new(keeper: &Keeper) -> anyhow::Result<Self> {
        let pipe = keeper.signal_pipe.try_clone().context("the pipe can't be cloned")?;
        let handle = |signal: Signal| unix::signal(SignalKind::from_raw(signal.as_raw()));
        let discarded = FORWARDED
            .into_iter()
            // A handler on an ignored signal would reset the signal to the default in the command.
            .filter(|&signal| signal != Signal::CHILD && !disposition::is_ignored(signal));
        Ok(Self {
            pipe: Receiver::from_owned_fd(OwnedFd::from(pipe)).context("the pipe can't be read")?,
            is_closed: false,
            front: keeper.front,
            children: handle(Signal::CHILD).context("signals can't be listened to")?,
            _discarded: discarded
                .map(handle)
                .collect::<Result<_, _>>()
                .context("signals can't be listened to")?,
        })
    }

    /// Returns the next event. After [`Event::FrontDied`], only [`Event::ChildChanged`] is
    /// returned.
    ///
    /// # Cancel safety
    ///
    /// This method is cancel safe: if the future is dropped, no event is lost.
    pub(super) async fn next(&mut self) -> Event {
        loop {
            let mut byte = [0];
            tokio::select! {
                _ = self.children.recv() => return Event::ChildChanged,
                read = self.pipe.read(&mut byte), if !self.is_closed => match read {
                    Ok(1) => match decode(byte[0]) {
                        Some(event) => return event,
                        None => tracing::debug!(byte = byte[0], "ignored an unknown order from the front"),
                    },
                    // Treat an error like the end of the pipe.
                    _ => {
                        self.is_closed = true;
                        return Event::FrontDied;
                    }
                }
            }
        }
    }

    /// Waits for the next event that ends the tool, and returns the exit code for it.
    ///
    /// Used while no command is running that signals could be forwarded to.
    pub(super) async fn wait_for_termination(&mut self) -> u8 {
        loop {
            match self.next().await {
                Event::Signal(signal @ (Signal::TERM | Signal::INT | Signal::HUP | Signal::QUIT), _) => {
                    return exit::by_signal(signal.as_raw());
                }
                Event::FrontDied => return exit::by_signal(Signal::KILL.as_raw()),
                // The front stops together with this process. If the front leads its session, no
                // shell could continue the front.
                Event::Signal(Signal::TSTP, _) if !leads_own_session(self.front) => stop_this_process(),
                event => tracing::debug!(?event, "not forwarded: the command has not been started"),
            }
        }
    }
}

const FROM_KERNEL: u8 = 0x80;

/// Encodes a signal in one byte. Signal numbers are below 128.
pub(super) fn encode(signal: Signal, sender: Sender) -> u8 {
    let from = match sender {
        Sender::Kernel => FROM_KERNEL,
        Sender::Process => 0,
    };
    signal.as_raw() as u8 | from
}

fn decode(byte: u8) -> Option<Event> {
    let sender = if byte & FROM_KERNEL == 0 {
        Sender::Process
    } else {
        Sender::Kernel
    };
    Signal::from_named_raw(i32::from(byte & !FROM_KERNEL)).map(|signal| Event::Signal(signal, sender))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_forwarded_signal_comes_through_with_its_sender() {
        for signal in FORWARDED {
            for sender in [Sender::Kernel, Sender::Process] {
                assert_eq!(decode(encode(signal, sender)), Some(Event::Signal(signal, sender)));
            }
        }
    }
}
