//! What signals do to the tool: those that were ignored when it was started stay ignored, for the tool and for the
//! commands that it starts, as nohup(1) and shells expect.

use rustix::process::Signal;

/// Whether a signal is ignored. Ask before a handler is installed for it.
///
/// For PIPE, which Rust's runtime ignores in every program, the answer is about the time before that.
pub(crate) fn is_ignored(signal: Signal) -> bool {
    #[cfg(target_os = "linux")]
    if signal == Signal::PIPE {
        return before_main::pipe_was_ignored();
    }
    is_ignored_now(signal)
}

/// Ignores a signal.
///
/// Async-signal-safe: a child may call it between fork and exec.
pub(crate) fn ignore(signal: Signal) {
    set(signal, libc::SIG_IGN);
}

/// Lets a signal do what it does in a program that never asked for anything else.
///
/// Async-signal-safe: a child may call it between fork and exec.
pub(crate) fn set_default(signal: Signal) {
    set(signal, libc::SIG_DFL);
}

fn set(signal: Signal, disposition: libc::sighandler_t) {
    #[expect(unsafe_code, reason = "no safe interface ignores a signal")]
    // SAFETY: neither of the two dispositions has a handler that could run.
    unsafe {
        libc::signal(signal.as_raw(), disposition);
    }
}

fn is_ignored_now(signal: Signal) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::uninit();
    #[expect(unsafe_code, reason = "no safe interface reads a disposition")]
    // SAFETY: a null pointer for the new action changes nothing; the old one is written if 0 is returned.
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
    // SAFETY: the linker's array of functions that are called, in the main thread, before `main`. The function makes
    // one system call and uses nothing that Rust's runtime sets up.
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
