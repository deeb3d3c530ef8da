//! Output of the tool: results on standard output, as text or JSON; messages on standard error.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::Context;
use shardlock::tool::{must_be_escaped, printable};

use crate::exit::Failure;

/// The output format.
#[derive(Debug, Clone, clap::Args)]
#[group(skip)]
pub(crate) struct Format {
    /// Print the result as one line of JSON
    #[arg(long)]
    json: bool,
}

impl Format {
    /// Prints the result in the requested format.
    ///
    /// `text` is printed unchanged, to keep its line breaks and colours. The caller must pass any
    /// foreign text in it through [`printable`].
    pub(crate) fn print(&self, json: &impl Display, text: &str) -> Result<(), Failure> {
        if self.json { print_json(json) } else { print_text(text) }
    }
}

/// Prints one line of JSON.
pub(crate) fn print_json(json: &impl Display) -> Result<(), Failure> {
    print(&json_line(&json.to_string()))
}

/// Prints text, which is unchanged like that of [`Format::print`].
pub(crate) fn print_text(text: &str) -> Result<(), Failure> {
    print(text.trim_end())
}

fn print(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        // A reader such as `head` may close the pipe early. That is not an error.
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error)
            .context("the result could not be written")
            .map_err(Failure::system),
        _ => Ok(()),
    }
}

/// Makes JSON safe to show on a terminal: escapes the control characters that JSON allows
/// unescaped.
///
/// They can occur only inside strings, so the JSON stays equivalent.
fn json_line(json: &str) -> String {
    let mut line = String::with_capacity(json.len());
    for char in json.chars() {
        if must_be_escaped(char) {
            // All these characters are below 2^16, so one escape is enough.
            line.push_str(&format!("\\u{:04x}", u32::from(char)));
        } else {
            line.push(char);
        }
    }
    line
}

/// Standard error for log lines. Each message stays on one line, whatever text a server or user put
/// into it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LogWriter;

impl Write for LogWriter {
    /// Expects one whole line, which is how the log writes.
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

/// Writes one line to standard error, whatever text a server or user put into it.
///
/// Unlike `eprintln!`, this does not panic if standard error is closed: the tool may hold a lock
/// and still have a command to end.
pub(crate) fn eprint(message: impl Display) {
    writeln!(io::stderr(), "shardlock: {}", printable(&message.to_string())).ok();
}

/// Formats an error and its causes on one line, omitting causes already part of the text.
pub(crate) fn one_line(error: &anyhow::Error) -> String {
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
        assert_eq!(one_line(&error), "no server: a:1 can't be reached: connection refused");
    }
}
