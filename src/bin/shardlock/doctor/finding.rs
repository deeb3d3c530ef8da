//! What a check says.

use serde_json::{Value, json};

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// Good to know; nothing has to be done.
    Note,
    /// Locks work, but something can go wrong that need not.
    Warning,
    /// Locks don't work, or can be held twice.
    Error,
}

impl Level {
    pub(super) const ALL: [Self; 4] = [Self::Ok, Self::Note, Self::Warning, Self::Error];

    pub(super) const fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// The result of one check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Finding {
    /// The name of the check, which scripts may rely on.
    pub(super) check: &'static str,
    pub(super) level: Level,
    /// What there is.
    pub(super) found: String,
    /// Why it matters; nothing where all is well.
    pub(super) why: Option<String>,
    /// The command or the setting that mends it.
    pub(super) mend: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            found: found.into(),
            why: None,
            mend: None,
        }
    }

    pub(super) fn new(
        check: &'static str,
        level: Level,
        found: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self {
            check,
            level,
            found: found.into(),
            why: Some(why.into()),
            mend: Some(mend.into()),
        }
    }

    pub(super) fn note(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self::new(check, Level::Note, found, why, mend)
    }

    pub(super) fn warning(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self::new(check, Level::Warning, found, why, mend)
    }

    pub(super) fn error(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        mend: impl Into<String>,
    ) -> Self {
        Self::new(check, Level::Error, found, why, mend)
    }

    pub(super) fn as_json(&self) -> Value {
        json!({
            "check": self.check,
            "level": self.level.word(),
            "found": self.found,
            "why": self.why,
            "mend": self.mend,
        })
    }
}
