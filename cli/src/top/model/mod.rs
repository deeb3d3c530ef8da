//! The state of the view: the processes, the current view, its order, the filter. It reads no clock
//! and knows no terminal.

mod merge;
mod order;
mod process;
mod rates;

use std::time::Instant;

pub(super) use merge::{HeldRow, HotRow, ShardRow};
pub(super) use order::{By, Order, View};
pub(super) use process::{Away, Process};
pub(super) use rates::LockRates;

use super::keys::{Action, Edit, Motion};
use super::source::{Answer, Wish};
use order::Sortable;

/// The maximum length of a filter, in characters: no key is longer.
const FILTER_CHARS_MAX: usize = 512;

#[derive(Debug)]
pub(super) struct Model {
    processes: Vec<Process>,
    view: View,
    /// Per view: its order, and how many rows are scrolled off the top.
    orders: [Order; 3],
    above: [usize; 3],
    filter: String,
    pub(super) writing: bool,
    pub(super) helping: bool,
    wish: Wish,
    /// How many rows the last frame had room for, and the columns it can be sorted by.
    room: usize,
    columns: Vec<By>,
}

/// All rows, merged, filtered and sorted.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) hot: Vec<HotRow>,
    pub(super) held: Vec<HeldRow>,
    pub(super) shards: Vec<ShardRow>,
}

impl Rows {
    pub(super) const fn count(&self, view: View) -> usize {
        match view {
            View::Hot => self.hot.len(),
            View::Held => self.held.len(),
            View::Shards => self.shards.len(),
        }
    }
}

/// Totals for the status line. The filter does not apply.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Sums {
    pub(super) locks_per_s: Option<f64>,
    pub(super) waiters: usize,
    pub(super) held: usize,
    pub(super) shards_up: usize,
    pub(super) shards: usize,
}

impl Model {
    pub(super) fn new(labels: impl IntoIterator<Item = String>, view: View) -> Self {
        Self {
            processes: labels.into_iter().map(Process::new).collect(),
            view,
            orders: View::ALL.map(Order::usual),
            above: [0; 3],
            filter: String::new(),
            writing: false,
            helping: false,
            wish: Wish::default(),
            room: 0,
            columns: Vec::new(),
        }
    }

    /// Applies an answer. While paused, answers are dropped, so that the view does not change.
    pub(super) fn take(&mut self, answer: Answer) {
        if self.wish.paused {
            return;
        }
        if let Some(process) = self.processes.get_mut(answer.source) {
            process.take(answer.look, answer.at);
        }
    }

    pub(super) fn processes(&self) -> &[Process] {
        &self.processes
    }

    pub(super) const fn view(&self) -> View {
        self.view
    }

    pub(super) const fn order(&self, view: View) -> Order {
        self.orders[view as usize]
    }

    pub(super) fn filter(&self) -> &str {
        &self.filter
    }

    pub(super) const fn wish(&self) -> Wish {
        self.wish
    }

    pub(super) fn rows(&self) -> Rows {
        let filter = self.filter.to_lowercase();
        Rows {
            hot: arranged(merge::hot(&self.processes), &filter, self.order(View::Hot)),
            held: arranged(merge::held(&self.processes), &filter, self.order(View::Held)),
            shards: arranged(merge::shards(&self.processes), &filter, self.order(View::Shards)),
        }
    }

    pub(super) fn sums(&self) -> Sums {
        let mut sums = Sums::default();
        let shards = merge::shards(&self.processes);
        for shard in &shards {
            sums.waiters += shard.waiters;
            sums.shards_up += usize::from(shard.up == shard.of);
            if let Some(rates) = shard.rates {
                sums.locks_per_s = Some(sums.locks_per_s.unwrap_or_default() + rates.acquired);
            }
        }
        sums.shards = shards.len();
        let looks = self.processes.iter().filter_map(Process::look);
        let untold: usize = looks.map(|look| look.held_total.saturating_sub(look.held.len())).sum();
        sums.held = merge::held(&self.processes).len() + untold;
        sums
    }

    /// The sources that are unavailable now.
    pub(super) fn away(&self, now: Instant) -> impl Iterator<Item = Away<'_>> {
        self.processes.iter().filter_map(move |process| process.away(now))
    }

    /// The index of the first row to show, given the number of rows and the room for them.
    pub(super) fn first_row(&mut self, rows: usize, room: usize) -> usize {
        self.room = room;
        let above = &mut self.above[self.view as usize];
        *above = (*above).min(rows.saturating_sub(room));
        *above
    }

    /// Sets the columns of the frame, which `s` cycles through.
    pub(super) fn has_columns(&mut self, columns: Vec<By>) {
        self.columns = columns;
    }

    /// Applies an action. Quitting, suspending and searching happen elsewhere.
    pub(super) fn act(&mut self, action: Action) {
        let view = self.view as usize;
        match action {
            Action::Show(view) => self.show(view),
            Action::NextView => self.show(View::ALL[(view + 1) % View::ALL.len()]),
            Action::LastView => self.show(View::ALL[(view + View::ALL.len() - 1) % View::ALL.len()]),
            Action::NextColumn => self.orders[view] = self.orders[view].next(&self.columns),
            Action::Reverse => self.orders[view] = self.orders[view].reversed(),
            Action::Pause => self.wish.paused = !self.wish.paused,
            Action::Search => self.wish.searches += 1,
            Action::Help => self.helping = !self.helping,
            Action::Escape if self.helping => self.helping = false,
            Action::Escape => self.edit(Edit::Clear),
            Action::Move(motion) => self.scroll(motion),
            Action::Filter(edit) => self.edit(edit),
            Action::Quit | Action::Suspend => {}
        }
        if matches!(action, Action::Escape) {
            self.writing = false;
        }
    }

    fn show(&mut self, view: View) {
        self.view = view;
        self.helping = false;
    }

    fn scroll(&mut self, motion: Motion) {
        let page = self.room.saturating_sub(1).max(1);
        let above = &mut self.above[self.view as usize];
        // The next frame knows the number of rows and clamps this.
        *above = match motion {
            Motion::Up => above.saturating_sub(1),
            Motion::Down => above.saturating_add(1),
            Motion::PageUp => above.saturating_sub(page),
            Motion::PageDown => above.saturating_add(page),
            Motion::First => 0,
            Motion::Last => usize::MAX,
        };
    }

    fn edit(&mut self, edit: Edit) {
        self.helping = false;
        match edit {
            Edit::Begin => self.writing = true,
            Edit::Add(char) if self.filter.chars().count() < FILTER_CHARS_MAX => self.filter.push(char),
            Edit::Add(_) => {}
            Edit::Remove => drop(self.filter.pop()),
            Edit::Clear => self.filter.clear(),
            Edit::Keep => self.writing = false,
        }
        self.above = [0; 3];
    }
}

fn arranged<R: Sortable>(mut rows: Vec<R>, filter: &str, order: Order) -> Vec<R> {
    rows.retain(|row| row.matches(filter));
    order.sort(&mut rows);
    rows
}

#[cfg(test)]
mod tests;
