//! Blocking signals and fetching them one by one.

use std::io;
use std::mem::MaybeUninit;

use rustix::process::{Signal, getpid, kill_process};

/// The signals forwarded to the command, and CHILD, which reports that a child stopped or ended.
pub(super) const FORWARDED: [Signal; 10] = [
    Signal::TERM,
    Signal::INT,
    Signal::HUP,
    Signal::QUIT,
    Signal::USR1,
    Signal::USR2,
    Signal::TSTP,
    Signal::CONT,
    Signal::WINCH,
    Signal::CHILD,
];

/// Who sent a signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sender {
    /// The kernel, on behalf of the terminal: a key was pressed, the window changed size, or the
    /// terminal was closed. Every process of the job receives the same signal.
    Kernel,
    /// A process, which may have signalled only this process.
    Process,
}

/// A set of blocked signals, which this thread fetches one by one.
pub(super) struct BlockedSignals {
    blocked: libc::sigset_t,
    before: libc::sigset_t,
}

impl BlockedSignals {
    /// Blocks the signals in this thread.
    pub(super) fn block(signals: impl Iterator<Item = Signal>) -> io::Result<Self> {
        let (mut blocked, mut before) = (MaybeUninit::uninit(), MaybeUninit::uninit());
        #[expect(unsafe_code, reason = "no safe interface blocks signals")]
        // SAFETY: both sets are initialised before they are read: the first by `sigemptyset`, the
        // second by `pthread_sigmask` if it returns 0.
        unsafe {
            libc::sigemptyset(blocked.as_mut_ptr());
            for signal in signals {
                libc::sigaddset(blocked.as_mut_ptr(), signal.as_raw());
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, blocked.as_ptr(), before.as_mut_ptr());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            Ok(Self {
                blocked: blocked.assume_init(),
                before: before.assume_init(),
            })
        }
    }

    /// Restores the signal mask from before [`Self::block`].
    pub(super) fn unblock(&self) -> io::Result<()> {
        #[expect(unsafe_code, reason = "no safe interface unblocks signals")]
        // SAFETY: the kernel initialised the set in `block`.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.before, std::ptr::null_mut()) };
        if error == 0 {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(error))
        }
    }

    /// Waits for the next of the signals.
    #[cfg(target_os = "linux")]
    pub(super) fn next(&self) -> io::Result<(Signal, Sender)> {
        loop {
            let mut info = MaybeUninit::<libc::siginfo_t>::uninit();
            #[expect(unsafe_code, reason = "no safe interface waits for signals")]
            // SAFETY: the kernel initialises `info` if it returns a signal.
            let (number, code) = unsafe {
                match libc::sigwaitinfo(&raw const self.blocked, info.as_mut_ptr()) {
                    -1 => (-1, 0),
                    number => (number, info.assume_init().si_code),
                }
            };
            if number == -1 {
                let error = io::Error::last_os_error();
                // A debugger or a stop interrupts the wait.
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            } else if let Some(signal) = Signal::from_named_raw(number) {
                // Signals sent by processes have a code of 0 or less.
                let sender = if code > 0 { Sender::Kernel } else { Sender::Process };
                return Ok((signal, sender));
            }
        }
    }

    /// Waits for the next of the signals. This system does not report the sender, so
    /// [`Sender::Process`] is assumed.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn next(&self) -> io::Result<(Signal, Sender)> {
        loop {
            let mut number = 0;
            #[expect(unsafe_code, reason = "no safe interface waits for signals")]
            // SAFETY: both pointers are valid: to a field of `self` and to a local variable.
            let error = unsafe { libc::sigwait(&raw const self.blocked, &raw mut number) };
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            if let Some(signal) = Signal::from_named_raw(number) {
                return Ok((signal, Sender::Process));
            }
        }
    }
}

/// Stops this process. Returns when the process is continued.
pub(super) fn stop_this_process() {
    // A process can always stop itself.
    kill_process(getpid(), Signal::STOP).ok();
}
