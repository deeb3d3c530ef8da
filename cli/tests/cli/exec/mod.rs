//! `shardlock exec` with real processes, real signals and a real server.

mod conflict;
mod loss;
pub(crate) mod metrics;
mod min_hold;
mod modes;
mod outcome;
mod process_tree;
mod signals;
mod terminal;
mod textfile;
