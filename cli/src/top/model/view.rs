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
    /// The clients of agents (`shardlock serve`)
    Clients,
}

impl View {
    pub(in crate::top) const ALL: [Self; 4] = [Self::Hot, Self::Held, Self::Shards, Self::Clients];
}
