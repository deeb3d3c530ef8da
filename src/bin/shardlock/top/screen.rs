//! The terminal, from when it is taken until it is given back as it was: at the end, after an error, in a panic, and before standing in the background.

use std::io::{self, Stdout, stdout};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use crossterm::cursor::Show;
use crossterm::terminal::{
    BeginSynchronizedUpdate, Clear, ClearType, EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen,
    disable_raw_mode, enable_raw_mode, size,
};
use crossterm::{execute, queue};
use ratatui::backend::CrosstermBackend;
use ratatui::layout::Rect;
use ratatui::{Frame, Terminal, TerminalOptions, Viewport};
use rustix::process::{Signal, getpid, kill_process};

/// A terminal of ours, to draw on.
///
/// # Implementation details
///
/// Its size is followed here, by another [`Terminal`] for each. The library's own way is to ask a terminal where its cursor is, whose answer comes
/// among the keys: it takes seconds where a terminal gives none.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    size: (u16, u16),
}

/// The terminal is ours while this lives.
pub(super) struct Taken(());

impl Drop for Taken {
    fn drop(&mut self) {
        leave();
    }
}

impl Screen {
    /// # Errors
    ///
    /// The terminal refuses; it is as it was then.
    pub(super) fn take() -> anyhow::Result<(Self, Taken)> {
        give_back_in_a_panic();
        let taken = Taken(());
        let screen = enter().and_then(|()| fresh()).context("the terminal can't be used")?;
        Ok((screen, taken))
    }

    /// Shows a frame as a whole, where the terminal knows how: it is written in several parts.
    ///
    /// # Errors
    ///
    /// The terminal is gone.
    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> anyhow::Result<()> {
        let draw_whole = || {
            queue!(stdout(), BeginSynchronizedUpdate)?;
            let now = size()?;
            if now != self.size {
                *self = fresh()?;
            }
            self.terminal.draw(draw)?;
            execute!(stdout(), EndSynchronizedUpdate)
        };
        draw_whole().context("the terminal can't be written to")
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
            .and_then(|()| fresh())
            .map(|fresh| *self = fresh)
            .context("the terminal can't be used")
    }
}

/// An empty screen of the size that the terminal has now.
fn fresh() -> io::Result<Screen> {
    let (columns, rows) = size()?;
    execute!(stdout(), Clear(ClearType::All))?;
    let viewport = Viewport::Fixed(Rect::new(0, 0, columns, rows));
    Ok(Screen {
        terminal: Terminal::with_options(CrosstermBackend::new(stdout()), TerminalOptions { viewport })?,
        size: (columns, rows),
    })
}

/// Whether the terminal is ours. To give it back twice would put the cursor where it was before, over what was written since.
static TAKEN: AtomicBool = AtomicBool::new(false);

fn enter() -> io::Result<()> {
    TAKEN.store(true, Ordering::Relaxed);
    enable_raw_mode()?;
    execute!(stdout(), EnterAlternateScreen)
}

/// What fails here can't be helped: the terminal is gone then.
fn leave() {
    if !TAKEN.swap(false, Ordering::Relaxed) {
        return;
    }
    disable_raw_mode().ok();
    // A panic may have come in the middle of a frame.
    execute!(stdout(), EndSynchronizedUpdate, LeaveAlternateScreen, Show).ok();
}

/// Else what the panic says would be lost with the screen.
fn give_back_in_a_panic() {
    let said_before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        leave();
        said_before(panic);
    }));
}

#[cfg(test)]
mod tests {
    use super::Screen;
    use crate::support::Terminal;

    const ON_A_TERMINAL: &str = "LOCKTEST_PANIC_ON_TERMINAL";

    /// It is the process on the terminal in the second run, and then the test.
    #[test]
    fn a_panic_gives_the_terminal_back_before_it_is_told() {
        if std::env::var_os(ON_A_TERMINAL).is_some() {
            let _taken = Screen::take().unwrap();
            panic!("said in a panic");
        }
        let mut command = std::process::Command::new("sh");
        // A line is read in between, so that the modes can be seen before.
        command
            .args(["-c", "echo ready; read line; \"$0\" --exact top::screen::tests::a_panic_gives_the_terminal_back_before_it_is_told --nocapture; echo over"])
            .arg(std::env::current_exe().unwrap())
            .env(ON_A_TERMINAL, "yes")
            .env("RUST_BACKTRACE", "0");
        let terminal = Terminal::open(command, 24, 80);
        terminal.shows("ready");
        let modes = terminal.modes();
        terminal.types("go\n");
        terminal.shows("said in a panic");
        terminal.shows("over");
        assert!(terminal.written().contains("\x1b[?1049h"));
        assert!(!terminal.screen().alternate_screen() && !terminal.screen().hide_cursor());
        assert_eq!(terminal.modes(), modes);
    }
}
