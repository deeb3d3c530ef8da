//! The settings of requests that SIGHUP changes.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use shardlock::config::Config;

/// What a request has unless its command states something else.
pub(super) struct Defaults {
    /// The settings with which the manager was connected.
    at_start: Config,
    changed: RwLock<Option<Arc<RequestDefaults>>>,
}

/// The settings of a request that has none of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RequestDefaults {
    pub(super) ttl: Duration,
    pub(super) timeout: Option<Duration>,
    pub(super) max_hold: Option<Duration>,
    pub(super) min_hold: Duration,
    pub(super) linger: Duration,
}

impl RequestDefaults {
    fn of(config: &Config) -> Self {
        Self {
            ttl: config.ttl,
            timeout: config.timeout,
            max_hold: config.max_hold,
            min_hold: config.min_hold,
            linger: config.linger,
        }
    }
}

impl Defaults {
    pub(super) const fn new(at_start: Config) -> Self {
        Self {
            at_start,
            changed: RwLock::new(None),
        }
    }

    /// The settings that differ from those of the manager, if some do.
    pub(super) fn changed(&self) -> Option<Arc<RequestDefaults>> {
        self.changed.read().clone()
    }

    /// Applies new settings to later requests. Returns whether other settings differ as well, which
    /// need a restart.
    pub(super) fn change(&self, config: &Config) -> bool {
        let new = RequestDefaults::of(config);
        let is_as_before = new == RequestDefaults::of(&self.at_start);
        *self.changed.write() = (!is_as_before).then(|| Arc::new(new));
        let mut other = config.clone();
        other.ttl = self.at_start.ttl;
        other.timeout = self.at_start.timeout;
        other.max_hold = self.at_start.max_hold;
        other.min_hold = self.at_start.min_hold;
        other.linger = self.at_start.linger;
        other != self.at_start
    }
}
