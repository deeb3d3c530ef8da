//! `shardlock top` as a real process on a real terminal, beside real processes that contend for the
//! same keys.

mod endpoints;
mod live;
pub(crate) mod load;
mod once;
mod screenshot;
mod shards;

use support::Terminal;

use crate::tool::bare;

/// The tool with these arguments on a terminal of 24 rows and 80 columns.
#[track_caller]
pub(crate) fn top(args: &[&str]) -> Terminal {
    let args = [&["top", "--interval", "100ms"], args].concat();
    Terminal::open(bare(&args), 24, 80)
}

/// The words of the row that starts with this key.
fn row<'a>(lines: &'a [String], key: &str) -> Option<Vec<&'a str>> {
    let words = lines.iter().map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.into_iter().find(|words| words.first() == Some(&key))
}

/// Whether some line contains this text.
fn has(lines: &[String], text: &str) -> bool {
    lines.iter().any(|line| line.contains(text))
}

/// The first column of the table's rows.
fn keys(lines: &[String]) -> Vec<String> {
    let table = lines.iter().skip_while(|line| !line.starts_with("KEY")).skip(1);
    let rows = table.take_while(|line| !line.is_empty() && !line.starts_with(' '));
    rows.filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}
