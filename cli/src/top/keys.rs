//! Maps key presses to actions.

use crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::model::View;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Quit,
    /// Stops the process and returns to the shell, as other programs do on Ctrl-Z.
    Suspend,
    Show(View),
    NextView,
    LastView,
    NextColumn,
    Reverse,
    Pause,
    Search,
    Help,
    /// Closes the help if it is open, otherwise clears the filter.
    Escape,
    Move(Motion),
    Filter(Edit),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Motion {
    Up,
    Down,
    PageUp,
    PageDown,
    First,
    Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Edit {
    Begin,
    Add(char),
    Remove,
    Clear,
    /// Keeps the filter and makes keys commands again.
    Keep,
}

/// The action of a key press, or `None`. While a filter is being edited, letters are text.
pub(super) fn action(key: &KeyEvent, editing_filter: bool) -> Option<Action> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    if key.modifiers.contains(KeyModifiers::CONTROL) {
        return match key.code {
            KeyCode::Char('c') => Some(Action::Quit),
            KeyCode::Char('z') => Some(Action::Suspend),
            KeyCode::Char('u') if editing_filter => Some(Action::Filter(Edit::Clear)),
            KeyCode::Char('h') if editing_filter => Some(Action::Filter(Edit::Remove)),
            KeyCode::Char('f') => Some(Action::Move(Motion::PageDown)),
            KeyCode::Char('b') => Some(Action::Move(Motion::PageUp)),
            _ => None,
        };
    }
    if key.modifiers.contains(KeyModifiers::ALT) {
        return None;
    }
    if editing_filter {
        return Some(match key.code {
            KeyCode::Char(char) => Action::Filter(Edit::Add(char)),
            KeyCode::Backspace => Action::Filter(Edit::Remove),
            KeyCode::Enter => Action::Filter(Edit::Keep),
            KeyCode::Esc => Action::Escape,
            other => Action::Move(motion(other)?),
        });
    }
    Some(match key.code {
        KeyCode::Char('q') => Action::Quit,
        KeyCode::Char('1') => Action::Show(View::Hot),
        KeyCode::Char('2') => Action::Show(View::Held),
        KeyCode::Char('3') => Action::Show(View::Shards),
        KeyCode::Char('4') => Action::Show(View::Clients),
        KeyCode::Tab | KeyCode::Right => Action::NextView,
        KeyCode::BackTab | KeyCode::Left => Action::LastView,
        KeyCode::Char('s') => Action::NextColumn,
        KeyCode::Char('r') => Action::Reverse,
        KeyCode::Char(' ' | 'p') => Action::Pause,
        KeyCode::Char('n') => Action::Search,
        KeyCode::Char('?' | 'h') => Action::Help,
        KeyCode::Char('/') => Action::Filter(Edit::Begin),
        KeyCode::Char('k') => Action::Move(Motion::Up),
        KeyCode::Char('j') => Action::Move(Motion::Down),
        KeyCode::Char('g') => Action::Move(Motion::First),
        KeyCode::Char('G') => Action::Move(Motion::Last),
        KeyCode::Esc => Action::Escape,
        other => Action::Move(motion(other)?),
    })
}

const fn motion(code: KeyCode) -> Option<Motion> {
    Some(match code {
        KeyCode::Up => Motion::Up,
        KeyCode::Down => Motion::Down,
        KeyCode::PageUp => Motion::PageUp,
        KeyCode::PageDown => Motion::PageDown,
        KeyCode::Home => Motion::First,
        KeyCode::End => Motion::Last,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(code: KeyCode, modifiers: KeyModifiers, editing_filter: bool) -> Option<Action> {
        action(&KeyEvent::new(code, modifiers), editing_filter)
    }

    #[test]
    fn letters_are_commands_but_where_a_filter_is_written() {
        let none = KeyModifiers::NONE;
        assert_eq!(typed(KeyCode::Char('q'), none, false), Some(Action::Quit));
        assert_eq!(
            typed(KeyCode::Char('q'), none, true),
            Some(Action::Filter(Edit::Add('q')))
        );
        assert_eq!(
            typed(KeyCode::Char(' '), none, true),
            Some(Action::Filter(Edit::Add(' ')))
        );
        assert_eq!(
            typed(KeyCode::Char('c'), KeyModifiers::CONTROL, true),
            Some(Action::Quit)
        );
        assert_eq!(typed(KeyCode::Char('q'), KeyModifiers::ALT, false), None);
        assert_eq!(typed(KeyCode::Char('x'), none, false), None);
    }
}
