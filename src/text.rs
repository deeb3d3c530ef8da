//! Escapes untrusted text for a terminal, a log or a message.

use std::borrow::Cow;

/// Returns the text with every character that could move a cursor, control a terminal or start a
/// new line replaced by an escape such as `\u{1b}` or `\n`.
///
/// Names and values from a server, another process or a command line may contain anything. Text
/// shown to people goes through this function; values in the API are not changed.
#[must_use]
pub fn printable(text: &str) -> Cow<'_, str> {
    if !text.contains(must_be_escaped) {
        return Cow::Borrowed(text);
    }
    let mut escaped = String::with_capacity(text.len() + 16);
    for char in text.chars() {
        if must_be_escaped(char) {
            escaped.extend(char.escape_default());
        } else {
            escaped.push(char);
        }
    }
    Cow::Owned(escaped)
}

/// Returns whether [`printable`] escapes this character: control characters, line and paragraph
/// separators, and characters that change the direction of the following text.
#[must_use]
pub fn must_be_escaped(char: char) -> bool {
    char.is_control()
        || matches!(
            char,
            '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}'
        )
}

/// The longest prefix of at most `bytes_max` bytes that ends between characters.
pub(crate) fn shortened(text: &str, bytes_max: usize) -> &str {
    let end = (0..=bytes_max.min(text.len()))
        .rev()
        .find(|&at| text.is_char_boundary(at));
    &text[..end.unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_escaped_and_nothing_else() {
        for plain in ["", "coupon:123", "ключ 🔒 {a}", "back\\slash \"quoted\""] {
            assert!(matches!(printable(plain), Cow::Borrowed(same) if same == plain));
        }
        assert_eq!(
            printable("a\x1b[2Jb\nholder\tnobody\r"),
            r"a\u{1b}[2Jb\nholder\tnobody\r"
        );
        assert_eq!(printable("\u{9b}31m\u{7f}\0"), r"\u{9b}31m\u{7f}\u{0}");
        assert_eq!(printable("a\u{202e}b\u{2028}c"), r"a\u{202e}b\u{2028}c");
    }

    #[test]
    fn shortened_text_ends_between_characters() {
        assert_eq!(shortened("ab", 2), "ab");
        assert_eq!(shortened("abc", 2), "ab");
        assert_eq!(shortened("aé", 2), "a");
        assert_eq!(shortened("é", 0), "");
    }
}
