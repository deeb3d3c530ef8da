//! The unit tests of the rules pass and cover every rule.

use std::collections::BTreeSet;

use saphyr::YamlOwned;

use crate::promql;
use crate::rules::{self, list, text};
use crate::vocabulary::metrics_behind;

/// A group of unit tests and the metrics of its series.
struct Group {
    node: YamlOwned,
    metrics: BTreeSet<String>,
}

fn groups(file: &str) -> Vec<Group> {
    let document = rules::document(file);
    let groups = list(&document, "tests").iter().map(|test| {
        let series = list(test, "input_series").iter();
        let metrics = series.flat_map(|series| promql::names(text(series, "series")).selectors);
        Group {
            node: test.clone(),
            metrics: metrics.map(|selector| selector.metric).collect(),
        }
    });
    groups.collect()
}

#[test]
fn each_alert_fires_in_its_unit_tests_and_is_silent_in_others() {
    super::promtool(&["test", "rules", "alerts.test.yml"], None);
    let groups = groups("alerts.test.yml");
    for rule in rules::alerts() {
        let needed = metrics_behind(&rule.expr);
        let cases: Vec<_> = groups
            .iter()
            // Without its metrics a rule is always silent.
            .filter(|group| needed.is_subset(&group.metrics))
            .flat_map(|group| list(&group.node, "alert_rule_test"))
            .filter(|case| text(case, "alertname") == rule.name)
            .collect();
        let is_silent = |case: &&YamlOwned| list(case, "exp_alerts").is_empty();
        assert!(
            cases.iter().any(|case| !is_silent(case)),
            "{} does not fire in any unit test",
            rule.name
        );
        assert!(
            cases.iter().any(is_silent),
            "{} fires in every unit test that has its metrics",
            rule.name
        );
    }
}

#[test]
fn each_recording_rule_is_covered_by_a_unit_test() {
    super::promtool(&["test", "rules", "recording.test.yml"], None);
    let groups = groups("recording.test.yml");
    for rule in rules::records() {
        let gives = groups
            .iter()
            .flat_map(|group| list(&group.node, "promql_expr_test"))
            .any(|case| {
                let names = promql::names(text(case, "expr"));
                let is_about_it = names.selectors.iter().any(|selector| selector.metric == rule.name);
                is_about_it && !list(case, "exp_samples").is_empty()
            });
        assert!(gives, "{} is not covered by any unit test", rule.name);
    }
}
