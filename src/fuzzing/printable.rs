use super::text;
use crate::text::{must_be_escaped, printable as escape};

/// Untrusted text that is shown to people: `printable`.
pub fn printable(data: &[u8]) {
    let text = text(data);
    let shown = escape(&text);
    assert!(!shown.contains(must_be_escaped), "{shown:?} could change a terminal");
    assert_eq!(
        shown.lines().count(),
        usize::from(!shown.is_empty()),
        "{shown:?} is one line"
    );
    // A character of one byte becomes at most `\u{7f}`, a longer one at most `\u{2028}`.
    assert!(shown.len() <= text.len() * 6, "{} bytes of {}", shown.len(), text.len());
    assert_eq!(escape(&shown), shown, "nothing is escaped twice");
    assert_eq!(
        *shown == *text,
        !text.contains(must_be_escaped),
        "plain text is not changed"
    );
    if !text.contains('\\') {
        assert_eq!(unescaped(&shown), text, "different texts are shown differently");
    }
}

/// Reverses the escapes in a text that had no backslash.
fn unescaped(shown: &str) -> String {
    let mut parts = shown.split('\\');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (char, rest) = match part.strip_prefix("u{").and_then(|part| part.split_once('}')) {
            Some((code, rest)) => (
                u32::from_str_radix(code, 16).ok().and_then(char::from_u32).unwrap(),
                rest,
            ),
            None => {
                let char = match part.as_bytes()[0] {
                    b'n' => '\n',
                    b'r' => '\r',
                    b't' => '\t',
                    _ => panic!("unknown escape in {shown:?}"),
                };
                (char, &part[1..])
            }
        };
        text.push(char);
        text.push_str(rest);
    }
    text
}
