//! The data of panels and variables while the load runs.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::process::Command;
use std::time::Instant;

use support::prometheus::{Prometheus, Sample};

use super::definition::{self, Choice, Dashboard, filled};
use super::environment::Environment;
use super::faults::{FAULTS, QUIET, Sign};
use super::model;

/// The classes of the load.
const CLASSES: [&str; 8] = ["cron", "default", "jobs", "mail", "other", "prices", "reports", "sale"];

fn are_numbers(samples: &[Sample]) -> bool {
    !samples.is_empty() && samples.iter().any(|sample| sample.value.is_finite())
}

fn are_above_zero(samples: &[Sample]) -> bool {
    samples
        .iter()
        .any(|sample| sample.value.is_finite() && sample.value > 0.0)
}

#[test]
fn every_panel_and_every_variable_has_data_under_load() {
    let (dashboard, environment) = (Dashboard::read(), Environment::start());
    has_data(&dashboard, &environment, &Environment::everything());

    // Several values and a single value, in Grafana's notation.
    let mut some = Environment::everything();
    let instances = environment.prometheus.label_values("shardlock_shard_up", "instance");
    let agent = &environment.agent.address;
    let worker = instances.iter().find(|instance| *instance != agent).expect("a worker");
    some.insert("job", format!("({})", Prometheus::JOB));
    some.insert("instance", format!("({worker}|{agent})").replace('.', r"\\."));
    some.insert("class", "(jobs|mail|prices|sale)".to_owned());
    some.insert("shard", "(shard-0|shard-1|shard-2)".to_owned());
    has_data(&dashboard, &environment, &some);

    picture_shows_every_panel(&dashboard, &environment);

    for variable in &dashboard.variables {
        let values = environment
            .prometheus
            .label_values(&filled(&variable.series, &Environment::everything()), &variable.label);
        let values: BTreeSet<_> = values.iter().map(String::as_str).collect();
        let is_right = match variable.name.as_str() {
            "job" => values == BTreeSet::from([Prometheus::JOB]),
            "instance" => values.len() == 3,
            "class" => values == BTreeSet::from(CLASSES),
            "shard" => values == BTreeSet::from(["shard-0", "shard-1", "shard-2"]),
            name => panic!("the test does not know the variable {name}"),
        };
        assert!(is_right, "{}: {values:?}", variable.name);
    }
}

/// The picture of the dashboard for documents can be drawn from the same data.
#[track_caller]
fn picture_shows_every_panel(dashboard: &Dashboard, environment: &Environment) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("dashboard.svg");
    let rows: Vec<_> = dashboard.rows.iter().map(String::as_str).collect();
    let drawn = Command::new(model::python())
        .arg("-B")
        .arg(definition::folder().join("picture.py"))
        .arg(environment.prometheus.url())
        .arg(&file)
        .args(["--minutes", "1", "--rows"])
        .args(rows)
        .output()
        .unwrap();
    assert!(drawn.status.success(), "{}", String::from_utf8_lossy(&drawn.stderr));
    let text = std::fs::read_to_string(file).unwrap();
    let svg = roxmltree::Document::parse(&text).expect("an SVG");
    let texts: BTreeSet<_> = svg.descendants().filter_map(|node| node.text()).collect();
    for panel in &dashboard.panels {
        // Long titles are cut.
        let start: String = panel.title.chars().take(20).collect();
        assert!(texts.iter().any(|text| text.starts_with(&start)), "{}", panel.title);
    }
    assert!(!texts.contains("No data"), "{text}");
}

#[track_caller]
fn has_data(dashboard: &Dashboard, environment: &Environment, choice: &Choice) {
    for annotation in &dashboard.annotations {
        // A valid query, whose result is empty while all is well.
        environment.query(&annotation.targets[0], choice);
    }
    for panel in &dashboard.panels {
        for target in &panel.targets {
            if QUIET.contains(&panel.title.as_str()) {
                environment.until(&panel.title, target, choice, are_numbers);
            } else {
                environment.until(&panel.title, target, choice, are_above_zero);
            }
        }
    }
}

#[test]
fn fault_panels_have_data_during_their_faults() {
    let (dashboard, environment) = (Dashboard::read(), Environment::start());
    let choice = Environment::everything();
    for fault in FAULTS {
        if fault.is_unmistakable {
            for sign in fault.shown_by {
                let panel = dashboard.panel(sign.panel);
                let before = panel
                    .targets
                    .iter()
                    .flat_map(|target| environment.query(target, &choice));
                assert_eq!(
                    before.filter(|sample| is_sign(sign, sample)).count(),
                    0,
                    "{}",
                    sign.panel
                );
            }
        }
        let mut choice = choice.clone();
        if fault.again_after.is_some() {
            // The time that the fault lasts, and room for a scrape before and after it.
            choice.insert("__rate_interval", "8s".to_owned());
        }
        let injected_at = Cell::new(Instant::now());
        if !fault.is_repeated {
            (fault.inject)(&environment);
        }
        for sign in fault.shown_by {
            for target in &dashboard.panel(sign.panel).targets {
                let what = format!("{}, when {}", sign.panel, fault.what);
                environment.until(&what, target, &choice, |samples| {
                    let is_due = fault
                        .again_after
                        .is_some_and(|after| injected_at.get().elapsed() > after);
                    if fault.is_repeated || is_due {
                        (fault.inject)(&environment);
                        injected_at.set(Instant::now());
                    }
                    samples.iter().any(|sample| is_sign(sign, sample))
                });
            }
        }
        (fault.mend)(&environment);
    }
    let all_up = |samples: &[Sample]| samples.len() == 3 && samples.iter().all(|sample| sample.value == 1.0);
    let up = &dashboard.panel("Shards up").targets[0];
    environment.until("all shards are up again", up, &choice, all_up);
}

fn is_sign(sign: &Sign, sample: &Sample) -> bool {
    let has = |(name, value): &(&str, &str)| sample.labels.get(*name).is_some_and(|found| found == value);
    sign.labels.iter().all(has) && (sign.is_bad)(sample.value)
}

#[test]
fn every_normally_quiet_panel_is_covered_by_a_fault() {
    let shown = |title: &&str| {
        FAULTS
            .iter()
            .any(|fault| fault.shown_by.iter().any(|sign| sign.panel == *title))
    };
    for title in QUIET {
        assert!(shown(title), "{title}");
    }
}
