//! Generates load on real servers with real processes: shared by `demo` and `bench`.
//!
//! | file | what it does |
//! |---|---|
//! | `child` | the hidden command that starts child processes, so that none outlives its parent |
//! | `workers` | the worker processes, as the parent sees them |
//! | `commands` | the parent, as a worker sees it |
//! | `temp_servers` | throw-away servers |
//! | `connection`, `server_stats` | a connection to a server, and the server's statistics |
//! | `counters` | the counters of this process's lock manager |
//! | `key_distribution` | how often each key is used |
//! | `progress` | the progress bar |
//! | `erase` | erases what workers have left on given servers |

pub(crate) mod child;
pub(crate) mod commands;
pub(crate) mod connection;
pub(crate) mod counters;
mod erase;
#[cfg(test)]
mod fuzzing;
pub(crate) mod key_distribution;
pub(crate) mod progress;
pub(crate) mod server_stats;
pub(crate) mod temp_servers;
pub(crate) mod workers;

pub(crate) use erase::erase;

#[cfg(test)]
#[path = "../../../src/fuzzing/corpus.rs"]
pub(crate) mod corpus;

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_of_metrics_page_holds() {
        super::corpus::run("metrics_page", super::fuzzing::metrics_page);
    }
}
