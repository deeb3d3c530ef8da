//! The dashboard queries existing metrics by their labels, and covers all metrics.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::LazyLock;

use saphyr::{LoadableYamlNode, YamlOwned};
use shardlock::metrics::{METRICS, Metric, MetricKind};
use shardlock::tool::agent_metrics::AGENT_METRICS;

use super::definition::Dashboard;

/// The metrics of a manager, and those that an agent adds.
fn all_metrics() -> impl Iterator<Item = &'static Metric> {
    METRICS.iter().chain(AGENT_METRICS)
}

/// Labels that Prometheus adds.
const ADDED: [&str; 2] = ["job", "instance"];

/// Metrics that are not on the dashboard, with the reason.
const EXCEPTIONS: &[(&str, &str)] = &[];

/// A series used in an expression, with the labels that select it.
#[derive(Debug)]
struct Use {
    series: Series,
    labels: Vec<String>,
}

/// The series with a name.
#[derive(Debug)]
struct Series {
    name: String,
    /// The labels that it has in Prometheus.
    has: BTreeSet<String>,
    /// The metric, or those that the recording rule reads.
    metrics: BTreeSet<&'static str>,
}

/// The expressions of the recording rules, by name.
fn records() -> &'static BTreeMap<String, String> {
    static READ: LazyLock<BTreeMap<String, String>> = LazyLock::new(|| {
        let path = support::repository().join("config/prometheus/recording.rules.yml");
        let text = std::fs::read_to_string(path).expect("read the rules");
        let document = YamlOwned::load_from_str(&text).expect("YAML").remove(0);
        let list = |node: &YamlOwned, key| {
            node.as_mapping_get(key)
                .and_then(|list| list.as_vec().cloned())
                .expect(key)
        };
        let rules = list(&document, "groups")
            .into_iter()
            .flat_map(|group| list(&group, "rules"));
        let text = |rule: &YamlOwned, key| {
            rule.as_mapping_get(key)
                .and_then(|text| text.as_str())
                .expect(key)
                .to_owned()
        };
        rules.map(|rule| (text(&rule, "record"), text(&rule, "expr"))).collect()
    });
    &READ
}

/// The series used in an expression. Panics if a name is neither a metric nor a recorded series.
#[track_caller]
fn uses(expression: &str) -> Vec<Use> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
    let mut found = vec![];
    let mut rest = expression;
    while let Some(start) = rest.find(is_word) {
        let (name, after) = rest[start..].split_at(rest[start..].find(|c| !is_word(c)).unwrap_or(rest.len() - start));
        rest = after;
        if !name.contains("shardlock_") {
            continue;
        }
        let selectors = after
            .strip_prefix('{')
            .map(|inner| inner.split_once('}').expect("a brace").0);
        let labels = selectors.iter().flat_map(|selectors| selectors.split(", "));
        let labels = labels.map(|selector| selector.split(|c| !is_word(c)).next().expect("a label").to_owned());
        found.push(Use {
            series: series_named(name),
            labels: labels.collect(),
        });
    }
    found
}

#[track_caller]
fn series_named(name: &str) -> Series {
    let owned = |labels: &[&str]| labels.iter().map(|&label| label.to_owned()).collect::<BTreeSet<_>>();
    let (has, metrics) = if let Some((level, _)) = name.split_once(':') {
        let rule = records().get(name);
        let rule = rule.unwrap_or_else(|| panic!("{name} is not recorded"));
        let metrics = uses(rule).into_iter().flat_map(|one| one.series.metrics);
        (owned(&level.split('_').collect::<Vec<_>>()), metrics.collect())
    } else {
        let metric = metric_of(name);
        let bucket: &[&str] = if metric.kind == MetricKind::Histogram {
            &["le"]
        } else {
            &[]
        };
        (
            owned(&[metric.labels, &ADDED, bucket].concat()),
            BTreeSet::from([metric.name]),
        )
    };
    Series {
        name: name.to_owned(),
        has,
        metrics,
    }
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
    let found = all_metrics().find(is_of);
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

/// The labels that the result of an expression has.
fn labels_left(expression: &str) -> BTreeSet<String> {
    if expression.contains(" by (") {
        return groups(expression).into_iter().map(str::to_owned).collect();
    }
    match &*uses(expression) {
        // A recorded series as it is.
        [one] if expression.starts_with(&one.series.name) => one.series.has.clone(),
        _ => BTreeSet::new(),
    }
}

#[test]
fn every_series_has_the_labels_its_queries_use() {
    let dashboard = Dashboard::read();
    let panels = dashboard.panels.iter().chain(&dashboard.annotations);
    let asked = panels.flat_map(|panel| panel.targets.iter().map(|target| (&panel.title, &target.expression)));
    let chosen = dashboard
        .variables
        .iter()
        .map(|variable| (&variable.name, &variable.series));
    for (place, expression) in asked.chain(chosen) {
        let uses = uses(expression);
        assert!(!uses.is_empty(), "{place}: {expression} uses none of our metrics");
        for Use { series, labels } in &uses {
            for label in labels.iter().map(String::as_str).chain(groups(expression)) {
                assert!(
                    series.has.contains(label),
                    "{place}: {} has no label {label}",
                    series.name
                );
            }
            // The variables apply to every panel whose series have their labels.
            let choosing = ADDED.into_iter().chain(["class", "shard"]);
            for label in choosing.filter(|&label| series.has.contains(label) && place != "job") {
                let is_variable = dashboard.variables.iter().any(|variable| &variable.name == place);
                // A restart is one of a process, whatever its shards are.
                let is_restart = place == "Restart" && label == "shard";
                let by_it = labels.iter().any(|given| given == label);
                assert!(
                    by_it || is_variable || is_restart,
                    "{place}: {expression} ignores ${label}"
                );
            }
        }
    }
}

/// A series for each class or shard is recorded where a panel would read many buckets.
#[test]
fn quantiles_by_class_or_request_use_recording_rules() {
    for panel in &Dashboard::read().panels {
        for target in &panel.targets {
            let by = groups(&target.expression);
            let reads_buckets = target.expression.contains("histogram_quantile(");
            assert!(
                !reads_buckets || !(by.contains("class") || by.contains("request")) || panel.title == HAND_OFFS,
                "{}: use a recording rule",
                panel.title
            );
        }
    }
}

/// Its requests are a choice of all, of which there is no recording rule.
const HAND_OFFS: &str = "Round trip of hand-off requests";

#[test]
fn legends_name_only_labels_of_the_result() {
    let dashboard = Dashboard::read();
    for panel in dashboard.panels.iter().chain(&dashboard.annotations) {
        for target in &panel.targets {
            let left = labels_left(&target.expression);
            for label in target
                .legend
                .split("{{")
                .skip(1)
                .map(|rest| rest.split("}}").next().unwrap())
            {
                assert!(
                    left.contains(label),
                    "{}: {} has no {label}",
                    panel.title,
                    target.expression
                );
            }
        }
    }
}

#[test]
fn links_lead_to_pages_of_the_repository() {
    let links = Dashboard::read().links;
    assert!(!links.is_empty());
    for link in links {
        let path = link.strip_prefix(concat!(env!("CARGO_PKG_REPOSITORY"), "/blob/main/"));
        let path = path.unwrap_or_else(|| panic!("{link} is not in the repository of the packages"));
        assert!(support::repository().join(path).is_file(), "{link}");
    }
}

#[test]
fn every_metric_is_on_the_dashboard_or_left_out_for_a_reason() {
    let dashboard = Dashboard::read();
    let expressions = dashboard.panels.iter().flat_map(|panel| &panel.targets);
    let shown: BTreeSet<_> = expressions
        .flat_map(|target| uses(&target.expression))
        .flat_map(|one| one.series.metrics)
        .collect();
    for metric in all_metrics() {
        let reason = EXCEPTIONS.iter().find(|(name, _)| *name == metric.name);
        assert_eq!(shown.contains(metric.name), reason.is_none(), "{}", metric.name);
    }
    let known = |name: &str| all_metrics().any(|metric| metric.name == name);
    assert!(
        EXCEPTIONS
            .iter()
            .all(|(name, reason)| known(name) && !reason.is_empty())
    );
}

#[test]
fn every_panel_has_a_unique_title_and_a_description() {
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
