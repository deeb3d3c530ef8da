//! What the tool says: answers on standard output, for people or as JSON; complaints on standard error.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::Context;
use shardlock::{must_be_escaped, printable};

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
    ///
    /// What `human` has from elsewhere went through [`printable`] before: its own lines and colours must stay.
    pub(crate) fn print(&self, json: &impl Display, human: &str) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let written = if self.json {
            writeln!(out, "{}", json_line(&json.to_string()))
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

/// JSON that a terminal can be shown: the few control characters that JSON allows as they are become escapes. They can stand in strings only.
fn json_line(json: &str) -> String {
    let mut line = String::with_capacity(json.len());
    for char in json.chars() {
        if must_be_escaped(char) {
            // All of them are below 2^16.
            line.push_str(&format!("\\u{:04x}", u32::from(char)));
        } else {
            line.push(char);
        }
    }
    line
}

/// Standard error for log lines: each is one line, whatever a server or a user has put into it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogLines;

impl Write for LogLines {
    /// Takes one whole line, as the log writes them.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let (text, end) = text.strip_suffix('\n').map_or((&*text, ""), |text| (text, "\n"));
        write!(io::stderr(), "{}{end}", printable(text))?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Writes a line to standard error. It is one line, whatever a server or a user has put into it.
///
/// Unlike `eprintln!` it does not panic where that is closed: the tool may be holding a lock and have a command to end.
pub(crate) fn complain(message: impl Display) {
    writeln!(io::stderr(), "shardlock: {}", printable(&message.to_string())).ok();
}

/// An error with its causes in one line. What one of them repeats is left out.
pub(crate) fn in_one_line(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain() {
        let cause = cause.to_string();
        if line.is_empty() {
            line = cause;
        } else if !line.contains(&cause) {
            line = format!("{line}: {cause}");
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn json_with_control_characters_stays_the_same_json() {
        let value = serde_json::json!({ "a": "\u{1b}[2J\n\u{9b}\u{7f}\u{202e}é🔒" });
        let line = json_line(&value.to_string());
        assert!(!line.contains(must_be_escaped), "{line}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&line).unwrap(), value);
    }

    #[test]
    fn a_cause_that_was_named_is_not_repeated() {
        let error = anyhow!("connection refused")
            .context("a:1 can't be reached: connection refused")
            .context("no server");
        assert_eq!(
            in_one_line(&error),
            "no server: a:1 can't be reached: connection refused"
        );
    }
}
