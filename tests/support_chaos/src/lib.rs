//! Chaos: processes contend for locks while faults happen to them and to their servers, and an
//! independent checker judges the histories that they write.
//!
//! A test says what is attacked: the servers, the processes and their faults ([`Attacked`]). A
//! round draws faults from a seed and injects them ([`Plan`]), and a campaign runs rounds for as
//! long as asked ([`campaign`]). Each process writes a history ([`history`]); [`worker`] is one
//! with a manager of its own. Finally the checker reads the histories. It knows the documented
//! guarantees and exclusions, and nothing about the implementation.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

pub mod campaign;
mod checker;
pub mod clock;
mod faults;
pub mod history;
mod machine;
pub mod member;
mod report;
mod round;
pub mod worker;

pub use checker::Terms;
pub use clock::{nanos, now};
pub use faults::{Fault, some_time};
pub use member::Member;
pub use round::{Attacked, Plan, Start};
