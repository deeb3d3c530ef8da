//! Detects that the clock of a server has jumped.
//!
//! No lock decision uses a server's time of day. But a Redis server expires leases by it, so
//! operators need to know about a jump. Jumps are measured against our monotonic clock.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Moment;
use crate::store::{Health, ServerTime};

/// The smallest change that counts as a jump, beyond the uncertainty from round trips.
const STEP_MIN: Duration = Duration::from_millis(200);

/// What is known of the clocks of a shard's servers, by address.
#[derive(Debug, Default)]
pub(super) struct Clocks(HashMap<Arc<str>, ServerClock>);

impl Clocks {
    /// Returns which servers' clocks have jumped since the last probe, and by how many seconds.
    pub(super) fn on_probe(&mut self, health: &Health) -> Vec<(Arc<str>, f64)> {
        if health.reached.is_ok() {
            // A server without a time in a successful probe no longer belongs to the shard, or was
            // replaced.
            let is_there = |server: &Arc<str>| health.times.iter().any(|time| time.server == *server);
            self.0.retain(|server, _| is_there(server));
        }
        let steps = health.times.iter().filter_map(|time| {
            let step = match self.0.get_mut(&time.server) {
                Some(clock) => clock.on_reading(time),
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
    pub(super) fn largest_drift(&self) -> Option<f64> {
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
    uncertainty: f64,
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
            uncertainty: round_trip.as_secs_f64() / 2.0,
        }
    }

    /// By how many seconds the clock has jumped since the last probe, if it has.
    fn on_reading(&mut self, time: &ServerTime) -> Option<f64> {
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
        (step.abs() > STEP_MIN.as_secs_f64() + self.uncertainty + before.uncertainty + slack).then_some(step)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::StoreError;

    const EPOCH: f64 = 1_767_225_600.0;

    /// The time of a server at `at` seconds on our clock, if its own clock is `ahead` by that many
    /// seconds.
    fn time_of(server: &str, connection: u64, at: f64, ahead: f64, round_trip: f64) -> ServerTime {
        let moment = |seconds: f64| Moment::default() + Duration::from_secs_f64(seconds);
        ServerTime {
            server: server.into(),
            connection,
            since_epoch: Duration::from_secs_f64(EPOCH + at + ahead),
            sent_at: moment(at - round_trip / 2.0),
            received_at: moment(at + round_trip / 2.0),
        }
    }

    fn reachable(times: Vec<ServerTime>) -> Health {
        Health { reached: Ok(()), times }
    }

    /// Probes one server. Returns the detected jump and the drift.
    fn probe(clocks: &mut Clocks, connection: u64, at: f64, ahead: f64, round_trip: f64) -> (Option<f64>, f64) {
        let steps = clocks.on_probe(&reachable(vec![time_of("a:1", connection, at, ahead, round_trip)]));
        (steps.first().map(|(_, step)| *step), clocks.largest_drift().unwrap())
    }

    #[test]
    fn clock_step_in_either_direction_is_reported_once() {
        let mut clocks = Clocks::default();
        assert_eq!(probe(&mut clocks, 0, 10.0, 0.0, 0.001).0, None);
        assert_eq!(probe(&mut clocks, 0, 13.0, 0.001, 0.001).0, None);
        let (step, drift) = probe(&mut clocks, 0, 16.0, 3600.0, 0.001);
        assert!((step.unwrap() - 3600.0).abs() < 0.1 && (drift - 3600.0).abs() < 0.1);
        assert_eq!(probe(&mut clocks, 0, 19.0, 3600.0, 0.001).0, None);
        assert!((probe(&mut clocks, 0, 22.0, 3599.5, 0.001).0.unwrap() + 0.5).abs() < 0.1);
    }

    #[test]
    fn slow_reply_or_fast_clock_is_not_reported_as_a_step() {
        let mut clocks = Clocks::default();
        probe(&mut clocks, 0, 10.0, 0.0, 0.001);
        // The reply was delayed by half a second in one direction, so the clock seems to be off by
        // a quarter.
        assert_eq!(probe(&mut clocks, 0, 13.0, 0.25, 0.5).0, None);
        assert_eq!(probe(&mut clocks, 0, 16.0, 0.0, 0.001).0, None);
        // Slewed by half a percent for five minutes.
        let (step, drift) = probe(&mut clocks, 0, 316.0, 1.5, 0.001);
        assert!(step.is_none() && (drift - 1.5).abs() < 0.01, "{step:?} {drift}");
    }

    #[test]
    fn another_connection_or_server_starts_a_new_measurement() {
        let mut clocks = Clocks::default();
        probe(&mut clocks, 0, 10.0, 0.0, 0.001);
        let (step, drift) = probe(&mut clocks, 1, 13.0, 7.0, 0.001);
        assert!(step.is_none() && drift.abs() < 0.01, "{step:?} {drift}");
        // Connection numbers are local to a store, so two servers may have the same.
        let other = reachable(vec![time_of("b:1", 1, 16.0, -7.0, 0.001)]);
        assert_eq!(clocks.on_probe(&other), []);
        assert!(clocks.largest_drift().unwrap().abs() < 0.01);
        // The first server is back with another clock. It was forgotten in the meantime.
        assert_eq!(probe(&mut clocks, 1, 19.0, 9.0, 0.001).0, None);
    }

    #[test]
    fn servers_are_measured_separately_and_the_largest_drift_is_reported() {
        let mut clocks = Clocks::default();
        let three = |at: f64, ahead: [f64; 3]| {
            let names = ["a:1", "b:1", "c:1"];
            let times = names.iter().zip(ahead);
            reachable(times.map(|(name, ahead)| time_of(name, 0, at, ahead, 0.001)).collect())
        };
        assert_eq!(clocks.on_probe(&three(10.0, [0.0, 30.0, -30.0])), []);
        assert!(
            clocks.largest_drift().unwrap().abs() < 0.01,
            "they differ, but run at the same rate"
        );
        let steps = clocks.on_probe(&three(13.0, [0.01, 30.0, -35.0]));
        let [(server, step)] = &steps[..] else {
            panic!("{steps:?}")
        };
        assert!(&**server == "c:1" && (step + 5.0).abs() < 0.01, "{steps:?}");
        assert!((clocks.largest_drift().unwrap() + 5.0).abs() < 0.01);
    }

    #[test]
    fn clock_of_a_server_is_remembered_during_an_outage() {
        let mut clocks = Clocks::default();
        probe(&mut clocks, 0, 10.0, 0.0, 0.001);
        let away = Health {
            reached: Err(StoreError::Unavailable("away".into())),
            times: Vec::new(),
        };
        assert_eq!(clocks.on_probe(&away), []);
        assert!((probe(&mut clocks, 0, 19.0, 60.0, 0.001).0.unwrap() - 60.0).abs() < 0.1);
    }
}
