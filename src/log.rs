//! Events for the log of the application. They are those of `tracing`, except that a subscriber
//! that panics does not unwind into the code that logs: it may have a lock to give back, or a
//! request to settle.

macro_rules! debug_event {
    ($($event:tt)*) => { $crate::foreign::SUBSCRIBER.call(|| tracing::debug!($($event)*)) };
}
macro_rules! info_event {
    ($($event:tt)*) => { $crate::foreign::SUBSCRIBER.call(|| tracing::info!($($event)*)) };
}
macro_rules! warn_event {
    ($($event:tt)*) => { $crate::foreign::SUBSCRIBER.call(|| tracing::warn!($($event)*)) };
}
macro_rules! error_event {
    ($($event:tt)*) => { $crate::foreign::SUBSCRIBER.call(|| tracing::error!($($event)*)) };
}

pub(crate) use {debug_event as debug, error_event as error, info_event as info, warn_event as warn};
