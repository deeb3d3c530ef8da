//! The types of setting values: how each is parsed from text and checked.

use std::borrow::Cow;
use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use super::{Password, ReadyWhen, ShardConfig};
use crate::endpoint::{Endpoint, is_name_byte, redact};
use crate::error::InvalidSetting;
use crate::router::NAME_BYTES_MAX;
use crate::text::printable;

/// An [`InvalidSetting`] without the name of its field, which differs between sources.
#[derive(Debug)]
pub(super) struct Problem {
    /// The part of the field, such as `[1].url`; empty if it is the whole field.
    part: String,
    value: String,
    bound: String,
}

impl Problem {
    pub(super) fn new(value: impl Into<String>, bound: impl Into<String>) -> Self {
        Self {
            part: String::new(),
            value: value.into(),
            bound: bound.into(),
        }
    }

    pub(super) fn at(mut self, part: impl Into<String>) -> Self {
        self.part = part.into();
        self
    }

    pub(super) fn of(self, field: &str) -> InvalidSetting {
        InvalidSetting::new(format!("{field}{}", self.part), self.value, self.bound)
    }
}

/// Formats a value for an error: quoted, truncated, and without a password that was put into the
/// wrong field.
pub(super) fn echo(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    let shown = without_password(text);
    match shown.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{:?}...", &shown[..end]),
        None => format!("{shown:?}"),
    }
}

/// The same without quotes and in full, for the name of a file.
pub(super) fn plain(text: &str) -> String {
    printable(&without_password(text)).into_owned()
}

fn without_password(text: &str) -> Cow<'_, str> {
    if text.contains("://") || text.contains('@') {
        redact(text).into()
    } else {
        text.into()
    }
}

/// The bounds of one field.
pub(super) trait Bounds {
    type Value;
    /// Parses a value. It may still be out of bounds.
    fn parse(&self, text: &str) -> Result<Self::Value, Problem>;
    fn check(&self, value: &Self::Value) -> Result<(), Problem>;
}

/// From the first to the second, both inclusive.
pub(super) struct Within<T>(pub(super) T, pub(super) T);

/// A type of value that can be bounded by [`Within`].
pub(super) trait Quantity: PartialOrd + Sized {
    /// How a value is written.
    const FORM: &str;
    fn read(text: &str) -> Option<Self>;
    fn show(&self) -> String;
}

impl<T: Quantity> Within<T> {
    fn bound(&self) -> String {
        format!("from {} to {}", self.0.show(), self.1.show())
    }
}

impl<T: Quantity> Bounds for Within<T> {
    type Value = T;

    fn parse(&self, text: &str) -> Result<T, Problem> {
        T::read(text).ok_or_else(|| Problem::new(echo(text), format!("{} {}", T::FORM, self.bound())))
    }

    fn check(&self, value: &T) -> Result<(), Problem> {
        // NaN fails both comparisons, so it is not within.
        if self.0 <= *value && *value <= self.1 {
            Ok(())
        } else {
            Err(Problem::new(value.show(), self.bound()))
        }
    }
}

impl Quantity for Duration {
    const FORM: &str = "a duration such as 500ms, 10s or 2m,";

    fn read(text: &str) -> Option<Self> {
        // A number needs a unit; humantime accepts a bare zero.
        let has_unit = text.ends_with(|char: char| char.is_ascii_alphabetic());
        humantime::parse_duration(text).ok().filter(|_| has_unit)
    }

    fn show(&self) -> String {
        // humantime would format 365 days as "11months 30days 3h 50m 24s".
        const UNITS: [(u128, &str); 7] = [
            (86_400_000_000_000, "d"),
            (3_600_000_000_000, "h"),
            (60_000_000_000, "m"),
            (1_000_000_000, "s"),
            (1_000_000, "ms"),
            (1_000, "us"),
            (1, "ns"),
        ];
        let nanos = self.as_nanos();
        UNITS
            .iter()
            .find(|(unit, _)| nanos > 0 && nanos.is_multiple_of(*unit))
            .map_or_else(|| "0s".to_owned(), |(unit, name)| format!("{}{name}", nanos / unit))
    }
}

impl Quantity for f64 {
    const FORM: &str = "a number";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Quantity for usize {
    const FORM: &str = "a whole number";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Quantity for u32 {
    const FORM: &str = "a whole number";

    fn read(text: &str) -> Option<Self> {
        text.parse().ok()
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// `none`, or a value within other bounds.
pub(super) struct OrNone<B>(pub(super) B);

impl<B: Bounds> Bounds for OrNone<B> {
    type Value = Option<B::Value>;

    fn parse(&self, text: &str) -> Result<Self::Value, Problem> {
        if text == "none" {
            return Ok(None);
        }
        self.0.parse(text).map(Some).map_err(or_none)
    }

    fn check(&self, value: &Self::Value) -> Result<(), Problem> {
        match value {
            Some(value) => self.0.check(value).map_err(or_none),
            None => Ok(()),
        }
    }
}

fn or_none(mut problem: Problem) -> Problem {
    problem.bound.insert_str(0, "none, or ");
    problem
}

/// On or off.
pub(super) struct Switch;

impl Bounds for Switch {
    type Value = bool;

    fn parse(&self, text: &str) -> Result<bool, Problem> {
        text.parse().map_err(|_| Problem::new(echo(text), "true or false"))
    }

    fn check(&self, _: &bool) -> Result<(), Problem> {
        Ok(())
    }
}

/// When the admin endpoint reports that the process is ready.
pub(super) struct Readiness;

impl Bounds for Readiness {
    type Value = ReadyWhen;

    fn parse(&self, text: &str) -> Result<ReadyWhen, Problem> {
        let found = ReadyWhen::EACH.into_iter().find(|rule| rule.as_str() == text);
        found.ok_or_else(|| Problem::new(echo(text), "any or all"))
    }

    fn check(&self, _: &ReadyWhen) -> Result<(), Problem> {
        Ok(())
    }
}

/// 1 to `most` bytes, all of them allowed.
pub(super) struct Text {
    pub(super) most: usize,
    pub(super) allowed: fn(u8) -> bool,
    /// What is allowed, as text for the error.
    pub(super) words: &'static str,
}

impl Bounds for Text {
    type Value = String;

    fn parse(&self, text: &str) -> Result<String, Problem> {
        Ok(text.to_owned())
    }

    fn check(&self, value: &String) -> Result<(), Problem> {
        if (1..=self.most).contains(&value.len()) && value.bytes().all(self.allowed) {
            Ok(())
        } else {
            let bound = format!("1 to {} {}", self.most, self.words);
            Err(Problem::new(echo(value), bound))
        }
    }
}

/// The name of a file. Whether the file can be read is checked when it is used.
pub(super) struct File;

const PATH_BYTES_MAX: usize = 4096;

impl Bounds for File {
    type Value = PathBuf;

    fn parse(&self, text: &str) -> Result<PathBuf, Problem> {
        Ok(text.into())
    }

    fn check(&self, value: &PathBuf) -> Result<(), Problem> {
        if (1..=PATH_BYTES_MAX).contains(&value.as_os_str().len()) {
            Ok(())
        } else {
            let bound = format!("a file name of 1 to {PATH_BYTES_MAX} bytes");
            Err(Problem::new(echo(&value.display().to_string()), bound))
        }
    }
}

/// A password. Its value is never part of a problem.
pub(super) struct Secret;

const PASSWORD_BYTES_MAX: usize = 16 * 1024;

impl Bounds for Secret {
    type Value = Password;

    fn parse(&self, text: &str) -> Result<Password, Problem> {
        Ok(text.into())
    }

    fn check(&self, password: &Password) -> Result<(), Problem> {
        let bytes = password.expose().len();
        if (1..=PASSWORD_BYTES_MAX).contains(&bytes) {
            return Ok(());
        }
        let bound = format!("1 to {PASSWORD_BYTES_MAX} bytes long");
        Err(Problem::new(format!("{bytes} bytes long"), bound))
    }
}

/// Splits a list of shards at its commas. An item without a scheme is a further host of the
/// previous URL.
fn split_at_commas(text: &str) -> Vec<String> {
    let mut items: Vec<String> = Vec::new();
    for item in text.split(',').filter(|item| !item.is_empty()) {
        match items.last_mut() {
            Some(url) if !item.contains("://") => {
                url.push(',');
                url.push_str(item);
            }
            _ => items.push(item.to_owned()),
        }
    }
    items
}

/// 1 to `most` shards with unique names.
pub(super) struct Shards {
    pub(super) most: usize,
}

const SHARD_NAME: Text = Text {
    most: NAME_BYTES_MAX,
    allowed: is_name_byte,
    words: "letters, digits, dots, _ and -",
};

impl Bounds for Shards {
    type Value = Vec<ShardConfig>;

    fn parse(&self, text: &str) -> Result<Self::Value, Problem> {
        let shards = text.split_whitespace().flat_map(split_at_commas).enumerate();
        Ok(shards
            .map(|(position, item)| ShardConfig::from_text(position, &item))
            .collect())
    }

    fn check(&self, shards: &Self::Value) -> Result<(), Problem> {
        let bound = || format!("a list of 1 to {} shards", self.most);
        if shards.is_empty() {
            return Err(Problem::new("empty", bound()));
        }
        if shards.len() > self.most {
            return Err(Problem::new(format!("a list of {}", shards.len()), bound()));
        }
        let mut names = HashSet::new();
        for (position, shard) in shards.iter().enumerate() {
            let at = |part: &str| format!("[{position}].{part}");
            SHARD_NAME
                .check(&shard.name)
                .map_err(|problem| problem.at(at("name")))?;
            if !names.insert(&shard.name) {
                let problem = Problem::new(echo(&shard.name), "given to one shard only");
                return Err(problem.at(at("name")));
            }
            Endpoint::parse(&shard.url)
                .map_err(|invalid| Problem::new(invalid.value, invalid.bound).at(at(&invalid.field)))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_round_trip_through_their_text() {
        for text in ["0s", "1ns", "1500us", "50ms", "90s", "2m", "25h", "1d", "365d"] {
            assert_eq!(Duration::read(text).unwrap().show(), text);
        }
        assert_eq!(Duration::read("1m 30s").unwrap().show(), "90s");
        assert_eq!(Duration::read("24h").unwrap().show(), "1d");
        for text in ["0", "10", "", "s", "-1s", "1 fortnight", "99999999999999999999s"] {
            assert_eq!(Duration::read(text), None, "{text}");
        }
    }

    #[test]
    fn comma_separates_shards_or_the_hosts_of_one_shard() {
        let urls = |text: &str| {
            let shards = Shards { most: 9 }.parse(text).unwrap();
            shards.into_iter().map(|shard| shard.url).collect::<Vec<_>>()
        };
        assert_eq!(
            urls("a=redlock://h1,h2:1,h3/0,redis://:p=w@h\nb=redis+cluster://h,i, memory://"),
            [
                "redlock://h1,h2:1,h3/0",
                "redis://:p=w@h",
                "redis+cluster://h,i",
                "memory://"
            ]
        );
        assert_eq!(urls(" , ,"), [""; 0]);
    }

    #[test]
    fn echoed_value_is_truncated() {
        assert_eq!(echo(&"é".repeat(81)), format!("{:?}...", "é".repeat(80)));
        assert_eq!(echo("a:b\n"), "\"a:b\\n\"");
        assert_eq!(echo("redis://:s3cret@host"), "\"redis://:***@host\"");
    }
}
