//! Generates load on real servers with real processes: shared by `demo` and `bench`.
//!
//! | file | what it does |
//! |---|---|
//! | `child` | the hidden command that starts child processes, so that none outlives its parent |
//! | `crew` | the worker processes, as the parent sees them |
//! | `orders` | the parent, as a worker sees it |
//! | `server` | throw-away servers |
//! | `usage` | the statistics of a server |
//! | `counters` | the counters of this process's lock manager |
//! | `mix` | how often each key is used |
//! | `progress` | the progress bar |
//! | `signals` | the signals that end a run early |

pub(crate) mod child;
pub(crate) mod counters;
pub(crate) mod crew;
#[cfg(test)]
mod fuzzing;
pub(crate) mod mix;
pub(crate) mod orders;
pub(crate) mod progress;
pub(crate) mod server;
pub(crate) mod signals;
pub(crate) mod usage;

#[cfg(test)]
#[path = "../../../src/fuzzing/corpus.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_of_metrics_page_holds() {
        super::corpus::run("metrics_page", super::fuzzing::metrics_page);
    }
}
