//! The facts about a Redis server, as the server reported them. `probe` gathers them, checks read
//! them.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::servers::{ProbeError, host_port};

/// A server and the facts about it.
#[derive(Debug, Clone)]
pub(super) struct ProbedServer {
    /// `host:port`
    pub(super) address: String,
    /// Whether the URL has a password.
    pub(super) has_login: bool,
    pub(super) encrypted: bool,
    pub(super) facts: Result<Facts, ProbeError>,
}

/// The facts that a server reported. A query that the server refused is an `Err` with the server's
/// error.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) round_trips: RoundTrips,
    pub(super) info: Result<Info, String>,
    /// The settings from `CONFIG GET`.
    pub(super) settings: Result<BTreeMap<String, String>, String>,
    pub(super) clock: Result<Clock, String>,
    /// The stored fingerprint of the shard map, if there is one. In a cluster, an `Err` with
    /// `MOVED` if another node has the key.
    pub(super) map: Result<Option<String>, String>,
    /// The ACL user.
    pub(super) user: String,
    /// The needs that the user is not permitted.
    pub(super) denied: Vec<MissingPermission>,
    /// How many commands were tried to find out.
    pub(super) permissions_tried: usize,
    /// The error, if the server currently refuses writes. Known only if the commands themselves
    /// were tried, not just `ACL DRYRUN`.
    pub(super) write_error: Option<String>,
    /// The tried commands that the server does not know.
    pub(super) unknown_commands: Vec<String>,
    /// The error, if the server refuses a script with keys of several slots, such as a renewal.
    pub(super) multi_slot_error: Option<String>,
}

impl Facts {
    /// A value that both `CONFIG GET` and `INFO` report, so that one of them is enough.
    pub(super) fn value<'a>(&'a self, setting: &str, info: &str) -> Option<&'a str> {
        self.setting(setting).or_else(|| self.info(info))
    }

    pub(super) fn setting(&self, name: &str) -> Option<&str> {
        self.settings.as_ref().ok()?.get(name).map(String::as_str)
    }

    pub(super) fn info(&self, name: &str) -> Option<&str> {
        self.info.as_ref().ok()?.get(name)
    }

    pub(super) fn number(&self, name: &str) -> Option<u64> {
        self.info(name)?.parse().ok()
    }

    pub(super) fn is_replica(&self) -> bool {
        self.info("role") == Some("slave")
    }

    /// The address of the primary if this server is a replica.
    pub(super) fn primary(&self) -> Option<String> {
        let host = self.info("master_host").filter(|_| self.is_replica())?;
        Some(host_port(host, self.info("master_port")?))
    }

    pub(super) fn replicas(&self) -> Vec<Replica> {
        self.info.as_ref().map_or_else(|_| Vec::new(), Info::replicas)
    }
}

/// Statistics of the measured round trips.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RoundTrips {
    pub(super) count: usize,
    pub(super) least: Duration,
    pub(super) median: Duration,
    pub(super) most: Duration,
}

impl RoundTrips {
    /// Returns `None` if `times` is empty.
    pub(super) fn of(mut times: Vec<Duration>) -> Option<Self> {
        times.sort_unstable();
        Some(Self {
            count: times.len(),
            least: *times.first()?,
            median: times[times.len() / 2],
            most: *times.last()?,
        })
    }
}

/// The difference between a server's clock and this machine's clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Clock {
    /// The server's time minus ours, in milliseconds.
    pub(super) ahead_ms: i64,
    /// The uncertainty of the difference: half of the round trip.
    pub(super) uncertainty: Duration,
}

/// A command that the user may not run, or not on the needed key or channel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct MissingPermission {
    /// The ACL's name of the command, such as `set` or `cluster|slots`.
    pub(super) command: String,
    pub(super) rule: MissingRule,
}

/// Which permission is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum MissingRule {
    Command,
    /// The key pattern that the user's rules lack.
    Keys(String),
    /// The channel pattern that the user's rules lack.
    Channels(String),
}

/// The reply to `INFO`.
#[derive(Debug, Clone, Default)]
pub(super) struct Info(BTreeMap<String, String>);

/// A replica as its primary sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Replica {
    pub(super) address: String,
    pub(super) state: String,
    /// Seconds since the primary last heard from the replica.
    pub(super) lag: u64,
    /// How many bytes the replica is behind.
    pub(super) behind: u64,
}

impl Info {
    /// Parses lines of the form `name:value`. Other lines are ignored.
    pub(super) fn parse(text: &str) -> Self {
        let pairs = text.lines().filter_map(|line| line.trim_end().split_once(':'));
        Self(pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect())
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    fn replicas(&self) -> Vec<Replica> {
        let number = |name: &str| self.get(name).and_then(|value| value.parse::<u64>().ok());
        let written = number("master_repl_offset").unwrap_or_default();
        let count = number("connected_slaves").unwrap_or_default();
        // Do not trust the count: stop at the first missing line.
        (0..count)
            .map_while(|index| self.get(&format!("slave{index}")))
            .map(|line| {
                let field = |name: &str| {
                    let mut fields = line.split(',').filter_map(|field| field.split_once('='));
                    fields.find(|(known, _)| *known == name).map_or("", |(_, value)| value)
                };
                let offset = field("offset").parse().unwrap_or(0);
                Replica {
                    address: host_port(field("ip"), field("port")),
                    state: field("state").to_owned(),
                    lag: field("lag").parse().unwrap_or(0),
                    behind: written.saturating_sub(offset),
                }
            })
            .collect()
    }
}

#[cfg(test)]
impl Facts {
    /// A healthy server. The given `INFO` lines and settings override the defaults.
    pub(super) fn healthy(info: &str, settings: &[(&str, &str)]) -> Self {
        let usual = [
            ("maxmemory-policy", "noeviction"),
            ("maxmemory", "0"),
            ("appendonly", "yes"),
            ("appendfsync", "everysec"),
            ("no-appendfsync-on-rewrite", "no"),
            ("save", ""),
            (
                "client-output-buffer-limit",
                "normal 0 0 0 slave 268435456 67108864 60 pubsub 33554432 8388608 60",
            ),
            ("timeout", "0"),
            ("tcp-keepalive", "300"),
            ("acl-pubsub-default", "resetchannels"),
            ("maxclients", "10000"),
            ("min-replicas-to-write", "0"),
        ];
        let usual_info = "redis_version:7.0.15\nredis_mode:standalone\nuptime_in_seconds:100000\nrun_id:aaa\nconnected_clients:3\nrole:master\n\
             connected_slaves:0\nmaster_repl_offset:1000\nevicted_keys:0\nrejected_connections:0\ncluster_enabled:0\n";
        let pairs = usual.iter().chain(settings);
        Self {
            round_trips: RoundTrips {
                count: 20,
                least: Duration::from_micros(80),
                median: Duration::from_micros(100),
                most: Duration::from_micros(200),
            },
            info: Ok(Info::parse(&format!("{usual_info}{info}"))),
            settings: Ok(pairs
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect()),
            clock: Ok(Clock {
                ahead_ms: 0,
                uncertainty: Duration::from_micros(50),
            }),
            map: Ok(None),
            user: "default".to_owned(),
            denied: Vec::new(),
            permissions_tried: 18,
            write_error: None,
            unknown_commands: Vec::new(),
            multi_slot_error: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replicas_are_read_from_the_lines_of_their_primary() {
        let info = "role:master\r\nconnected_slaves:2\r\nslave0:ip=10.0.0.2,port=6379,state=online,offset=90,lag=1\r\n\
                    slave1:ip=::1,port=7,state=wait_bgsave,offset=0,lag=0\r\nmaster_repl_offset:100\r\n";
        let replicas = Facts::healthy(info, &[]).replicas();
        let [first, second] = &replicas[..] else {
            panic!("{replicas:?}")
        };
        assert_eq!(
            (first.address.as_str(), first.lag, first.behind),
            ("10.0.0.2:6379", 1, 10)
        );
        assert_eq!(
            (second.address.as_str(), second.state.as_str()),
            ("[::1]:7", "wait_bgsave")
        );
    }

    #[test]
    fn the_median_lies_between_the_least_and_the_most() {
        let of = |millis: &[u64]| RoundTrips::of(millis.iter().map(|&millis| Duration::from_millis(millis)).collect());
        let times = of(&[3, 1, 9]).unwrap();
        let millis = [times.least, times.median, times.most].map(|time| time.as_millis());
        assert_eq!((times.count, millis), (3, [1, 3, 9]));
        assert_eq!(of(&[]), None);
    }
}
