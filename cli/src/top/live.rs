//! The interactive view: redraws on key presses, new data, signals and a timer.

use std::time::{Duration, Instant};

use anyhow::Context;
use crossterm::event::{Event, EventStream};
use futures_util::StreamExt;
use tokio::time::MissedTickBehavior;

use super::draw::{self, DisplaySettings};
use super::keys::{self, Action};
use super::model::Model;
use super::screen::Screen;
use super::source::Poller;
use crate::exit::{self, Failure};
use crate::signals::{INTERACTIVE_INTERRUPTS, Signals};

/// How often to redraw without new data, so that the ages of stale data keep counting.
const DRAW_EVERY: Duration = Duration::from_secs(1);

/// Shows the model until the user quits or a signal arrives. Returns the exit code.
pub(super) async fn show(mut model: Model, mut poller: Poller, settings: DisplaySettings) -> Result<u8, Failure> {
    let mut signals = Signals::install(INTERACTIVE_INTERRUPTS)
        .context("signals can't be handled")
        .map_err(Failure::system)?;
    let (mut screen, _restore_guard) = Screen::take().map_err(Failure::system)?;
    let mut events = EventStream::new();
    let mut redraw = tokio::time::interval(DRAW_EVERY);
    redraw.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        draw(&mut screen, &mut model, settings).map_err(Failure::system)?;
        tokio::select! {
            event = events.next() => match event {
                Some(Ok(Event::Key(key))) => match keys::action(&key, model.editing_filter) {
                    Some(Action::Quit) => return Ok(exit::OK),
                    Some(Action::Suspend) => screen.suspend().map_err(Failure::system)?,
                    Some(action) => {
                        model.apply(action);
                        poller.control(model.control());
                    }
                    None => {}
                },
                // A resize: the next frame uses the new size.
                Some(Ok(_)) => {}
                // The terminal is gone.
                Some(Err(error)) => return Err(Failure::system(error)),
                None => return Ok(exit::OK),
            },
            // The sources are polled until the end, so there is always another sample.
            Some(polled) = poller.next() => model.apply_sample(polled),
            signal = signals.next() => return Ok(signal.exit_code),
            _ = redraw.tick() => {}
        }
    }
}

fn draw(screen: &mut Screen, model: &mut Model, settings: DisplaySettings) -> anyhow::Result<()> {
    let draw = |frame: &mut ratatui::Frame<'_>| {
        let area = frame.area();
        draw::frame(frame.buffer_mut(), area, model, settings, Instant::now());
    };
    screen.draw(draw)
}
