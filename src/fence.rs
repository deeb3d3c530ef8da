//! Fencing tokens: numbers that increase from holder to holder.

use std::fmt;
use std::num::NonZeroU64;

/// A number that is strictly larger than those of all earlier acquisitions of the key that could
/// not have held it at the same time.
///
/// The token of an exclusive lock is larger than all earlier ones of its key. The token of a shared
/// lock or of permits is larger than those of all exclusive locks before it. Among holders that may
/// hold the key together, the order of tokens means nothing.
///
/// Send the token along with each write that the lock protects, and have the resource reject a
/// write whose token is smaller than the largest it has seen. A holder that was paused past its
/// lease can then do no harm, whatever it believes. See Martin Kleppmann, "How to do distributed
/// locking" (2016), for the argument.
///
/// Tokens of different keys are not comparable. The unit is an eighth of a microsecond since
/// 2025-01-01 on the server's clock, so tokens keep growing after a server has lost its counters.
/// Until 2060 a token fits into the 53 bits that a double represents exactly.
///
/// In etcd, a token is the revision of the transaction that found its manager to be the owner,
/// times 65,536, plus 1 to 65,536. Revisions only grow, and each is used for one request. An etcd
/// restored from a backup returns to old revisions. Managers that have seen later ones reject such
/// tokens ([`LockErrorKind::TokenRegression`]) until they are restarted.
///
/// Tokens of one key must not be compared across a move of the key to a shard of another kind.
///
/// # Examples
///
/// A resource that rejects late writes:
///
/// ```
/// use shardlock::FencingToken;
///
/// #[derive(Default)]
/// struct Resource {
///     largest: Option<FencingToken>,
///     value: &'static str,
/// }
///
/// impl Resource {
///     fn write(&mut self, token: FencingToken, value: &'static str) -> bool {
///         if self.largest > Some(token) {
///             return false;
///         }
///         (self.largest, self.value) = (Some(token), value);
///         true
///     }
/// }
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), shardlock::LockError> {
/// # let locks = shardlock::LockManager::connect("memory://").await?;
/// let mut resource = Resource::default();
/// let first = locks.lock("k").await?;
/// let old = first.token();
/// first.release().await?;
///
/// let second = locks.lock("k").await?;
/// assert!(resource.write(second.token(), "new"));
/// assert!(!resource.write(old, "late"));
/// assert_eq!(resource.value, "new");
/// # second.release().await }
/// ```
///
/// [`LockErrorKind::TokenRegression`]: crate::error::LockErrorKind::TokenRegression
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct FencingToken(NonZeroU64);

impl FencingToken {
    /// The token with this number, or `None` for zero, which is never issued.
    #[must_use]
    pub const fn new(number: u64) -> Option<Self> {
        match NonZeroU64::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    /// The number itself, for the resource that compares tokens.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The number that corresponds to a server's `TIME`: seconds since the Unix epoch, and
    /// microseconds within that second.
    ///
    /// Returns zero, which is below every token, for times before 2025.
    pub(crate) const fn from_server_time(seconds: u64, micros: u64) -> u64 {
        let whole = seconds.saturating_sub(EPOCH_SECONDS).saturating_mul(8_000_000);
        whole.saturating_add(micros.saturating_mul(8))
    }
}

/// 2025-01-01T00:00:00Z in seconds since the Unix epoch.
const EPOCH_SECONDS: u64 = 1_735_689_600;

impl fmt::Display for FencingToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl From<FencingToken> for u64 {
    fn from(token: FencingToken) -> Self {
        token.get()
    }
}

/// For columns of SQL databases, most of which have no unsigned integers. Tokens that servers issue
/// fit: a Redis server's counter is an `i64`, and etcd reaches the limit after 2^47 writes.
///
/// ```
/// use shardlock::FencingToken;
///
/// # fn main() -> Result<(), shardlock::error::TokenRangeError> {
/// let token = FencingToken::try_from(482_113_750_274_177_i64)?;
/// let stored: i64 = token.try_into()?;
/// assert_eq!(stored, 482_113_750_274_177);
/// # Ok(()) }
/// ```
impl TryFrom<FencingToken> for i64 {
    type Error = TokenRangeError;

    fn try_from(token: FencingToken) -> Result<Self, TokenRangeError> {
        Self::try_from(token.get()).map_err(|_| TokenRangeError::too_large(token.get()))
    }
}

/// For columns of SQL databases.
impl TryFrom<i64> for FencingToken {
    type Error = TokenRangeError;

    fn try_from(number: i64) -> Result<Self, TokenRangeError> {
        let token = u64::try_from(number).ok().and_then(Self::new);
        token.ok_or_else(|| TokenRangeError::too_small(number))
    }
}

/// A number that is no [`FencingToken`], or a token that is no `i64`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct TokenRangeError(TokenRange);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum TokenRange {
    #[error("{0} is not a fencing token; fencing tokens are 1 or larger")]
    TooSmall(i64),
    #[error(
        "the fencing token {0} does not fit into an i64, whose maximum is {max}; store it as text or as a decimal number",
        max = i64::MAX
    )]
    TooLarge(u64),
}

impl TokenRangeError {
    const fn too_small(number: i64) -> Self {
        Self(TokenRange::TooSmall(number))
    }

    const fn too_large(token: u64) -> Self {
        Self(TokenRange::TooLarge(token))
    }
}

/// A range of tokens that a store issued exclusively to one cycle: `next ..= last`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct TokenBlock {
    next: u64,
    last: u64,
}

impl TokenBlock {
    pub(crate) const EMPTY: Self = Self { next: 1, last: 0 };

    /// The block of `count` tokens that ends with `last`. Empty if `last` is the largest number
    /// there is: no store issues it, but a forged message may contain it.
    pub(crate) const fn ending_at(last: u64, count: u32) -> Self {
        match last.checked_add(1) {
            Some(end) => Self {
                next: end.saturating_sub(count as u64),
                last,
            },
            None => Self::EMPTY,
        }
    }

    /// The smallest remaining token, or one above the largest if none is left.
    pub(crate) const fn first(self) -> u64 {
        self.next
    }

    pub(crate) const fn last(self) -> u64 {
        self.last
    }

    /// The number of remaining tokens.
    pub(crate) const fn remaining(self) -> u64 {
        (self.last + 1).saturating_sub(self.next)
    }

    /// Takes the smallest remaining token.
    pub(crate) fn take(&mut self) -> Option<FencingToken> {
        if self.next > self.last {
            return None;
        }
        let token = FencingToken::new(self.next);
        self.next += 1;
        token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_gives_its_tokens_once_and_in_order() {
        let mut block = TokenBlock::ending_at(12, 3);
        let taken: Vec<u64> = std::iter::from_fn(|| block.take()).map(FencingToken::get).collect();
        assert_eq!(taken, [10, 11, 12]);
        assert_eq!((block.first(), block.last()), (13, 12));
        assert_eq!(block.remaining(), 0);
        assert_eq!(TokenBlock::EMPTY.remaining(), 0);
    }

    #[test]
    fn token_is_a_number() {
        let token = TokenBlock::ending_at(7, 1).take().unwrap();
        assert_eq!((u64::from(token), token.get()), (7, 7));
    }

    /// Numbers come from servers, and from any client that can publish to an inbox.
    #[test]
    fn block_of_any_numbers_counts_without_overflow() {
        for last in [0, 1, 63, i64::MAX as u64, u64::MAX - 1, u64::MAX] {
            for count in [0, 1, 64, u32::MAX] {
                let mut block = TokenBlock::ending_at(last, count);
                let remaining = block.remaining();
                assert!(remaining <= u64::from(count), "{last} {count}");
                let taken: Vec<_> = std::iter::from_fn(|| block.take()).take(65).collect();
                assert!(taken.is_sorted_by(|one, next| one < next), "{last} {count}");
                assert!(taken.iter().all(|token| token.get() <= last), "{last} {count}");
            }
        }
        assert_eq!(TokenBlock::ending_at(u64::MAX, 64), TokenBlock::EMPTY);
        assert_eq!(
            FencingToken::from_server_time(i64::MAX as u64, i64::MAX as u64),
            u64::MAX
        );
    }

    #[test]
    fn token_is_converted_to_and_from_an_i64_within_its_range() {
        for number in [1, 2, i64::MAX] {
            let token = FencingToken::try_from(number).unwrap();
            assert_eq!(i64::try_from(token).unwrap(), number);
        }
        for number in [0, -1, i64::MIN] {
            let error = FencingToken::try_from(number).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("{number} is not a fencing token; fencing tokens are 1 or larger")
            );
        }
        let beyond = FencingToken::new(1 << 63).unwrap();
        assert_eq!(
            i64::try_from(beyond).unwrap_err().to_string(),
            "the fencing token 9223372036854775808 does not fit into an i64, whose maximum is 9223372036854775807; store it as text or as \
             a decimal number"
        );
    }

    #[test]
    fn tokens_of_2059_fit_a_double() {
        let seconds_2059 = EPOCH_SECONDS + 35 * 365 * 24 * 3600;
        assert!(FencingToken::from_server_time(seconds_2059, 999_999) < 1 << 53);
        assert_eq!(FencingToken::from_server_time(0, 0), 0);
    }
}
