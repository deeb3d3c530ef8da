//! Text from elsewhere, made safe for a terminal, a log or a message: the one place for it.

use std::borrow::Cow;

/// The same text with every character that could move a cursor, change a terminal or begin another line written as an escape: `\u{1b}`, `\n`.
///
/// Names and values that come from a server, from another process or from a command line may hold anything. What is shown to people goes through
/// here; values in the API are left as they are.
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

/// Whether this character is one that [`printable`] escapes: control characters, line and paragraph separators, and those that turn the direction of
/// what follows.
#[must_use]
pub fn must_be_escaped(char: char) -> bool {
    char.is_control()
        || matches!(
            char,
            '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{61c}'
        )
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
}
