//! Load on real servers by real processes: what `demo` and `bench` have in common.
//!
//! | file | what it does |
//! |---|---|
//! | `child` | the hidden command by which child processes start, so that none outlives its parent |
//! | `crew` | the worker processes, as the parent sees them |
//! | `orders` | the parent, as a worker sees it |
//! | `server` | throw-away servers |
//! | `usage` | what a server says that it was asked to do |
//! | `counters` | what the lock manager of this process has counted |
//! | `mix` | which keys are wanted how often |
//! | `progress` | the bar that shows how far it is |
//! | `signals` | the signals that end it early |

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
#[path = "../../../fuzzing/corpus.rs"]
mod corpus;

#[cfg(test)]
mod tests {
    #[test]
    fn corpus_of_metrics_page_holds() {
        super::corpus::run("metrics_page", super::fuzzing::metrics_page);
    }
}
