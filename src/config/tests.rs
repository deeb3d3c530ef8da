use super::*;

fn one_shard() -> Config {
    let mut config = Config::default();
    // A shard to which every setting applies.
    let url = if cfg!(feature = "tls") {
        "rediss://a"
    } else {
        "redis://a"
    };
    config.set("shards", url).unwrap();
    config
}

#[test]
fn every_field_of_the_struct_is_in_the_table_and_has_a_setter_in_the_builder() {
    let debug = format!("{:#?}", Config::default());
    let fields: Vec<_> = debug
        .lines()
        .filter_map(|line| line.strip_prefix("    ")?.split_once(':'))
        .filter(|(name, _)| !name.starts_with(' '))
        .map(|(name, _)| name)
        .collect();
    let table: Vec<_> = Config::fields().map(|(name, _)| name).collect();
    assert_eq!(fields, table);

    let builder = include_str!("builder.rs");
    for name in table {
        let setter = format!("pub fn {name}(");
        let generic_setter = format!("pub fn {name}<");
        assert!(builder.contains(&setter) || builder.contains(&generic_setter), "{name}");
    }
}

#[test]
fn each_value_is_allowed_up_to_its_bounds_and_refused_beyond_them() {
    for (name, allowed, refused) in [
        (
            "namespace",
            &["a", "lock:", "~!"][..],
            &["", "a b", "{a}", "a%", "ä", "a\u{7f}"][..],
        ),
        (
            "ttl",
            &["50ms", "24h"],
            &["49ms", "24h 1ms", "0s", "10", "-1s", "none", "", "1e9s"],
        ),
        (
            "renew_fraction",
            &["0.02", "0.5"],
            &["0.019", "0.51", "NaN", "inf", "-0.1", "10%"],
        ),
        ("timeout", &["none", "0s", "365d"], &["365d 1ms", "never", ""]),
        ("max_hold", &["none", "1ms", "365d"], &["0s", "999us", "366d"]),
        ("min_hold", &["0s", "1ms", "24h"], &["24h 1ms", "none", "0", "-1s"]),
        ("linger", &["0s", "1us", "1h"], &["3601s", "none", "0", "-1s"]),
        ("store_timeout", &["10ms", "60s"], &["9ms", "61s"]),
        ("connections", &["1", "16"], &["0", "17", "-1", "1.0", "one"]),
        (
            "max_burst",
            &["none", "1", "1000000"],
            &["0", "1000001", "4294967297", "", "never"],
        ),
        ("max_slice", &["0s", "10s"], &["10001ms"]),
        ("max_waiters_per_key", &["1", "10000000"], &["0", "10000001"]),
        ("max_waiters", &["1", "10000000"], &["0", "10000001"]),
        ("max_keys", &["1", "10000000"], &["0", "10000001"]),
        ("class", &["a", "a_b-9"], &["", "A", "a b", "ä", "a.b"]),
        ("max_classes", &["1", "1000"], &["0", "1001"]),
        ("hot_keys", &["1", "1024"], &["0", "1025"]),
        ("hot_key_metrics", &["true", "false"], &["", "1", "yes", "True", "none"]),
        ("check_role", &["true", "false"], &["", "1", "yes", "True", "none"]),
        ("log_keys", &["true", "false"], &["", "1", "yes", "True", "none"]),
        ("ready_when", &["any", "all"], &["", "one", "Any", "true", "none"]),
        ("slow_wait", &["none", "1ms", "365d"], &["0s", "366d", "never"]),
        ("long_hold", &["none", "1ms", "365d"], &["0s", "366d", "never"]),
        ("min_replicas_acked", &["0", "16"], &["17", "-1"]),
        ("redlock_max_ttl", &["50ms", "24h"], &["49ms", "25h"]),
        ("tls_ca", &["none", "/etc/ca.pem"], &[""]),
        (
            "shards",
            &["memory://", "a=memory://,b=memory://x", " redis://:a=b@h\nredis://i "],
            &[
                "",
                " , ",
                "x",
                "a=memory://,a=memory://x",
                "=memory://",
                "a/b=memory://",
                "b a=memory://",
            ],
        ),
    ] {
        let mut config = one_shard();
        for value in allowed {
            config.set(name, value).unwrap();
            config.validate().unwrap();
        }
        let before = config.clone();
        for value in refused {
            let error = config.set(name, value).unwrap_err();
            assert!(error.field.starts_with(name), "{name} {value:?}: {error}");
            assert!(!error.bound.is_empty());
            assert_eq!(config, before, "{name} {value:?}");
        }
    }
    let text = |bytes| "a".repeat(bytes);
    let mut config = one_shard();
    for (name, most) in [("namespace", 64), ("class", 32)] {
        config.set(name, &text(most)).unwrap();
        assert!(config.set(name, &text(most + 1)).is_err());
    }
    config.set("shards", &format!("{}=memory://", text(32))).unwrap();
    assert!(config.set("shards", &format!("{}=memory://", text(33))).is_err());
    config.set("shards", &"memory:// ".repeat(1024)).unwrap();
    assert!(config.set("shards", &"memory:// ".repeat(1025)).is_err());
}

#[test]
fn values_set_in_code_are_checked_too() {
    let message = |change: fn(&mut Config)| {
        let mut config = one_shard();
        change(&mut config);
        config.validate().unwrap_err().to_string()
    };
    assert_eq!(
        message(|config| config.ttl = Duration::from_millis(5)),
        "ttl is 5ms, but must be from 50ms to 1d"
    );
    assert_eq!(
        message(|config| config.max_hold = Some(Duration::ZERO)),
        "max_hold is 0s, but must be none, or from 1ms to 365d"
    );
    assert_eq!(
        message(|config| config.renew_fraction = f64::NAN),
        "renew_fraction is NaN, but must be from 0.02 to 0.5"
    );
    assert_eq!(
        message(|config| config.connections = 17),
        "connections is 17, but must be from 1 to 16"
    );
    assert_eq!(
        message(|config| config.shards.clear()),
        "shards is empty, but must be a list of 1 to 1024 shards"
    );
    assert_eq!(
        message(|config| config.namespace = "a{b".into()),
        "namespace is \"a{b\", but must be 1 to 64 bytes of printable ASCII without spaces, braces and %"
    );
}

#[test]
fn setting_that_no_shard_reads_is_refused() {
    let refusal = |shards: &str, name: &str, value: &str| {
        let mut config = Config::default();
        config.set("shards", shards).unwrap();
        config.set(name, value).unwrap();
        config.validate().map_err(|error| error.to_string())
    };
    assert_eq!(
        refusal("redis://a memory://", "tls_ca", "/a/ca.pem").unwrap_err(),
        "tls_ca is /a/ca.pem, but must be none unless a shard's URL uses TLS (rediss:// and the like)"
    );
    let misplaced = refusal("redis://a", "tls_ca", "redis://:s3cret@\u{1b}host").unwrap_err();
    assert!(
        misplaced.starts_with("tls_ca is redis://:***@\\u{1b}host, but must be"),
        "{misplaced}"
    );
    assert_eq!(
        refusal("memory://", "min_replicas_acked", "1").unwrap_err(),
        "min_replicas_acked is 1, but must be 0 unless a shard is redis://, redis+sentinel:// or redis+cluster://, the kinds with replicas"
    );
    assert_eq!(refusal("memory:// redis://a", "min_replicas_acked", "1"), Ok(()));
    #[cfg(feature = "tls")]
    assert_eq!(refusal("redis://a rediss://b", "tls_ca", "/a/ca.pem"), Ok(()));
}

#[test]
fn malformed_value_is_refused_with_its_setting_and_the_expected_form() {
    let message = |name, value| one_shard().set(name, value).unwrap_err().to_string();
    assert_eq!(
        message("ttl", "10"),
        "ttl is \"10\", but must be a duration such as 500ms, 10s or 2m, from 50ms to 1d"
    );
    assert_eq!(
        message("timeout", "never"),
        "timeout is \"never\", but must be none, or a duration such as 500ms, 10s or 2m, from 0s to 365d"
    );
    assert_eq!(
        message("max_burst", "many"),
        "max_burst is \"many\", but must be none, or a whole number from 1 to 1000000"
    );
    assert_eq!(
        message("tll", "10s"),
        "setting is \"tll\", but must be a known one; did you mean ttl?"
    );
    let unknown = message("frobnicate", "10s");
    assert!(
        unknown.starts_with("setting is \"frobnicate\", but must be a known one: shards, namespace, ttl, "),
        "{unknown}"
    );
}

#[test]
fn fingerprints_and_key_names_match_those_stored_by_shards() {
    let mut config = Config::default();
    config.set("shards", "a=memory://x,b=memory://y").unwrap();
    assert_eq!(config.fingerprints()[1], "v2 a:0-8191,b:8192-16383 here=b");
    assert_eq!(config.map_key(), "lock:%map");
    let key = |name| config.key_of_lease(name).map(|key| key.to_string());
    assert_eq!(key("lock:100%25"), Some("100%".to_owned()));
    assert_eq!(key("lock:%map"), None);
}

#[test]
fn shards_are_named_by_their_position_unless_they_have_a_name() {
    let mut config = Config::default();
    config
        .set("shards", "redis://:pa=ss@a, b=redis://b\nredis://c")
        .unwrap();
    let expected = [
        ShardConfig::new("shard-0", "redis://:pa=ss@a"),
        ShardConfig::new("b", "redis://b"),
        ShardConfig::new("shard-2", "redis://c"),
    ];
    assert_eq!(config.shards, expected);
    let error = config.set("shards", "redis://a,redis://b:0").unwrap_err();
    assert_eq!(error.field, "shards[1].url");
    let error = config.set("shards", "shard-1=redis://a,redis://b").unwrap_err();
    assert_eq!(
        error.to_string(),
        "shards[1].name is \"shard-1\", but must be given to one shard only"
    );
}

#[test]
fn no_message_shows_a_password() {
    let mut config = one_shard();
    for (name, value) in [
        ("shards", "redis://:s3cret@host:99999"),
        ("shards", "a=redis://user:s3cret@host/x"),
        ("shards", "redis://:12,s3cret@host:x"),
        ("shards", "redis://:s3cret,34@host/x"),
        ("shards", "user:s3cret=@host"),
        ("ttl", "redis://:s3cret@host"),
        ("namespace", "redis://:s3cret@host{"),
        ("redis://:s3cret@host", "ttl"),
    ] {
        let error = config.set(name, value).unwrap_err();
        assert!(!format!("{error} {error:?}").contains("s3cret"), "{error}");
    }
    config.shards = vec![ShardConfig::new("redis://:s3cret@host", "a")];
    assert!(!config.validate().unwrap_err().to_string().contains("s3cret"));
    config.shards = vec![ShardConfig::new("a", "redis://:s3cret@host")];
    assert!(!format!("{config:?}").contains("s3cret"));
}
