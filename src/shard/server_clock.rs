//! Steps of the clock of a shard's server, seen against our monotonic clock.
//!
//! No lock decision uses a server's time of day; but a Redis server ends leases by it, so a step is something to know.

use std::sync::Arc;
use std::time::Duration;

use super::Shard;
use crate::clock::Moment;
use crate::store::{ServerTime, StoreError};

/// How often a server is asked for its time.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// The smallest step that is one, beyond what the round trips leave open.
const STEP_MIN: Duration = Duration::from_millis(200);

/// Asks the server for its time every few seconds, and so also finds out whether it is there when nobody else asks.
pub(super) async fn watch(shard: Arc<Shard>) {
    let mut clock = ServerClock::default();
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        let sent_at = Moment::now();
        let answer = tokio::time::timeout(shard.timeout, shard.store.server_time()).await;
        match answer.unwrap_or_else(|_| Err(shard.no_answer())) {
            Ok(Some(time)) => {
                shard.metrics.set_up(true);
                let seen = clock.saw(time, sent_at, Moment::now());
                shard.metrics.clock_drift.set(seen.drift);
                if let Some(step) = seen.step {
                    shard.metrics.clock_jumps.increment(1);
                    tracing::warn!(shard = %shard.name, seconds = step, "the server's clock has jumped; leases on it may end early or late");
                }
            }
            // This store can't tell.
            Ok(None) => return,
            Err(error) => {
                shard.metrics.set_up(!matches!(error, StoreError::Unavailable(_)));
                tracing::debug!(shard = %shard.name, ?error, "the server did not tell its time");
            }
        }
    }
}

/// What is known of a server's clock.
#[derive(Debug, Default)]
struct ServerClock {
    known: Option<Known>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    connection: u64,
    /// How far its clock was ahead of ours at the first look, in seconds.
    first: f64,
    last: f64,
    last_at: Moment,
    /// By how much the last one may be wrong.
    doubt: f64,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Seen {
    /// How far it has gone ahead of ours since the first look, in seconds.
    drift: f64,
    /// By how much it has jumped since the last look, if it has.
    step: Option<f64>,
}

impl ServerClock {
    fn saw(&mut self, time: ServerTime, sent_at: Moment, received_at: Moment) -> Seen {
        let round_trip = received_at.since(sent_at);
        let ours = Duration::from_nanos(sent_at.as_nanos()) + round_trip / 2;
        let offset = time.since_epoch.as_secs_f64() - ours.as_secs_f64();
        let doubt = round_trip.as_secs_f64() / 2.0;
        let before = self.known.filter(|known| known.connection == time.connection);
        // Another connection may lead to another server, whose clock is another: nothing can be said of a step.
        let first = before.map_or(offset, |known| known.first);
        let step = before.and_then(|known| {
            // A clock that is 1 % too fast is one for the drift.
            let slack = received_at.since(known.last_at).as_secs_f64() / 100.0;
            let step = offset - known.last;
            (step.abs() > STEP_MIN.as_secs_f64() + doubt + known.doubt + slack).then_some(step)
        });
        self.known = Some(Known {
            connection: time.connection,
            first,
            last: offset,
            last_at: received_at,
            doubt,
        });
        Seen {
            drift: offset - first,
            step,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: f64 = 1_767_225_600.0;

    /// One look, at so many seconds on our clock, at a server clock that is so far ahead.
    fn look(clock: &mut ServerClock, connection: u64, at: f64, ahead: f64, round_trip: f64) -> Seen {
        let moment = |seconds: f64| Moment::default() + Duration::from_secs_f64(seconds);
        let time = ServerTime {
            since_epoch: Duration::from_secs_f64(EPOCH + at + ahead),
            connection,
        };
        clock.saw(time, moment(at - round_trip / 2.0), moment(at + round_trip / 2.0))
    }

    #[test]
    fn a_step_in_either_direction_is_seen_once() {
        let mut clock = ServerClock::default();
        assert_eq!(look(&mut clock, 0, 10.0, 0.0, 0.001).step, None);
        assert_eq!(look(&mut clock, 0, 13.0, 0.001, 0.001).step, None);
        let jumped = look(&mut clock, 0, 16.0, 3600.0, 0.001);
        assert!((jumped.step.unwrap() - 3600.0).abs() < 0.1 && (jumped.drift - 3600.0).abs() < 0.1);
        assert_eq!(look(&mut clock, 0, 19.0, 3600.0, 0.001).step, None);
        assert!((look(&mut clock, 0, 22.0, 3599.5, 0.001).step.unwrap() + 0.5).abs() < 0.1);
    }

    #[test]
    fn a_slow_answer_or_a_fast_clock_is_no_step() {
        let mut clock = ServerClock::default();
        look(&mut clock, 0, 10.0, 0.0, 0.001);
        // The answer waited for half a second on one of the ways, so the clock seems to be off by a quarter.
        assert_eq!(look(&mut clock, 0, 13.0, 0.25, 0.5).step, None);
        assert_eq!(look(&mut clock, 0, 16.0, 0.0, 0.001).step, None);
        // Slewed by half a percent for five minutes.
        let seen = look(&mut clock, 0, 316.0, 1.5, 0.001);
        assert!(seen.step.is_none() && (seen.drift - 1.5).abs() < 0.01, "{seen:?}");
    }

    #[test]
    fn another_server_is_a_new_beginning() {
        let mut clock = ServerClock::default();
        look(&mut clock, 0, 10.0, 0.0, 0.001);
        let seen = look(&mut clock, 1, 13.0, 7.0, 0.001);
        assert_eq!(seen.step, None);
        assert!(seen.drift.abs() < 0.01);
    }
}
