//! Why a store could not do something.

use std::error::Error;
use std::fmt;
use std::io;
use std::ops::Deref;
use std::sync::Arc;

/// Why a store could not do something: a text for people, and the I/O error behind it if there was
/// one. Other errors of client libraries are not kept, because they may contain passwords.
#[derive(Clone, Default)]
pub(crate) struct Reason {
    text: Arc<str>,
    io: Option<Arc<io::Error>>,
}

impl Reason {
    /// Adds the first I/O error among this error and its causes.
    pub(crate) fn caused_by(mut self, error: &(dyn Error + 'static)) -> Self {
        /// How the Redis client returns a cause.
        type Shared = Arc<dyn Error + Send + Sync>;

        let mut causes = std::iter::successors(Some(error), |&error| error.source());
        let io = causes.find_map(|cause| match cause.downcast_ref::<Shared>() {
            Some(shared) => shared.downcast_ref::<io::Error>(),
            None => cause.downcast_ref(),
        });
        // An `io::Error` can't be cloned.
        self.io = io.map(|io| {
            Arc::new(match io.raw_os_error() {
                Some(code) => io::Error::from_raw_os_error(code),
                None => io::Error::new(io.kind(), io.to_string()),
            })
        });
        self
    }

    /// The I/O error.
    pub(super) fn io(&self) -> Option<&(dyn Error + 'static)> {
        self.io.as_deref().map(|io| io as &(dyn Error + 'static))
    }

    /// Changes the text and keeps the cause.
    pub(crate) fn map(self, change: impl FnOnce(&str) -> String) -> Self {
        Self {
            text: change(&self.text).into(),
            io: self.io,
        }
    }
}

impl Deref for Reason {
    type Target = str;

    fn deref(&self) -> &str {
        &self.text
    }
}

impl From<String> for Reason {
    fn from(text: String) -> Self {
        Self {
            text: text.into(),
            io: None,
        }
    }
}

impl From<&str> for Reason {
    fn from(text: &str) -> Self {
        Self {
            text: text.into(),
            io: None,
        }
    }
}

impl fmt::Debug for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
