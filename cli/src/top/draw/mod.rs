//! Draws the model: two status lines, the tabs, the table, and a line with the keys.

mod columns;
mod format;
mod help;
mod style;
mod table;

use std::time::{Duration, Instant};

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};
use ratatui::widgets::Widget;

use super::model::{Model, Rows, Unavailable, View};
use super::source::process_of;
use format::{Truncation, sanitize, truncate};
use table::Layout;

/// The height of the table's header, and of the area below the table.
const HEADER: u16 = 1;
const BELOW: u16 = 1;

/// Settings that do not change while the view is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct DisplaySettings {
    pub(super) interval: Duration,
    pub(super) colours: bool,
}

/// Draws one frame. It fits any area, however small: the least important parts are left out first.
pub(super) fn frame(buffer: &mut Buffer, area: Rect, model: &mut Model, settings: DisplaySettings, now: Instant) {
    if area.is_empty() {
        return;
    }
    let rows = model.rows();
    let mut lines = vec![title(model, settings, area.width, now)];
    // On a low screen the table has priority.
    if area.height >= 8 && !model.showing_help {
        lines.push(status_line(model, now));
    }
    if area.height >= 6 && !model.showing_help {
        lines.push(tabs(model, &rows));
    }
    let below = if area.height >= 5 { BELOW } else { 0 };
    let room = area.height.saturating_sub(lines.len() as u16 + below);
    lines.extend(if model.showing_help {
        help::lines()
    } else {
        table(model, &rows, area.width, room)
    });
    lines.truncate(usize::from(area.height - below));
    for (line, y) in lines.iter().zip(area.y..) {
        line.render(Rect::new(area.x, y, area.width, 1), buffer);
    }
    if below > 0 {
        let y = area.bottom() - 1;
        footer(model).render(Rect::new(area.x, y, area.width, 1), buffer);
    }
    if !settings.colours {
        for cell in &mut buffer.content {
            cell.fg = ratatui::style::Color::Reset;
            cell.bg = ratatui::style::Color::Reset;
        }
    }
}

fn title(model: &Model, settings: DisplaySettings, width: u16, now: Instant) -> Line<'static> {
    let right = if model.control().paused {
        Span::styled(" PAUSED ", style::PAUSED)
    } else {
        Span::raw(format!("every {} ", humantime::format_duration(settings.interval)))
    };
    let left = "shardlock top  ";
    let room = usize::from(width).saturating_sub(left.len() + right.width() + 2);
    let (label, more) = source_label(model, now);
    let whole = sanitize(&(label.clone() + &more));
    let shown_label = if format::width(&whole) <= room {
        whole
    } else {
        truncate(&sanitize(&label), room, Truncation::Tail)
    };
    let blank = room.saturating_sub(format::width(&shown_label)) + 1;
    Line::from(vec![
        Span::raw(" "),
        Span::styled(left, style::TITLE),
        Span::raw(shown_label),
        Span::raw(" ".repeat(blank)),
        right,
    ])
}

/// The label of the source or sources, and further details if there is room.
fn source_label(model: &Model, now: Instant) -> (String, String) {
    let [source] = model.sources() else {
        let count = model.sources().len();
        let more = match model.unavailable(now).count() {
            0 => String::new(),
            unavailable => format!(", {unavailable} unavailable"),
        };
        return (format!("{count} processes"), more);
    };
    let sample = source.sample();
    let manager = sample.and_then(|sample| sample.manager.as_deref());
    let mut more = manager.map_or_else(String::new, |manager| format!("  {}", process_of(manager)));
    if let Some(uptime) = sample.and_then(|sample| sample.uptime) {
        more += &format!(", up {}", format::time(uptime));
    }
    (source.label.clone(), more)
}

/// The status line: an unavailable source, a note, or the totals.
fn status_line(model: &Model, now: Instant) -> Line<'static> {
    let mut unavailable = model.unavailable(now);
    if let Some(first) = unavailable.next() {
        let others = unavailable.count();
        return Line::styled(format!(" {}", describe_unavailable(&first, others)), style::ERROR);
    }
    let samples = || model.sources().iter().filter_map(|source| source.sample());
    if let Some(note) = samples().find_map(|sample| sample.note.as_deref()) {
        return Line::styled(format!(" {}", sanitize(note)), style::NOTE);
    }
    if samples().next().is_none() {
        return Line::styled(" waiting for data ...", style::FAINT);
    }
    let totals = model.totals();
    let rate = totals.locks_per_s.map_or_else(|| "-".to_owned(), format::rate);
    Line::from(format!(
        " {rate} locks/s   {} waiting   {} held   {}/{} shards up",
        format::count(totals.waiters as u64),
        format::count(totals.held as u64),
        totals.shards_up,
        totals.shards,
    ))
}

/// Kept short, since the reason may be cut off at the end of the line.
fn describe_unavailable(unavailable: &Unavailable<'_>, others: usize) -> String {
    let and_others = if others > 0 {
        format!(" (and {others} more)")
    } else {
        String::new()
    };
    let stale = unavailable
        .last_sample
        .map_or_else(String::new, |stale| format!(", stale for {}", format::time(stale)));
    format!(
        "{}{and_others} unavailable for {}{stale}: {}",
        sanitize(unavailable.label),
        format::time(unavailable.unavailable_for),
        sanitize(unavailable.reason)
    )
}

fn tabs(model: &Model, rows: &Rows) -> Line<'static> {
    let names = [
        (View::Hot, "1 hot keys"),
        (View::Held, "2 held"),
        (View::Shards, "3 shards"),
        (View::Clients, "4 clients"),
    ];
    let names = names.into_iter().filter(|(view, _)| model.views().contains(view));
    let mut spans = vec![Span::raw(" ")];
    for (view, name) in names {
        let style = if view == model.view() {
            style::TAB_SHOWN
        } else {
            style::TAB
        };
        spans.push(Span::styled(format!(" {name} {} ", rows.count(view)), style));
        spans.push(Span::raw(" "));
    }
    if !model.filter().is_empty() && !model.editing_filter {
        spans.push(Span::styled(format!("  only {:?}", model.filter()), style::NOTE));
    }
    Line::from(spans)
}

fn table(model: &mut Model, rows: &Rows, width: u16, room: u16) -> Vec<Line<'static>> {
    let view = model.view();
    let layout = Layout::of_screen(columns::of(view, rows), width);
    let rows = columns::rows(view, rows);
    let room = usize::from(room.saturating_sub(HEADER));
    let first = model.first_row(rows.len(), room);
    model.set_columns(layout.shown());
    let mut lines = vec![layout.header(model.order(view))];
    if rows.is_empty() {
        lines.push(Line::styled(format!("  {}", empty_reason(model)), style::FAINT));
    }
    lines.extend(rows.iter().skip(first).take(room).map(|row| layout.line(row)));
    lines
}

/// Why the table is empty.
fn empty_reason(model: &Model) -> &'static str {
    if model.sources().iter().all(|source| source.sample().is_none()) {
        return "no data yet";
    }
    if !model.filter().is_empty() {
        return "nothing matches the filter; esc clears it";
    }
    match model.view() {
        View::Hot => "no key is contended",
        View::Held => "no lock is held",
        View::Shards => "there are no shards",
        View::Clients => "no agent with clients",
    }
}

fn footer(model: &Model) -> Line<'static> {
    if model.editing_filter {
        return Line::from(vec![
            Span::styled(" /", style::TITLE),
            Span::raw(sanitize(model.filter())),
            Span::styled(" ", style::TAB_SHOWN),
            Span::styled("  enter keeps the filter, esc clears it", style::FAINT),
        ]);
    }
    let pause = if model.control().paused { "resume" } else { "pause" };
    let keys = [
        ("q", "quit"),
        ("?", "help"),
        ("tab", "view"),
        ("s", "sort"),
        ("r", "reverse"),
        ("/", "filter"),
        ("space", pause),
    ];
    let mut spans = vec![Span::raw(" ")];
    for (key, meaning) in keys {
        spans.push(Span::styled(key, style::TITLE));
        spans.push(Span::raw(format!(" {meaning}   ")));
    }
    Line::from(spans)
}

/// The frame as plain text for scripts and files, with all rows and nothing cut off.
pub(super) fn plain_text(model: &Model, views: &[View], now: Instant) -> String {
    let rows = model.rows();
    let labels = model.sources().iter().map(|source| {
        let manager = source
            .sample()
            .and_then(|sample| sample.manager.as_deref())
            .unwrap_or_default();
        sanitize(&format!("{} {manager}", source.label)).trim_end().to_owned()
    });
    let mut lines: Vec<String> = labels.collect();
    lines.push(status_line(model, now).to_string().trim().to_owned());
    for view in views {
        let layout_rows = columns::rows(*view, &rows);
        let layout = Layout::of_contents(columns::of(*view, &rows), &layout_rows);
        lines.push(String::new());
        lines.push(layout.header(model.order(*view)).to_string());
        lines.extend(layout_rows.iter().map(|row| layout.line(row).to_string()));
    }
    let mut text = String::new();
    for line in lines {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests;
