//! The rules as a resource of the Prometheus Operator.

use std::fs;
use std::path::Path;
use std::process::Command;

use saphyr::YamlOwned;

use crate::rules::{self, ALERTS, RECORDS, list, text};

const FILE: &str = "deploy/kubernetes/prometheusrule.yaml";

/// The groups of rules.
fn groups(node: &YamlOwned) -> Vec<YamlOwned> {
    list(node, "groups").to_vec()
}

#[test]
fn prometheus_rule_has_the_rules_of_the_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let resource = rules::document_at(&root.join(FILE));
    assert_eq!(text(&resource, "apiVersion"), "monitoring.coreos.com/v1");
    assert_eq!(text(&resource, "kind"), "PrometheusRule");
    let spec = resource.as_mapping_get("spec").unwrap();
    let sources = [RECORDS, ALERTS].map(rules::document);
    let expected: Vec<_> = sources.iter().flat_map(groups).collect();
    assert!(
        groups(spec) == expected,
        "{FILE} does not have the rules of config/prometheus: run scripts/prometheus-rule > {FILE}"
    );
}

#[test]
fn prometheus_rule_is_the_output_of_its_script() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = Command::new(root.join("scripts/prometheus-rule")).output().unwrap();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    assert!(
        fs::read(root.join(FILE)).unwrap() == made.stdout,
        "run scripts/prometheus-rule > {FILE}"
    );
}
