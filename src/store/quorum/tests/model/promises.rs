//! What was promised to the holders, checked with each guard.

use super::*;

/// The guards that were given out, and their tokens.
#[derive(Default)]
pub(super) struct Promises {
    held: Vec<Given>,
    /// The largest tokens of a writer, and of anybody.
    last_written: u64,
    largest: u64,
    blocks: Vec<TokenBlock>,
}

/// A guard that was given out.
struct Given {
    cycle: Cycle,
    until: u64,
}

impl Promises {
    /// A manager has the key. Returns how many others have it, or which promise is broken.
    pub(super) fn hold(&mut self, now: u64, cycle: Cycle, tokens: TokenBlock, until: u64) -> Result<usize, String> {
        self.held.retain(|given| given.until > now);
        let is_writer = cycle.mode().is_exclusive();
        let beside = self
            .held
            .iter()
            .find(|given| is_writer || given.cycle.mode().is_exclusive());
        if let Some(beside) = beside {
            return Err(format!("at {now}, {cycle} has the key beside {}", beside.cycle));
        }
        let least = if is_writer { self.largest } else { self.last_written };
        if tokens.first() <= least {
            return Err(format!("at {now}, {cycle} has the tokens {tokens:?} after {least}"));
        }
        let overlaps = |block: &&TokenBlock| block.first() <= tokens.last() && tokens.first() <= block.last();
        if let Some(other) = self.blocks.iter().find(overlaps) {
            return Err(format!("at {now}, {cycle} has the tokens {tokens:?} beside {other:?}"));
        }
        self.blocks.push(tokens);
        self.largest = self.largest.max(tokens.last());
        if is_writer {
            self.last_written = tokens.last();
        }
        self.held.push(Given { cycle, until });
        Ok(self.held.len() - 1)
    }

    /// A renewal has extended the lease of a holder.
    pub(super) fn extend(&mut self, cycle: Cycle, until: u64) {
        let given = self.held.iter_mut().find(|given| given.cycle == cycle);
        given.unwrap().until = until;
    }

    /// A holder is done.
    pub(super) fn end(&mut self, cycle: Cycle) {
        self.held.retain(|given| given.cycle != cycle);
    }
}
