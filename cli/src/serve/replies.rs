//! Writing replies in RESP2 or RESP3.

use std::io::Write;

/// The version of the protocol that a connection has chosen with HELLO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Protocol {
    #[default]
    Resp2,
    Resp3,
}

impl Protocol {
    pub(super) const fn number(self) -> i64 {
        match self {
            Self::Resp2 => 2,
            Self::Resp3 => 3,
        }
    }
}

/// How much memory a connection without unsent replies keeps.
const KEPT_BYTES: usize = 1024;

/// Replies that were not sent yet.
#[derive(Debug, Default)]
pub(super) struct Replies {
    unsent: Vec<u8>,
    /// How much of `unsent` was sent.
    sent: usize,
    pub(super) protocol: Protocol,
}

impl Replies {
    /// The bytes to send next.
    pub(super) fn unsent(&self) -> &[u8] {
        &self.unsent[self.sent..]
    }

    /// Removes bytes that were sent.
    pub(super) fn sent(&mut self, count: usize) {
        self.sent += count;
        if self.sent >= self.unsent.len() {
            self.sent = 0;
            self.unsent.clear();
            self.unsent.shrink_to(KEPT_BYTES);
        }
    }

    /// A short text without line breaks, such as `OK`.
    pub(super) fn simple(&mut self, text: &str) {
        self.line('+', text);
    }

    /// An error: its code, then a message. Line breaks would end the reply, so none is sent.
    pub(super) fn error(&mut self, text: &str) {
        if text.contains(['\r', '\n']) {
            self.line('-', text.replace(['\r', '\n'], " "));
        } else {
            self.line('-', text);
        }
    }

    pub(super) fn integer(&mut self, number: i64) {
        self.line(':', number);
    }

    pub(super) fn bulk(&mut self, bytes: impl AsRef<[u8]>) {
        let bytes = bytes.as_ref();
        self.line('$', bytes.len());
        self.unsent.extend_from_slice(bytes);
        self.unsent.extend_from_slice(b"\r\n");
    }

    /// Nothing: `nil` in most clients.
    pub(super) fn null(&mut self) {
        match self.protocol {
            Protocol::Resp2 => self.line('$', -1),
            Protocol::Resp3 => self.line('_', ""),
        }
    }

    /// Begins an array with this number of elements.
    pub(super) fn array(&mut self, count: usize) {
        self.line('*', count);
    }

    /// Begins a map with this number of entries. RESP2 has an array of keys and values instead.
    pub(super) fn map(&mut self, count: usize) {
        match self.protocol {
            Protocol::Resp2 => self.line('*', count * 2),
            Protocol::Resp3 => self.line('%', count),
        }
    }

    /// Begins a push message with this number of elements, of which the first is its kind. RESP2
    /// has none.
    pub(super) fn push(&mut self, count: usize) {
        self.line('>', count);
    }

    fn line(&mut self, kind: char, content: impl std::fmt::Display) {
        // Writing to memory can't fail.
        write!(self.unsent, "{kind}{content}\r\n").ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(protocol: Protocol, write: impl FnOnce(&mut Replies)) -> String {
        let mut replies = Replies {
            protocol,
            ..Replies::default()
        };
        write(&mut replies);
        String::from_utf8(replies.unsent).unwrap()
    }

    #[test]
    fn replies_differ_between_the_versions_of_the_protocol() {
        let write = |replies: &mut Replies| {
            replies.map(1);
            replies.bulk("k");
            replies.null();
        };
        assert_eq!(written(Protocol::Resp2, write), "*2\r\n$1\r\nk\r\n$-1\r\n");
        assert_eq!(written(Protocol::Resp3, write), "%1\r\n$1\r\nk\r\n_\r\n");
    }

    #[test]
    fn an_error_is_one_line() {
        let text = written(Protocol::Resp2, |replies| replies.error("ERR a\r\n+OK"));
        assert_eq!(text, "-ERR a  +OK\r\n");
    }

    #[test]
    fn parts_are_sent_one_after_the_other_and_memory_is_returned() {
        let mut replies = Replies::default();
        replies.bulk("x".repeat(10_000));
        let length = replies.unsent().len();
        replies.sent(length - 3);
        assert_eq!(replies.unsent(), b"x\r\n");
        replies.sent(3);
        assert!(replies.unsent().is_empty() && replies.unsent.capacity() <= KEPT_BYTES);
    }
}
