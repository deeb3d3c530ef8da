//! The rules of the locks as pure code: events in, effects out.
//!
//! # Implementation details
//!
//! Nothing here reads a clock, draws a random number, touches an atomic of the driver, or knows
//! tasks, runtimes and stores. Time arrives with each event. So the same code runs in production
//! (`driver`), in the exhaustive tests and in the simulation.
//!
//! [`key`] is the state machine of one key of one manager; read its header first. [`orphans`] has
//! the retry rules of cycles that are over, [`min_holds`] knows which leases must stay although
//! they were released, [`renewals`] decides which renewals are sent when, and [`admission`] how
//! much a manager takes on.

pub(crate) mod admission;
pub(crate) mod key;
pub(crate) mod min_holds;
pub(crate) mod orphans;
pub(crate) mod renewals;

pub(crate) use key::{
    BLOCK_OF_GRANT, Bound, Capacity, Contender, Context, Effects, Granted, InOutage, Linger, MinHold, Outcome, Path,
    Rare, Request, Rules, StoreEvent, StoreOutage, WaiterId, WaiterOptions, Wake,
};
#[cfg(test)]
pub(crate) use key::{Flaw, Unlimited};
