//! The state of the view: the processes, the current view, its order, the filter. It reads no clock
//! and knows no terminal.

mod clients;
mod merge;
mod rates;
mod sort;
mod source_state;
mod view;

use std::time::Instant;

pub(super) use clients::ClientRow;
pub(super) use merge::{HeldRow, HotRow, ShardRow};
pub(super) use rates::LockRates;
pub(super) use sort::{ColumnId, SortOrder};
pub(super) use source_state::{SourceState, Unavailable};
pub(super) use view::View;

use super::keys::{Action, Edit, Motion};
use super::source::{PollControl, PolledSample};
use sort::Sortable;

/// The maximum length of a filter, in characters: no key is longer.
const FILTER_CHARS_MAX: usize = 512;

#[derive(Debug)]
pub(super) struct Model {
    sources: Vec<SourceState>,
    view: View,
    /// Per view: its order, and how many rows are scrolled off the top.
    orders: [SortOrder; View::ALL.len()],
    scrolled: [usize; View::ALL.len()],
    filter: String,
    pub(super) editing_filter: bool,
    pub(super) showing_help: bool,
    control: PollControl,
    /// How many rows the last frame had room for, and the columns it can be sorted by.
    visible_rows: usize,
    columns: Vec<ColumnId>,
}

/// All rows, merged, filtered and sorted.
#[derive(Debug, Default)]
pub(super) struct Rows {
    pub(super) hot: Vec<HotRow>,
    pub(super) held: Vec<HeldRow>,
    pub(super) shards: Vec<ShardRow>,
    pub(super) clients: Vec<ClientRow>,
}

impl Rows {
    pub(super) const fn count(&self, view: View) -> usize {
        match view {
            View::Hot => self.hot.len(),
            View::Held => self.held.len(),
            View::Shards => self.shards.len(),
            View::Clients => self.clients.len(),
        }
    }
}

/// Totals for the status line. The filter does not apply.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Totals {
    pub(super) locks_per_s: Option<f64>,
    pub(super) waiters: usize,
    pub(super) held: usize,
    pub(super) shards_up: usize,
    pub(super) shards: usize,
}

impl Model {
    pub(super) fn new(labels: impl IntoIterator<Item = String>, view: View) -> Self {
        Self {
            sources: labels.into_iter().map(SourceState::new).collect(),
            view,
            orders: View::ALL.map(SortOrder::default_of),
            scrolled: [0; View::ALL.len()],
            filter: String::new(),
            editing_filter: false,
            showing_help: false,
            control: PollControl::default(),
            visible_rows: 0,
            columns: Vec::new(),
        }
    }

    /// Applies a sample. While paused, samples are dropped, so that the view does not change.
    pub(super) fn apply_sample(&mut self, polled: PolledSample) {
        if self.control.paused {
            return;
        }
        if let Some(source) = self.sources.get_mut(polled.source) {
            source.update(polled.sample, polled.at);
        }
    }

    pub(super) fn sources(&self) -> &[SourceState] {
        &self.sources
    }

    pub(super) const fn view(&self) -> View {
        self.view
    }

    /// The views that there are: only an agent has clients.
    pub(super) fn views(&self) -> &'static [View] {
        let mut samples = self.sources.iter().filter_map(SourceState::sample);
        if self.view == View::Clients || samples.any(|sample| sample.clients.is_some()) {
            &View::ALL
        } else {
            &View::ALL[..View::Clients as usize]
        }
    }

    pub(super) const fn order(&self, view: View) -> SortOrder {
        self.orders[view as usize]
    }

    pub(super) fn filter(&self) -> &str {
        &self.filter
    }

    pub(super) const fn control(&self) -> PollControl {
        self.control
    }

    pub(super) fn rows(&self) -> Rows {
        let filter = self.filter.to_lowercase();
        Rows {
            hot: filtered_and_sorted(merge::hot(&self.sources), &filter, self.order(View::Hot)),
            held: filtered_and_sorted(merge::held(&self.sources), &filter, self.order(View::Held)),
            shards: filtered_and_sorted(merge::shards(&self.sources), &filter, self.order(View::Shards)),
            clients: filtered_and_sorted(clients::clients(&self.sources), &filter, self.order(View::Clients)),
        }
    }

    pub(super) fn totals(&self) -> Totals {
        let mut totals = Totals::default();
        let shards = merge::shards(&self.sources);
        for shard in &shards {
            totals.waiters += shard.waiters;
            totals.shards_up += usize::from(shard.up == shard.of);
            if let Some(rates) = shard.rates {
                totals.locks_per_s = Some(totals.locks_per_s.unwrap_or_default() + rates.acquired);
            }
        }
        totals.shards = shards.len();
        let samples = self.sources.iter().filter_map(SourceState::sample);
        let unlisted: usize = samples
            .map(|sample| sample.held_total.saturating_sub(sample.held.len()))
            .sum();
        totals.held = merge::held(&self.sources).len() + unlisted;
        totals
    }

    /// The sources that are unavailable now.
    pub(super) fn unavailable(&self, now: Instant) -> impl Iterator<Item = Unavailable<'_>> {
        self.sources.iter().filter_map(move |source| source.unavailable(now))
    }

    /// The index of the first row to show, given the number of rows and the room for them.
    pub(super) fn first_row(&mut self, rows: usize, visible_rows: usize) -> usize {
        self.visible_rows = visible_rows;
        let scrolled = &mut self.scrolled[self.view as usize];
        *scrolled = (*scrolled).min(rows.saturating_sub(visible_rows));
        *scrolled
    }

    /// Sets the columns of the frame, which `s` cycles through.
    pub(super) fn set_columns(&mut self, columns: Vec<ColumnId>) {
        self.columns = columns;
    }

    /// Applies an action. Quitting, suspending and searching happen elsewhere.
    pub(super) fn apply(&mut self, action: Action) {
        let view = self.view as usize;
        match action {
            Action::Show(view) => self.show(view),
            Action::NextView => self.show_neighbour(1),
            Action::LastView => self.show_neighbour(self.views().len() - 1),
            Action::NextColumn => self.orders[view] = self.orders[view].next(&self.columns),
            Action::Reverse => self.orders[view] = self.orders[view].reversed(),
            Action::Pause => self.control.paused = !self.control.paused,
            Action::Search => self.control.searches += 1,
            Action::Help => self.showing_help = !self.showing_help,
            Action::Escape if self.showing_help => self.showing_help = false,
            Action::Escape => self.edit(Edit::Clear),
            Action::Move(motion) => self.scroll(motion),
            Action::Filter(edit) => self.edit(edit),
            Action::Quit | Action::Suspend => {}
        }
        if matches!(action, Action::Escape) {
            self.editing_filter = false;
        }
    }

    fn show_neighbour(&mut self, steps: usize) {
        let views = self.views();
        self.show(views[(self.view as usize + steps) % views.len()]);
    }

    fn show(&mut self, view: View) {
        self.view = view;
        self.showing_help = false;
    }

    fn scroll(&mut self, motion: Motion) {
        let page = self.visible_rows.saturating_sub(1).max(1);
        let scrolled = &mut self.scrolled[self.view as usize];
        // The next frame knows the number of rows and clamps this.
        *scrolled = match motion {
            Motion::Up => scrolled.saturating_sub(1),
            Motion::Down => scrolled.saturating_add(1),
            Motion::PageUp => scrolled.saturating_sub(page),
            Motion::PageDown => scrolled.saturating_add(page),
            Motion::First => 0,
            Motion::Last => usize::MAX,
        };
    }

    fn edit(&mut self, edit: Edit) {
        self.showing_help = false;
        match edit {
            Edit::Begin => self.editing_filter = true,
            Edit::Add(char) if self.filter.chars().count() < FILTER_CHARS_MAX => self.filter.push(char),
            Edit::Add(_) => {}
            Edit::Remove => drop(self.filter.pop()),
            Edit::Clear => self.filter.clear(),
            Edit::Keep => self.editing_filter = false,
        }
        self.scrolled = [0; View::ALL.len()];
    }
}

fn filtered_and_sorted<R: Sortable>(mut rows: Vec<R>, filter: &str, order: SortOrder) -> Vec<R> {
    rows.retain(|row| row.matches(filter));
    order.sort(&mut rows);
    rows
}

#[cfg(test)]
mod tests;
