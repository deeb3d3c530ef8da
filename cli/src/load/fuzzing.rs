//! Invariants of what the tool parses from other processes. The fuzz target in `fuzz/` that runs
//! this includes this file and `counters.rs` as modules.

use super::counters::Counters;

/// A page of metrics in Prometheus' text format.
pub(crate) fn metrics_page(data: &[u8]) {
    // A page always ends with a complete line.
    let text = format!("{}\n", String::from_utf8_lossy(data));
    // A quote could make it look like another label.
    let is_legal = |class: &&str| {
        class
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-'))
    };
    let class = text.lines().next().filter(is_legal).unwrap_or("jobs");
    let counters = Counters::parse(&text, class);
    assert_eq!(counters.since(counters), Counters::default());
    assert_eq!(counters.since(Counters::default()), counters);
    assert!(counters.locks() >= counters.uncontended);
    // An additional line adds its value, and a comment adds nothing.
    let more = format!(
        "{text}shardlock_acquisitions_total{{class=\"{class}\",outcome=\"acquired\",path=\"remote\"}} 2\n\
         # shardlock_store_requests_total{{}} 3\nshardlock_store_requests_total{{shard=\"a\"}} 5\n"
    );
    let more = Counters::parse(&more, class);
    assert_eq!(more.store_requests, counters.store_requests.saturating_add(5));
    assert_eq!(more.remote, counters.remote.saturating_add(2));
    assert_eq!((more.uncontended, more.local), (counters.uncontended, counters.local));
}
