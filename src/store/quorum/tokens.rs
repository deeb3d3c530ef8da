//! Choosing tokens that nobody else has. Sends nothing, so every case can be tested.
//!
//! Each block is written to a majority of counters before it is used, and the counters are returned
//! as they were before. An exclusive cycle is the only one with a majority: nobody else takes
//! tokens meanwhile, so one block above those counters is enough. Other readers may take tokens at
//! the same time. Two majorities have a node in common, and the reader that came there second finds
//! the block of the first. So a reader takes another block until no counter of a majority reaches
//! into it, and no two readers have the same token.

use std::ops::Range;

use crate::fence::TokenBlock;
use crate::mode::LockMode;

/// The tokens that a cycle with a majority has chosen so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct TokenChoice {
    pub(super) tokens: TokenBlock,
    count: u32,
    /// Whether nobody else can take tokens at the same time.
    is_alone: bool,
    /// The largest distance of the next block from the counters. Grows, so that two readers soon
    /// choose different blocks, and so that requests that count up the sequencer's counter do not
    /// reach it. `None` before the first choice.
    distance_max: Option<u64>,
}

/// The largest distance of a block from the counters: 8 ms, in the unit of tokens. A slot issues
/// fewer tokens than that in a round trip.
const DISTANCE_MAX: u64 = 1 << 16;

impl TokenChoice {
    /// The first choice of a cycle in this mode: `count` tokens of the sequencer.
    pub(super) fn new(mode: LockMode, tokens: TokenBlock, count: u32) -> Self {
        Self {
            tokens,
            count,
            is_alone: mode.is_exclusive(),
            distance_max: None,
        }
    }

    /// Whether the tokens may be used: the largest counter of a majority was this, before it was
    /// raised to the last of them.
    pub(super) fn is_final(&self, counter: u64) -> bool {
        counter < self.tokens.first() || (self.is_alone && self.distance_max.is_some())
    }

    /// Chooses tokens above the counter.
    pub(super) fn next(&mut self, counter: u64, random: impl FnOnce(Range<u64>) -> u64) -> TokenBlock {
        let count = u64::from(self.count);
        let distance = match self.distance_max {
            Some(most) => random(0..most),
            None => 0,
        };
        self.distance_max = Some(self.distance_max.map_or(count, |most| (most * 2).min(DISTANCE_MAX)));
        self.tokens = TokenBlock::ending_at(counter.saturating_add(distance + count), self.count);
        self.tokens
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(first: u64, last: u64) -> TokenBlock {
        TokenBlock::ending_at(last, u32::try_from(last + 1 - first).unwrap())
    }

    #[test]
    fn tokens_that_no_counter_reaches_are_kept() {
        for mode in [LockMode::Exclusive, LockMode::Shared] {
            let choice = TokenChoice::new(mode, block(11, 14), 4);
            assert!(choice.is_final(0) && choice.is_final(10), "{mode}");
            assert!(!choice.is_final(11) && !choice.is_final(99), "{mode}");
        }
    }

    #[test]
    fn writer_chooses_tokens_once_and_a_reader_until_they_are_unique() {
        let largest = |range: Range<u64>| range.end - 1;
        let mut writer = TokenChoice::new(LockMode::Exclusive, block(11, 14), 4);
        assert_eq!(writer.next(20, largest), block(21, 24));
        assert!(writer.is_final(24), "only requests that wait can have counted on");

        let mut reader = TokenChoice::new(LockMode::Shared, block(11, 14), 4);
        assert_eq!(reader.next(20, largest), block(21, 24));
        assert!(reader.is_final(20) && !reader.is_final(21));
        // Another reader chose the same ones.
        assert_eq!(reader.next(24, largest), block(28, 31));
        assert_eq!(reader.next(31, largest), block(39, 42));
        for _ in 0..40 {
            let counter = reader.tokens.last();
            let next = reader.next(counter, largest);
            assert!(next.first() > counter && next.first() - counter <= DISTANCE_MAX);
        }
    }
}
