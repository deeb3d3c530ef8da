//! Short forms of times, numbers and names.

use std::time::Duration;

use ratatui::text::Span;
use shardlock::tool::must_be_escaped;

use crate::top::source::Age;

/// At most six characters: `0.25ms`, `8.2ms`, `820ms`, `8.2s`, `59s`, `12m03s`, `5h12m`, `3d04h`.
pub(super) fn time(time: Duration) -> String {
    let (seconds, ms) = (time.as_secs(), time.as_secs_f64() * 1e3);
    // The bounds are where rounding would add a digit.
    if ms < 9.995 {
        if ms < 0.005 {
            "0ms".to_owned()
        } else {
            format!("{ms:.2}ms")
        }
    } else if ms < 99.95 {
        format!("{ms:.1}ms")
    } else if ms < 999.5 {
        format!("{ms:.0}ms")
    } else if ms < 9_950.0 {
        format!("{:.1}s", ms / 1e3)
    } else if seconds < 60 {
        format!("{seconds}s")
    } else if seconds < 3600 {
        format!("{}m{:02}s", seconds / 60, seconds % 60)
    } else if seconds < 86_400 {
        format!("{}h{:02}m", seconds / 3600, seconds / 60 % 60)
    } else if seconds < 1000 * 86_400 {
        format!("{}d{:02}h", seconds / 86_400, seconds / 3600 % 24)
    } else {
        format!("{}d", (seconds / 86_400).min(99_999))
    }
}

pub(super) fn age(age: Age) -> String {
    let time = time(age.time);
    if age.at_least { format!(">{time}") } else { time }
}

/// At most six characters: `8.2`, `820`, `12.3k`, `4.5M`.
pub(super) fn rate(rate: f64) -> String {
    if rate < 9.95 && rate > 0.0 {
        format!("{rate:.1}")
    } else {
        count(rate.round().max(0.0) as u64)
    }
}

pub(super) fn count(count: u64) -> String {
    let scaled = count as f64;
    match count {
        0..=9_999 => count.to_string(),
        10_000..=999_949 => format!("{:.1}k", scaled / 1e3),
        999_950..=999_949_999 => format!("{:.1}M", scaled / 1e6),
        _ => format!("{:.1}G", scaled / 1e9),
    }
}

/// Where a text that is too long is shortened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Truncation {
    Head,
    Middle,
    Tail,
}

/// The width of a text in columns.
pub(super) fn width(text: &str) -> usize {
    Span::raw(text).width()
}

/// Replaces characters that would move the cursor or change the writing direction by `?`: a key can
/// contain any character, and there is little room for escapes.
pub(super) fn sanitize(text: &str) -> String {
    text.chars()
        .map(|char| if must_be_escaped(char) { '?' } else { char })
        .collect()
}

/// Shortens a text to at most this many columns, with an ellipsis for the part that is left out.
pub(super) fn truncate(text: &str, columns: usize, cut: Truncation) -> String {
    if width(text) <= columns {
        return text.to_owned();
    }
    let Some(room) = columns.checked_sub(1) else {
        return String::new();
    };
    let (head, tail) = match cut {
        Truncation::Head => (0, room),
        Truncation::Middle => (room.div_ceil(2), room / 2),
        Truncation::Tail => (room, 0),
    };
    let head = prefix(text.chars(), head);
    let tail: String = prefix(text.chars().rev(), tail).chars().rev().collect();
    format!("{head}…{tail}")
}

/// The longest prefix that fits into this many columns.
fn prefix(chars: impl Iterator<Item = char>, columns: usize) -> String {
    let mut room = columns;
    let mut encoded = [0; 4];
    chars
        .take_while(|char| match room.checked_sub(width(char.encode_utf8(&mut encoded))) {
            Some(left) => {
                room = left;
                true
            }
            None => false,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_take_six_characters_at_most() {
        for (micros, text) in [
            (0, "0ms"),
            (250, "0.25ms"),
            (9_994, "9.99ms"),
            (9_996, "10.0ms"),
            (99_960, "100ms"),
            (820_000, "820ms"),
            (999_600, "1.0s"),
            (9_960_000, "9s"),
            (59_999_999, "59s"),
            (723_000_000, "12m03s"),
            (18_720_000_000, "5h12m"),
            (273_600_000_000, "3d04h"),
            (1_000 * 86_400_000_000, "1000d"),
            (u64::MAX, "99999d"),
        ] {
            let shown = time(Duration::from_micros(micros));
            assert_eq!(shown, text);
            assert!(shown.len() <= 6);
        }
    }

    #[test]
    fn counts_and_rates_take_six_characters_at_most() {
        for (number, text) in [
            (0, "0"),
            (9_999, "9999"),
            (10_000, "10.0k"),
            (999_949, "999.9k"),
            (999_950, "1.0M"),
        ] {
            assert_eq!(count(number), text);
        }
        assert_eq!(
            [rate(0.0), rate(0.04), rate(9.94), rate(9.96)],
            ["0", "0.0", "9.9", "10"]
        );
    }

    #[test]
    fn a_long_text_loses_what_matters_least() {
        assert_eq!(truncate("coupon:123", 10, Truncation::Middle), "coupon:123");
        assert_eq!(truncate("coupon:1234", 10, Truncation::Middle), "coupo…1234");
        assert_eq!(
            truncate("src/jobs.rs:57:13", 10, Truncation::Head),
            "…rs:57:13".replace("…rs", "….rs")
        );
        assert_eq!(truncate("a long reason", 7, Truncation::Tail), "a long…");
        assert_eq!(truncate("abc", 0, Truncation::Middle), "");
        assert_eq!(truncate("abc", 1, Truncation::Middle), "…");
        // A wide character is not split.
        assert_eq!(truncate("鍵鍵鍵鍵", 6, Truncation::Middle), "鍵…鍵");
        assert!(width(&truncate("鍵鍵鍵鍵", 4, Truncation::Middle)) <= 4);
    }

    #[test]
    fn characters_that_move_the_cursor_are_not_shown() {
        assert_eq!(sanitize("a\x1b[2J\u{202e}b\n"), "a?[2J?b?");
    }
}
