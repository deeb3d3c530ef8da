//! The framing of requests: arrays of strings, as client libraries send them, and lines, as people
//! type them into `nc -U`.
//!
//! # Implementation details
//!
//! The bytes come from anybody who can connect. A request is a flat array of strings, so nothing
//! here recurses; decoders for replies, which accept arrays in arrays, can be made to overflow the
//! stack. Every length is compared with a limit before anything is allocated for it. The reader
//! remembers how much of an incomplete request it has seen, so a client that sends single bytes
//! costs no more than one that sends them together.
//!
//! This file knows neither sockets nor commands, so that the fuzzer can reach it.

use std::fmt;
use std::ops::Range;

/// The most words in a request.
pub(super) const WORDS_MAX: usize = 1024;

/// The longest line with a length: a sign, the digits of a 64-bit number, and the line break.
const LENGTH_LINE_MAX: usize = 24;

/// How much memory a connection without an unfinished request keeps.
const KEPT_BYTES: usize = 1024;

/// The bytes that were received and not used yet, and how far they were parsed.
#[derive(Debug)]
pub(super) struct Requests {
    received: Vec<u8>,
    /// Where the first unfinished request begins in `received`.
    start: usize,
    /// What is known of the unfinished request.
    unfinished: Unfinished,
    bytes_max: usize,
}

/// What is known of a request that has not been received completely. Positions count from its
/// first byte.
#[derive(Debug, Default)]
struct Unfinished {
    /// How many bytes have been parsed.
    parsed: usize,
    /// How many words are missing, once the first line is known.
    missing: Option<usize>,
    words: Vec<Range<usize>>,
}

/// Why a connection cannot continue: where the next request begins is unknown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Malformed {
    /// What is wrong, in the words of Redis.
    Protocol(String),
    /// The request is longer than this number of bytes.
    TooLong(usize),
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Protocol(what) => write!(f, "ERR Protocol error: {what}"),
            Self::TooLong(most) => write!(
                f,
                "LIMIT the request is longer than {most} bytes, the most that the agent accepts; \
                 shorten it, or raise --max-request-bytes"
            ),
        }
    }
}

/// Whether the reader is done with the first bytes.
enum Step {
    /// More bytes are needed.
    Incomplete,
    /// There was something that asks for nothing, such as an empty line.
    Nothing,
    /// The words of a request, and its length.
    Complete(usize),
}

impl Requests {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self {
            received: Vec::new(),
            start: 0,
            unfinished: Unfinished::default(),
            bytes_max,
        }
    }

    /// How many more bytes are accepted. Zero if there are as many as a request may have.
    pub(super) fn room(&self) -> usize {
        self.bytes_max.saturating_sub(self.received.len() - self.start)
    }

    /// Adds bytes that were received. The caller must not add more than [`room`](Self::room).
    pub(super) fn add(&mut self, bytes: &[u8]) {
        if self.start > 0 {
            self.received.drain(..self.start);
            self.start = 0;
        }
        self.received.extend_from_slice(bytes);
    }

    /// Passes the words of the next request to `parse`. Returns `None` if no request is complete.
    ///
    /// # Errors
    ///
    /// [`Malformed`] if the bytes are no request. The same error is returned from then on.
    pub(super) fn next<T>(&mut self, parse: impl Fn(&[&[u8]]) -> T) -> Result<Option<T>, Malformed> {
        loop {
            let pending = &self.received[self.start..];
            let Some(&first) = pending.first() else {
                self.shrink();
                return Ok(None);
            };
            let is_array = first == b'*';
            let step = if is_array {
                self.unfinished.parse_array(pending, self.bytes_max)?
            } else {
                self.unfinished.find_line_end(pending)
            };
            match step {
                Step::Incomplete if pending.len() >= self.bytes_max => {
                    return Err(Malformed::TooLong(self.bytes_max));
                }
                Step::Incomplete => return Ok(None),
                Step::Nothing => {
                    let length = self.unfinished.parsed;
                    self.consume(length);
                }
                Step::Complete(length) if is_array => {
                    let words = &self.unfinished.words;
                    let words: Vec<&[u8]> = words.iter().map(|word| &pending[word.clone()]).collect();
                    let parsed = parse(&words);
                    self.consume(length);
                    return Ok(Some(parsed));
                }
                Step::Complete(length) => {
                    let words = words_of_line(&pending[..length])
                        .ok_or_else(|| Malformed::Protocol("unbalanced quotes in request".to_owned()))?;
                    if words.len() > WORDS_MAX {
                        return Err(Malformed::Protocol(format!("more than {WORDS_MAX} words in a line")));
                    }
                    let words: Vec<&[u8]> = words.iter().map(Vec::as_slice).collect();
                    let parsed = if words.is_empty() { None } else { Some(parse(&words)) };
                    self.consume(length);
                    if parsed.is_some() {
                        return Ok(parsed);
                    }
                }
            }
        }
    }

    fn consume(&mut self, length: usize) {
        self.start += length;
        self.unfinished.parsed = 0;
        self.unfinished.missing = None;
        self.unfinished.words.clear();
    }

    /// Returns memory that a connection without an unfinished request does not need.
    fn shrink(&mut self) {
        self.start = 0;
        self.received.clear();
        self.received.shrink_to(KEPT_BYTES);
        self.unfinished.words.shrink_to(KEPT_BYTES / size_of::<Range<usize>>());
    }
}

impl Unfinished {
    /// Parses as much of `*2\r\n$4\r\nPING\r\n$2\r\nhi\r\n` as there is.
    fn parse_array(&mut self, pending: &[u8], bytes_max: usize) -> Result<Step, Malformed> {
        let mut missing = match self.missing {
            Some(missing) => missing,
            None => {
                let Some((count, end)) = length_line(pending, 0, "multibulk")? else {
                    return Ok(Step::Incomplete);
                };
                self.parsed = end;
                match usize::try_from(count) {
                    // Redis accepts an array without elements, and an absent one, and ignores them.
                    Err(_) | Ok(0) => return Ok(Step::Nothing),
                    Ok(count) if count > WORDS_MAX => {
                        return Err(Malformed::Protocol("invalid multibulk length".to_owned()));
                    }
                    Ok(count) => count,
                }
            }
        };
        self.missing = Some(missing);
        while missing > 0 {
            match pending.get(self.parsed) {
                None => return Ok(Step::Incomplete),
                Some(b'$') => {}
                Some(&other) => {
                    let other = char::from(other).escape_default();
                    return Err(Malformed::Protocol(format!("expected '$', got '{other}'")));
                }
            }
            let Some((length, begin)) = length_line(pending, self.parsed, "bulk")? else {
                return Ok(Step::Incomplete);
            };
            let length = usize::try_from(length).map_err(|_| Malformed::Protocol("invalid bulk length".to_owned()))?;
            if length > bytes_max {
                return Err(Malformed::TooLong(bytes_max));
            }
            let end = begin + length;
            if end + 2 > bytes_max {
                return Err(Malformed::TooLong(bytes_max));
            }
            match pending.get(end..end + 2) {
                None => return Ok(Step::Incomplete),
                Some(b"\r\n") => {}
                Some(_) => {
                    return Err(Malformed::Protocol("expected a line break after a string".to_owned()));
                }
            }
            self.words.push(begin..end);
            self.parsed = end + 2;
            missing -= 1;
            self.missing = Some(missing);
        }
        Ok(Step::Complete(self.parsed))
    }

    /// Looks for the end of a line that is typed by hand.
    fn find_line_end(&mut self, pending: &[u8]) -> Step {
        let new = &pending[self.parsed..];
        match new.iter().position(|&byte| byte == b'\n') {
            Some(position) => Step::Complete(self.parsed + position + 1),
            None => {
                self.parsed = pending.len();
                Step::Incomplete
            }
        }
    }
}

/// Parses a line such as `*3\r\n` that begins at `from`. Returns the number and where the line
/// ends, or `None` if the end has not been received.
fn length_line(pending: &[u8], from: usize, kind: &str) -> Result<Option<(i64, usize)>, Malformed> {
    let line = &pending[from..];
    let line = &line[..line.len().min(LENGTH_LINE_MAX)];
    let invalid = || Malformed::Protocol(format!("invalid {kind} length"));
    let Some(end) = line.iter().position(|&byte| byte == b'\n') else {
        return if line.len() == LENGTH_LINE_MAX {
            Err(invalid())
        } else {
            Ok(None)
        };
    };
    let digits = line[1..end].strip_suffix(b"\r").ok_or_else(invalid)?;
    // `parse` accepts a plus sign, which the protocol does not have.
    let number = std::str::from_utf8(digits).ok().filter(|text| !text.starts_with('+'));
    let number = number.and_then(|text| text.parse().ok()).ok_or_else(invalid)?;
    Ok(Some((number, from + end + 1)))
}

/// Splits a line into words as redis-cli does: by white space, with `"..."` and `'...'` around
/// words that contain some. Returns `None` if a quote is not closed, or not followed by a space.
fn words_of_line(line: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut words = Vec::new();
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        let &first = match rest.first() {
            Some(first) => first,
            None => return Some(words),
        };
        let (word, after) = match first {
            b'"' => double_quoted(&rest[1..])?,
            b'\'' => single_quoted(&rest[1..])?,
            _ => {
                let end = rest.iter().position(u8::is_ascii_whitespace).unwrap_or(rest.len());
                (rest[..end].to_vec(), &rest[end..])
            }
        };
        if after.first().is_some_and(|byte| !byte.is_ascii_whitespace()) {
            return None;
        }
        words.push(word);
        rest = after;
    }
}

/// A word up to the closing quote, and what follows it.
type Quoted<'a> = Option<(Vec<u8>, &'a [u8])>;

fn double_quoted(text: &[u8]) -> Quoted<'_> {
    let mut word = Vec::new();
    let mut rest = text;
    loop {
        match rest {
            [b'"', after @ ..] => return Some((word, after)),
            [b'\\', b'x', high, low, after @ ..] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                let digits = [*high, *low];
                let digits = std::str::from_utf8(&digits).ok()?;
                word.push(u8::from_str_radix(digits, 16).ok()?);
                rest = after;
            }
            [b'\\', escaped, after @ ..] => {
                word.push(match escaped {
                    b'n' => b'\n',
                    b'r' => b'\r',
                    b't' => b'\t',
                    b'b' => 8,
                    b'a' => 7,
                    other => *other,
                });
                rest = after;
            }
            [byte, after @ ..] => {
                word.push(*byte);
                rest = after;
            }
            [] => return None,
        }
    }
}

fn single_quoted(text: &[u8]) -> Quoted<'_> {
    let mut word = Vec::new();
    let mut rest = text;
    loop {
        match rest {
            [b'\'', after @ ..] => return Some((word, after)),
            [b'\\', b'\'', after @ ..] => {
                word.push(b'\'');
                rest = after;
            }
            [byte, after @ ..] => {
                word.push(*byte);
                rest = after;
            }
            [] => return None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All requests in these bytes, and the error after them. The bytes arrive in parts of this
    /// size.
    fn read(bytes: &[u8], part: usize, bytes_max: usize) -> (Vec<Vec<String>>, Option<Malformed>) {
        let mut requests = Requests::new(bytes_max);
        let mut found = Vec::new();
        let mut left = bytes;
        loop {
            let next = requests.next(|words| {
                let text = |word: &&[u8]| String::from_utf8_lossy(word).into_owned();
                words.iter().map(text).collect()
            });
            match next {
                Ok(Some(words)) => found.push(words),
                Err(error) => return (found, Some(error)),
                Ok(None) if left.is_empty() => return (found, None),
                Ok(None) => {
                    let now = part.min(left.len()).min(requests.room());
                    requests.add(&left[..now]);
                    left = &left[now..];
                }
            }
        }
    }

    #[track_caller]
    fn words(bytes: &str, expected: &[&[&str]]) {
        for part in [1, 2, 3, 7, 1000] {
            assert_eq!(read(bytes.as_bytes(), part, 1000), (owned(expected), None), "{part}");
        }
    }

    fn owned(words: &[&[&str]]) -> Vec<Vec<String>> {
        words
            .iter()
            .map(|words| words.iter().map(|&word| word.to_owned()).collect())
            .collect()
    }

    #[track_caller]
    fn error(bytes: &str, expected: &str) {
        for part in [1, 1000] {
            let (found, error) = read(bytes.as_bytes(), part, 64);
            assert_eq!(
                (found, error.map(|error| error.to_string())),
                (vec![], Some(expected.to_owned()))
            );
        }
    }

    #[test]
    fn requests_are_read_however_they_are_split() {
        words("*1\r\n$4\r\nPING\r\n", &[&["PING"]]);
        words("*2\r\n$4\r\nLOCK\r\n$0\r\n\r\n", &[&["LOCK", ""]]);
        words(
            "*2\r\n$4\r\nLOCK\r\n$5\r\na\r\n$1\r\n*1\r\n$1\r\nx\r\n",
            &[&["LOCK", "a\r\n$1"], &["x"]],
        );
        words(
            "*1\r\n$4\r\nPING\r\nPING\n*1\r\n$4\r\nQUIT\r\n",
            &[&["PING"], &["PING"], &["QUIT"]],
        );
    }

    #[test]
    fn lines_are_split_into_words() {
        words(
            "LOCK k TIMEOUT 5\r\n\r\n  \nPING\n",
            &[&["LOCK", "k", "TIMEOUT", "5"], &["PING"]],
        );
        words("LOCK \"a b\\x41\\n\\\"\" 'c\\'d'\n", &[&["LOCK", "a bA\n\"", "c'd"]]);
        words("\"\" x\n", &[&["", "x"]]);
    }

    #[test]
    fn arrays_without_elements_are_ignored() {
        words("*0\r\n*-1\r\n*1\r\n$1\r\nx\r\n", &[&["x"]]);
    }

    #[test]
    fn malformed_requests_are_refused() {
        let protocol = |what: &str| format!("ERR Protocol error: {what}");
        error("*x\r\n", &protocol("invalid multibulk length"));
        error("*+1\r\n", &protocol("invalid multibulk length"));
        error("*1\n$1\r\nx\r\n", &protocol("invalid multibulk length"));
        error("*99999999999999999999999999\r\n", &protocol("invalid multibulk length"));
        error("*9223372036854775807\r\n", &protocol("invalid multibulk length"));
        error("*1\r\n*1\r\n$1\r\nx\r\n", &protocol("expected '$', got '*'"));
        error("*1\r\n\u{1}", &protocol("expected '$', got '\\u{1}'"));
        error("*1\r\n$-1\r\n", &protocol("invalid bulk length"));
        error("*1\r\n$1\r\nxyz", &protocol("expected a line break after a string"));
        error("LOCK \"k\n", &protocol("unbalanced quotes in request"));
        error("LOCK 'a'b\n", &protocol("unbalanced quotes in request"));
    }

    #[test]
    fn requests_beyond_the_limit_are_refused_before_they_are_received() {
        let too_long = Malformed::TooLong(64).to_string();
        assert!(
            too_long.contains("64 bytes") && too_long.contains("--max-request-bytes"),
            "{too_long}"
        );
        error("*1\r\n$65\r\n", &too_long);
        error("*1\r\n$9223372036854775807\r\n", &too_long);
        error(&"x".repeat(64), &too_long);
        error(&format!("*2\r\n$40\r\n{}\r\n$30\r\nx", "x".repeat(40)), &too_long);
        let (found, error) = read(format!("{}\n", "x".repeat(63)).as_bytes(), 64, 64);
        assert_eq!((found.len(), error), (1, None));
    }

    #[test]
    fn idle_connection_keeps_little_memory() {
        let mut requests = Requests::new(1 << 16);
        let key = "k".repeat(60_000);
        requests.add(format!("*1\r\n$60000\r\n{key}\r\n").as_bytes());
        assert_eq!(requests.next(|words| words[0].len()), Ok(Some(60_000)));
        assert_eq!(requests.next(|words| words.len()), Ok(None));
        assert!(requests.received.capacity() <= KEPT_BYTES);
    }
}
