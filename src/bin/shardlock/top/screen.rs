//! The terminal, from when it is taken until it is given back as it was: at the end, after an error, in a panic, and before standing in the background.

use std::io::{self, Stdout, stdout};

use anyhow::Context;
use crossterm::cursor::Show;
use crossterm::execute;
use crossterm::terminal::{EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use rustix::process::{Signal, getpid, kill_process};

/// A terminal of ours. Dropping it gives it back.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
}

impl Screen {
    /// # Errors
    ///
    /// The terminal refuses; it is as it was then.
    pub(super) fn take() -> anyhow::Result<Self> {
        give_back_in_a_panic();
        match enter().and_then(|()| Terminal::new(CrosstermBackend::new(stdout()))) {
            Ok(terminal) => Ok(Self { terminal }),
            Err(error) => {
                leave();
                Err(error).context("the terminal can't be used")
            }
        }
    }

    pub(super) fn terminal(&mut self) -> &mut Terminal<CrosstermBackend<Stdout>> {
        &mut self.terminal
    }

    /// Stands in the background until the shell brings us back.
    ///
    /// # Errors
    ///
    /// The terminal can't be taken again.
    pub(super) fn suspend(&mut self) -> anyhow::Result<()> {
        leave();
        kill_process(getpid(), Signal::TSTP).context("can't stand in the background")?;
        enter()
            .and_then(|()| self.terminal.clear())
            .context("the terminal can't be used")
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        leave();
    }
}

fn enter() -> io::Result<()> {
    enable_raw_mode()?;
    execute!(stdout(), EnterAlternateScreen)
}

/// What fails here can't be helped: the terminal is gone then.
fn leave() {
    disable_raw_mode().ok();
    execute!(stdout(), LeaveAlternateScreen, Show).ok();
}

/// Else what the panic says would be lost with the screen.
fn give_back_in_a_panic() {
    let said_before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        leave();
        said_before(panic);
    }));
}
