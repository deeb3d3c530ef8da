//! Runs the doctor and reads its report.

use std::collections::BTreeMap;
use std::process::Command;

use serde_json::Value;

use crate::tool::{bare, run};

/// The doctor's report.
pub(crate) struct Report {
    pub(crate) code: i32,
    pub(crate) json: Value,
}

/// Runs the doctor with these shards and arguments.
#[track_caller]
pub(crate) fn doctor(shards: &[&str], args: &[&str]) -> Report {
    let ended = run(command(shards, &[&["--json"], args].concat()));
    let json: Value = serde_json::from_str(&ended.stdout).unwrap_or_else(|error| panic!("{error}: {ended:?}"));
    assert_eq!(json["exit_code"], ended.code, "{ended:?}");
    Report { code: ended.code, json }
}

pub(crate) fn command(shards: &[&str], args: &[&str]) -> Command {
    let mut command = bare(&["doctor"]);
    command.args(args).env("SHARDLOCK_SHARDS", shards.join(" "));
    command
}

impl Report {
    /// All findings, each with its place and check.
    pub(crate) fn all(&self) -> Vec<(&str, &str, &Value)> {
        let mut lists = vec![("settings", &self.json["settings"])];
        for shard in self.json["shards"].as_array().unwrap() {
            lists.push((shard["name"].as_str().unwrap(), &shard["findings"]));
            for server in shard["servers"].as_array().unwrap() {
                lists.push((server["server"].as_str().unwrap(), &server["findings"]));
            }
        }
        lists
            .into_iter()
            .flat_map(|(place, findings)| findings.as_array().unwrap().iter().map(move |finding| (place, finding)))
            .map(|(place, finding)| (place, finding["check"].as_str().unwrap(), finding))
            .collect()
    }

    /// The only finding of this check.
    #[track_caller]
    pub(crate) fn one(&self, check: &str) -> &Value {
        self.at(None, check)
    }

    /// The only finding of this check at this place.
    #[track_caller]
    pub(crate) fn at(&self, place: Option<&str>, check: &str) -> &Value {
        let found: Vec<_> = self
            .all()
            .into_iter()
            .filter(|(at, name, _)| *name == check && place.is_none_or(|place| place == *at))
            .collect();
        let [(_, _, finding)] = &found[..] else {
            panic!("{} findings of {check}: {:#}", found.len(), self.json)
        };
        finding
    }

    /// The warnings and errors, as check and level.
    pub(crate) fn problems(&self) -> BTreeMap<String, String> {
        self.all()
            .into_iter()
            .filter(|(_, _, finding)| finding["level"] == "warning" || finding["level"] == "error")
            .map(|(_, check, finding)| (check.to_owned(), finding["level"].as_str().unwrap().to_owned()))
            .collect()
    }

    /// Asserts that this is the only complaint, and that the finding contains these words.
    #[track_caller]
    pub(crate) fn has_only_problem(&self, check: &str, level: &str, words: &[&str]) {
        let expected = BTreeMap::from([(check.to_owned(), level.to_owned())]);
        assert_eq!(self.problems(), expected, "{:#}", self.json);
        assert_eq!(self.code, if level == "error" { 2 } else { 1 });
        let text = self.one(check).to_string();
        for word in words {
            assert!(text.contains(word), "no {word:?} in {text}");
        }
    }
}
