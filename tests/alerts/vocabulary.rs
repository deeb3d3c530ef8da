//! Every name in the rules and their unit tests exists in shardlock: metrics, labels and label
//! values.
//!
//! A rule with a misspelt name is valid but never fires. Its unit test may still pass, because it
//! creates its own series.

use std::collections::BTreeSet;

use shardlock::metrics::{METRICS, Metric, MetricKind};
use shardlock::tool::agent_metrics::AGENT_METRICS;

use crate::page::Page;
use crate::promql::{self, Selector};
use crate::rules::{self, Rule};

/// Labels whose values shardlock chooses, rather than the user.
const WORDED: [&str; 8] = ["mode", "outcome", "path", "kind", "reason", "request", "limit", "le"];

/// The series in which Prometheus itself records whether a target could be scraped.
const SCRAPED: &str = "up";

/// The metrics of a manager, and those that an agent adds.
fn all_metrics() -> impl Iterator<Item = &'static Metric> {
    METRICS.iter().chain(AGENT_METRICS)
}

/// The labels of a series with this name, as Prometheus sees it. `None` if there is no such series.
pub(crate) fn labels(name: &str) -> Option<BTreeSet<&str>> {
    if name == SCRAPED {
        return Some(BTreeSet::from(["job", "instance"]));
    }
    if let Some((level, _)) = name.split_once(':') {
        let is_recorded = rules::records().iter().any(|rule| rule.name == name);
        return is_recorded.then(|| level.split('_').collect());
    }
    all_metrics().find_map(|metric| {
        let suffix = name.strip_prefix(metric.name)?;
        let is_series = match metric.kind {
            MetricKind::Histogram => ["_bucket", "_sum", "_count"].contains(&suffix),
            _ => suffix.is_empty(),
        };
        let le = (suffix == "_bucket").then_some("le");
        let scraped = ["job", "instance"].into_iter().chain(le);
        is_series.then(|| metric.labels.iter().copied().chain(scraped).collect())
    })
}

/// The names of the metrics behind an expression, including those that recording rules read.
pub(crate) fn metrics_behind(expr: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for selector in promql::names(expr).selectors {
        match rules::records().iter().find(|rule| rule.name == selector.metric) {
            Some(rule) => found.extend(metrics_behind(&rule.expr)),
            None => {
                found.insert(selector.metric);
            }
        }
    }
    found
}

fn all_rules() -> impl Iterator<Item = &'static Rule> {
    rules::records().iter().chain(rules::alerts())
}

/// Asserts that the series, the labels and, if shardlock chooses them, the label values exist.
fn check(selector: &Selector, page: &Page, place: &str) {
    let labels = labels(&selector.metric).unwrap_or_else(|| panic!("{place}: there is no {}", selector.metric));
    for matcher in &selector.matchers {
        let label = matcher.label.as_str();
        assert!(
            labels.contains(label),
            "{place}: {} has no label {label}",
            selector.metric
        );
        if !WORDED.contains(&label) {
            continue;
        }
        for behind in metrics_behind(&selector.metric) {
            let values = page.values(&behind, label);
            // A recording rule may read several metrics, not all of which have this label.
            let is_read = values.is_empty() && behind != selector.metric;
            for value in matcher.value.split('|') {
                assert!(
                    is_read || values.contains(value),
                    "{place}: {behind} has no series with {label}={value:?}, only {values:?}"
                );
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_and_their_tests_use_existing_series() {
    let page = Page::of_a_load().await;
    for rule in all_rules() {
        let names = promql::names(&rule.expr);
        assert!(!names.selectors.is_empty(), "{rule:?}");
        let mut known = BTreeSet::new();
        for selector in &names.selectors {
            check(selector, page, &rule.name);
            known.extend(labels(&selector.metric).unwrap());
        }
        for label in &names.groupings {
            assert!(
                known.contains(label.as_str()),
                "{}: nothing in it has a label {label}",
                rule.name
            );
        }
    }
    for name in ["alerts.test.yml", "recording.test.yml"] {
        let document = rules::document(name);
        for series in rules::list(&document, "tests")
            .iter()
            .flat_map(|test| rules::list(test, "input_series"))
        {
            let series = rules::text(series, "series");
            let names = promql::names(series);
            let [selector] = names.selectors.as_slice() else {
                panic!("{name}: {series} is not a series");
            };
            check(selector, page, name);
            let given: BTreeSet<_> = selector.matchers.iter().map(|matcher| matcher.label.as_str()).collect();
            assert_eq!(
                Some(given),
                labels(&selector.metric),
                "{name}: {series} does not have the labels of the real series"
            );
        }
    }
}

#[test]
fn documents_name_only_existing_metrics_and_alerts() {
    let alerts: BTreeSet<_> = rules::alerts().iter().map(|rule| rule.name.as_str()).collect();
    for rule in rules::alerts() {
        let words = rule
            .texts()
            .flat_map(|text| text.split(|char: char| !char.is_ascii_alphanumeric() && char != '_' && char != ':'));
        for word in words.map(|word| word.trim_matches(':')) {
            if word.starts_with("shardlock_") || word.starts_with("job_") {
                let is_histogram = all_metrics().any(|metric| metric.name == word);
                assert!(
                    is_histogram || labels(word).is_some(),
                    "{}: there is no metric {word}",
                    rule.name
                );
            }
            let is_alert = word
                .strip_prefix("Lock")
                .is_some_and(|rest| rest.starts_with(|char: char| char.is_ascii_uppercase()))
                && word != "LockError";
            assert!(
                !is_alert || alerts.contains(word),
                "{}: there is no alert {word}",
                rule.name
            );
        }
    }
}
