//! The views of the table.

/// A view of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(in crate::top) enum View {
    /// The keys with the most contention
    Hot,
    /// The locks that are held, the oldest first
    Held,
    /// The shards
    Shards,
}

impl View {
    pub(in crate::top) const ALL: [Self; 3] = [Self::Hot, Self::Held, Self::Shards];
}
