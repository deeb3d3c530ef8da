//! The columns of each view and the contents of their cells.

use ratatui::style::Style;

use super::style;
use super::table::{Column, Room, Row};
use super::words::{self, Cut};
use crate::top::model::{By, HeldRow, HotRow, LockRates, Rows, ShardRow, View};

const fn column(by: By, title: &'static str, room: Room, from_width: u16) -> Column {
    Column {
        by,
        title,
        room,
        from_width,
        cut: Cut::Middle,
    }
}

/// Widths fit the longest number; titles leave room for the sort sign.
const HOT: &[Column] = &[
    column(By::Name, "KEY", Room::Share(1), 0),
    column(By::Shard, "SHARD", Room::Text(12), 100),
    column(By::Holder, "HOLDER", Room::Text(14), 60),
    column(By::Age, "AGE", Room::Number(7), 48),
    column(By::Waiters, "WAITERS", Room::Number(8), 24),
    column(By::P50, "P50", Room::Number(6), 70),
    column(By::P99, "P99", Room::Number(6), 36),
    column(By::Contended, "CONTENDED", Room::Number(10), 100),
    column(By::Rate, "CONT/S", Room::Number(7), 42),
];

const HELD: &[Column] = &[
    column(By::Name, "KEY", Room::Share(3), 0),
    column(By::Shard, "SHARD", Room::Text(12), 120),
    column(By::Holder, "HOLDER", Room::Text(14), 52),
    column(By::Age, "AGE", Room::Number(7), 24),
    column(By::Left, "LEFT", Room::Number(6), 44),
    column(By::Waiters, "WAITERS", Room::Number(8), 34),
    column(By::Token, "TOKEN", Room::Number(17), 120),
    Column {
        by: By::Caller,
        title: "CALLER",
        room: Room::Share(2),
        from_width: 76,
        // The file name and the line are at the end.
        cut: Cut::Head,
    },
];

const SHARDS: &[Column] = &[
    column(By::Name, "SHARD", Room::Share(1), 0),
    column(By::Kind, "KIND", Room::Text(15), 96),
    column(By::State, "STATE", Room::Text(8), 20),
    column(By::Leases, "LEASES", Room::Number(7), 64),
    column(By::Waiters, "WAITERS", Room::Number(8), 44),
    column(By::Rate, "LOCKS/S", Room::Number(8), 32),
    column(By::Local, "LOCAL/S", Room::Number(8), 80),
    column(By::Remote, "REMOTE/S", Room::Number(9), 80),
    column(By::P50, "RT P50", Room::Number(7), 56),
    column(By::P99, "RT P99", Room::Number(7), 72),
];

pub(super) const fn of(view: View) -> &'static [Column] {
    match view {
        View::Hot => HOT,
        View::Held => HELD,
        View::Shards => SHARDS,
    }
}

/// The rows of the view, as text.
pub(super) fn rows(view: View, rows: &Rows) -> Vec<Row> {
    match view {
        View::Hot => rows
            .hot
            .iter()
            .map(|row| filled(HOT, |by| hot(row, by), hot_style(row)))
            .collect(),
        View::Held => rows
            .held
            .iter()
            .map(|row| filled(HELD, |by| held(row, by), held_style(row)))
            .collect(),
        View::Shards => rows
            .shards
            .iter()
            .map(|row| filled(SHARDS, |by| shard(row, by), shard_style(row)))
            .collect(),
    }
}

fn filled(columns: &[Column], cell: impl Fn(By) -> Option<String>, style: Style) -> Row {
    let unknown = || "-".to_owned();
    Row {
        cells: columns
            .iter()
            .map(|column| cell(column.by).unwrap_or_else(unknown))
            .collect(),
        style,
    }
}

fn hot(row: &HotRow, by: By) -> Option<String> {
    match by {
        By::Name => Some(row.key.clone()),
        By::Shard => Some(row.shard.clone()),
        By::Holder => row.holder.clone(),
        By::Age => row.age.map(words::age),
        By::Waiters => Some(words::count(row.waiters as u64)),
        By::P50 => row.waits.map(|waits| words::time(waits.p50)),
        By::P99 => row.waits.map(|waits| words::time(waits.p99)),
        // Stores do not count contention.
        By::Contended => row.waits.map(|_| words::count(row.contended)),
        By::Rate => row.rate.map(words::rate),
        _ => None,
    }
}

const fn hot_style(row: &HotRow) -> Style {
    match (row.stale, row.waiters) {
        (true, _) => style::STALE,
        (false, 0) => Style::new(),
        (false, _) => style::WANTED,
    }
}

fn held(row: &HeldRow, by: By) -> Option<String> {
    match by {
        By::Name => Some(row.key.clone()),
        By::Shard => Some(row.shard.clone()),
        By::Holder => Some(row.who.clone()),
        By::Age => Some(words::age(row.age)),
        By::Left => Some(row.remaining.map_or_else(|| "no end".to_owned(), words::time)),
        By::Waiters => Some(words::count(row.waiters as u64)),
        By::Token => row.token.map(|token| token.to_string()),
        By::Caller => row.caller.clone(),
        _ => None,
    }
}

const fn held_style(row: &HeldRow) -> Style {
    match (row.stale, row.waiters) {
        (true, _) => style::STALE,
        (false, 0) => Style::new(),
        (false, _) => style::WANTED,
    }
}

fn shard(row: &ShardRow, by: By) -> Option<String> {
    let rate = |of: fn(LockRates) -> f64| row.rates.map(|rates| words::rate(of(rates)));
    match by {
        By::Name => Some(row.name.clone()),
        By::Kind => Some(row.kind.clone()),
        By::State => Some(match row.up {
            up if up == row.of => "up".to_owned(),
            0 => "down".to_owned(),
            up => format!("{up}/{} up", row.of),
        }),
        By::Leases => Some(words::count(row.leases as u64)),
        By::Waiters => Some(words::count(row.waiters as u64)),
        By::Rate => rate(|rates| rates.acquired),
        By::Local => rate(|rates| rates.local),
        By::Remote => rate(|rates| rates.remote),
        By::P50 => Some(words::time(row.round_trips.p50)),
        By::P99 => Some(words::time(row.round_trips.p99)),
        _ => None,
    }
}

const fn shard_style(row: &ShardRow) -> Style {
    match (row.stale, row.up == row.of) {
        (true, _) => style::STALE,
        (false, true) => Style::new(),
        (false, false) => style::DOWN,
    }
}
