//! Signal dispositions. Signals that were ignored when the tool was started stay ignored, for the
//! tool and for the commands that it starts, as nohup(1) and shells expect.

use rustix::process::Signal;

/// Returns whether a signal is ignored. Call this before a handler is installed for the signal.
///
/// Rust's runtime ignores PIPE in every program. For PIPE, this returns the state before the
/// runtime started (on Linux).
pub(crate) fn is_ignored(signal: Signal) -> bool {
    #[cfg(target_os = "linux")]
    if signal == Signal::PIPE {
        return before_main::pipe_was_ignored();
    }
    is_ignored_now(signal)
}

/// Ignores a signal.
///
/// Async-signal-safe: a child may call this between fork and exec.
pub(crate) fn ignore(signal: Signal) {
    set(signal, libc::SIG_IGN);
}

/// Restores the default disposition of a signal.
///
/// Async-signal-safe: a child may call this between fork and exec.
pub(crate) fn set_default(signal: Signal) {
    set(signal, libc::SIG_DFL);
}

fn set(signal: Signal, disposition: libc::sighandler_t) {
    #[expect(unsafe_code, reason = "no safe interface ignores a signal")]
    // SAFETY: `SIG_IGN` and `SIG_DFL` install no handler.
    unsafe {
        libc::signal(signal.as_raw(), disposition);
    }
}

fn is_ignored_now(signal: Signal) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    #[expect(unsafe_code, reason = "no safe interface reads a disposition")]
    // SAFETY: with a null pointer for the new action, nothing changes. The old action is
    // initialised if the call returns 0.
    unsafe {
        libc::sigaction(signal.as_raw(), std::ptr::null(), action.as_mut_ptr()) == 0
            && action.assume_init().sa_sigaction == libc::SIG_IGN
    }
}

#[cfg(target_os = "linux")]
mod before_main {
    use std::sync::atomic::{AtomicBool, Ordering};

    use rustix::process::Signal;

    static PIPE_WAS_IGNORED: AtomicBool = AtomicBool::new(false);

    #[expect(
        unsafe_code,
        reason = "nothing else runs before Rust's runtime changes the disposition"
    )]
    // SAFETY: `.init_array` holds functions that are called on the main thread before `main`. This
    // one makes a single system call and uses nothing that Rust's runtime sets up.
    #[used]
    #[unsafe(link_section = ".init_array")]
    static RECORD: extern "C" fn() = record;

    extern "C" fn record() {
        PIPE_WAS_IGNORED.store(super::is_ignored_now(Signal::PIPE), Ordering::Relaxed);
    }

    pub(super) fn pipe_was_ignored() -> bool {
        PIPE_WAS_IGNORED.load(Ordering::Relaxed)
    }
}
