//! The result of a check.

use serde_json::{Value, json};

/// The severity of a finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Level {
    /// No problem.
    Ok,
    /// Good to know. No action is needed.
    Note,
    /// Locks work, but there is an avoidable risk.
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
    /// The name of the check. Scripts may rely on it.
    pub(super) check: &'static str,
    pub(super) level: Level,
    /// What was found.
    pub(super) found: String,
    /// Why it matters. `None` if the level is [`Level::Ok`].
    pub(super) why: Option<String>,
    /// The command or setting that fixes the problem. `None` if the level is [`Level::Ok`].
    pub(super) fix: Option<String>,
}

impl Finding {
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self {
            check,
            level: Level::Ok,
            found: found.into(),
            why: None,
            fix: None,
        }
    }

    pub(super) fn new(
        check: &'static str,
        level: Level,
        found: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self {
            check,
            level,
            found: found.into(),
            why: Some(why.into()),
            fix: Some(fix.into()),
        }
    }

    pub(super) fn note(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(check, Level::Note, found, why, fix)
    }

    pub(super) fn warning(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(check, Level::Warning, found, why, fix)
    }

    pub(super) fn error(
        check: &'static str,
        found: impl Into<String>,
        why: impl Into<String>,
        fix: impl Into<String>,
    ) -> Self {
        Self::new(check, Level::Error, found, why, fix)
    }

    pub(super) fn as_json(&self) -> Value {
        json!({
            "check": self.check,
            "level": self.level.word(),
            "found": self.found,
            "why": self.why,
            "fix": self.fix,
        })
    }
}
