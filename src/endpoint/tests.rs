use super::*;
use deadpool_redis::redis::IntoConnectionInfo;
use proptest::prelude::*;

fn parsed(text: &str) -> Endpoint {
    Endpoint::parse(text).unwrap()
}

fn refusal(text: &str) -> String {
    Endpoint::parse(text).unwrap_err().to_string()
}

#[test]
fn redis_urls_are_shown_in_full_without_the_password() {
    for (text, shown) in [
        ("redis://localhost", "redis://localhost:6379/0"),
        ("redis://localhost/", "redis://localhost:6379/0"),
        ("redis://localhost:/3", "redis://localhost:6379/3"),
        ("REDIS://10.0.0.1:7000/15", "redis://10.0.0.1:7000/15"),
        ("redis://[::1]:7000", "redis://[::1]:7000/0"),
        ("redis://:s3cret@host", "redis://:***@host:6379/0"),
        ("redis://user:s3cret@host:1/2", "redis://user:***@host:1/2"),
        ("redis://user:s3%40cret@host", "redis://user:***@host:6379/0"),
    ] {
        let endpoint = parsed(text);
        assert_eq!(endpoint.to_string(), shown, "{text}");
        assert_eq!(format!("{endpoint:?}"), format!("Endpoint({shown:?})"));
    }
}

#[test]
fn the_client_gets_the_password() {
    let endpoint: Endpoint = "redis://user:s3%40cret@[::1]:7000/2".parse().unwrap();
    let EndpointKind::Redis(server) = endpoint.kind() else {
        panic!("{endpoint} is a Redis")
    };
    let info = server.with_password().into_connection_info().unwrap();
    assert_eq!(info.addr().to_string(), "::1:7000");
    assert_eq!(info.redis_settings().username(), Some("user"));
    assert_eq!(info.redis_settings().password(), Some("s3@cret"));
    assert_eq!(info.redis_settings().db(), 2);
}

#[test]
fn login_is_put_into_urls_that_lack_one() {
    let user = Credentials::new("a:b", "s3@/?");
    let default_user = Credentials::password("s3cret");
    for (url, credentials, shown, password) in [
        ("redis://h", &user, "redis://a%3Ab:***@h:6379/0", "a%3Ab:s3%40%2F%3F@h"),
        ("valkey://h/3", &default_user, "redis://:***@h:6379/3", ":s3cret@h"),
        (
            "redis+sentinel://h/m",
            &user,
            "redis+sentinel://a%3Ab:***@h:26379/m/0",
            "",
        ),
        (
            "redlock://h,i,j",
            &user,
            "redlock://a%3Ab:***@h:6379,i:6379,j:6379/0",
            "s3%40%2F%3F@h",
        ),
        (
            "unix:///s?db=1",
            &user,
            "redis+unix:///s?db=1&user=a%3Ab&pass=***",
            "pass=s3%40%2F%3F",
        ),
        (
            "redis+unix:///s",
            &default_user,
            "redis+unix:///s?db=0&pass=***",
            "pass=s3cret",
        ),
    ] {
        assert!(parsed(url).lacks_login(), "{url}");
        let endpoint = parsed(&with_login(url, credentials));
        assert!(!endpoint.lacks_login(), "{endpoint}");
        assert_eq!(endpoint.to_string(), shown);
        let server = endpoint.server_at("h:1").unwrap();
        let has_password = endpoint.servers()[0].with_password().contains(password);
        assert!(has_password && server.has_login(), "{url}");
    }
    assert!(!parsed("memory://").lacks_login() && !parsed("redis://:p@h").lacks_login());
    // The login of sentinels is another one.
    assert!(parsed("redis+sentinel://h/m?sentinel_password=x").lacks_login());
}

#[test]
fn memory_urls_have_an_optional_name() {
    let name = |text: &str| match parsed(text).kind() {
        EndpointKind::Memory { name } => name.clone(),
        _ => panic!("{text} is a memory"),
    };
    assert_eq!(name("memory://"), "");
    assert_eq!(name("memory://Test-1.a_b"), "Test-1.a_b");
    assert_eq!(parsed("memory://x").to_string(), "memory://x");
    assert!(refusal("memory://a/b").contains("memory:// and a name of at most 64"));
}

#[test]
fn urls_of_several_hosts_name_all_of_them_and_their_ports() {
    for (text, shown) in [
        (
            "redis+sentinel://u:s3cret@a,b:1,[::1]/mymaster/3",
            "redis+sentinel://u:***@a:26379,b:1,[::1]:26379/mymaster/3",
        ),
        (
            "redis+sentinel://a/m?sentinel_user=x&sentinel_password=s3cret",
            "redis+sentinel://a:26379/m/0",
        ),
        ("redis+cluster://:s3cret@a,b", "redis+cluster://:***@a:6379,b:6379"),
        ("redlock://a,b,c:1/2", "redlock://a:6379,b:6379,c:1/2"),
    ] {
        assert_eq!(parsed(text).to_string(), shown, "{text}");
        assert!(!format!("{:?}", parsed(text)).contains("s3cret"));
    }
    let endpoint = parsed("redis+sentinel://u:p%2Fw@a,b/m/3?sentinel_password=s%40");
    let EndpointKind::Sentinel {
        sentinels,
        primary,
        access,
    } = endpoint.kind()
    else {
        panic!("{endpoint} is watched")
    };
    assert_eq!(primary, "m");
    assert_eq!(sentinels[1].with_password(), "redis://:s%40@b:26379/0");
    assert_eq!(access.url("c:1").with_password(), "redis://u:p%2Fw@c:1/3");
    // A slash is allowed in the query, but not in the login part.
    let endpoint = parsed("redis+sentinel://a/m?sentinel_user=u&sentinel_password=a/b");
    assert_eq!(endpoint.servers()[0].with_password(), "redis://u:a%2Fb@a:26379/0");
    for (text, bound) in [
        ("redis+sentinel://a,b", "the name of a primary"),
        ("redis+sentinel://a/m/x", "a database from 0"),
        ("redis+sentinel://a/m?sentinel_user=x", "sentinel_password if"),
        ("redis+sentinel://a/m?other=s3cret", "nothing but sentinel_user and"),
        ("redis+cluster://a,,b", "a host that is not empty"),
        ("redis+cluster://a,a:6379", "a:6379 is listed twice"),
        ("redlock://a,b", "with 3 to 15 hosts, not 2"),
        ("redis+cluster://a,b/1", "without a database: a cluster has only 0"),
        ("redis+cluster://a/0/x", "without a database: a cluster has only 0"),
        (
            "redis+sentinel://a/m?sentinel_password=s3cret&sentinel_password=x",
            "with sentinel_password once",
        ),
        ("redis+sentinel://a/m/1/2", "a database from 0"),
        ("redis://a//1", "a database from 0"),
        ("redis://a/1/2", "a database from 0"),
        ("redis://@a", "with a password before the @, or without an @"),
        ("redis://:@a", "with a password before the @, or without an @"),
        ("redlock://:@a,b,c", "with a password before the @, or without an @"),
        ("redis://a?", "without a ? or # part"),
        ("redis://a#b", "without a ? or # part"),
    ] {
        let message = refusal(text);
        assert!(message.contains(bound) && !message.contains("s3cret"), "{message}");
    }
}

#[test]
fn server_urls_contain_the_login_and_their_debug_output_does_not() {
    let url = |server: Option<ServerUrl>| server.unwrap().with_password().to_owned();
    let single = parsed("redis://u:s3cret@a/2");
    assert_eq!(single.servers()[0].with_password(), "redis://u:s3cret@a:6379/2");
    assert_eq!(url(single.server_at("[::1]:7")), "redis://u:s3cret@[::1]:7/2");
    let watched = parsed("redis+sentinel://u:s3cret@a,b/m/3?sentinel_password=s");
    assert_eq!(watched.primary_name(), Some("m"));
    assert_eq!(watched.servers()[1].with_password(), "redis://:s@b:26379/0");
    assert_eq!(url(watched.server_at("c:1")), "redis://u:s3cret@c:1/3");
    let cluster = parsed("redis+cluster://:s3cret@a,b");
    assert_eq!(cluster.servers().len(), 2);
    assert_eq!(url(cluster.server_at("c:1")), "redis://:s3cret@c:1/0");
    assert!(parsed("memory://").servers().is_empty() && parsed("memory://").server_at("a:1").is_none());
    if let Ok(etcd) = Endpoint::parse("etcd://u:s3%40@a,b:1") {
        assert_eq!(etcd.servers()[1].with_password(), "etcd://u:s3%40@b:1");
        assert_eq!(url(etcd.server_at("c:2")), "etcd://u:s3%40@c:2");
    }
    assert_eq!(format!("{:?}", single.servers()), "[ServerUrl(\"a:6379\")]");
}

#[cfg(feature = "etcd")]
#[test]
fn url_of_etcd_with_parts_that_nothing_reads_is_refused() {
    for (text, bound) in [
        ("etcd://a/1", "without a path"),
        ("etcd://a,b/lock", "without a path"),
        ("etcd://a?b=c", "without a ? or # part"),
        ("etcd://:@a", "with a password before the @, or without an @"),
    ] {
        let message = refusal(text);
        assert!(message.contains(bound), "{message}");
    }
    assert_eq!(parsed("etcd://a/").to_string(), "etcd://a:2379");
}

#[test]
fn valkey_is_another_name_of_redis() {
    for (text, shown) in [
        ("valkey://u:s3cret@host/3", "redis://u:***@host:6379/3"),
        ("VALKEY+sentinel://a,b/m", "redis+sentinel://a:26379,b:26379/m/0"),
        ("valkey+cluster://a,b", "redis+cluster://a:6379,b:6379"),
        ("valkey+unix:///run/valkey.sock", "redis+unix:///run/valkey.sock?db=0"),
    ] {
        assert_eq!(parsed(text).to_string(), shown, "{text}");
    }
    if cfg!(feature = "tls") {
        assert_eq!(parsed("valkeys://host").to_string(), "rediss://host:6379/0");
        assert_eq!(parsed("valkeys+cluster://a").scheme(), "rediss+cluster");
    }
    assert!(refusal("valkeyx://host").contains("a URL of a known kind"));
}

#[test]
fn sockets_are_named_by_their_paths_and_log_in_by_the_query() {
    for (text, shown) in [
        ("redis+unix:///run/redis.sock", "redis+unix:///run/redis.sock?db=0"),
        ("unix:///run/redis.sock?db=3", "redis+unix:///run/redis.sock?db=3"),
        (
            "unix:///a%20b/s?user=u&pass=s3cret",
            "redis+unix:///a%20b/s?db=0&user=u&pass=***",
        ),
        ("unix:///s?pass=s3cret", "redis+unix:///s?db=0&pass=***"),
    ] {
        let endpoint = parsed(text);
        assert_eq!(endpoint.to_string(), shown, "{text}");
        assert!(!format!("{endpoint:?} {:?}", endpoint.servers()).contains("s3cret"));
    }
    let server = parsed("unix:///a%20b/s?user=u&pass=s3%26cret&db=2").servers().remove(0);
    assert_eq!(server.place(), "/a b/s");
    assert!(server.has_login() && !server.is_encrypted());
    let info = server.with_password().into_connection_info().unwrap();
    assert_eq!(info.addr().to_string(), "/a b/s");
    assert_eq!(info.redis_settings().username(), Some("u"));
    assert_eq!(info.redis_settings().password(), Some("s3&cret"));
    assert_eq!(info.redis_settings().db(), 2);
    // As in a URL with an address, a plus is not a special character.
    let plus = parsed("unix:///s?user=a%2Fb&pass=a+b@").servers().remove(0);
    for server in [&plus, &plus.at("10.0.0.1:7")] {
        let info = server.with_password().into_connection_info().unwrap();
        assert_eq!(info.redis_settings().username(), Some("a/b"));
        assert_eq!(info.redis_settings().password(), Some("a+b@"));
    }
    // A server of the same shard with an address.
    assert_eq!(
        server.at("10.0.0.1:7").with_password(),
        "redis://u:s3%26cret@10.0.0.1:7/2"
    );
    for (text, bound) in [
        ("unix://run/redis.sock", "three slashes"),
        ("unix://user:s3cret@/run/redis.sock", "three slashes"),
        ("unix://", "three slashes"),
        ("unix:///", "the path of a socket"),
        ("unix:///run/", "the path of a socket"),
        ("unix:///run/../s", "without the segments . and .."),
        ("unix:///run/%2e/s", "without the segments . and .."),
        ("unix:///run/s:", "does not end like a drive"),
        ("unix:///s?db=x", "a database from 0"),
        ("unix:///s?user=u", "pass if user is given"),
        ("unix:///s?password=s3cret", "nothing but db, user and pass"),
        ("unix:///s?pass=s3cret&pass=s3cret", "nothing but db, user and pass"),
        ("unix:///s#s3cret", "nothing but db, user and pass"),
        ("unix:///s?pass=s3cret%FF", "UTF-8 in the user and the password"),
        (
            "rediss+unix:///s",
            if cfg!(feature = "tls") { "has no TLS" } else { "" },
        ),
    ] {
        let message = refusal(text);
        assert!(message.contains(bound) && !message.contains("s3cret"), "{message}");
    }
    let long = format!("unix:///{}", "s".repeat(107));
    assert!(refusal(&long).contains("at most 107 bytes"));
}

#[test]
fn kinds_that_are_not_built_or_not_known_are_refused_by_name() {
    for (scheme, feature, is_built) in [
        ("rediss", "tls", cfg!(feature = "tls")),
        ("etcd", "etcd", cfg!(feature = "etcd")),
    ] {
        match Endpoint::parse(&format!("{scheme}://u:s3cret@a:1")) {
            Ok(endpoint) => assert!(is_built, "{endpoint}"),
            Err(error) => {
                let message = error.to_string();
                assert!(!is_built && message.contains(&format!("{scheme}:// needs the feature `{feature}`")));
                assert!(!message.contains("s3cret"), "{message}");
            }
        }
    }
    assert!(refusal("http://host").contains("supported: redis://, redis+unix://, redis+sentinel://"));
    for address in ["localhost:6379", "10.0.0.1", "[::1]:6379"] {
        let expected = format!("url is {address}, but must be a URL, such as redis://{address}; supported");
        assert!(refusal(address).contains(&expected), "{}", refusal(address));
    }
    for secret in ["u:s3cret@host", "u:s3cret"] {
        assert!(!refusal(secret).contains("s3cret"), "{}", refusal(secret));
    }
}

#[test]
fn values_outside_their_bounds_are_refused_with_value_and_bound() {
    for (text, value, bound) in [
        ("", "empty", "a URL"),
        ("redis://", "redis://", "a host that is not empty"),
        ("redis:///0", "redis:///0", "a host that is not empty"),
        ("redis://:6379", "redis://:***", "a host that is not empty"),
        ("redis://host:99999", "redis://host:99999", "a port from 1 to 65535"),
        ("redis://host:0", "redis://host:0", "a port from 1 to 65535"),
        ("redis://host:port", "redis://host:***", "a port from 1 to 65535"),
        ("redis://host/one", "redis://host/one", "a database from 0 to"),
        ("redis://host/-1", "redis://host/-1", "a database from 0 to"),
        ("redis://host/+1", "redis://host/+1", "a database from 0 to"),
        (
            "redis://host/2147483648",
            "redis://host/2147483648",
            "from 0 to 2147483647",
        ),
        ("redis://host/1/2", "redis://host/1/2", "a database from 0 to"),
        ("redis://0.0.0.0", "redis://0.0.0.0", "no wildcard address"),
        ("redis://host?db=1", "redis://host?***", "without a ? or # part"),
        (
            "redis://secret@host",
            "redis://***@host",
            "with a password after the user",
        ),
        ("redis://ho st", "redis://ho st", "without spaces"),
    ] {
        let message = refusal(text);
        let expected = format!("url is {value}, but must be ");
        assert!(message.starts_with(&expected) && message.contains(bound), "{message}");
    }
    let long = refusal(&format!("redis://{}", "h".repeat(2048)));
    assert_eq!(long, "url is 2056 bytes long, but must be 1 to 2048 bytes long");
}

#[test]
fn a_malformed_url_does_not_show_its_password() {
    for text in [
        "redis://:s3cret@host:99999",
        "redis://user:s3cret@host:99999",
        "redis://user:s3cret@host:port",
        "redis://user:s3cret@host/database",
        "redis://user:s3cret@",
        "redis://user:s3/s3cret@host",
        "redis://user:1/s3cret@host",
        "redis://user:1#s3cret@host",
        "redis://user:1?s3cret@host",
        "redis://user:s3#s3cret@host",
        "redis://user:s3@s3cret@host:x",
        "redis://user:s3 s3cret@host",
        "redis://s3cret@host",
        "redis://s3cret:@host",
        "redis://:s3cret:6379",
        "redis://host:s3cret",
        "redis://:s3cret",
        "redis://host?password=s3cret",
        "redis://host?password=s3@s3cret",
        "redis://host#s3cret",
        "redis//:s3cret@host",
        "redis:/s3cret@host",
        "redis:s3cret@host",
        "user:s3://s3cret@host",
        "user:s3cret@host",
        "s3cret@host",
        ":s3cret",
        "etcd://user:s3cret@host:x",
        "redis+cluster://user:s3cret@a,b:x",
        "redlock://user:s3cret@a",
        "memory://user:s3cret@host",
        "postgres://user:s3cret@host",
        "redis://user:%FFs3cret@host",
    ] {
        let error = Endpoint::parse(text).unwrap_err();
        assert!(!error.to_string().contains("s3cret"), "{text}: {error}");
        assert!(!format!("{error:?}").contains("s3cret"), "{text}: {error:?}");
    }
}

proptest! {
    #[test]
    fn no_password_is_ever_shown(
        before in "[a-z:/@?#%.=,\\[\\]]{0,6}",
        after in "[a-z0-9:/@?#%.=,\\[\\]]{0,6}",
        port in 0_u32..99_999,
    ) {
        for (scheme, hosts) in [("redis", "host"), ("redis+cluster", "a,b"), ("redlock", "a,b,c"), ("etcd", "a,b")] {
            let text = format!("{scheme}://user:{before}SECRET{after}@{hosts}:{port}");
            let shown = match Endpoint::parse(&text) {
                Ok(endpoint) => format!("{endpoint} {endpoint:?}"),
                Err(error) => format!("{error} {error:?}"),
            };
            prop_assert!(!shown.contains("SECRET"), "{text}: {shown}");
        }
    }
}
