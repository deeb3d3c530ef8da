//! Probes a shard every few seconds: whether it accepts locks, whether it still knows its waiters,
//! and whether the clocks of its servers have jumped.
//!
//! No lock decision uses a server's time of day. But a Redis server expires leases by it, so
//! operators need to know about a jump. Jumps are measured against our monotonic clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::{Shard, places};
use crate::clock::Moment;
use crate::store::{Health, ServerTime};
use crate::text::printable;

/// The interval between probes.
const LOOK_EVERY: Duration = Duration::from_secs(3);
/// The shortest interval between probes after a refused request.
const LOOK_EVERY_MIN: Duration = Duration::from_millis(500);
/// The smallest change that counts as a jump, beyond the uncertainty from round trips.
const STEP_MIN: Duration = Duration::from_millis(200);

/// Probes for as long as the thread lives, even if no locks are taken.
pub(super) async fn watch(shard: Arc<Shard>) {
    let mut clocks = Clocks::default();
    loop {
        tokio::time::sleep(LOOK_EVERY_MIN).await;
        tokio::select! {
            () = tokio::time::sleep(LOOK_EVERY - LOOK_EVERY_MIN) => {}
            () = shard.reach.doubted.notified() => {}
        }
        let health = tokio::time::timeout(shard.manager.timeout, shard.store.probe()).await;
        let health = health.unwrap_or_else(|_| Health {
            reached: Err(shard.no_answer()),
            times: Vec::new(),
        });
        shard.note_look(&health.reached);
        shard.note_map(&health.reached);
        if let Err(error) = &health.reached {
            tracing::debug!(shard = %shard.name, %error, "the health probe of the shard failed");
        }
        for (server, seconds) in clocks.saw(&health) {
            shard.metrics.clock_jumps.increment(1);
            tracing::warn!(shard = %shard.name, server = %printable(&server), seconds, "the server's clock has jumped; leases on it may end early or late");
        }
        if health.reached.is_ok() {
            places::check(&shard).await;
        }
        if let Some(drift) = clocks.largest_drift() {
            shard.metrics.clock_drift.set(drift);
        }
    }
}

/// What is known of the clocks of a shard's servers, by address.
#[derive(Debug, Default)]
struct Clocks(HashMap<Arc<str>, ServerClock>);

impl Clocks {
    /// Returns which servers' clocks have jumped since the last probe, and by how many seconds.
    fn saw(&mut self, health: &Health) -> Vec<(Arc<str>, f64)> {
        if health.reached.is_ok() {
            // A server without a time in a successful probe no longer belongs to the shard, or was
            // replaced.
            let is_there = |server: &Arc<str>| health.times.iter().any(|time| time.server == *server);
            self.0.retain(|server, _| is_there(server));
        }
        let steps = health.times.iter().filter_map(|time| {
            let step = match self.0.get_mut(&time.server) {
                Some(clock) => clock.saw(time),
                None => {
                    self.0.insert(Arc::clone(&time.server), ServerClock::first_seen(time));
                    None
                }
            };
            Some((Arc::clone(&time.server), step?))
        });
        steps.collect()
    }

    /// The largest drift of a server's clock relative to ours since it was first seen, in seconds.
    /// Positive if it has moved ahead.
    fn largest_drift(&self) -> Option<f64> {
        let drifts = self.0.values().map(|clock| clock.last - clock.first);
        drifts.max_by(|one, other| one.abs().total_cmp(&other.abs()))
    }
}

/// What is known of a server's clock.
#[derive(Debug, Clone, Copy)]
struct ServerClock {
    connection: u64,
    /// How far it was ahead of ours at the first probe, in seconds.
    first: f64,
    last: f64,
    last_at: Moment,
    /// The uncertainty of `last`, in seconds.
    doubt: f64,
}

impl ServerClock {
    fn first_seen(time: &ServerTime) -> Self {
        let round_trip = time.received_at.since(time.sent_at);
        let ours = Duration::from_nanos(time.sent_at.as_nanos()) + round_trip / 2;
        let offset = time.since_epoch.as_secs_f64() - ours.as_secs_f64();
        Self {
            connection: time.connection,
            first: offset,
            last: offset,
            last_at: time.received_at,
            doubt: round_trip.as_secs_f64() / 2.0,
        }
    }

    /// By how many seconds the clock has jumped since the last probe, if it has.
    fn saw(&mut self, time: &ServerTime) -> Option<f64> {
        let before = std::mem::replace(self, Self::first_seen(time));
        // A new connection may lead to another server with a different clock, so a jump cannot be
        // detected.
        if self.connection != before.connection {
            return None;
        }
        self.first = before.first;
        // A clock that runs up to 1 % fast or slow counts as drift.
        let slack = self.last_at.since(before.last_at).as_secs_f64() / 100.0;
        let step = self.last - before.last;
        (step.abs() > STEP_MIN.as_secs_f64() + self.doubt + before.doubt + slack).then_some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    const EPOCH: f64 = 1_767_225_600.0;

    /// The time of a server at `at` seconds on our clock, if its own clock is `ahead` by that many
    /// seconds.
    fn told(server: &str, connection: u64, at: f64, ahead: f64, round_trip: f64) -> ServerTime {
        let moment = |seconds: f64| Moment::default() + Duration::from_secs_f64(seconds);
        ServerTime {
            server: server.into(),
            connection,
            since_epoch: Duration::from_secs_f64(EPOCH + at + ahead),
            sent_at: moment(at - round_trip / 2.0),
            received_at: moment(at + round_trip / 2.0),
        }
    }

    fn all_is_well(times: Vec<ServerTime>) -> Health {
        Health { reached: Ok(()), times }
    }

    /// Probes one server. Returns the detected jump and the drift.
    fn look(clocks: &mut Clocks, connection: u64, at: f64, ahead: f64, round_trip: f64) -> (Option<f64>, f64) {
        let steps = clocks.saw(&all_is_well(vec![told("a:1", connection, at, ahead, round_trip)]));
        (steps.first().map(|(_, step)| *step), clocks.largest_drift().unwrap())
    }

    #[test]
    fn a_step_in_either_direction_is_seen_once() {
        let mut clocks = Clocks::default();
        assert_eq!(look(&mut clocks, 0, 10.0, 0.0, 0.001).0, None);
        assert_eq!(look(&mut clocks, 0, 13.0, 0.001, 0.001).0, None);
        let (step, drift) = look(&mut clocks, 0, 16.0, 3600.0, 0.001);
        assert!((step.unwrap() - 3600.0).abs() < 0.1 && (drift - 3600.0).abs() < 0.1);
        assert_eq!(look(&mut clocks, 0, 19.0, 3600.0, 0.001).0, None);
        assert!((look(&mut clocks, 0, 22.0, 3599.5, 0.001).0.unwrap() + 0.5).abs() < 0.1);
    }

    #[test]
    fn a_slow_answer_or_a_fast_clock_is_no_step() {
        let mut clocks = Clocks::default();
        look(&mut clocks, 0, 10.0, 0.0, 0.001);
        // The reply was delayed by half a second in one direction, so the clock seems to be off by
        // a quarter.
        assert_eq!(look(&mut clocks, 0, 13.0, 0.25, 0.5).0, None);
        assert_eq!(look(&mut clocks, 0, 16.0, 0.0, 0.001).0, None);
        // Slewed by half a percent for five minutes.
        let (step, drift) = look(&mut clocks, 0, 316.0, 1.5, 0.001);
        assert!(step.is_none() && (drift - 1.5).abs() < 0.01, "{step:?} {drift}");
    }

    #[test]
    fn another_connection_or_server_is_a_new_beginning() {
        let mut clocks = Clocks::default();
        look(&mut clocks, 0, 10.0, 0.0, 0.001);
        let (step, drift) = look(&mut clocks, 1, 13.0, 7.0, 0.001);
        assert!(step.is_none() && drift.abs() < 0.01, "{step:?} {drift}");
        // Connection numbers are local to a store, so two servers may have the same.
        let other = all_is_well(vec![told("b:1", 1, 16.0, -7.0, 0.001)]);
        assert_eq!(clocks.saw(&other), []);
        assert!(clocks.largest_drift().unwrap().abs() < 0.01);
        // The first server is back with another clock. It was forgotten in the meantime.
        assert_eq!(look(&mut clocks, 1, 19.0, 9.0, 0.001).0, None);
    }

    #[test]
    fn each_server_is_measured_by_itself_and_the_largest_drift_is_told() {
        let mut clocks = Clocks::default();
        let three = |at: f64, ahead: [f64; 3]| {
            let names = ["a:1", "b:1", "c:1"];
            let times = names.iter().zip(ahead);
            all_is_well(times.map(|(name, ahead)| told(name, 0, at, ahead, 0.001)).collect())
        };
        assert_eq!(clocks.saw(&three(10.0, [0.0, 30.0, -30.0])), []);
        assert!(
            clocks.largest_drift().unwrap().abs() < 0.01,
            "they differ, but run at the same rate"
        );
        let steps = clocks.saw(&three(13.0, [0.01, 30.0, -35.0]));
        let [(server, step)] = &steps[..] else {
            panic!("{steps:?}")
        };
        assert!(&**server == "c:1" && (step + 5.0).abs() < 0.01, "{steps:?}");
        assert!((clocks.largest_drift().unwrap() + 5.0).abs() < 0.01);
    }

    #[test]
    fn a_server_that_is_away_for_a_while_is_remembered() {
        let mut clocks = Clocks::default();
        look(&mut clocks, 0, 10.0, 0.0, 0.001);
        let away = Health {
            reached: Err(StoreError::Unavailable("away".into())),
            times: Vec::new(),
        };
        assert_eq!(clocks.saw(&away), []);
        assert!((look(&mut clocks, 0, 19.0, 60.0, 0.001).0.unwrap() - 60.0).abs() < 0.1);
    }
}
