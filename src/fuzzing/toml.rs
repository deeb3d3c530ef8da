use super::{SECRET, text};
use crate::config::Config;
use crate::text::must_be_escaped;

/// A configuration file.
pub fn toml(data: &[u8]) {
    let text = text(data);
    // A password outside a URL can't be recognized.
    let hides = !text.replace(&format!("redis://:{SECRET}@"), "").contains(SECRET);
    match Config::from_toml(&text) {
        Ok(config) => {
            if hides {
                let shown = format!("{:?}", config.shards);
                assert!(!shown.contains(SECRET), "{shown}");
            }
            if let Err(error) = config.validate() {
                // Settings that a file may leave to another source.
                let together = [
                    "shards",
                    "redlock_max_ttl",
                    "min_replicas_acked",
                    "tls_ca",
                    "tls_cert",
                    "tls_key",
                ];
                assert!(
                    together.contains(&error.field.as_str()),
                    "{error} was not reported for {text:?}"
                );
                shown(&error.to_string(), hides);
            }
            assert!(config.shards.len() <= 1024 && config.namespace.len() <= 64);
        }
        Err(error) => {
            shown(&error.to_string(), hides);
            assert!(error.field.contains("TOML line "), "{error} names the line");
        }
    }
}

fn shown(error: &str, hides: bool) {
    assert!(!error.contains(must_be_escaped), "{error:?}");
    assert!(!(hides && error.contains(SECRET)), "{error}");
}
