//! A table whose columns depend on the width of the screen.

use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};

use super::format::{Truncation, sanitize, truncate, width};
use super::style;
use crate::top::model::{ColumnId, SortOrder};

#[derive(Debug)]
pub(super) struct Column {
    pub(super) by: ColumnId,
    pub(super) title: &'static str,
    pub(super) room: ColumnWidth,
    /// The column is left out on narrower screens.
    pub(super) from_width: u16,
    pub(super) cut: Truncation,
}

/// The width of a column.
#[derive(Debug, Clone, Copy)]
pub(super) enum ColumnWidth {
    /// Right-aligned numbers.
    Number(u16),
    Text(u16),
    /// A share of the width that the other columns leave.
    Share(u16),
}

/// A row: its cells in the order of all columns, shown or not.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) cells: Vec<String>,
    pub(super) style: Style,
}

/// The columns that are shown, with their widths.
#[derive(Debug)]
pub(super) struct Layout<'a> {
    columns: Vec<(usize, &'a Column, usize)>,
}

impl<'a> Layout<'a> {
    /// The layout for a screen of this width.
    pub(super) fn of_screen(columns: &'a [Column], screen: u16) -> Self {
        let shown = |column: &&Column| column.from_width <= screen;
        let fixed: u16 = columns
            .iter()
            .filter(shown)
            .map(|column| match column.room {
                ColumnWidth::Number(width) | ColumnWidth::Text(width) => width + 1,
                ColumnWidth::Share(_) => 1,
            })
            .sum();
        let shares: u16 = columns.iter().filter(shown).map(|column| column.room.shares()).sum();
        let rest = usize::from((screen + 1).saturating_sub(fixed));
        let mut left = rest;
        let mut widths: Vec<_> = columns
            .iter()
            .enumerate()
            .filter(|(_, column)| shown(column))
            .map(|(index, column)| match column.room {
                ColumnWidth::Number(width) | ColumnWidth::Text(width) => (index, column, usize::from(width)),
                ColumnWidth::Share(parts) => {
                    let width = rest * usize::from(parts) / usize::from(shares.max(1));
                    left -= width;
                    (index, column, width)
                }
            })
            .collect();
        // The remainder of the division goes to the first shared column.
        if let Some((.., width)) = widths.iter_mut().find(|(_, column, _)| column.room.shares() > 0) {
            *width += left;
        }
        Self { columns: widths }
    }

    /// The layout for plain text: as wide as the longest cells, with nothing left out.
    pub(super) fn of_contents(columns: &'a [Column], rows: &[Row]) -> Self {
        let columns = columns.iter().enumerate().map(|(index, column)| {
            let cells = rows.iter().filter_map(|row| row.cells.get(index));
            let longest = cells.map(|cell| width(&sanitize(cell))).max().unwrap_or_default();
            // Room for the sort sign.
            (index, column, longest.max(width(column.title) + 1))
        });
        Self {
            columns: columns.collect(),
        }
    }

    pub(super) fn shown(&self) -> Vec<ColumnId> {
        self.columns.iter().map(|(_, column, _)| column.by).collect()
    }

    pub(super) fn header(&self, order: SortOrder) -> Line<'static> {
        let cells = self.columns.iter().map(|(_, column, width)| {
            let is_sorted = column.by == order.by;
            let sign = match (is_sorted, order.largest_first) {
                (false, _) => "",
                (true, true) => "▼",
                (true, false) => "▲",
            };
            let style = if is_sorted {
                style::HEADER.add_modifier(Modifier::UNDERLINED)
            } else {
                style::HEADER
            };
            (padded(&format!("{}{sign}", column.title), column, *width), style)
        });
        line(cells, style::HEADER)
    }

    pub(super) fn line(&self, row: &Row) -> Line<'static> {
        let cells = self.columns.iter().map(|(index, column, width)| {
            let cell = row.cells.get(*index).map(|cell| sanitize(cell)).unwrap_or_default();
            (padded(&cell, column, *width), Style::new())
        });
        line(cells, row.style)
    }
}

impl ColumnWidth {
    const fn shares(self) -> u16 {
        match self {
            Self::Share(parts) => parts,
            Self::Number(_) | Self::Text(_) => 0,
        }
    }
}

fn padded(cell: &str, column: &Column, columns: usize) -> String {
    let cell = truncate(cell, columns, column.cut);
    let blank = " ".repeat(columns - width(&cell).min(columns));
    match column.room {
        ColumnWidth::Number(_) => blank + &cell,
        ColumnWidth::Text(_) | ColumnWidth::Share(_) => cell + &blank,
    }
}

fn line(cells: impl Iterator<Item = (String, Style)>, whole: Style) -> Line<'static> {
    let mut spans = Vec::new();
    for (cell, style) in cells {
        if !spans.is_empty() {
            spans.push(Span::raw(" "));
        }
        spans.push(Span::styled(cell, style));
    }
    Line::from(spans).style(whole)
}
