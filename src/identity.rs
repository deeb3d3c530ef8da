//! The identity of a manager, and the owner tag that it writes for what it holds.

use std::fmt;
use std::sync::Arc;

use crate::protocol::Cycle;
use crate::random;

/// The name of a manager: `host-pid-random`, unique among all managers that ever ran.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct ManagerId(Arc<str>);

/// The maximum number of characters of the host name in an identity.
const HOST_CHARS_MAX: usize = 64;
/// The number of digits of the random part.
const RANDOM_DIGITS: usize = 16;
/// The maximum number of digits of a process id.
const PID_DIGITS_MAX: usize = 10;

impl ManagerId {
    /// A name for a new manager of this process.
    pub(crate) fn new() -> Self {
        let uname = rustix::system::uname();
        Self::of(
            &uname.nodename().to_string_lossy(),
            std::process::id(),
            random::number(),
        )
    }

    /// The name made of these parts. In the host name, characters other than letters, digits, dots
    /// and dashes become dashes.
    pub(crate) fn of(host: &str, pid: u32, random: u64) -> Self {
        let host: String = host
            .chars()
            .take(HOST_CHARS_MAX)
            .map(|char| {
                if char.is_ascii_alphanumeric() || char == '.' {
                    char
                } else {
                    '-'
                }
            })
            .collect();
        let host = if host.is_empty() { "host" } else { &host };
        Self(format!("{host}-{pid}-{random:016x}").into())
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The owner tag of one cycle in a lease or a queue: `manager:cycle`.
    pub(crate) const fn owner_tag(&self, cycle: Cycle) -> OwnerTag<'_> {
        OwnerTag { manager: self, cycle }
    }
}

/// A manager and one of its cycles, as written in a store.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OwnerTag<'a> {
    manager: &'a ManagerId,
    cycle: Cycle,
}

impl OwnerTag<'_> {
    /// The two parts, which are separated by a colon.
    pub(crate) fn parts(&self) -> (&str, Cycle) {
        (self.manager.as_str(), self.cycle)
    }
}

impl fmt::Display for OwnerTag<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.manager.0)?;
        f.write_str(":")?;
        self.cycle.fmt(f)
    }
}

impl fmt::Display for ManagerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Returns the name of the manager ([`LockManager::id`](crate::LockManager::id)) in the owner of a
/// lease, as returned by [`LockGuard::owner`](crate::LockGuard::owner) or found in a
/// [`Holder`](crate::introspect::Holder). Returns `None` if the owner is not a manager but a client
/// of another library. The format of earlier versions is recognized too.
#[must_use]
pub fn manager_of(owner: &str) -> Option<&str> {
    let (manager, cycle) = split(owner)?;
    let is_cycle = !cycle.is_empty()
        && cycle
            .bytes()
            .all(|byte| byte.is_ascii_hexdigit() || b"-sp".contains(&byte));
    is_cycle.then_some(manager)
}

/// The manager and the cycle of an owner tag, or `None` if another library wrote it. The Lua
/// scripts apply the same rule.
pub(crate) fn parse_owner_tag(owner_tag: &str) -> Option<(&str, Cycle)> {
    let (manager, cycle) = split(owner_tag)?;
    Some((manager, Cycle::parse(cycle)?))
}

/// Splits at the colon that follows a possible manager name.
fn split(owner_tag: &str) -> Option<(&str, &str)> {
    let (manager, cycle) = owner_tag.rsplit_once(':')?;
    let (host_and_pid, random) = manager.rsplit_once('-')?;
    let (host, pid) = host_and_pid.rsplit_once('-')?;
    let digits =
        |text: &str| (1..=PID_DIGITS_MAX).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
    let hex = random.len() == RANDOM_DIGITS && random.bytes().all(|byte| byte.is_ascii_hexdigit());
    let named = !host.is_empty()
        && host
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'-');
    (named && digits(pid) && hex).then_some((manager, cycle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owner_tag_is_parsed_as_it_was_written() {
        let id = ManagerId::of("my host_1.example", 42, 0xabc);
        assert_eq!(id.as_str(), "my-host-1.example-42-0000000000000abc");
        assert_eq!(
            parse_owner_tag(&id.owner_tag(Cycle::of(7)).to_string()),
            Some((id.as_str(), Cycle::of(7)))
        );
        let own = ManagerId::new();
        assert_eq!(
            parse_owner_tag(&own.owner_tag(Cycle::of(1)).to_string()),
            Some((own.as_str(), Cycle::of(1)))
        );
    }

    #[test]
    fn manager_is_found_in_owner_tags_of_every_version() {
        let id = ManagerId::new();
        assert_eq!(manager_of(&id.owner_tag(Cycle::of(7)).to_string()), Some(id.as_str()));
        assert_eq!(manager_of(&format!("{}:7", id.as_str())), Some(id.as_str()));
        for foreign in [
            "",
            "redlock:17",
            "vm-26421-405e:2",
            id.as_str(),
            &format!("{}:", id.as_str()),
        ] {
            assert_eq!(manager_of(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn owner_tags_of_other_libraries_are_foreign() {
        for foreign in [
            "",
            "1",
            "host:1",
            "550e8400-e29b-41d4-a716-446655440000",
            "a-1-zz:1",
            "uuid:thread-1",
            "h-1-0000000000000abc:x",
            "h-12345678901-0000000000000abc:2-1-00000000",
        ] {
            assert_eq!(parse_owner_tag(foreign), None, "{foreign}");
        }
    }
}
