//! Random numbers.

use std::hash::{BuildHasher, RandomState};
use std::ops::{Range, RangeInclusive};
use std::time::Duration;

/// A number that other processes can't guess: a keyed hash, whose keys the standard library takes
/// from the operating system, once for each thread.
pub(crate) fn number() -> u64 {
    RandomState::new().hash_one(())
}

/// A number in this range, or its start if it is empty.
pub(crate) fn number_in(range: Range<u64>) -> u64 {
    let width = range.end.saturating_sub(range.start);
    // The high half of the product is less than the width. For the widths drawn here, all numbers
    // are equally likely for all practical purposes.
    let offset = (u128::from(number()) * u128::from(width)) >> 64;
    range.start + offset as u64
}

/// A time in this range, to the nanosecond.
pub(crate) fn time_in(range: RangeInclusive<Duration>) -> Duration {
    let nanos = |time: &Duration| u64::try_from(time.as_nanos()).unwrap_or(u64::MAX - 1);
    Duration::from_nanos(number_in(nanos(range.start())..nanos(range.end()) + 1))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn numbers_differ_and_use_all_bits() {
        let numbers: BTreeSet<u64> = (0..1000).map(|_| number()).collect();
        assert_eq!(numbers.len(), 1000);
        let ones = numbers.iter().fold(0, |ones, number| ones | number);
        let zeros = numbers.iter().fold(0, |zeros, number| zeros | !number);
        assert_eq!((ones, zeros), (u64::MAX, u64::MAX));
        let of_another_thread = std::thread::spawn(number).join().unwrap();
        assert!(!numbers.contains(&of_another_thread));
    }

    #[test]
    fn every_number_of_a_range_is_drawn_and_no_other() {
        let drawn: BTreeSet<u64> = (0..1000).map(|_| number_in(3..7)).collect();
        assert_eq!(drawn, BTreeSet::from([3, 4, 5, 6]));
        assert_eq!(number_in(5..5), 5);
        assert!(number_in(0..u64::MAX) < u64::MAX);
    }

    #[test]
    fn times_are_within_their_range() {
        let range = Duration::from_millis(5)..=Duration::from_millis(6);
        assert!((0..1000).all(|_| range.contains(&time_in(range.clone()))));
        assert_eq!(
            time_in(Duration::MAX..=Duration::MAX),
            Duration::from_nanos(u64::MAX - 1)
        );
        assert_eq!(time_in(Duration::ZERO..=Duration::ZERO), Duration::ZERO);
    }
}
