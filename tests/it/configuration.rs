//! Settings have the same names in code, files and the environment, and are checked alike.

use std::time::Duration;

use shardlock::config::{Builder, Config, Endpoint, ReadyWhen, ShardConfig};
use shardlock::error::InvalidSetting;
use shardlock::tool;

/// A non-default value for every setting.
const SAMPLES: [(&str, &str); 32] = [
    ("shards", "a=rediss://:s3cret@a:1/2,memory://b,redis://c"),
    ("namespace", "jobs/"),
    ("ttl", "5s"),
    ("renew_fraction", "0.25"),
    ("timeout", "1500ms"),
    ("max_hold", "2m"),
    ("min_hold", "13s"),
    ("linger", "3s"),
    ("store_timeout", "250ms"),
    ("connections", "2"),
    ("max_burst", "3"),
    ("max_slice", "4ms"),
    ("max_waiters_per_key", "5"),
    ("max_waiters", "6"),
    ("max_keys", "7"),
    ("class", "batch"),
    ("max_classes", "8"),
    ("hot_keys", "9"),
    ("hot_key_metrics", "true"),
    ("slow_wait", "11s"),
    ("long_hold", "12s"),
    ("log_keys", "false"),
    ("ready_when", "all"),
    ("min_replicas_acked", "1"),
    ("redlock_max_ttl", "20s"),
    ("check_role", "false"),
    ("username", "worker"),
    ("password", "s3cret"),
    ("password_file", "password"),
    ("tls_ca", "ca.pem"),
    ("tls_cert", "me.pem"),
    ("tls_key", "me.key"),
];

/// The samples that can be set together.
fn together() -> impl Iterator<Item = (&'static str, &'static str)> {
    SAMPLES.into_iter().filter(|(name, _)| *name != "password_file")
}

fn from_code() -> Result<Config, InvalidSetting> {
    Builder::new()
        .named_shard("a", "rediss://:s3cret@a:1/2")
        .shard("memory://b")
        .shard("redis://c")
        .namespace("jobs/")
        .ttl(Duration::from_secs(5))
        .renew_fraction(0.25)
        .timeout(Duration::from_millis(1500))
        .max_hold(Duration::from_secs(120))
        .min_hold(Duration::from_secs(13))
        .linger(Duration::from_secs(3))
        .store_timeout(Duration::from_millis(250))
        .connections(2)
        .max_burst(3)
        .max_slice(Duration::from_millis(4))
        .max_waiters_per_key(5)
        .max_waiters(6)
        .max_keys(7)
        .class("batch")
        .max_classes(8)
        .hot_keys(9)
        .hot_key_metrics(true)
        .slow_wait(Duration::from_secs(11))
        .long_hold(Duration::from_secs(12))
        .log_keys(false)
        .ready_when(ReadyWhen::AllShardsUp)
        .min_replicas_acked(1)
        .redlock_max_ttl(Duration::from_secs(20))
        .check_role(false)
        .username("worker")
        .password("s3cret")
        .tls_ca("ca.pem")
        .tls_cert("me.pem")
        .tls_key("me.key")
        .build_config()
}

fn variable(name: &str, value: &str) -> (String, String) {
    (format!("SHARDLOCK_{}", name.to_uppercase()), value.to_owned())
}

#[test]
fn every_setting_has_a_sample_here_that_is_not_its_default() {
    let names: Vec<_> = tool::fields().map(|(name, _)| name).collect();
    assert_eq!(names, SAMPLES.map(|(name, _)| name));
    for (name, value) in SAMPLES {
        let mut config = Config::default();
        tool::set(&mut config, name, value).unwrap();
        assert_ne!(config, Config::default(), "{name}");
    }
}

#[test]
fn every_setting_is_reached_from_code_the_environment_and_by_name() {
    let mut by_name = Config::default();
    for (name, value) in together() {
        tool::set(&mut by_name, name, value).unwrap();
    }
    let mut from_env = Config::default();
    tool::apply_variables(&mut from_env, together().map(|(name, value)| variable(name, value))).unwrap();
    assert_eq!(by_name, from_code().unwrap());
    assert_eq!(from_env, from_code().unwrap());
    let file = Builder::new().shard("redis://c").password_file("password");
    let mut by_name = Config::default();
    tool::set(&mut by_name, "shards", "redis://c").unwrap();
    tool::set(&mut by_name, "password_file", "password").unwrap();
    assert_eq!(by_name, file.build_config().unwrap());
}

#[test]
fn login_that_is_ambiguous_or_unused_is_refused() {
    let refusal = |shards: &str, settings: &[(&str, &str)]| {
        let mut config = Config::default();
        tool::set(&mut config, "shards", shards).unwrap();
        for (name, value) in settings {
            tool::set(&mut config, name, value).unwrap();
        }
        let message = config.validate().unwrap_err().to_string();
        assert!(!message.contains("s3cret"), "{message}");
        message
    };
    let (user, password, file) = (
        ("username", "worker"),
        ("password", "s3cret"),
        ("password_file", "/run/password"),
    );
    assert_eq!(
        refusal("redis://a", &[password, file]),
        "password_file is /run/password, but must be none if password is set; use only one of them"
    );
    assert_eq!(
        refusal("redis://a", &[user]),
        "username is \"worker\", but must be none, or set together with password or password_file"
    );
    assert_eq!(
        refusal("redis://:p@a memory://", &[file]),
        "password_file is set, but must be none unless a shard with servers has a URL without a login"
    );
    #[cfg(feature = "etcd")]
    assert!(refusal("etcd://a", &[password]).starts_with("username is none, but must be set together with"));

    let mut config = Config::default();
    let error = tool::set(&mut config, "password", &"s3cret".repeat(4000)).unwrap_err();
    assert_eq!(
        error.to_string(),
        "password is 24000 bytes long, but must be none, or 1 to 16384 bytes long"
    );
    for name in ["", "a\nb", &"x".repeat(129)] {
        assert_eq!(tool::set(&mut config, "username", name).unwrap_err().field, "username");
    }
}

#[test]
fn later_settings_override_earlier_ones() {
    let mut config = Config::default();
    tool::set(&mut config, "ttl", "1s").unwrap();
    tool::set(&mut config, "max_burst", "1").unwrap();
    tool::apply_variables(&mut config, [variable("max_burst", "2"), variable("class", "env")]).unwrap();
    let config = Builder::new()
        .ttl(Duration::from_secs(9))
        .config(config)
        .shard("memory://")
        .class("code")
        .timeout(None)
        .build_config()
        .unwrap();
    assert_eq!(config.ttl, Duration::from_secs(1));
    assert_eq!((config.max_burst, config.class.as_str()), (Some(2), "code"));
}

#[test]
fn code_can_replace_the_shards_of_other_sources() {
    let config = Builder::new()
        .shard("redis://a")
        .shards([ShardConfig::new("b", "redis://b")])
        .build_config()
        .unwrap();
    assert_eq!(config.shards, [ShardConfig::new("b", "redis://b")]);
}

#[test]
fn the_defaults_lack_only_a_shard() {
    let error = Builder::new().build_config().unwrap_err();
    assert_eq!(error.field, "shards");
    let mut expected = Config::default();
    tool::set(&mut expected, "shards", "redis://localhost").unwrap();
    let config = Builder::new().shard("redis://localhost").build_config().unwrap();
    assert_eq!(config, expected);
}

#[test]
fn an_error_in_the_environment_names_the_variable() {
    let refusal = |name: &str, value: &str| {
        let mut config = Config::default();
        let good = variable("max_keys", "9");
        let error = tool::apply_variables(&mut config, [good, (name.into(), value.into())]).unwrap_err();
        assert_eq!(config, Config::default(), "{name}");
        error.to_string()
    };
    assert_eq!(
        refusal("SHARDLOCK_TTL", "1ms"),
        "SHARDLOCK_TTL is 1ms, but must be from 50ms to 1d"
    );
    assert!(refusal("SHARDLOCK_TTL", "soon").starts_with("SHARDLOCK_TTL is \"soon\", but must be a duration"));
    let url = refusal("SHARDLOCK_SHARDS", "memory://, redis://:s3cret@host:x");
    assert!(
        url.starts_with("SHARDLOCK_SHARDS[1].url is redis://:***@host:***, but must be "),
        "{url}"
    );
    assert_eq!(
        refusal("SHARDLOCK_TLL", "10s"),
        "environment variable is \"SHARDLOCK_TLL\", but must be a known one; did you mean SHARDLOCK_TTL?"
    );
    assert!(refusal("SHARDLOCK_ttl", "10s").ends_with("; did you mean SHARDLOCK_TTL?"));
    assert!(refusal("SHARDLOCK_METRIC", "127.0.0.1:1").ends_with("; did you mean SHARDLOCK_METRICS?"));
    let unknown = refusal("SHARDLOCK_IMAGE_TAG", "1.2.3");
    assert!(unknown.contains("must be a known one: SHARDLOCK_SHARDS, "), "{unknown}");
    // Nobody else needs the variables of the tests of this project.
    assert!(
        !unknown.contains("SHARDLOCK_RABBITMQ") && !unknown.contains("did you mean"),
        "{unknown}"
    );
    // Resembles a variable that Kubernetes sets.
    assert!(refusal("SHARDLOCK_PORT", "9187").contains("must be a known one: "));
}

#[test]
fn variables_of_kubernetes_services_are_ignored() {
    let mut config = Config::default();
    let services = [
        ("SHARDLOCK_SERVICE_HOST", "10.96.0.12"),
        ("SHARDLOCK_SERVICE_PORT", "9187"),
        ("SHARDLOCK_SERVICE_PORT_METRICS", "9187"),
        ("SHARDLOCK_PORT", "tcp://10.96.0.12:9187"),
        ("SHARDLOCK_PORT_9187_TCP", "tcp://10.96.0.12:9187"),
        ("SHARDLOCK_PORT_9187_TCP_ADDR", "10.96.0.12"),
        ("SHARDLOCK_PORT_9187_TCP_PORT", "9187"),
        ("SHARDLOCK_PORT_9187_TCP_PROTO", "tcp"),
        ("SHARDLOCK_REDIS_SERVICE_HOST", "fd00::13"),
        ("SHARDLOCK_REDIS_PORT", "tcp://[fd00::13]:6379"),
    ];
    let variables = services.map(|(name, value)| (name.to_owned(), value.to_owned()));
    tool::apply_variables(&mut config, variables.into_iter().chain([variable("ttl", "5s")])).unwrap();
    let mut expected = Config::default();
    tool::set(&mut expected, "ttl", "5s").unwrap();
    assert_eq!(config, expected);
}

#[test]
fn variables_without_a_value_count_as_unset() {
    let mut config = Config::default();
    let names = tool::fields().map(|(name, _)| variable(name, ""));
    let unknown = ("SHARDLOCK_TLL".to_owned(), String::new());
    tool::apply_variables(&mut config, names.chain([unknown])).unwrap();
    assert_eq!(config, Config::default());
}

#[test]
fn unrelated_variables_are_ignored() {
    let mut config = Config::default();
    let others = [
        "SHARDLOCK_AGENT",
        "SHARDLOCK_AGENT_PASSWORD",
        "SHARDLOCK_AGENT_PASSWORD_FILE",
        "SHARDLOCK_CONFIG",
        "SHARDLOCK_LOG",
        "SHARDLOCK_METRICS",
        "SHARDLOCK_REDIS_SERVER",
        "SHARDLOCK_ETCD_SERVER",
        "SHARDLOCK_POSTGRES",
        "SHARDLOCK_PROMETHEUS",
        "SHARDLOCK_PYTHON",
        "SHARDLOCK_RABBITMQ",
        "SHARDLOCK_CLIENTS",
        "SHARDLOCKS",
        "TTL",
        "PATH",
    ];
    tool::apply_variables(&mut config, others.map(|name| (name.to_owned(), "anything".to_owned()))).unwrap();
    assert_eq!(config, Config::default());
}

#[test]
fn neither_a_configuration_nor_an_endpoint_shows_a_password() {
    let config = from_code().unwrap();
    let builder = Builder::new().config(config.clone());
    let endpoint: Endpoint = config.shards[0].url.parse().unwrap();
    let shown = format!("{config:?} {config:#?} {builder:?} {endpoint} {endpoint:?}");
    assert!(shown.contains("rediss://:***@a:1/2"), "{shown}");
    assert!(!shown.contains("s3cret"), "{shown}");
}

const EXAMPLE: &str = include_str!("../../config/shardlock.example.toml");

#[test]
fn the_example_file_has_every_setting() {
    let names: Vec<_> = EXAMPLE
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name)
        .collect();
    let fields: Vec<_> = tool::fields().map(|(name, _)| name).collect();
    assert_eq!(names, fields);
}

#[cfg(feature = "file")]
mod file {
    use super::*;

    #[test]
    fn the_example_file_has_the_defaults() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/config/shardlock.example.toml");
        let config = Config::from_file(path).unwrap();
        config.validate().unwrap();
        let expected = Builder::new().shard("redis://127.0.0.1:6379").build_config().unwrap();
        assert_eq!(config, expected);
    }

    #[cfg(feature = "tls")]
    #[test]
    fn example_file_for_tls_is_valid() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/config/tls.example.toml");
        let config = Config::from_file(path).unwrap();
        config.validate().unwrap();
        let expected = Builder::new()
            .shard("rediss://shardlock:change-me@redis.example.com:6379")
            .tls_ca("/etc/shardlock/ca.pem")
            .tls_cert("/etc/shardlock/client.pem")
            .tls_key("/etc/shardlock/client.key")
            .build_config()
            .unwrap();
        assert_eq!(config, expected);
    }

    #[test]
    fn there_is_an_example_of_each_kind_of_shard() {
        let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/config");
        let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
        let mut schemes = std::collections::BTreeSet::new();
        for path in files.filter(|path| path.to_string_lossy().ends_with(".example.toml")) {
            let is_built = |file: &str, feature: bool| feature || !path.ends_with(file);
            if !is_built("etcd.example.toml", cfg!(feature = "etcd"))
                || !is_built("tls.example.toml", cfg!(feature = "tls"))
            {
                // A build without this kind returns an error, as the endpoint's own tests show.
                Config::from_file(&path).unwrap_err();
                continue;
            }
            let config = Config::from_file(&path).unwrap();
            config.validate().unwrap();
            let endpoints = config.shards.iter().map(|shard| Endpoint::parse(&shard.url).unwrap());
            schemes.extend(endpoints.map(|endpoint| endpoint.scheme().to_owned()));
        }
        for scheme in ["redis", "redis+sentinel", "redis+cluster", "redlock"] {
            assert!(schemes.contains(scheme), "{scheme} is not in {schemes:?}");
        }
        assert_eq!(schemes.contains("etcd"), cfg!(feature = "etcd"));
    }

    #[test]
    fn every_setting_is_reached_from_a_file() {
        let quoted: String = together()
            .map(|(name, value)| format!("{name} = {value:?}\n"))
            .collect();
        assert_eq!(Config::from_toml(&quoted).unwrap(), from_code().unwrap());
        let typed: String = together()
            .map(|(name, value)| {
                if value.parse::<f64>().is_ok() || value.parse::<bool>().is_ok() {
                    format!("{name} = {value}\n")
                } else {
                    format!("{name} = {value:?}\n")
                }
            })
            .collect();
        assert_ne!(typed, quoted);
        assert_eq!(Config::from_toml(&typed).unwrap(), from_code().unwrap());
    }

    #[test]
    fn an_error_in_a_file_names_the_file_and_the_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("locks.toml");
        let missing = Config::from_file(&path).unwrap_err().to_string();
        assert!(missing.contains("locks.toml is unreadable (No such file"), "{missing}");
        std::fs::write(&path, "class = 'a'\nttl = '1ms'\n").unwrap();
        let bound = Config::from_file(&path).unwrap_err().to_string();
        assert!(
            bound.contains("locks.toml line 2) is 1ms, but must be from 50ms to 1d"),
            "{bound}"
        );
        std::fs::write(&path, "class = 'a'\n\nshards = [redis://:s3cret@host]\n").unwrap();
        let syntax = Config::from_file(&path).unwrap_err().to_string();
        assert!(syntax.contains("locks.toml line 3 is malformed ("), "{syntax}");
        assert!(!syntax.contains("s3cret"), "{syntax}");
    }
}
