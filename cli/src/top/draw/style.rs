//! The colours. Each state is also visible without colours, by a modifier or in the text.

use ratatui::style::{Color, Modifier, Style};

pub(super) const TITLE: Style = Style::new().add_modifier(Modifier::BOLD);
pub(super) const HEADER: Style = Style::new().fg(Color::Cyan).add_modifier(Modifier::BOLD);
pub(super) const TAB: Style = Style::new();
pub(super) const TAB_SHOWN: Style = Style::new().add_modifier(Modifier::REVERSED);
pub(super) const ERROR: Style = Style::new().fg(Color::Red).add_modifier(Modifier::BOLD);
pub(super) const NOTE: Style = Style::new().fg(Color::Yellow);
pub(super) const PAUSED: Style = Style::new().fg(Color::Yellow).add_modifier(Modifier::REVERSED);
pub(super) const FAINT: Style = Style::new().add_modifier(Modifier::DIM);

/// A row of a source that is unavailable.
pub(super) const STALE: Style = FAINT;
/// A key with waiters, and a shard that does not answer.
pub(super) const CONTENDED: Style = Style::new().fg(Color::Yellow);
pub(super) const DOWN: Style = ERROR;
