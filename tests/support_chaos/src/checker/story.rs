//! The lines of a history around a finding.

use std::fmt::Write;

use super::Finding;
use crate::clock::{Nanos, SECOND};
use crate::history::{Event, Line};

/// Number of lines about the key around the finding, and for how long before it faults are
/// included.
const LINES: usize = 24;
const FAULTS_BEFORE: Nanos = 8 * SECOND;

pub(super) fn render(finding: &Finding, lines: &[Line]) -> String {
    let (start, key) = (finding.since.min(finding.at), finding.key.as_deref());
    let mut of_key = std::collections::HashSet::new();
    for line in lines {
        if let Event::Asked { key: asked, .. } = &line.event
            && Some(asked.as_str()) == key
        {
            of_key.insert((line.who.as_str(), line.number));
        }
    }
    let is_fault = |line: &Line| matches!(line.event, Event::FaultBegun { .. } | Event::FaultOver);
    let concerns = |line: &&Line| {
        is_fault(line) && line.at + FAULTS_BEFORE > start && line.at < finding.at + SECOND
            || of_key.contains(&(line.who.as_str(), line.number))
            || matches!(line.event, Event::Left { .. })
    };
    let concerned: Vec<&Line> = lines.iter().filter(concerns).collect();
    // Two separate excerpts if many lines lie between them, and all faults.
    let place = |at: Nanos| concerned.partition_point(|line| line.at < at);
    let near = |index: usize, place: usize| index + LINES / 2 >= place && index < place + LINES / 2;
    let (first, last) = (place(start), place(finding.at));
    let mut story = format!(
        "{} of key {} at {}: {}\n",
        finding.violation,
        key.unwrap_or("-"),
        finding.at,
        finding.words
    );
    let mut skipped = 0;
    for (index, line) in concerned.iter().enumerate() {
        if near(index, first) || near(index, last) || is_fault(line) {
            if skipped > 0 {
                writeln!(story, "    ... {skipped} lines").expect("a string");
            }
            skipped = 0;
            let millis = (line.at as f64 - finding.at as f64) / 1e6;
            writeln!(story, "  {millis:+12.3} ms  {line}").expect("a string");
        } else if index > first && index < last {
            skipped += 1;
        }
    }
    story
}
