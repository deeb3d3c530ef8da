//! Reads the rule files.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use saphyr::{LoadableYamlNode, YamlOwned};

pub(crate) const RECORDS: &str = "recording.rules.yml";
pub(crate) const ALERTS: &str = "alerts.rules.yml";

/// A recording or alerting rule.
#[derive(Debug)]
pub(crate) struct Rule {
    pub(crate) name: String,
    pub(crate) expr: String,
    labels: Vec<(String, String)>,
    annotations: Vec<(String, String)>,
}

impl Rule {
    pub(crate) fn label(&self, name: &str) -> String {
        value(&self.labels, name)
    }

    pub(crate) fn annotation(&self, name: &str) -> String {
        value(&self.annotations, name)
    }

    /// All texts that operators read.
    pub(crate) fn texts(&self) -> impl Iterator<Item = &str> {
        self.annotations.iter().map(|(_, text)| text.as_str())
    }
}

fn value(pairs: &[(String, String)], name: &str) -> String {
    let found = pairs.iter().find(|(known, _)| known == name);
    found.map_or_else(String::new, |(_, value)| value.clone())
}

/// The only document of a file in `config/prometheus`.
pub(crate) fn document(name: &str) -> YamlOwned {
    document_at(&super::file(name))
}

/// The only document of a file.
pub(crate) fn document_at(path: &Path) -> YamlOwned {
    let text = fs::read_to_string(path).unwrap();
    let mut documents = YamlOwned::load_from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(documents.len(), 1, "{}", path.display());
    documents.remove(0)
}

/// The items of the list at a key; empty if there is no such key.
pub(crate) fn list<'a>(node: &'a YamlOwned, key: &str) -> &'a [YamlOwned] {
    let found = node.as_mapping_get(key);
    found.map_or(&[], |list| {
        list.as_vec().unwrap_or_else(|| panic!("{key} is not a list: {list:?}"))
    })
}

/// The text at a key.
pub(crate) fn text<'a>(node: &'a YamlOwned, key: &str) -> &'a str {
    let found = node.as_mapping_get(key).and_then(|text| text.as_str());
    found.unwrap_or_else(|| panic!("there is no text {key} in {node:?}"))
}

fn pairs(rule: &YamlOwned, key: &str) -> Vec<(String, String)> {
    let Some(mapping) = rule.as_mapping_get(key).and_then(YamlOwned::as_mapping) else {
        return Vec::new();
    };
    let text = |node: &YamlOwned| node.as_str().unwrap().to_owned();
    mapping.iter().map(|(name, value)| (text(name), text(value))).collect()
}

fn read(file: &str, kind: &str) -> Vec<Rule> {
    let document = document(file);
    let rules = list(&document, "groups").iter().flat_map(|group| list(group, "rules"));
    let rules: Vec<Rule> = rules
        .map(|rule| Rule {
            name: text(rule, kind).to_owned(),
            expr: text(rule, "expr").to_owned(),
            labels: pairs(rule, "labels"),
            annotations: pairs(rule, "annotations"),
        })
        .collect();
    assert!(!rules.is_empty(), "{file} has no rules");
    rules
}

pub(crate) fn alerts() -> &'static [Rule] {
    static READ: OnceLock<Vec<Rule>> = OnceLock::new();
    READ.get_or_init(|| read(ALERTS, "alert"))
}

pub(crate) fn records() -> &'static [Rule] {
    static READ: OnceLock<Vec<Rule>> = OnceLock::new();
    READ.get_or_init(|| read(RECORDS, "record"))
}
