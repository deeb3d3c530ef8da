//! The timer for holds.
//!
//! tokio's timers count whole milliseconds and round up: a sleep of 5 ms takes 6.1 ms. Workers in
//! other languages hold their locks for as long as requested, and the comparison with them would
//! suffer. So a hold uses a timer of the kernel where there is one.

use std::time::Duration;

/// Sleeps for as long as requested. A task has one of its own.
#[derive(Debug, Default)]
pub(super) struct HoldTimer {
    /// Created for the first hold.
    #[cfg(target_os = "linux")]
    timer: Option<kernel::Timer>,
}

impl HoldTimer {
    /// Sleeps for this long. If the kernel has no timer, such as when file descriptors have run
    /// out, it is a sleep of tokio; the report has the hold as measured.
    pub(super) async fn sleep(&mut self, duration: Duration) {
        #[cfg(target_os = "linux")]
        {
            if self.timer.is_none() {
                self.timer = kernel::Timer::new().ok();
            }
            if let Some(timer) = &mut self.timer
                && timer.sleep(duration).await.is_ok()
            {
                return;
            }
        }
        tokio::time::sleep(duration).await;
    }
}

#[cfg(target_os = "linux")]
mod kernel {
    use std::io;
    use std::time::Duration;

    use rustix::time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
    };
    use tokio::io::AsyncReadExt;
    use tokio::net::unix::pipe::Receiver;

    /// A timer of Linux, accurate to some 50 us.
    ///
    /// tokio's reader of pipes reads from any file descriptor that epoll accepts, and takes it
    /// without `unsafe`.
    #[derive(Debug)]
    pub(super) struct Timer(Receiver);

    impl Timer {
        pub(super) fn new() -> io::Result<Self> {
            let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
            let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
            Receiver::from_owned_fd_unchecked(timer).map(Self)
        }

        pub(super) async fn sleep(&mut self, duration: Duration) -> io::Result<()> {
            if duration.is_zero() {
                // It would stop the timer.
                return Ok(());
            }
            let once = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec::try_from(duration).map_err(io::Error::other)?,
            };
            timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &once)?;
            // The number of times that it has expired: once.
            self.0.read_u64().await?;
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test]
    async fn a_hold_is_not_shorter_than_asked_for() {
        let mut timer = HoldTimer::default();
        for duration in [Duration::ZERO, Duration::from_micros(300), Duration::from_millis(5)] {
            let start = Instant::now();
            timer.sleep(duration).await;
            assert!(start.elapsed() >= duration, "{duration:?}: {:?}", start.elapsed());
        }
    }
}
