//! Formats all findings as text or JSON.

use std::fmt::Write;

use serde_json::{Value, json};
use shardlock::tool::printable;

use super::finding::{Finding, Level};
use crate::exit;

/// All findings.
#[derive(Debug)]
pub(super) struct Report {
    /// Findings about the settings alone.
    pub(super) settings: Vec<Finding>,
    pub(super) shards: Vec<ShardReport>,
}

/// Findings about one shard.
#[derive(Debug, Default)]
pub(super) struct ShardReport {
    pub(super) name: String,
    /// The URL, without the password.
    pub(super) url: String,
    /// Findings about the shard as a whole.
    pub(super) findings: Vec<Finding>,
    pub(super) servers: Vec<ServerReport>,
}

/// Findings about one server.
#[derive(Debug)]
pub(super) struct ServerReport {
    /// `host:port`
    pub(super) address: String,
    /// The role of the server in the shard.
    pub(super) part: &'static str,
    pub(super) findings: Vec<Finding>,
}

impl Report {
    fn findings(&self) -> impl Iterator<Item = &Finding> {
        let of_shards = self.shards.iter().flat_map(|shard| {
            let of_servers = shard.servers.iter().flat_map(|server| &server.findings);
            shard.findings.iter().chain(of_servers)
        });
        self.settings.iter().chain(of_shards)
    }

    fn count(&self, level: Level) -> usize {
        self.findings().filter(|finding| finding.level == level).count()
    }

    /// The worst level of all findings.
    pub(super) fn level(&self) -> Level {
        self.findings().map(|finding| finding.level).max().unwrap_or(Level::Ok)
    }

    pub(super) fn exit_code(&self) -> u8 {
        match self.level() {
            Level::Ok | Level::Note => exit::OK,
            Level::Warning => exit::WARNINGS,
            Level::Error => exit::ERRORS,
        }
    }

    pub(super) fn as_json(&self) -> Value {
        let list = |findings: &[Finding]| findings.iter().map(Finding::as_json).collect::<Vec<_>>();
        let shards: Vec<_> = self
            .shards
            .iter()
            .map(|shard| {
                let servers: Vec<_> = shard
                    .servers
                    .iter()
                    .map(|server| {
                        json!({ "server": server.address, "part": server.part, "findings": list(&server.findings) })
                    })
                    .collect();
                json!({ "name": shard.name, "url": shard.url, "findings": list(&shard.findings), "servers": servers })
            })
            .collect();
        let counts: serde_json::Map<_, _> = Level::ALL
            .into_iter()
            .map(|level| (level.word().to_owned(), self.count(level).into()))
            .collect();
        json!({
            "level": self.level().word(),
            "exit_code": self.exit_code(),
            "counts": counts,
            "settings": list(&self.settings),
            "shards": shards,
        })
    }

    pub(super) fn as_text(&self, colouring: Colouring) -> String {
        let mut text = String::new();
        // Writing to a string can't fail.
        if !self.settings.is_empty() {
            writeln!(text, "{}", colouring.bold("settings")).ok();
            write_findings(&mut text, &self.settings, 2, colouring);
            text.push('\n');
        }
        for shard in &self.shards {
            writeln!(text, "{}  {}", colouring.bold(&shard.name), printable(&shard.url)).ok();
            write_findings(&mut text, &shard.findings, 2, colouring);
            for server in &shard.servers {
                writeln!(
                    text,
                    "  {}  {}",
                    colouring.bold(&printable(&server.address)),
                    server.part
                )
                .ok();
                write_findings(&mut text, &server.findings, 4, colouring);
            }
            text.push('\n');
        }
        let mut counts = Level::ALL.map(|level| match (self.count(level), level) {
            (1, _) | (_, Level::Ok) => format!("{} {}", self.count(level), level.word()),
            (count, _) => format!("{count} {}s", level.word()),
        });
        counts.reverse();
        writeln!(text, "{}", counts.join(", ")).ok();
        text
    }
}

/// Width of the column with the names of checks.
const CHECK_WIDTH: usize = 24;

fn write_findings(text: &mut String, findings: &[Finding], indent: usize, colouring: Colouring) {
    for finding in findings {
        let level = colouring.level(finding.level);
        let (check, found) = (finding.check, printable(&finding.found));
        writeln!(text, "{:indent$}{level} {check:CHECK_WIDTH$} {found}", "").ok();
        let below = indent + LEVEL_WIDTH + 1;
        for (title, line) in [("why", &finding.why), ("fix", &finding.fix)] {
            if let Some(line) = line.as_ref().filter(|line| !line.is_empty()) {
                writeln!(text, "{:below$}{title:<5} {}", "", printable(line)).ok();
            }
        }
    }
}

const LEVEL_WIDTH: usize = 7;

/// Whether the text output uses colours.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colouring {
    Plain,
    Colours,
}

impl Colouring {
    fn with(self, code: &str, text: &str) -> String {
        match self {
            Self::Plain => text.to_owned(),
            Self::Colours => format!("\x1b[{code}m{text}\x1b[0m"),
        }
    }

    fn bold(self, text: &str) -> String {
        self.with("1", text)
    }

    fn level(self, level: Level) -> String {
        let code = match level {
            Level::Ok => "32",
            Level::Note => "36",
            Level::Warning => "33",
            Level::Error => "1;31",
        };
        self.with(code, &format!("{:LEVEL_WIDTH$}", level.word()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(levels: &[Level]) -> Report {
        let findings = levels
            .iter()
            .map(|&level| Finding::new("a-check", level, "a value", "a reason", "a command"));
        Report {
            settings: Vec::new(),
            shards: vec![ShardReport {
                name: "a".to_owned(),
                url: "redis://a:1/0".to_owned(),
                findings: vec![Finding::ok("shard-check", "good")],
                servers: vec![ServerReport {
                    address: "a:1".to_owned(),
                    part: "primary",
                    findings: findings.collect(),
                }],
            }],
        }
    }

    #[test]
    fn the_worst_finding_decides_on_the_exit_code() {
        for (levels, word, code) in [
            (&[][..], "ok", 0),
            (&[Level::Note, Level::Ok], "note", 0),
            (&[Level::Warning, Level::Note], "warning", 1),
            (&[Level::Warning, Level::Error, Level::Ok], "error", 2),
        ] {
            let json = report(levels).as_json();
            assert_eq!((&json["level"], &json["exit_code"]), (&word.into(), &code.into()));
        }
    }

    #[test]
    fn text_has_a_line_per_check_and_colours_only_if_requested() {
        let report = report(&[Level::Warning]);
        let text = report.as_text(Colouring::Plain);
        let expected = "\
a  redis://a:1/0
  ok      shard-check              good
  a:1  primary
    warning a-check                  a value
            why   a reason
            fix   a command

0 errors, 1 warning, 0 notes, 1 ok
";
        assert_eq!(text, expected);
        assert!(report.as_text(Colouring::Colours).contains("\x1b[33mwarning\x1b[0m"));
    }
}
