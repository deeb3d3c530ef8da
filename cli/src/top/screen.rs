//! Takes over the terminal and restores it: at the end, after an error, in a panic, and before
//! suspending.

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

/// The terminal while the view draws on it.
///
/// # Implementation details
///
/// The size is tracked here, and each change creates a new [`Terminal`]. The library's own resizing
/// queries the cursor position, whose reply arrives among the key presses; a terminal that does not
/// reply delays it by seconds.
pub(super) struct Screen {
    terminal: Terminal<CrosstermBackend<Stdout>>,
    size: (u16, u16),
}

/// Restores the terminal when dropped.
pub(super) struct RestoreGuard(());

impl Drop for RestoreGuard {
    fn drop(&mut self) {
        leave();
    }
}

impl Screen {
    /// # Errors
    ///
    /// If the terminal can't be set up; its previous state is restored.
    pub(super) fn take() -> anyhow::Result<(Self, RestoreGuard)> {
        restore_on_panic();
        let guard = RestoreGuard(());
        let screen = enter()
            .and_then(|()| clear_screen())
            .context("the terminal can't be used")?;
        Ok((screen, guard))
    }

    /// Draws a frame. It is written in several parts; terminals that support synchronized updates
    /// show it at once.
    ///
    /// # Errors
    ///
    /// If the terminal is gone.
    pub(super) fn draw(&mut self, draw: impl FnOnce(&mut Frame<'_>)) -> anyhow::Result<()> {
        let draw_whole = || {
            queue!(stdout(), BeginSynchronizedUpdate)?;
            let now = size()?;
            if now != self.size {
                *self = clear_screen()?;
            }
            self.terminal.draw(draw)?;
            execute!(stdout(), EndSynchronizedUpdate)
        };
        draw_whole().context("the terminal can't be written to")
    }

    /// Suspends the process until the shell resumes it.
    ///
    /// # Errors
    ///
    /// If the terminal can't be set up again.
    pub(super) fn suspend(&mut self) -> anyhow::Result<()> {
        leave();
        kill_process(getpid(), Signal::TSTP).context("can't suspend")?;
        enter()
            .and_then(|()| clear_screen())
            .map(|screen| *self = screen)
            .context("the terminal can't be used")
    }
}

/// Clears the screen and returns one of the terminal's current size.
fn clear_screen() -> io::Result<Screen> {
    let (columns, rows) = size()?;
    execute!(stdout(), Clear(ClearType::All))?;
    let viewport = Viewport::Fixed(Rect::new(0, 0, columns, rows));
    Ok(Screen {
        terminal: Terminal::with_options(CrosstermBackend::new(stdout()), TerminalOptions { viewport })?,
        size: (columns, rows),
    })
}

/// Whether the terminal is taken over. Restoring it twice would move the cursor back to its old
/// position, over later output.
static IS_TAKEN: AtomicBool = AtomicBool::new(false);

fn enter() -> io::Result<()> {
    IS_TAKEN.store(true, Ordering::Relaxed);
    enable_raw_mode()?;
    execute!(stdout(), EnterAlternateScreen)
}

/// Restores the terminal. Errors are ignored: the terminal is gone then.
fn leave() {
    if !IS_TAKEN.swap(false, Ordering::Relaxed) {
        return;
    }
    disable_raw_mode().ok();
    // A panic may interrupt a frame.
    execute!(stdout(), EndSynchronizedUpdate, LeaveAlternateScreen, Show).ok();
}

/// Restores the terminal before a panic message is printed, which would otherwise be lost with the
/// screen.
fn restore_on_panic() {
    let previous_hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        leave();
        previous_hook(panic);
    }));
}

#[cfg(test)]
mod tests {
    use support::Terminal;

    use super::Screen;

    const ON_A_TERMINAL: &str = "SHARDLOCK_TEST_PANIC_ON_TERMINAL";

    /// The test starts itself again as the process on the terminal.
    #[test]
    fn panic_restores_the_terminal_before_its_message() {
        if std::env::var_os(ON_A_TERMINAL).is_some() {
            let _guard = Screen::take().unwrap();
            panic!("said in a panic");
        }
        let mut command = std::process::Command::new("sh");
        // The shell reads a line first, so that the original modes can be recorded.
        command
            .args(["-c", "echo ready; read line; \"$0\" --exact top::screen::tests::panic_restores_the_terminal_before_its_message --nocapture; echo over"])
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
