//! The columns of each view and the contents of their cells.

use std::time::Duration;

use ratatui::style::Style;

use super::format::{self, Truncation};
use super::style;
use super::table::{Column, ColumnWidth, Row};
use crate::top::model::{ClientRow, ColumnId, HeldRow, HotRow, LockRates, Rows, ShardRow, View};

const fn column(by: ColumnId, title: &'static str, room: ColumnWidth, from_width: u16) -> Column {
    Column {
        by,
        title,
        room,
        from_width,
        cut: Truncation::Middle,
    }
}

/// Widths fit the longest number; titles leave room for the sort sign.
const HOT: &[Column] = &[
    column(ColumnId::Name, "KEY", ColumnWidth::Share(1), 0),
    column(ColumnId::Shard, "SHARD", ColumnWidth::Text(12), 100),
    column(ColumnId::Holder, "HOLDER", ColumnWidth::Text(14), 60),
    column(ColumnId::Age, "AGE", ColumnWidth::Number(7), 48),
    column(ColumnId::Waiters, "WAITERS", ColumnWidth::Number(8), 24),
    column(ColumnId::P50, "P50", ColumnWidth::Number(6), 70),
    column(ColumnId::P99, "P99", ColumnWidth::Number(6), 36),
    column(ColumnId::Contended, "CONTENDED", ColumnWidth::Number(10), 100),
    column(ColumnId::Rate, "CONT/S", ColumnWidth::Number(7), 42),
];

const HELD: &[Column] = &[
    column(ColumnId::Name, "KEY", ColumnWidth::Share(3), 0),
    column(ColumnId::Shard, "SHARD", ColumnWidth::Text(12), 120),
    column(ColumnId::Holder, "HOLDER", ColumnWidth::Text(14), 52),
    column(ColumnId::Age, "AGE", ColumnWidth::Number(7), 24),
    column(ColumnId::Left, "LEFT", ColumnWidth::Number(6), 44),
    column(ColumnId::Waiters, "WAITERS", ColumnWidth::Number(8), 34),
    column(ColumnId::Token, "TOKEN", ColumnWidth::Number(17), 120),
    Column {
        by: ColumnId::Caller,
        title: "CALLER",
        room: ColumnWidth::Share(2),
        from_width: 76,
        // The file name and the line are at the end.
        cut: Truncation::Head,
    },
];

/// The same if a key is held together. At most as wide as the other up to 100 columns.
const HELD_TOGETHER: &[Column] = &[
    column(ColumnId::Name, "KEY", ColumnWidth::Share(3), 0),
    column(ColumnId::Shard, "SHARD", ColumnWidth::Text(12), 132),
    column(ColumnId::Mode, "MODE", ColumnWidth::Text(13), 60),
    column(ColumnId::Holders, "HOLDERS", ColumnWidth::Number(8), 70),
    column(ColumnId::Holder, "HOLDER", ColumnWidth::Text(14), 80),
    column(ColumnId::Age, "AGE", ColumnWidth::Number(7), 24),
    column(ColumnId::Left, "LEFT", ColumnWidth::Number(6), 48),
    column(ColumnId::Waiters, "WAITERS", ColumnWidth::Number(8), 34),
    column(ColumnId::Token, "TOKEN", ColumnWidth::Number(17), 140),
    Column {
        by: ColumnId::Caller,
        title: "CALLER",
        room: ColumnWidth::Share(2),
        from_width: 100,
        cut: Truncation::Head,
    },
];

const SHARDS: &[Column] = &[
    column(ColumnId::Name, "SHARD", ColumnWidth::Share(1), 0),
    column(ColumnId::Kind, "KIND", ColumnWidth::Text(15), 96),
    column(ColumnId::State, "STATE", ColumnWidth::Text(8), 20),
    column(ColumnId::Leases, "LEASES", ColumnWidth::Number(7), 64),
    column(ColumnId::Waiters, "WAITERS", ColumnWidth::Number(8), 44),
    column(ColumnId::Rate, "LOCKS/S", ColumnWidth::Number(8), 32),
    column(ColumnId::Local, "LOCAL/S", ColumnWidth::Number(8), 80),
    column(ColumnId::Remote, "REMOTE/S", ColumnWidth::Number(9), 80),
    column(ColumnId::P50, "RT P50", ColumnWidth::Number(7), 56),
    column(ColumnId::P99, "RT P99", ColumnWidth::Number(7), 72),
];

const CLIENTS: &[Column] = &[
    column(ColumnId::Name, "CLIENT", ColumnWidth::Text(10), 0),
    column(ColumnId::Label, "NAME", ColumnWidth::Text(16), 72),
    column(ColumnId::Uid, "UID", ColumnWidth::Number(7), 96),
    column(ColumnId::Connections, "CONNS", ColumnWidth::Number(6), 34),
    column(ColumnId::Locks, "LOCKS", ColumnWidth::Number(6), 26),
    column(ColumnId::Waiters, "WAITING", ColumnWidth::Number(8), 64),
    column(ColumnId::Age, "OLDEST", ColumnWidth::Number(7), 42),
    column(ColumnId::Wait, "WAIT", ColumnWidth::Number(7), 52),
    Column {
        by: ColumnId::Keys,
        title: "KEYS",
        room: ColumnWidth::Share(1),
        from_width: 20,
        cut: Truncation::Tail,
    },
];

/// The columns of the view for these rows.
pub(super) fn of(view: View, rows: &Rows) -> &'static [Column] {
    match view {
        View::Hot => HOT,
        View::Held if rows.held.iter().any(|row| !row.mode.is_exclusive()) => HELD_TOGETHER,
        View::Held => HELD,
        View::Shards => SHARDS,
        View::Clients => CLIENTS,
    }
}

/// The rows of the view, as text.
pub(super) fn rows(view: View, rows: &Rows) -> Vec<Row> {
    let columns = of(view, rows);
    match view {
        View::Hot => rows
            .hot
            .iter()
            .map(|row| filled(columns, |by| hot(row, by), hot_style(row)))
            .collect(),
        View::Held => rows
            .held
            .iter()
            .map(|row| filled(columns, |by| held(row, by), held_style(row)))
            .collect(),
        View::Shards => rows
            .shards
            .iter()
            .map(|row| filled(columns, |by| shard(row, by), shard_style(row)))
            .collect(),
        View::Clients => rows
            .clients
            .iter()
            .map(|row| filled(columns, |by| client(row, by), client_style(row)))
            .collect(),
    }
}

fn filled(columns: &[Column], cell: impl Fn(ColumnId) -> Option<String>, style: Style) -> Row {
    let unknown = || "-".to_owned();
    Row {
        cells: columns
            .iter()
            .map(|column| cell(column.by).unwrap_or_else(unknown))
            .collect(),
        style,
    }
}

fn hot(row: &HotRow, by: ColumnId) -> Option<String> {
    match by {
        ColumnId::Name => Some(row.key.clone()),
        ColumnId::Shard => Some(row.shard.clone()),
        ColumnId::Holder => row.holder.clone(),
        ColumnId::Age => row.age.map(format::age),
        ColumnId::Waiters => Some(format::count(row.waiters as u64)),
        ColumnId::P50 => row.waits.map(|waits| format::time(waits.p50)),
        ColumnId::P99 => row.waits.map(|waits| format::time(waits.p99)),
        // Stores do not count contention.
        ColumnId::Contended => row.waits.map(|_| format::count(row.contended)),
        ColumnId::Rate => row.rate.map(format::rate),
        _ => None,
    }
}

const fn hot_style(row: &HotRow) -> Style {
    match (row.stale, row.waiters) {
        (true, _) => style::STALE,
        (false, 0) => Style::new(),
        (false, _) => style::CONTENDED,
    }
}

fn held(row: &HeldRow, by: ColumnId) -> Option<String> {
    match by {
        ColumnId::Name => Some(row.key.clone()),
        ColumnId::Shard => Some(row.shard.clone()),
        ColumnId::Holder => Some(row.holder.clone()),
        ColumnId::Mode => Some(row.mode.to_string()),
        ColumnId::Holders => Some(format::count(row.mode.holders())),
        ColumnId::Age => Some(format::age(row.age)),
        ColumnId::Left => Some(row.remaining.map_or_else(|| "no end".to_owned(), format::time)),
        ColumnId::Waiters => Some(format::count(row.waiters as u64)),
        ColumnId::Token => row.token.map(|token| token.to_string()),
        ColumnId::Caller => row.caller.clone(),
        _ => None,
    }
}

const fn held_style(row: &HeldRow) -> Style {
    match (row.stale, row.waiters) {
        (true, _) => style::STALE,
        (false, 0) => Style::new(),
        (false, _) => style::CONTENDED,
    }
}

fn shard(row: &ShardRow, by: ColumnId) -> Option<String> {
    let rate = |of: fn(LockRates) -> f64| row.rates.map(|rates| format::rate(of(rates)));
    match by {
        ColumnId::Name => Some(row.name.clone()),
        ColumnId::Kind => Some(row.kind.clone()),
        ColumnId::State => Some(match row.up {
            up if up == row.of => "up".to_owned(),
            0 => "down".to_owned(),
            up => format!("{up}/{} up", row.of),
        }),
        ColumnId::Leases => Some(format::count(row.leases as u64)),
        ColumnId::Waiters => Some(format::count(row.waiters as u64)),
        ColumnId::Rate => rate(|rates| rates.acquired),
        ColumnId::Local => rate(|rates| rates.local),
        ColumnId::Remote => rate(|rates| rates.remote),
        ColumnId::P50 => round_trip(row.round_trips.p50),
        ColumnId::P99 => round_trip(row.round_trips.p99),
        _ => None,
    }
}

/// None has been measured if it is zero, as by a store that is looked at from outside.
fn round_trip(time: Duration) -> Option<String> {
    (!time.is_zero()).then(|| format::time(time))
}

const fn shard_style(row: &ShardRow) -> Style {
    match (row.stale, row.up == row.of) {
        (true, _) => style::STALE,
        (false, true) => Style::new(),
        (false, false) => style::DOWN,
    }
}

fn client(row: &ClientRow, by: ColumnId) -> Option<String> {
    let process = &row.process;
    match by {
        ColumnId::Name => Some(row.label.clone()),
        ColumnId::Label => Some(row.name().to_owned()).filter(|name| !name.is_empty()),
        ColumnId::Uid => process.uid.map(|uid| uid.to_string()),
        ColumnId::Connections => Some(format::count(process.connections as u64)),
        ColumnId::Locks => Some(format::count(process.locks as u64)),
        ColumnId::Waiters => Some(format::count(process.waiting as u64)),
        ColumnId::Age => row.oldest.map(format::time),
        ColumnId::Wait => row.longest_wait.map(format::time),
        ColumnId::Keys => Some(row.keys.clone()).filter(|keys| !keys.is_empty()),
        _ => None,
    }
}

const fn client_style(row: &ClientRow) -> Style {
    match (row.stale, row.process.waiting) {
        (true, _) => style::STALE,
        (false, 0) => Style::new(),
        (false, _) => style::CONTENDED,
    }
}
