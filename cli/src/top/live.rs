//! The interactive view: redraws on key presses, new data, signals and a timer.

use std::future::poll_fn;
use std::task::Poll;
use std::time::{Duration, Instant};

use anyhow::Context;
use crossterm::event::{Event, EventStream};
use futures_util::StreamExt;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::MissedTickBehavior;

use super::draw::{self, Setting};
use super::keys::{self, Action};
use super::model::Model;
use super::screen::Screen;
use super::source::Asking;
use crate::disposition;
use crate::exit::{self, Failure};

/// How often to redraw without new data, so that the ages of stale data keep counting.
const DRAW_EVERY: Duration = Duration::from_secs(1);

/// Shows the model until the user quits or a signal arrives. Returns the exit code.
pub(super) async fn show(mut model: Model, mut asking: Asking, setting: Setting) -> Result<u8, Failure> {
    let mut signals = Signals::listen().map_err(Failure::system)?;
    let (mut screen, _taken) = Screen::take().map_err(Failure::system)?;
    let mut events = EventStream::new();
    let mut beat = tokio::time::interval(DRAW_EVERY);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        draw(&mut screen, &mut model, setting).map_err(Failure::system)?;
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) => match keys::action(&key, model.writing) {
                    Some(Action::Quit) => return Ok(exit::OK),
                    Some(Action::Suspend) => screen.suspend().map_err(Failure::system)?,
                    Some(action) => {
                        model.act(action);
                        asking.wish(model.wish());
                    }
                    None => {}
                },
                // A resize: the next frame uses the new size.
                Some(Ok(_)) => {}
                // The terminal is gone.
                Some(Err(error)) => return Err(Failure::system(error)),
                None => return Ok(exit::OK),
            },
            // The sources are polled until the end, so there is always another answer.
            Some(answer) = asking.next() => model.take(answer),
            number = signals.next() => return Ok(exit::by_signal(number)),
            _ = beat.tick() => {}
        }
    }
}

fn draw(screen: &mut Screen, model: &mut Model, setting: Setting) -> anyhow::Result<()> {
    let draw = |frame: &mut ratatui::Frame<'_>| {
        let area = frame.area();
        draw::frame(frame.buffer_mut(), area, model, setting, Instant::now());
    };
    screen.draw(draw)
}

/// The signals that end the program, except those that were ignored when it started.
struct Signals(Vec<(Signal, i32)>);

impl Signals {
    fn listen() -> anyhow::Result<Self> {
        use rustix::process::Signal;

        let ending = [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT];
        let listened_to = ending.into_iter().filter(|&signal| !disposition::is_ignored(signal));
        let listen = |signal: Signal| {
            let number = signal.as_raw();
            self::signal(SignalKind::from_raw(number))
                .map(|signal| (signal, number))
                .context("signals can't be handled")
        };
        listened_to.map(listen).collect::<anyhow::Result<_>>().map(Self)
    }

    /// Waits for the next signal and returns its number.
    async fn next(&mut self) -> i32 {
        poll_fn(|cx| {
            let came = |(signal, number): &mut (Signal, i32)| {
                matches!(signal.poll_recv(cx), Poll::Ready(Some(()))).then_some(*number)
            };
            self.0.iter_mut().find_map(came).map_or(Poll::Pending, Poll::Ready)
        })
        .await
    }
}
