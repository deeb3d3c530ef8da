//! The counters of this process's lock manager, from its page of metrics.

use serde::{Deserialize, Serialize};

/// Acquired locks by path, and store requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Counters {
    pub(crate) uncontended: u64,
    pub(crate) local: u64,
    pub(crate) remote: u64,
    /// Round trips to the stores, renewals included.
    pub(crate) store_requests: u64,
}

impl Counters {
    /// Parses the Prometheus text format. Locks are counted for this class only, requests for all
    /// classes.
    pub(crate) fn parse(text: &str, class: &str) -> Self {
        let class = format!("class=\"{class}\"");
        let by_path = |path: &str| {
            let path = format!("path=\"{path}\"");
            sum_of(text, "shardlock_acquisitions_total{", &[&class, &path])
        };
        Self {
            uncontended: by_path("uncontended"),
            // Under a lingering lease, too, a lock passes between tasks of one process, only with a
            // pause. A shared lock can be acquired beside other tasks of the process.
            local: ["local", "lingering", "joined"]
                .into_iter()
                .map(by_path)
                .fold(0, u64::saturating_add),
            remote: by_path("remote"),
            store_requests: sum_of(text, "shardlock_store_requests_total{", &[]),
        }
    }

    pub(crate) const fn since(self, earlier: Self) -> Self {
        Self {
            uncontended: self.uncontended.saturating_sub(earlier.uncontended),
            local: self.local.saturating_sub(earlier.local),
            remote: self.remote.saturating_sub(earlier.remote),
            store_requests: self.store_requests.saturating_sub(earlier.store_requests),
        }
    }

    pub(crate) const fn locks(self) -> u64 {
        self.uncontended.saturating_add(self.local).saturating_add(self.remote)
    }
}

/// The sum of a counter over all lines with these labels.
fn sum_of(text: &str, name: &str, labels: &[&str]) -> u64 {
    text.lines()
        .filter(|line| line.starts_with(name) && labels.iter().all(|label| line.contains(label)))
        .filter_map(|line| line.rsplit_once(' ')?.1.parse::<u64>().ok())
        .fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lines_with_all_labels_count() {
        let text = "# HELP shardlock_acquisitions_total ...\n\
            shardlock_acquisitions_total{class=\"jobs\",mode=\"exclusive\",outcome=\"acquired\",path=\"local\"} 1\n\
            shardlock_acquisitions_total{class=\"jobs\",mode=\"shared\",outcome=\"acquired\",path=\"joined\"} 2\n\
            shardlock_acquisitions_total{class=\"other\",outcome=\"acquired\",path=\"local\"} 4\n\
            shardlock_acquisitions_total{class=\"jobs\",outcome=\"timeout\",path=\"none\"} 5\n\
            shardlock_store_requests_total{shard=\"a\"} 6\nshardlock_store_requests_total{shard=\"b\"} 7\n";
        let counters = Counters::parse(text, "jobs");
        let expected = Counters {
            local: 3,
            store_requests: 13,
            ..Counters::default()
        };
        assert_eq!((counters, counters.locks()), (expected, 3));
    }

    #[test]
    fn sum_of_large_counts_is_the_largest_number() {
        let largest = u64::MAX;
        let text = format!(
            "shardlock_store_requests_total{{shard=\"a\"}} {largest}\nshardlock_store_requests_total{{shard=\"b\"}} 7\n"
        );
        assert_eq!(Counters::parse(&text, "jobs").store_requests, largest);
    }
}
