//! In which mode a key is held, and by how many together.

use std::fmt;

use shardlock::LockMode;
use shardlock::introspect::KeyState;

/// The holders of a key that is not held exclusively. The default is an exclusive lock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct HeldMode {
    /// The number of shared holders: guards, or leases if the shards were read.
    shared: u64,
    /// The number of holders of permits.
    with_permits: u64,
    permits_in_use: u32,
    /// The smallest limit that a holder of permits states.
    limit: u16,
}

impl HeldMode {
    /// The mode of one guard.
    pub(crate) const fn of_guard(mode: LockMode) -> Self {
        let (shared, with_permits, permits_in_use, limit) = match mode {
            LockMode::Shared => (1, 0, 0, 0),
            LockMode::Permits { weight, limit } => (0, 1, weight as u32, limit),
            // Another mode is one of a newer version.
            _ => (0, 0, 0, 0),
        };
        Self {
            shared,
            with_permits,
            permits_in_use,
            limit,
        }
    }

    /// The mode in which a shard holds a key. The state lists the first hundred holders only; those
    /// beyond are counted as shared ones.
    pub(crate) fn of_state(state: &KeyState) -> Self {
        let listed = state.holders.iter().map(|holder| Self::of_guard(holder.mode));
        let mut all = listed.fold(Self::default(), Self::with);
        if all.with_permits == state.holders.len() as u64 {
            all.with_permits = state.holder_count;
        }
        Self {
            shared: state.holder_count.saturating_sub(all.with_permits),
            permits_in_use: state.permits_in_use,
            ..all
        }
    }

    /// Both together.
    pub(crate) fn with(self, other: Self) -> Self {
        Self {
            shared: self.shared + other.shared,
            with_permits: self.with_permits + other.with_permits,
            permits_in_use: self.permits_in_use.saturating_add(other.permits_in_use),
            limit: match (self.limit, other.limit) {
                (0, limit) | (limit, 0) => limit,
                (one, other) => one.min(other),
            },
        }
    }

    pub(crate) fn is_exclusive(&self) -> bool {
        *self == Self::default()
    }

    /// The mode without numbers.
    pub(crate) const fn kind(&self) -> &'static str {
        match (self.shared, self.with_permits) {
            (0, 0) => "exclusive",
            (_, 0) => "shared",
            (0, _) => "permits",
            (_, _) => "shared and permits",
        }
    }

    pub(crate) const fn permits_in_use(&self) -> u32 {
        self.permits_in_use
    }

    /// The smallest limit that a holder of permits states, if there is one.
    pub(crate) const fn permits_limit(&self) -> Option<u16> {
        match self.limit {
            0 => None,
            limit => Some(limit),
        }
    }

    /// The number of holders.
    pub(crate) const fn holders(&self) -> u64 {
        match self.shared + self.with_permits {
            0 => 1,
            together => together,
        }
    }

    /// The holders in a few words, in place of the name of a process.
    pub(crate) fn describe_holders(&self) -> String {
        match (self.shared, self.with_permits) {
            (1.., 0) => format!("{} shared", self.shared),
            _ => self.to_string(),
        }
    }
}

/// `exclusive`, `shared`, `4/10 permits` (in use, of the limit) or `shared, 4/10`.
impl fmt::Display for HeldMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (in_use, limit) = (self.permits_in_use, self.limit);
        match (self.shared, self.with_permits) {
            (0, 0) => f.write_str("exclusive"),
            (_, 0) => f.write_str("shared"),
            (0, _) => write!(f, "{in_use}/{limit} permits"),
            (_, _) => write!(f, "shared, {in_use}/{limit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_are_counted_together_and_the_smallest_limit_is_shown() {
        let of = |modes: &[LockMode]| {
            let each = modes.iter().map(|&mode| HeldMode::of_guard(mode));
            each.fold(HeldMode::default(), HeldMode::with)
        };
        let permits = |weight, limit| LockMode::Permits { weight, limit };
        for (modes, mode, holders, short) in [
            (&[LockMode::Exclusive][..], "exclusive", 1, "exclusive"),
            (&[LockMode::Shared], "shared", 1, "1 shared"),
            (&[LockMode::Shared, LockMode::Shared], "shared", 2, "2 shared"),
            (&[permits(3, 10), permits(1, 8)], "4/8 permits", 2, "4/8 permits"),
            (&[permits(1, 8), LockMode::Shared], "shared, 1/8", 2, "shared, 1/8"),
        ] {
            let held = of(modes);
            let shown = (held.to_string(), held.holders(), held.describe_holders());
            assert_eq!(shown, (mode.to_owned(), holders, short.to_owned()), "{modes:?}");
            assert_eq!(held.is_exclusive(), mode == "exclusive");
        }
    }
}
