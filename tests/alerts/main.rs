//! The Prometheus rules in `config/prometheus`: promtool accepts them, their unit tests pass, and
//! their metrics exist.

// A failing environment ends the test.
#![allow(clippy::expect_used, clippy::panic, clippy::unwrap_used)]

mod cases;
mod kubernetes;
mod page;
mod promql;
mod rules;
mod vocabulary;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rules::{ALERTS, RECORDS};

/// The path of a file in `config/prometheus`.
fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("config/prometheus")
        .join(name)
}

/// Runs promtool with these arguments and this input, and returns its output. Panics if promtool
/// fails.
fn promtool(args: &[&str], input: Option<File>) -> String {
    let output = Command::new(support::prometheus::promtool())
        .args(args)
        .current_dir(file(""))
        .stdin(input.map_or_else(Stdio::null, Stdio::from))
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "promtool {args:?}: {}\n{said}", output.status);
    said.into_owned()
}

#[test]
fn the_configuration_is_valid_and_loads_the_rules() {
    let said = promtool(&["check", "config", "prometheus.yml"], None);
    assert!(said.contains("2 rule files found"), "{said}");
    assert!(!said.contains("WARNING"), "{said}");
    for name in [RECORDS, ALERTS] {
        let checked = format!("Checking {}", name);
        assert!(said.contains(&checked), "{said}");
        promtool(&["check", "rules", "--lint=all", "--lint-fatal", name], None);
    }
}

#[test]
fn every_alert_has_a_severity_a_summary_and_an_action() {
    for rule in rules::alerts() {
        let severity = rule.label("severity");
        assert!(["critical", "warning"].contains(&severity.as_str()), "{rule:?}");
        for (annotation, least) in [("summary", 20), ("description", 40), ("action", 100)] {
            assert!(
                rule.annotation(annotation).len() >= least,
                "{rule:?} has no {annotation}"
            );
        }
    }
}

#[test]
fn the_page_on_operations_lists_the_alerts() {
    let page = include_str!("../../docs/operations.md");
    for rule in rules::alerts() {
        assert!(
            page.contains(&format!("`{}`", rule.name)),
            "docs/operations.md does not mention {}",
            rule.name
        );
    }
}
