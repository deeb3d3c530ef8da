//! Detects stalls of the machine itself, during which no process can meet a deadline.
//!
//! A virtual machine may be paused, or lose its processors to others, and the system may stop
//! everybody who writes to a busy disk, as the workers do for their histories. A thread that only
//! watches the clock and writes detects this and records it as a fault that affects all processes.
//! It does not excuse violations of safety.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::checker::EVERYBODY;
use crate::clock::{Nanos, now};
use crate::history::{Event, Journal};

const BEAT: Duration = Duration::from_millis(10);
/// A machine with any spare processor time wakes the thread with less delay than this.
const STALL: Nanos = 150_000_000;

pub(crate) const NAME: &str = "machine-stall";

/// Number of stalls since this process started, and their total duration.
pub(crate) static STALLS: AtomicU64 = AtomicU64::new(0);
pub(crate) static STALLED: AtomicU64 = AtomicU64::new(0);

pub(crate) struct Watch {
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    pub(crate) fn start(history: &Path) -> Self {
        let journal = Journal::create(history, "machine");
        let mut beats = File::create(history.join("machine.beats")).expect("make a file");
        let over = Arc::<AtomicBool>::default();
        let thread = thread::spawn({
            let over = Arc::clone(&over);
            move || {
                let (mut last, mut number) = (now(), 0);
                while !over.load(Ordering::Relaxed) {
                    thread::sleep(BEAT);
                    beats.write_all(b"\n").expect("write a file");
                    let at = now();
                    if at - last > STALL {
                        number += 1;
                        let (fault, target) = (NAME.to_owned(), EVERYBODY.to_owned());
                        journal.note(last, number, Event::FaultBegun { fault, target });
                        journal.note(at, number, Event::FaultOver);
                        STALLS.fetch_add(1, Ordering::Relaxed);
                        STALLED.fetch_add(at - last, Ordering::Relaxed);
                    }
                    last = at;
                }
            }
        });
        let thread = Some(thread);
        Self { over, thread }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the thread ends");
        }
    }
}
