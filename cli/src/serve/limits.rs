//! What clients may use at most.

use std::time::Duration;

/// The limits. Each has an error of its own, which names the option.
///
/// Waiting requests need none per connection: commands of a connection are executed one after the
/// other, so at most one of them waits. `max_waiters` and `max_waiters_per_key` limit those of all
/// connections together.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Limits")]
#[group(skip)]
pub(super) struct Limits {
    /// The most connections
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = at_least_1(1_000_000))]
    pub(super) max_connections: u64,

    /// The most locks that a connection may hold
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = at_least_1(1_000_000))]
    pub(super) max_locks: u64,

    /// The longest request, and the most bytes that are read ahead while a LOCK waits
    #[arg(long, value_name = "BYTES", default_value_t = 16_384, value_parser = request_bytes())]
    pub(super) max_request_bytes: u64,

    /// How long a connection may take to authenticate, if there is a password
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = auth_time)]
    pub(super) auth_timeout: Duration,
}

fn at_least_1(most: u64) -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1..=most)
}

fn request_bytes() -> clap::builder::RangedU64ValueParser {
    clap::value_parser!(u64).range(1_024..=1 << 20)
}

const AUTH_TIME_MAX: Duration = Duration::from_secs(3600);

fn auth_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).ok();
    let time = time.filter(|time| !time.is_zero() && *time <= AUTH_TIME_MAX);
    time.ok_or_else(|| "must be a duration such as 500ms or 10s, up to 1h".to_owned())
}

impl Limits {
    pub(super) fn request_bytes_max(&self) -> usize {
        // At most 1 MiB, by the range of the option.
        usize::try_from(self.max_request_bytes).unwrap_or(usize::MAX)
    }

    /// Makes room for all connections: raises the soft limit on open files as far as the system
    /// allows, and warns if that is not enough.
    pub(super) fn raise_open_files(&self) {
        use rustix::process::{Resource, getrlimit, setrlimit};

        // For the shards' connections, listeners, and what libraries open.
        const OTHERS: u64 = 256;
        let wanted = self.max_connections.saturating_add(OTHERS);
        let mut limit = getrlimit(Resource::Nofile);
        if limit.current.is_none_or(|current| current >= wanted) {
            return;
        }
        let possible = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
        limit.current = Some(possible);
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the limit on open files could not be raised");
        } else if possible < wanted {
            tracing::warn!(
                possible,
                wanted,
                "the limit on open files allows fewer connections than --max-connections; raise \
                 it, such as with LimitNOFILE= in a systemd unit"
            );
        }
    }
}
