//! Lock modes: exclusive, shared, permits.

use std::fmt;

/// The mode in which a key is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "snake_case"))]
#[non_exhaustive]
pub enum LockMode {
    /// One holder at a time, and nobody beside it.
    #[default]
    Exclusive,
    /// Any number of shared holders at a time, but no exclusive one beside them.
    Shared,
    /// A number of permits, of which all holders together have at most `limit` at a time.
    Permits {
        /// The number of permits that this holder has.
        weight: u16,
        /// The largest number of permits that may be in use, as this holder states it.
        limit: u16,
    },
}

/// The largest number of permits of a key.
pub(crate) const PERMITS_MAX: u16 = 1_000;

impl LockMode {
    /// The number of kinds of modes: exclusive, shared, permits.
    pub(crate) const KINDS: usize = 3;

    /// A mode of each kind, at the index of its kind.
    pub(crate) const ONE_OF_EACH: [Self; Self::KINDS] = [
        Self::Exclusive,
        Self::Shared,
        Self::Permits {
            weight: 1,
            limit: PERMITS_MAX,
        },
    ];

    /// The number of its kind, which is below [`KINDS`](Self::KINDS).
    pub(crate) const fn kind(self) -> usize {
        match self {
            Self::Exclusive => 0,
            Self::Shared => 1,
            Self::Permits { .. } => 2,
        }
    }

    /// The name of the mode, as in metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exclusive => "exclusive",
            Self::Shared => "shared",
            Self::Permits { .. } => "permits",
        }
    }

    /// Whether a view leaves the mode out because it is the usual one.
    #[cfg(feature = "serde")]
    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    pub(crate) const fn is_usual(&self) -> bool {
        self.is_exclusive()
    }

    /// Whether it is [`Exclusive`](Self::Exclusive).
    pub(crate) const fn is_exclusive(self) -> bool {
        matches!(self, Self::Exclusive)
    }

    /// The number of permits that a holder in this mode takes.
    pub(crate) const fn weight(self) -> u32 {
        match self {
            Self::Exclusive | Self::Shared => 0,
            Self::Permits { weight, .. } => weight as u32,
        }
    }

    /// The number of permits that all holders together may have, as a holder in this mode states
    /// it.
    pub(crate) const fn limit(self) -> u32 {
        match self {
            Self::Exclusive | Self::Shared => u32::MAX,
            Self::Permits { limit, .. } => limit as u32,
        }
    }

    /// The end of a cycle's text. Empty for exclusive, so that the most frequent text is short.
    pub(crate) const fn suffix(self) -> Suffix {
        Suffix(self)
    }

    /// Parses the output of [`suffix`](Self::suffix) without its first dash.
    pub(crate) fn parse_suffix(text: &str) -> Option<Self> {
        if text == "s" {
            return Some(Self::Shared);
        }
        let (weight, limit) = text.strip_prefix('p')?.split_once('-')?;
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !(digits(weight) && digits(limit)) {
            return None;
        }
        let (weight, limit) = (weight.parse().ok()?, limit.parse().ok()?);
        (1 <= weight && weight <= limit).then_some(Self::Permits { weight, limit })
    }
}

impl fmt::Display for LockMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exclusive | Self::Shared => f.write_str(self.as_str()),
            Self::Permits { weight, limit } => write!(f, "permits {weight}/{limit}"),
        }
    }
}

/// See [`LockMode::suffix`].
#[derive(Debug)]
pub(crate) struct Suffix(LockMode);

impl fmt::Display for Suffix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            LockMode::Exclusive => Ok(()),
            LockMode::Shared => f.write_str("-s"),
            LockMode::Permits { weight, limit } => write!(f, "-p{weight}-{limit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_of_mode_has_its_index() {
        for (kind, mode) in LockMode::ONE_OF_EACH.into_iter().enumerate() {
            assert_eq!(mode.kind(), kind, "{mode}");
        }
    }
}
