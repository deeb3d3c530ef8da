//! The dashboard as its file defines it: panels, their queries, and variables.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use support::repository;

/// The directory of the dashboard.
pub(crate) fn folder() -> PathBuf {
    repository().join("grafana")
}

pub(crate) fn file() -> PathBuf {
    folder().join("dashboards/shardlock.json")
}

pub(crate) struct Dashboard {
    /// Those of collapsed rows, too.
    pub(crate) panels: Vec<Panel>,
    /// Marks on all graphs, in the form of panels: the legend is the text of the mark.
    pub(crate) annotations: Vec<Panel>,
    /// The titles of the rows.
    pub(crate) rows: Vec<String>,
    /// The addresses of pages.
    pub(crate) links: Vec<String>,
    pub(crate) variables: Vec<Variable>,
}

/// A panel, not counting rows.
pub(crate) struct Panel {
    pub(crate) title: String,
    pub(crate) description: String,
    pub(crate) targets: Vec<Target>,
}

/// One query of a panel.
pub(crate) struct Target {
    pub(crate) expression: String,
    pub(crate) legend: String,
}

/// A variable with a query to Prometheus: `label_values(series, label)`.
pub(crate) struct Variable {
    pub(crate) name: String,
    pub(crate) series: String,
    pub(crate) label: String,
}

/// Values of variables, by name without the dollar sign.
pub(crate) type Choice = BTreeMap<&'static str, String>;

impl Dashboard {
    pub(crate) fn read() -> Self {
        let content = std::fs::read_to_string(file()).expect("the dashboard can be read");
        let document: Value = serde_json::from_str(&content).expect("the dashboard is JSON");
        let nested = list(&document["panels"])
            .filter_map(|row| row["panels"].as_array())
            .flatten();
        let panels = list(&document["panels"])
            .filter(|panel| panel["type"] != "row")
            .chain(nested);
        let asked = list(&document["templating"]["list"]).filter(|variable| variable["type"] == "query");
        Self {
            panels: panels.map(Panel::read).collect(),
            annotations: list(&document["annotations"]["list"])
                .map(Panel::read_annotation)
                .collect(),
            rows: list(&document["panels"])
                .filter(|panel| panel["type"] == "row")
                .map(|row| text(&row["title"]))
                .collect(),
            links: list(&document["links"]).map(|link| text(&link["url"])).collect(),
            variables: asked.map(Variable::read).collect(),
        }
    }

    #[track_caller]
    pub(crate) fn panel(&self, title: &str) -> &Panel {
        let mut all = self.panels.iter().chain(&self.annotations);
        let found = all.find(|panel| panel.title == title);
        found.unwrap_or_else(|| panic!("no panel or annotation is titled {title:?}"))
    }
}

impl Panel {
    fn read(panel: &Value) -> Self {
        let targets = list(&panel["targets"]).map(|target| Target {
            expression: text(&target["expr"]),
            legend: text(&target["legendFormat"]),
        });
        Self {
            title: text(&panel["title"]),
            description: text(&panel["description"]),
            targets: targets.collect(),
        }
    }
}

impl Panel {
    fn read_annotation(annotation: &Value) -> Self {
        let target = Target {
            expression: text(&annotation["expr"]),
            legend: text(&annotation["titleFormat"]),
        };
        Self {
            title: text(&annotation["name"]),
            description: String::new(),
            targets: vec![target],
        }
    }
}

impl Variable {
    fn read(variable: &Value) -> Self {
        let query = text(&variable["query"]["query"]);
        let inner = query
            .strip_prefix("label_values(")
            .and_then(|rest| rest.strip_suffix(')'));
        let (series, label) = inner
            .and_then(|inner| inner.rsplit_once(','))
            .unwrap_or_else(|| panic!("{query} is not label_values(series, label)"));
        Self {
            name: text(&variable["name"]),
            series: series.to_owned(),
            label: label.trim().to_owned(),
        }
    }
}

/// The expression with the variables replaced, as Grafana would send it.
#[track_caller]
pub(crate) fn filled(expression: &str, choice: &Choice) -> String {
    let mut filled = expression.to_owned();
    // Longest names first: the start of `$__range` must not be replaced as a shorter variable.
    let mut names: Vec<_> = choice.iter().collect();
    names.sort_by_key(|(name, _)| std::cmp::Reverse(name.len()));
    for (name, value) in names {
        filled = filled.replace(&format!("${name}"), value);
    }
    assert!(!filled.contains('$'), "a variable is unknown: {filled}");
    filled
}

#[track_caller]
fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().expect("a list").iter()
}

#[track_caller]
fn text(value: &Value) -> String {
    value
        .as_str()
        .unwrap_or_else(|| panic!("{value} is not a string"))
        .to_owned()
}
