//! What the keys do and the columns mean.

use ratatui::text::Line;

use super::style;

const HELP: &[(&str, &str)] = &[
    ("tab  1 2 3", "next view; hot keys, held locks, shards"),
    ("s  r", "sort by the next column; reverse the order"),
    ("/", "show only what has a text in its key, holder, caller or shard"),
    ("esc", "show everything again"),
    ("space  n", "pause and go on; look for more keys (--shard)"),
    ("arrows  page", "move through the rows"),
    ("q  ctrl-c", "quit"),
    ("", ""),
    ("HOLDER", "the process, as host-pid; not here: none of those looked at"),
    ("AGE  LEFT", "for how long it is held; until when without a renewal"),
    ("WAITERS", "tasks that wait; with --shard, processes that wait"),
    ("P50 P99", "waits of those who got it, right within a factor of two"),
    ("CONT/S", "how often a second it was found held or wanted"),
    ("LOCKS/S", "all locks; LOCAL: from a task of the same process;"),
    ("", "REMOTE: from another process"),
    ("RT P50 P99", "round trips to the shard"),
    (">1m03s", "at least: a store tells only who, not since when"),
    ("", ""),
    ("", "Several processes: counts are added up, of waits and round"),
    ("", "trips the largest is shown. Rates are those between two looks."),
];

pub(super) fn lines() -> Vec<Line<'static>> {
    let lines = HELP.iter().map(|(what, meaning)| {
        let mut line = Line::from(format!("  {what:13} "));
        line.push_span(*meaning);
        line
    });
    std::iter::once(Line::styled("  ? help, again to leave it", style::TITLE))
        .chain(lines)
        .collect()
}
