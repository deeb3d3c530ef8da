//! The name of a lock, and the slot it belongs to.

use std::borrow::Cow;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use crate::error::InvalidSetting;

/// The number of slots, as in Redis Cluster.
pub const SLOTS: u16 = 16_384;

/// One of the 16384 slots of the key space: CRC16 of the key, or of its `{hash tag}`, mod 16384.
///
/// The rule is that of the Redis Cluster specification (CRC-16/XMODEM): if the key contains a `{`
/// and a later `}` with at least one byte in between, only the part in between is hashed, so that
/// keys with the same tag share a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(u16);

impl Slot {
    /// Returns the slot of a key.
    #[must_use]
    pub fn of(key: &[u8]) -> Self {
        Self(crc16::State::<crc16::XMODEM>::calculate(hash_tag(key).unwrap_or(key)) & (SLOTS - 1))
    }

    /// Returns the slot with this number, or `None` if the number is too large.
    pub(crate) const fn new(number: u16) -> Option<Self> {
        if number < SLOTS { Some(Self(number)) } else { None }
    }

    /// Returns the slot of a text that is given in two parts and has no hash tag.
    pub(crate) fn of_parts(first: &[u8], second: &[u8]) -> Self {
        let mut state = crc16::State::<crc16::XMODEM>::new();
        state.update(first);
        state.update(second);
        Self(state.get() & (SLOTS - 1))
    }

    /// Returns the number of the slot, 0 to 16383.
    #[must_use]
    pub const fn number(self) -> u16 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The part between the first `{` and the first `}` after it, unless that part is missing or empty.
pub(crate) fn hash_tag(key: &[u8]) -> Option<&[u8]> {
    // Most keys have no tag. To look at every byte is faster than to stop at the first match: the
    // compiler compares 16 bytes at once.
    if !key.iter().fold(false, |found, &byte| found | (byte == b'{')) {
        return None;
    }
    let open = key.iter().position(|&byte| byte == b'{')?;
    let length = key[open + 1..].iter().position(|&byte| byte == b'}')?;
    (length > 0).then(|| &key[open + 1..open + 1 + length])
}

/// The name of a lock: 1 to 512 bytes of UTF-8. Cheap to clone: clones share the name.
///
/// Calls that take a key accept a `&str`, a `String` or a `LockKey`. A `LockKey` has been checked
/// and is not checked again, so it suits keys that are used often:
///
/// ```
/// use shardlock::{LockKey, LockManager};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # let locks = LockManager::connect("memory://").await?;
/// let key = LockKey::new("coupon:123")?;
/// for _ in 0..3 {
///     locks.lock(&key).await?.release().await?;
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LockKey(Arc<str>);

impl LockKey {
    /// The length of the longest key, in bytes.
    pub const BYTES_MAX: usize = 512;

    /// Checks a name.
    ///
    /// # Errors
    ///
    /// [`InvalidSetting`] if it is empty or longer than [`BYTES_MAX`](Self::BYTES_MAX).
    pub fn new(name: &str) -> Result<Self, InvalidSetting> {
        let bound = || format!("1 to {} bytes long", Self::BYTES_MAX);
        if name.is_empty() {
            return Err(InvalidSetting::new("key", "empty", bound()));
        }
        if name.len() > Self::BYTES_MAX {
            let start: String = name.chars().take(24).collect();
            return Err(InvalidSetting::new(
                "key",
                format!("{} bytes long ({start:?}...)", name.len()),
                bound(),
            ));
        }
        Ok(Self(name.into()))
    }

    /// Returns the name as it was given.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the slot of the key, which decides its shard.
    #[must_use]
    pub fn slot(&self) -> Slot {
        Slot::of(self.0.as_bytes())
    }
}

impl TryFrom<&str> for LockKey {
    type Error = InvalidSetting;

    #[inline]
    fn try_from(name: &str) -> Result<Self, InvalidSetting> {
        Self::new(name)
    }
}

impl TryFrom<&String> for LockKey {
    type Error = InvalidSetting;

    #[inline]
    fn try_from(name: &String) -> Result<Self, InvalidSetting> {
        Self::new(name)
    }
}

impl TryFrom<String> for LockKey {
    type Error = InvalidSetting;

    #[inline]
    fn try_from(name: String) -> Result<Self, InvalidSetting> {
        Self::new(&name)
    }
}

impl TryFrom<Cow<'_, str>> for LockKey {
    type Error = InvalidSetting;

    #[inline]
    fn try_from(name: Cow<'_, str>) -> Result<Self, InvalidSetting> {
        Self::new(&name)
    }
}

impl From<&LockKey> for LockKey {
    #[inline]
    fn from(key: &LockKey) -> Self {
        key.clone()
    }
}

impl FromStr for LockKey {
    type Err = InvalidSetting;

    fn from_str(name: &str) -> Result<Self, InvalidSetting> {
        Self::new(name)
    }
}

impl std::borrow::Borrow<str> for LockKey {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl AsRef<str> for LockKey {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for LockKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use redis::cluster_routing::Slot as TheirSlot;

    #[test]
    fn known_keys_have_known_slots() {
        for (key, slot) in [
            ("foo", 12182),
            ("{foo}shard", 12182),
            ("foo{}{bar}", 8363),
            ("123456789", 12739),
        ] {
            assert_eq!(Slot::of(key.as_bytes()).number(), slot, "{key}");
        }
    }

    #[test]
    fn keys_are_made_of_every_kind_of_text() {
        let key = LockKey::new("k").unwrap();
        assert_eq!(LockKey::try_from("k").as_ref(), Ok(&key));
        assert_eq!(LockKey::try_from("k".to_owned()).as_ref(), Ok(&key));
        assert_eq!(LockKey::try_from(&"k".to_owned()).as_ref(), Ok(&key));
        assert_eq!(LockKey::try_from(Cow::Borrowed("k")).as_ref(), Ok(&key));
        assert_eq!("k".parse::<LockKey>().as_ref(), Ok(&key));
        assert_eq!(LockKey::from(&key), key);
        assert!(LockKey::try_from(String::new()).is_err());
    }

    proptest! {
        #[test]
        fn slots_agree_with_the_redis_client(key in "[a-c{}%é ]{1,12}") {
            let ours = TheirSlot::new(Slot::of(key.as_bytes()).number());
            prop_assert_eq!(ours, Some(TheirSlot::for_key(key.as_bytes())));
        }
    }

    #[test]
    fn keys_outside_their_bounds_are_refused_with_value_and_bound() {
        let empty = LockKey::new("").unwrap_err().to_string();
        assert_eq!(empty, "key is empty, but must be 1 to 512 bytes long");
        let long = LockKey::new(&"x".repeat(513)).unwrap_err().to_string();
        assert!(long.contains("513 bytes long") && long.contains("1 to 512"), "{long}");
        assert!(LockKey::new(&"x".repeat(512)).is_ok());
        assert_ne!(LockKey::new("A").unwrap(), LockKey::new("a").unwrap());
    }
}
