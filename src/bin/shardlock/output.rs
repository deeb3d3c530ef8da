//! What the tool says: answers on standard output, for people or as JSON; complaints on standard error.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::Context;

use crate::exit::Failure;

/// In which form an answer is wanted.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Form {
    /// Answer with one line of JSON
    #[arg(long)]
    json: bool,
}

impl Form {
    /// Prints an answer in the form that is wanted.
    pub(crate) fn print(&self, json: &impl Display, human: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let written = if self.json {
            writeln!(out, "{json}")
        } else {
            writeln!(out, "{}", human.trim_end())
        };
        match written.and_then(|()| out.flush()) {
            // A reader such as `head` that has seen enough is no error.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error)
                .context("the answer could not be written")
                .map_err(Failure::system),
            _ => Ok(()),
        }
    }
}

/// Writes a line to standard error.
///
/// Unlike `eprintln!` it does not panic where that is closed: the tool may be holding a lock and have a command to end.
pub(crate) fn complain(message: impl Display) {
    writeln!(io::stderr(), "shardlock: {message}").ok();
}
