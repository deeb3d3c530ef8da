//! The glob patterns of Redis, as in `SCAN` and ACL rules.

/// Escapes the special characters of a pattern with backslashes.
pub(crate) fn escape_glob(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len() + 4);
    for char in text.chars() {
        if matches!(char, '*' | '?' | '[' | ']' | '\\' | '^') {
            pattern.push('\\');
        }
        pattern.push(char);
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn special_characters_are_escaped() {
        assert_eq!(escape_glob("lock:"), "lock:");
        assert_eq!(escape_glob("a*[b]?\\"), "a\\*\\[b\\]\\?\\\\");
    }
}
