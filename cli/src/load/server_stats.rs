//! The statistics of a Redis server, from its own counters.

use deadpool_redis::Pool;
use deadpool_redis::redis::cmd;

use super::connection;

/// Calls and CPU time of servers since their start. Calls from within scripts are included.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ServerStats {
    pub(crate) scripts: u64,
    pub(crate) publishes: u64,
    /// CPU time, in microseconds.
    pub(crate) cpu_us: u64,
}

/// The commands that run a script or a function.
const SCRIPTS: [&str; 6] = ["eval", "eval_ro", "evalsha", "evalsha_ro", "fcall", "fcall_ro"];

const PUBLISHES: [&str; 2] = ["publish", "spublish"];

impl ServerStats {
    /// The sum over all servers.
    pub(crate) async fn of_all(servers: &[Pool]) -> anyhow::Result<Self> {
        let mut sum = Self::default();
        for server in servers {
            let mut connection = connection::get(server).await?;
            let mut texts = Vec::new();
            // One section per command, since servers before 7.0 accept only one.
            for section in ["commandstats", "cpu"] {
                let text: String = cmd("INFO").arg(section).query_async(&mut connection).await?;
                texts.push(text);
            }
            let one = Self::parse(&texts.concat());
            sum.scripts += one.scripts;
            sum.publishes += one.publishes;
            sum.cpu_us += one.cpu_us;
        }
        Ok(sum)
    }

    pub(crate) const fn since(self, earlier: Self) -> Self {
        // A server that has restarted counts from 0 again.
        Self {
            scripts: self.scripts.saturating_sub(earlier.scripts),
            publishes: self.publishes.saturating_sub(earlier.publishes),
            cpu_us: self.cpu_us.saturating_sub(earlier.cpu_us),
        }
    }

    /// Parses the sections `commandstats` and `cpu` of INFO.
    fn parse(text: &str) -> Self {
        let calls = |names: &[&str]| names.iter().map(|name| calls_in(text, name)).sum();
        let seconds = ["used_cpu_user:", "used_cpu_sys:"]
            .iter()
            .map(|name| seconds_in(text, name));
        Self {
            scripts: calls(&SCRIPTS),
            publishes: calls(&PUBLISHES),
            cpu_us: seconds.map(|seconds| (seconds * 1e6) as u64).sum(),
        }
    }
}

/// The calls of one command, from a line such as `cmdstat_evalsha:calls=12,usec=345,...`.
fn calls_in(stats: &str, command: &str) -> u64 {
    let calls = stats.lines().find_map(|line| {
        let rest = line.strip_prefix("cmdstat_")?.strip_prefix(command)?;
        rest.strip_prefix(":calls=")?.split(',').next()?.parse().ok()
    });
    calls.unwrap_or(0)
}

fn seconds_in(stats: &str, name: &str) -> f64 {
    let seconds = stats
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    seconds.unwrap_or(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_those_of_exactly_these_commands_and_times_are_summed() {
        let stats = "# Commandstats\r\ncmdstat_evalsha:calls=12,usec=345\r\ncmdstat_eval:calls=3,usec=1\r\n\
            cmdstat_spublish:calls=2,usec=1\r\n# CPU\r\nused_cpu_sys:0.25\r\nused_cpu_user:1.500001\r\nused_cpu_sys_children:9\r\n";
        assert_eq!(calls_in(stats, "eval"), 3);
        assert_eq!(calls_in(stats, "publish"), 0);
        let usage = ServerStats {
            scripts: 15,
            publishes: 2,
            cpu_us: 1_750_001,
        };
        assert_eq!(ServerStats::parse(stats), usage);
    }
}
