//! The dashboard conforms to the saved Grafana model, and a misspelt field is an error.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use super::definition;

/// The Python interpreter that has the model.
pub(super) fn python() -> PathBuf {
    let path = std::env::var_os("SHARDLOCK_PYTHON").filter(|path| !path.is_empty());
    path.map(PathBuf::from).unwrap_or_else(|| {
        panic!(
            "SHARDLOCK_PYTHON is not set: `make test` sets it to the Python that scripts/ensure-grafana-model prints"
        )
    })
}

fn check(what: &str, at: Option<&Path>) -> Output {
    let mut command = Command::new(python());
    command
        .arg("-B")
        .arg(definition::folder().join("dashboard.py"))
        .arg(what)
        .args(at);
    command.output().expect("run Python")
}

#[test]
fn dashboard_fits_the_model_and_is_up_to_date() {
    let output = check("--check", None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn misspelt_field_is_an_error_with_its_location() {
    let dashboard: Value = serde_json::from_str(&std::fs::read_to_string(definition::file()).unwrap()).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let place = |kind: &str| panels.iter().position(|panel| panel["type"] == kind).unwrap();
    let (stat, lines) = (place("stat"), place("timeseries"));
    let closed = panels.iter().position(|panel| panel["collapsed"] == true).unwrap();
    let at = |panel: usize, rest: &str| format!("/panels/{panel}{rest}");
    let mistakes: Vec<(String, &str, Value)> = vec![
        (String::new(), "refresch", json!("10s")),
        (at(stat, ""), "descripton", json!("text")),
        (at(stat, "/options"), "grafMode", json!("area")),
        (at(stat, "/options/reduceOptions"), "calc", json!(["last"])),
        (at(lines, "/fieldConfig/defaults"), "unti", json!("s")),
        (at(lines, "/fieldConfig/defaults/custom"), "lineWdth", json!(1)),
        (at(lines, "/options/legend"), "displaymode", json!("list")),
        (at(lines, "/targets/0"), "legend", json!("text")),
        (at(lines, "/gridPos"), "width", json!(8)),
        // A panel of a collapsed row.
        (at(closed, "/panels/0"), "descripton", json!("text")),
        (at(closed, "/panels/0"), "type", json!("timeserie")),
        ("/annotations/list/0".to_owned(), "iconColour", json!("red")),
        ("/annotations/list/0".to_owned(), "titleFormat", json!(1)),
        ("/links/0".to_owned(), "uri", json!("text")),
        ("/templating/list/1".to_owned(), "include_all", json!(true)),
        ("/templating/list/1/query".to_owned(), "querry", json!("text")),
        // An existing field with an unknown value.
        (at(lines, "/fieldConfig/defaults/custom"), "drawStyle", json!("bar")),
        (at(stat, "/options"), "colorMode", json!("valeu")),
        (at(stat, ""), "type", json!("statt")),
    ];
    let temp = tempfile::tempdir().unwrap();
    for (pointer, name, value) in mistakes {
        let mut wrong = dashboard.clone();
        wrong.pointer_mut(&pointer).expect("a place")[name] = value.clone();
        let file = temp.path().join("wrong.json");
        std::fs::write(&file, serde_json::to_string_pretty(&wrong).unwrap()).unwrap();
        let output = check("--check", Some(&file));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{pointer}/{name} = {value} was not found");
        // The error may name a value that is checked together with the wrong one.
        let is_named = stderr.contains(name) || stderr.contains(value.as_str().unwrap_or(name));
        let by_model = stderr.lines().any(|line| !line.contains("dashboard.py makes"));
        assert!(is_named && by_model, "{pointer}/{name} = {value}: {stderr}");
    }
}

#[test]
fn provisioning_files_are_valid_and_a_misspelt_field_is_an_error() {
    let output = check("--provisioning", None);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let kept = definition::folder().join("provisioning");
    for (file, right, wrong) in [
        ("datasources/prometheus.yml", "timeInterval:", "timeIntervall:"),
        ("datasources/prometheus.yml", "isDefault:", "default:"),
        ("dashboards/shardlock.yml", "path:", "paht:"),
        ("dashboards/shardlock.yml", "providers:", "provider:"),
    ] {
        let temp = tempfile::tempdir().unwrap();
        for name in ["datasources/prometheus.yml", "dashboards/shardlock.yml"] {
            let text = std::fs::read_to_string(kept.join(name)).unwrap();
            let text = if name == file { text.replace(right, wrong) } else { text };
            std::fs::create_dir_all(temp.path().join(name).parent().unwrap()).unwrap();
            std::fs::write(temp.path().join(name), text).unwrap();
        }
        let output = check("--provisioning", Some(temp.path()));
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && stderr.contains(wrong.trim_end_matches(':')),
            "{file}, {wrong}: {stderr}"
        );
    }
}
