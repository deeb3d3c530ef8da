//! The dashboard queries existing metrics by their labels, and covers all metrics.

use std::collections::BTreeSet;

use shardlock::metrics::{METRICS, Metric, MetricKind};

use super::definition::Dashboard;

/// Labels that Prometheus adds.
const ADDED: [&str; 2] = ["job", "instance"];

/// Metrics that are not on the dashboard, with the reason.
const EXCEPTIONS: &[(&str, &str)] = &[];

/// A metric used in an expression, with the labels that select it.
#[derive(Debug)]
struct Use {
    metric: &'static Metric,
    labels: Vec<String>,
}

/// The metrics used in an expression. Panics if a name is not a metric.
#[track_caller]
fn uses(expression: &str) -> Vec<Use> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = vec![];
    let mut rest = expression;
    while let Some(start) = rest.find("shardlock_") {
        let (name, after) = rest[start..].split_at(rest[start..].find(|c| !is_word(c)).unwrap_or(rest.len() - start));
        let selectors = after
            .strip_prefix('{')
            .map(|inner| inner.split_once('}').expect("a brace").0);
        let labels = selectors.iter().flat_map(|selectors| selectors.split(", "));
        let labels = labels.map(|selector| selector.split(|c| !is_word(c)).next().expect("a label").to_owned());
        found.push(Use {
            metric: metric_of(name),
            labels: labels.collect(),
        });
        rest = after;
    }
    found
}

#[track_caller]
fn metric_of(series: &str) -> &'static Metric {
    let parts = |metric: &Metric| match metric.kind {
        MetricKind::Histogram => ["_bucket", "_sum", "_count"].as_slice(),
        _ => [""].as_slice(),
    };
    let is_of = |metric: &&Metric| {
        let rest = series.strip_prefix(metric.name);
        rest.is_some_and(|rest| parts(metric).contains(&rest))
    };
    let found = METRICS.iter().find(is_of);
    found.unwrap_or_else(|| panic!("{series} is not a metric, or not a series of its kind"))
}

/// The labels by which an expression groups.
fn groups(expression: &str) -> BTreeSet<&str> {
    let lists = expression
        .split("by (")
        .skip(1)
        .map(|rest| rest.split(')').next().unwrap());
    lists.flat_map(|list| list.split(", ")).collect()
}

#[test]
fn every_metric_has_the_labels_that_it_is_asked_by() {
    let dashboard = Dashboard::read();
    let asked = dashboard
        .panels
        .iter()
        .flat_map(|panel| panel.targets.iter().map(|target| (&panel.title, &target.expression)));
    let chosen = dashboard
        .variables
        .iter()
        .map(|variable| (&variable.name, &variable.series));
    for (place, expression) in asked.chain(chosen) {
        let uses = uses(expression);
        assert!(!uses.is_empty(), "{place}: {expression} uses none of our metrics");
        for one in &uses {
            let has = |label: &str| one.metric.labels.contains(&label) || ADDED.contains(&label);
            for label in &one.labels {
                assert!(has(label), "{place}: {} has no label {label}", one.metric.name);
            }
            for label in groups(expression) {
                let is_bucket = label == "le" && one.metric.kind == MetricKind::Histogram;
                assert!(
                    has(label) || is_bucket,
                    "{place}: {} has no label {label}",
                    one.metric.name
                );
            }
            // The variables apply to every panel whose metrics have their labels.
            let choosing = ADDED.into_iter().chain(["class", "shard"]);
            for label in choosing.filter(|&label| has(label) && place != "job") {
                let is_variable = dashboard.variables.iter().any(|variable| &variable.name == place);
                let by_it = one.labels.iter().any(|given| given == label);
                assert!(by_it || is_variable, "{place}: {expression} ignores ${label}");
            }
        }
    }
}

#[test]
fn a_legend_names_labels_that_are_left() {
    for panel in &Dashboard::read().panels {
        for target in &panel.targets {
            let groups = groups(&target.expression);
            for label in target
                .legend
                .split("{{")
                .skip(1)
                .map(|rest| rest.split("}}").next().unwrap())
            {
                assert!(
                    groups.contains(label),
                    "{}: {} has no {label}",
                    panel.title,
                    target.expression
                );
            }
        }
    }
}

#[test]
fn every_metric_is_on_the_dashboard_or_left_out_for_a_reason() {
    let dashboard = Dashboard::read();
    let expressions = dashboard.panels.iter().flat_map(|panel| &panel.targets);
    let shown: BTreeSet<_> = expressions
        .flat_map(|target| uses(&target.expression))
        .map(|one| one.metric.name)
        .collect();
    for metric in METRICS {
        let reason = EXCEPTIONS.iter().find(|(name, _)| *name == metric.name);
        assert_eq!(shown.contains(metric.name), reason.is_none(), "{}", metric.name);
    }
    let known = |name: &str| METRICS.iter().any(|metric| metric.name == name);
    assert!(
        EXCEPTIONS
            .iter()
            .all(|(name, reason)| known(name) && !reason.is_empty())
    );
}

#[test]
fn every_panel_says_what_it_means_and_what_to_do() {
    let mut titles = BTreeSet::new();
    for panel in &Dashboard::read().panels {
        assert!(
            titles.insert(panel.title.clone()),
            "two panels are titled {}",
            panel.title
        );
        assert!(
            panel.description.len() > 80 && panel.description.ends_with('.'),
            "{}",
            panel.title
        );
        assert!(!panel.targets.is_empty(), "{}", panel.title);
    }
}
