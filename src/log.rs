//! Log events: the macros of `tracing`, except that a panic of the subscriber is caught. The code
//! that logs may still have to release a lock, or to complete a request.

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
