use super::{SECRET, lines, text};
use crate::config::Config;
use crate::error::InvalidSetting;
use crate::text::must_be_escaped;

/// Settings by name, as set by code, a command line or the environment. The first two lines are a
/// name and a value; the rest are environment variables.
pub fn settings(data: &[u8]) {
    let text = text(data);
    let hides = !text.replace(&format!("redis://:{SECRET}@"), "").contains(SECRET);
    let [name, value, variables] = lines(&text);
    let mut config = Config::default();
    let set = config.set(name, value);
    match &set {
        Ok(()) => {
            let mut again = config.clone();
            again.set(name, value).unwrap();
            assert_eq!(again, config);
        }
        Err(error) => {
            assert_eq!(config, Config::default(), "nothing has changed");
            shown(error, hides);
        }
    }
    #[cfg(feature = "file")]
    {
        let in_a_file = Config::from_toml(&format!("{} = {}", quoted(name), quoted(value)));
        same(&set, &config, in_a_file, "a file");
    }
    if Config::fields().any(|(known, _)| known == name) && !value.is_empty() {
        let mut from_variables = Config::default();
        let variable = format!("SHARDLOCK_{}", name.to_ascii_uppercase());
        let applied = from_variables.apply_variables([(variable, value.to_owned())]);
        same(&set, &config, applied.map(|()| from_variables), "a variable");
    }
    let variables: Vec<(String, String)> = variables
        .lines()
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect();
    let mut changed = config.clone();
    match changed.apply_variables(variables) {
        Ok(()) => {}
        Err(error) => {
            assert_eq!(changed, config, "nothing has changed");
            shown(&error, hides);
            assert!(error.field.starts_with("SHARDLOCK_") || error.field == "environment variable");
        }
    }
}

/// Checks that another source accepts the same values, and refuses a value for the same reason.
fn same(set: &Result<(), InvalidSetting>, config: &Config, other: Result<Config, InvalidSetting>, source: &str) {
    match (set, other) {
        (Ok(()), Ok(other)) => assert_eq!(*config, other, "{source} is parsed differently"),
        (Err(one), Err(other)) => {
            assert_eq!(
                (&one.value, &one.bound),
                (&other.value, &other.bound),
                "{source} is refused for another reason"
            );
        }
        (set, other) => panic!("{set:?}, but from {source} {other:?}"),
    }
}

fn shown(error: &InvalidSetting, hides: bool) {
    let error = error.to_string();
    assert!(!error.contains(must_be_escaped), "{error:?}");
    assert!(!(hides && error.contains(SECRET)), "{error}");
}

/// Quotes a text as a TOML string.
#[cfg(feature = "file")]
fn quoted(text: &str) -> String {
    let mut quoted = "\"".to_owned();
    for char in text.chars() {
        match char {
            '"' | '\\' => quoted.extend(['\\', char]),
            char if char.is_control() => quoted.push_str(&format!("\\u{:04x}", u32::from(char))),
            char => quoted.push(char),
        }
    }
    quoted.push('"');
    quoted
}
