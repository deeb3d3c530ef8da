//! Draws the model: two status lines, the tabs, the table, and a line with the keys.

mod columns;
mod help;
mod style;
mod table;
mod words;

use std::time::{Duration, Instant};

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};
use ratatui::widgets::Widget;

use super::model::{Away, Model, Rows, View};
use super::source::process_of;
use table::Layout;
use words::{Cut, fit, plain};

/// The height of the table's header, and of the area below the table.
const HEADER: u16 = 1;
const BELOW: u16 = 1;

/// Settings that do not change while the view is shown.
#[derive(Debug, Clone, Copy)]
pub(super) struct Setting {
    pub(super) interval: Duration,
    pub(super) colours: bool,
}

/// Draws one frame. It fits any area, however small: the least important parts are left out first.
pub(super) fn frame(buffer: &mut Buffer, area: Rect, model: &mut Model, setting: Setting, now: Instant) {
    if area.is_empty() {
        return;
    }
    let rows = model.rows();
    let mut lines = vec![title(model, setting, area.width, now)];
    // On a low screen the table has priority.
    if area.height >= 8 && !model.helping {
        lines.push(state(model, now));
    }
    if area.height >= 6 && !model.helping {
        lines.push(views(model, &rows));
    }
    let below = if area.height >= 5 { BELOW } else { 0 };
    let room = area.height.saturating_sub(lines.len() as u16 + below);
    lines.extend(if model.helping {
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
    if !setting.colours {
        for cell in &mut buffer.content {
            cell.fg = ratatui::style::Color::Reset;
            cell.bg = ratatui::style::Color::Reset;
        }
    }
}

fn title(model: &Model, setting: Setting, width: u16, now: Instant) -> Line<'static> {
    let right = if model.wish().paused {
        Span::styled(" PAUSED ", style::PAUSED)
    } else {
        Span::raw(format!("every {} ", humantime::format_duration(setting.interval)))
    };
    let left = "shardlock top  ";
    let room = usize::from(width).saturating_sub(left.len() + right.width() + 2);
    let (label, more) = who(model, now);
    let whole = plain(&(label.clone() + &more));
    let who = if words::width(&whole) <= room {
        whole
    } else {
        fit(&plain(&label), room, Cut::Tail)
    };
    let blank = room.saturating_sub(words::width(&who)) + 1;
    Line::from(vec![
        Span::raw(" "),
        Span::styled(left, style::TITLE),
        Span::raw(who),
        Span::raw(" ".repeat(blank)),
        right,
    ])
}

/// The label of the source or sources, and further details if there is room.
fn who(model: &Model, now: Instant) -> (String, String) {
    let [process] = model.processes() else {
        let count = model.processes().len();
        let more = match model.away(now).count() {
            0 => String::new(),
            away => format!(", {away} unavailable"),
        };
        return (format!("{count} processes"), more);
    };
    let look = process.look();
    let manager = look.and_then(|look| look.manager.as_deref());
    let mut more = manager.map_or_else(String::new, |manager| format!("  {}", process_of(manager)));
    if let Some(uptime) = look.and_then(|look| look.uptime) {
        more += &format!(", up {}", words::time(uptime));
    }
    (process.label.clone(), more)
}

/// The status line: an unavailable source, a note, or the totals.
fn state(model: &Model, now: Instant) -> Line<'static> {
    let mut away = model.away(now);
    if let Some(first) = away.next() {
        let others = away.count();
        return Line::styled(format!(" {}", in_words(&first, others)), style::TROUBLE);
    }
    let looks = || model.processes().iter().filter_map(|process| process.look());
    if let Some(note) = looks().find_map(|look| look.note.as_deref()) {
        return Line::styled(format!(" {}", plain(note)), style::NOTE);
    }
    if looks().next().is_none() {
        return Line::styled(" waiting for data ...", style::FAINT);
    }
    let sums = model.sums();
    let rate = sums.locks_per_s.map_or_else(|| "-".to_owned(), words::rate);
    Line::from(format!(
        " {rate} locks/s   {} waiting   {} held   {}/{} shards up",
        words::count(sums.waiters as u64),
        words::count(sums.held as u64),
        sums.shards_up,
        sums.shards,
    ))
}

/// Kept short, since the reason may be cut off at the end of the line.
fn in_words(away: &Away<'_>, others: usize) -> String {
    let and_others = if others > 0 {
        format!(" (and {others} more)")
    } else {
        String::new()
    };
    let said = away
        .said
        .map_or_else(String::new, |said| format!(", stale for {}", words::time(said)));
    format!(
        "{}{and_others} unavailable for {}{said}: {}",
        plain(away.label),
        words::time(away.silent),
        plain(away.reason)
    )
}

fn views(model: &Model, rows: &Rows) -> Line<'static> {
    let names = [
        (View::Hot, "1 hot keys"),
        (View::Held, "2 held"),
        (View::Shards, "3 shards"),
    ];
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
    if !model.filter().is_empty() && !model.writing {
        spans.push(Span::styled(format!("  only {:?}", model.filter()), style::NOTE));
    }
    Line::from(spans)
}

fn table(model: &mut Model, rows: &Rows, width: u16, room: u16) -> Vec<Line<'static>> {
    let view = model.view();
    let layout = Layout::of_screen(columns::of(view), width);
    let rows = columns::rows(view, rows);
    let room = usize::from(room.saturating_sub(HEADER));
    let first = model.first_row(rows.len(), room);
    model.has_columns(layout.shown());
    let mut lines = vec![layout.header(model.order(view))];
    if rows.is_empty() {
        lines.push(Line::styled(format!("  {}", nothing(model)), style::FAINT));
    }
    lines.extend(rows.iter().skip(first).take(room).map(|row| layout.line(row)));
    lines
}

/// Why the table is empty.
fn nothing(model: &Model) -> &'static str {
    if model.processes().iter().all(|process| process.look().is_none()) {
        return "no data yet";
    }
    if !model.filter().is_empty() {
        return "nothing matches the filter; esc clears it";
    }
    match model.view() {
        View::Hot => "no key is contended",
        View::Held => "no lock is held",
        View::Shards => "there are no shards",
    }
}

fn footer(model: &Model) -> Line<'static> {
    if model.writing {
        return Line::from(vec![
            Span::styled(" /", style::TITLE),
            Span::raw(plain(model.filter())),
            Span::styled(" ", style::TAB_SHOWN),
            Span::styled("  enter keeps the filter, esc clears it", style::FAINT),
        ]);
    }
    let pause = if model.wish().paused { "resume" } else { "pause" };
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
pub(super) fn text(model: &Model, views: &[View], now: Instant) -> String {
    let rows = model.rows();
    let processes = model.processes().iter().map(|process| {
        let manager = process
            .look()
            .and_then(|look| look.manager.as_deref())
            .unwrap_or_default();
        plain(&format!("{} {manager}", process.label)).trim_end().to_owned()
    });
    let mut lines: Vec<String> = processes.collect();
    lines.push(state(model, now).to_string().trim().to_owned());
    for view in views {
        let layout_rows = columns::rows(*view, &rows);
        let layout = Layout::of_contents(columns::of(*view), &layout_rows);
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
