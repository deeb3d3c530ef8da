//! The help screen: keys and columns.

use ratatui::text::Line;

use super::style;

const HELP: &[(&str, &str)] = &[
    ("tab  1 2 3 4", "next view; hot keys, held locks, shards, clients"),
    ("s  r", "sort by the next column; reverse the order"),
    (
        "/  esc",
        "filter rows by text in key, holder, caller or shard; clear it",
    ),
    ("space  n", "pause or resume; search for more keys (--shard)"),
    ("arrows  page", "move through the rows"),
    ("q  ctrl-c", "quit"),
    ("", ""),
    (
        "HOLDER",
        "the process, as host-pid, or several; \"not here\": none shown",
    ),
    (
        "MODE HOLDERS",
        "permits in use, of their limit; guards, or leases with --shard",
    ),
    ("AGE  LEFT", "time held; time until it expires unless renewed"),
    ("WAITERS", "waiting tasks; with --shard, waiting processes"),
    ("P50 P99", "waits for acquired locks, accurate within a factor of two"),
    ("CONT/S", "requests per second that found it held or waited for"),
    ("LOCKS/S", "locks acquired; LOCAL: handed over within the process;"),
    ("", "REMOTE: handed over by another process"),
    ("CLIENT", "of an agent: process; OLDEST lock, longest WAIT, their KEYS"),
    ("RT P50 P99", "round trips to the shard"),
    (">1m03s", "at least: a store knows the holder, but not since when"),
    ("", ""),
    ("", "With several processes, counts are summed, and waits and"),
    ("", "round trips are the largest. Rates are between two samples."),
];

pub(super) fn lines() -> Vec<Line<'static>> {
    let lines = HELP.iter().map(|(what, meaning)| {
        let mut line = Line::from(format!("  {what:13} "));
        line.push_span(*meaning);
        line
    });
    std::iter::once(Line::styled("  help, ? to close it", style::TITLE))
        .chain(lines)
        .collect()
}
