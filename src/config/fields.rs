//! The table of all settings: their names, bounds and descriptions. Files, the environment and the
//! command line reach the settings through this table, which checks values from every source.

use std::time::Duration;

use super::Config;
use super::bounds::{Bounds, File, OrNone, Problem, Readiness, Secret, Shards, Switch, Text, Within};

/// One setting.
pub(super) struct Field {
    pub(super) name: &'static str,
    /// A one-line description.
    pub(super) doc: &'static str,
    /// Parses the value from text. The value may still be out of bounds.
    pub(super) set: fn(&mut Config, &str) -> Result<(), Problem>,
    pub(super) check: fn(&Config) -> Result<(), Problem>,
}

impl Field {
    pub(super) fn named(name: &str) -> Option<&'static Self> {
        FIELDS.iter().find(|field| field.name == name)
    }
}

/// A setting with the name of the field of [`Config`] that holds it.
macro_rules! field {
    ($name:ident, $bounds:expr, $doc:literal) => {
        Field {
            name: stringify!($name),
            doc: $doc,
            set: |config, text| {
                config.$name = $bounds.parse(text)?;
                Ok(())
            },
            check: |config| $bounds.check(&config.$name),
        }
    };
}

const fn ms(millis: u64) -> Duration {
    Duration::from_millis(millis)
}

const fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

const DAY: u64 = 24 * 3600;

pub(super) const TTL: Within<Duration> = Within(ms(50), secs(DAY));
pub(super) const TIMEOUT: OrNone<Within<Duration>> = OrNone(Within(Duration::ZERO, secs(365 * DAY)));
pub(super) const MAX_HOLD: OrNone<Within<Duration>> = OrNone(Within(ms(1), secs(365 * DAY)));
/// A lease lasts for as long, so the bound is that of the TTL.
pub(super) const MIN_HOLD: Within<Duration> = Within(Duration::ZERO, TTL.1);
pub(super) const LINGER: Within<Duration> = Within(Duration::ZERO, secs(3600));

const NAMESPACE: Text = Text {
    most: 64,
    // A brace would change which part of a key decides its slot; % is used to encode keys with
    // braces.
    allowed: |byte| byte.is_ascii_graphic() && !matches!(byte, b'{' | b'}' | b'%'),
    words: "bytes of printable ASCII without spaces, braces and %",
};

const CLASS: Text = Text {
    most: 32,
    allowed: |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-'),
    words: "lower-case letters, digits, _ and -",
};

const USERNAME: Text = Text {
    most: 128,
    allowed: |byte| !byte.is_ascii_control(),
    words: "bytes without control characters",
};

/// In the order of [`Config`].
pub(super) static FIELDS: &[Field] = &[
    field!(
        shards,
        Shards { most: 1024 },
        "the shards, as a list of url or name=url"
    ),
    field!(namespace, NAMESPACE, "the prefix of all key names in Redis"),
    field!(ttl, TTL, "how long a key stays locked after its holder dies"),
    field!(
        renew_fraction,
        Within(0.02, 0.5),
        "the fraction of its TTL after which a lease is renewed"
    ),
    field!(timeout, TIMEOUT, "how long a request waits for its lock, or none"),
    field!(max_hold, MAX_HOLD, "how long the lease of a guard is renewed, or none"),
    field!(
        min_hold,
        MIN_HOLD,
        "how long a key stays locked after its lock was acquired, even if it is released earlier"
    ),
    field!(
        linger,
        LINGER,
        "how long a lease stays with the process after its last guard is gone, if no task waits"
    ),
    field!(
        store_timeout,
        Within(ms(10), secs(60)),
        "how long a shard may take to reply"
    ),
    field!(
        connections,
        Within(1, 16),
        "the number of command connections to each shard"
    ),
    field!(
        max_burst,
        OrNone(Within(1, 1_000_000)),
        "how many guards a process serves in one turn while others wait, or none"
    ),
    field!(
        max_slice,
        Within(Duration::ZERO, secs(10)),
        "how long a process serves its tasks in one turn while others wait"
    ),
    field!(
        max_waiters_per_key,
        Within(1, 10_000_000),
        "how many tasks of a process may wait for one key"
    ),
    field!(
        max_waiters,
        Within(1, 10_000_000),
        "how many tasks of a process may wait, over all keys"
    ),
    field!(
        max_keys,
        Within(1, 10_000_000),
        "how many keys a process may hold or wait for at a time; lingering leases make room"
    ),
    field!(
        class,
        CLASS,
        "the class under which metrics count requests that name none"
    ),
    field!(max_classes, Within(1, 1000), "the maximum number of classes in metrics"),
    field!(
        hot_keys,
        Within(1, 1024),
        "how many of the keys with the most contention are tracked by name"
    ),
    field!(
        hot_key_metrics,
        Switch,
        "whether the admin endpoint has a metric for each of the hot keys: true or false"
    ),
    field!(
        slow_wait,
        MAX_HOLD,
        "the duration from which a wait for a lock is logged, or none"
    ),
    field!(
        long_hold,
        MAX_HOLD,
        "the duration from which a held guard is logged, or none"
    ),
    field!(
        log_keys,
        Switch,
        "whether log lines about lost locks, slow waits and long holds name the key: true or false"
    ),
    field!(
        ready_when,
        Readiness,
        "when /readyz of the admin endpoint answers 200: if any shard is up, or only if all are"
    ),
    field!(
        min_replicas_acked,
        Within(0, 16),
        "how many replicas must acknowledge a lease before it counts"
    ),
    field!(
        redlock_max_ttl,
        TTL,
        "the longest TTL in a redlock:// shard; a restarted node does not vote for this long"
    ),
    field!(
        check_role,
        Switch,
        "whether each connect checks by ROLE that a Redis server is a primary: true or false"
    ),
    field!(
        username,
        OrNone(USERNAME),
        "the user that logs in to the servers of shards whose URL has no login, or none"
    ),
    field!(password, OrNone(Secret), "the password of the user, or none"),
    field!(
        password_file,
        OrNone(File),
        "a file with the password, read at each connect, or none"
    ),
    field!(
        tls_ca,
        OrNone(File),
        "a PEM file with the authorities that sign server certificates, or none"
    ),
    field!(
        tls_cert,
        OrNone(File),
        "a PEM file with the certificate to present to servers, or none"
    ),
    field!(tls_key, OrNone(File), "a PEM file with the key of tls_cert, or none"),
];
