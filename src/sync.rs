//! The atomics and the mutex of what threads share outside the mutex of a key.
//!
//! For `make loom` they are those of the crate `loom`, which executes the models (`mod models` in
//! the files that use this one) in every order in which threads may see each other's writes.

#[cfg(not(all(test, shardlock_loom)))]
pub(crate) use parking_lot::Mutex;
#[cfg(not(all(test, shardlock_loom)))]
pub(crate) use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

#[cfg(all(test, shardlock_loom))]
pub(crate) use loom::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

/// Like that of `parking_lot`.
#[cfg(all(test, shardlock_loom))]
#[derive(Debug)]
pub(crate) struct Mutex<T>(loom::sync::Mutex<T>);

#[cfg(all(test, shardlock_loom))]
impl<T> Mutex<T> {
    pub(crate) fn lock(&self) -> loom::sync::MutexGuard<'_, T> {
        self.0.lock().unwrap()
    }
}

#[cfg(all(test, shardlock_loom))]
impl<T: Default> Default for Mutex<T> {
    fn default() -> Self {
        Self(loom::sync::Mutex::new(T::default()))
    }
}
