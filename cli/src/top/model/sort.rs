//! The sort order of each view.

use std::cmp::Ordering;

use super::merge::{HeldRow, HotRow, ShardRow};
use super::view::View;

/// A column by which rows can be sorted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::top) enum ColumnId {
    Name,
    Shard,
    Kind,
    Holder,
    Mode,
    Holders,
    Age,
    Left,
    Waiters,
    P50,
    P99,
    Rate,
    Contended,
    Token,
    Caller,
    State,
    Leases,
    Local,
    Remote,
    Label,
    Uid,
    Connections,
    Locks,
    Wait,
    Keys,
}

impl ColumnId {
    /// Whether this column is sorted in descending order by default.
    const fn largest_first(self) -> bool {
        !matches!(
            self,
            Self::Name
                | Self::Shard
                | Self::Kind
                | Self::Holder
                | Self::Mode
                | Self::Caller
                | Self::State
                | Self::Left
                | Self::Label
                | Self::Uid
                | Self::Keys
        )
    }
}

/// The order of one view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::top) struct SortOrder {
    pub(in crate::top) by: ColumnId,
    pub(in crate::top) largest_first: bool,
}

impl SortOrder {
    pub(super) const fn of(by: ColumnId) -> Self {
        Self {
            by,
            largest_first: by.largest_first(),
        }
    }

    pub(super) const fn default_of(view: View) -> Self {
        Self::of(match view {
            View::Hot => ColumnId::Rate,
            View::Held | View::Clients => ColumnId::Age,
            View::Shards => ColumnId::Name,
        })
    }

    pub(super) const fn reversed(self) -> Self {
        Self {
            largest_first: !self.largest_first,
            ..self
        }
    }

    /// Sorts by the next of these columns.
    pub(super) fn next(self, columns: &[ColumnId]) -> Self {
        let index = columns.iter().position(|by| *by == self.by);
        let next = index.map_or(0, |index| (index + 1) % columns.len().max(1));
        columns.get(next).map_or(self, |by| Self::of(*by))
    }

    /// Rows that are equal in the column are ordered by weight and then by name, so that they keep
    /// their places.
    pub(super) fn sort<R: Sortable>(self, rows: &mut [R]) {
        rows.sort_by(|one, other| {
            let order = one.compare(other, self.by);
            let order = if self.largest_first { order.reverse() } else { order };
            order.then_with(|| R::tie(one, other))
        });
    }
}

/// A row that can be sorted and filtered.
pub(super) trait Sortable {
    fn compare(&self, other: &Self, by: ColumnId) -> Ordering;
    fn tie(one: &Self, other: &Self) -> Ordering;
    /// The texts that a filter searches.
    fn texts(&self) -> [&str; 3];

    /// Whether any of its texts contains the filter, ignoring case.
    fn matches(&self, lower_case: &str) -> bool {
        self.texts().iter().any(|text| text.to_lowercase().contains(lower_case))
    }
}

fn compare_floats(one: Option<f64>, other: Option<f64>) -> Ordering {
    // Unknown values sort as the smallest.
    one.unwrap_or(-1.0).total_cmp(&other.unwrap_or(-1.0))
}

impl Sortable for HotRow {
    fn compare(&self, other: &Self, by: ColumnId) -> Ordering {
        match by {
            ColumnId::Name => self.key.cmp(&other.key),
            ColumnId::Shard => self.shard.cmp(&other.shard),
            ColumnId::Holder => self.holder.cmp(&other.holder),
            ColumnId::Age => self.age.cmp(&other.age),
            ColumnId::Waiters => self.waiters.cmp(&other.waiters),
            ColumnId::P50 => self
                .waits
                .map(|waits| waits.p50)
                .cmp(&other.waits.map(|waits| waits.p50)),
            ColumnId::P99 => self
                .waits
                .map(|waits| waits.p99)
                .cmp(&other.waits.map(|waits| waits.p99)),
            ColumnId::Contended => self.contended.cmp(&other.contended),
            _ => compare_floats(self.rate, other.rate),
        }
    }

    fn tie(one: &Self, other: &Self) -> Ordering {
        let by_weight = (other.contended, other.waiters).cmp(&(one.contended, one.waiters));
        by_weight.then_with(|| (&one.key, &one.shard).cmp(&(&other.key, &other.shard)))
    }

    fn texts(&self) -> [&str; 3] {
        [&self.key, &self.shard, self.holder.as_deref().unwrap_or_default()]
    }
}

impl Sortable for HeldRow {
    fn compare(&self, other: &Self, by: ColumnId) -> Ordering {
        match by {
            ColumnId::Name => self.key.cmp(&other.key),
            ColumnId::Shard => self.shard.cmp(&other.shard),
            ColumnId::Holder => self.holder.cmp(&other.holder),
            ColumnId::Mode => self.mode.to_string().cmp(&other.mode.to_string()),
            ColumnId::Holders => self.mode.holders().cmp(&other.mode.holders()),
            // Leases without a TTL come last.
            ColumnId::Left => {
                let left = |row: &Self| (row.remaining.is_none(), row.remaining);
                left(self).cmp(&left(other))
            }
            ColumnId::Waiters => self.waiters.cmp(&other.waiters),
            ColumnId::Token => self.token.cmp(&other.token),
            ColumnId::Caller => self.caller.cmp(&other.caller),
            _ => self.age.cmp(&other.age),
        }
    }

    fn tie(one: &Self, other: &Self) -> Ordering {
        (&one.key, &one.shard).cmp(&(&other.key, &other.shard))
    }

    fn texts(&self) -> [&str; 3] {
        [&self.key, &self.holder, self.caller.as_deref().unwrap_or_default()]
    }
}

impl Sortable for ShardRow {
    fn compare(&self, other: &Self, by: ColumnId) -> Ordering {
        let rate = |row: &Self, of: fn(super::LockRates) -> f64| row.rates.map(of);
        match by {
            ColumnId::Kind => self.kind.cmp(&other.kind),
            ColumnId::State => (self.up * other.of.max(1)).cmp(&(other.up * self.of.max(1))),
            ColumnId::Leases => self.leases.cmp(&other.leases),
            ColumnId::Waiters => self.waiters.cmp(&other.waiters),
            ColumnId::Rate => compare_floats(rate(self, |rates| rates.acquired), rate(other, |rates| rates.acquired)),
            ColumnId::Local => compare_floats(rate(self, |rates| rates.local), rate(other, |rates| rates.local)),
            ColumnId::Remote => compare_floats(rate(self, |rates| rates.remote), rate(other, |rates| rates.remote)),
            ColumnId::P50 => self.round_trips.p50.cmp(&other.round_trips.p50),
            ColumnId::P99 => self.round_trips.p99.cmp(&other.round_trips.p99),
            _ => compare_names(&self.name, &other.name),
        }
    }

    fn tie(one: &Self, other: &Self) -> Ordering {
        compare_names(&one.name, &other.name)
    }

    fn texts(&self) -> [&str; 3] {
        [&self.name, &self.kind, ""]
    }
}

/// `shard-2` comes before `shard-10`.
fn compare_names(one: &str, other: &str) -> Ordering {
    let parts = |name: &str| {
        let stem = name.trim_end_matches(|char: char| char.is_ascii_digit()).len();
        let (stem, number) = name.split_at(stem);
        (stem.to_owned(), number.parse::<u64>().ok(), name.to_owned())
    };
    parts(one).cmp(&parts(other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_at_the_end_of_names_are_compared_as_numbers() {
        let mut names = ["shard-10", "shard-2", "eu", "shard-1", "9"];
        names.sort_by(|one, other| compare_names(one, other));
        assert_eq!(names, ["9", "eu", "shard-1", "shard-2", "shard-10"]);
    }

    #[test]
    fn the_order_goes_through_the_columns_and_comes_round() {
        let columns = [ColumnId::Name, ColumnId::Age];
        let order = SortOrder::of(ColumnId::Name);
        assert!(!order.largest_first);
        let next = order.next(&columns);
        assert_eq!((next.by, next.largest_first), (ColumnId::Age, true));
        assert_eq!(next.reversed().next(&columns), order);
        // If the column is no longer shown, the first one is next.
        assert_eq!(SortOrder::of(ColumnId::Token).next(&columns).by, ColumnId::Name);
    }
}
