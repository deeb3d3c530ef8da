//! Passwords do not appear in logs, errors, `Debug` output or metrics.

use std::time::Duration;

use shardlock::LockManager;
use shardlock::config::{Builder, Config, Credentials, CredentialsRequest, Endpoint, ShardConfig};
use shardlock::tool::apply_variables;
use support::{ClientType, PATIENCE, RedisServer, worker};
use support_locks::{SHORT_TTL, soon, until, until_queued};

use super::recorder::LogRecorder;

/// Must not appear anywhere, whether encoded as in a URL or decoded.
const SECRET: &str = "hunter2";
/// The right password, encoded for a URL and as the server knows it, and a wrong one, encoded. Each
/// contains the secret.
const RIGHT: (&str, &str) = ("right-hunter2%40%2F%3A", "right-hunter2@/:");
const WRONG: &str = "wrong-hunter2%3F%23";

#[track_caller]
fn assert_secret_is_kept(what: &str, text: &str) {
    if let Some(at) = text.find(SECRET) {
        let from = text[..at].rfind('\n').map_or(0, |line| line + 1);
        let to = text[at..].find('\n').map_or(text.len(), |line| at + line);
        panic!("{what}: {}", &text[from..to]);
    }
}

/// URLs of all kinds whose servers do not exist or refuse the login.
fn hopeless_urls(server: &RedisServer) -> Vec<String> {
    let (place, dead) = (server.address(), "127.0.0.1:1");
    let login = format!("user:{WRONG}");
    let mut urls = vec![
        format!("redis://:{WRONG}@{place}"),
        format!("redis://{login}@{place}/3"),
        format!("redis://{login}@{dead}"),
        format!("redis://{login}@lock.invalid:6379"),
        format!("redis+sentinel://{login}@{dead}/mymaster?sentinel_user=u&sentinel_password={WRONG}"),
        format!("redis+sentinel://{login}@{place}/mymaster?sentinel_password={WRONG}"),
        format!("redis+cluster://{login}@{dead},lock.invalid"),
        format!("redis+cluster://{login}@{place}"),
        format!("redlock://{login}@{dead},127.0.0.1:2,{place}"),
        format!("etcd://{login}@{dead}"),
        // Common mistakes.
        format!("redis://:{SECRET}"),
        format!("redis://{SECRET}@{place}"),
        format!("redis://user:{SECRET}@{place}:x"),
        format!("redis://user:{SECRET}/#@{place}"),
        format!("redis://user:{SECRET}@{place}/no-number"),
        format!("redis://user:{SECRET} @{place}"),
        format!("redis:/user:{SECRET}@{place}"),
        format!("reddis://user:{SECRET}@{place}"),
        format!("redis+sentinel://{dead}/mymaster?sentinel_pasword={SECRET}"),
        format!("redis+sentinel://{dead}/mymaster?sentinel_password={SECRET}&x={SECRET}"),
        format!("redlock://user:{SECRET}@{dead}"),
    ];
    for scheme in ["rediss", "rediss+sentinel", "rediss+cluster", "redlocks", "etcds"] {
        let path = if scheme.contains("sentinel") { "/mymaster" } else { "" };
        let hosts = if scheme == "redlocks" {
            format!("{dead},127.0.0.1:2,{place}")
        } else {
            place.clone()
        };
        urls.push(format!("{scheme}://{login}@{hosts}{path}"));
    }
    urls
}

/// A process has only one recorder, so this test has its own process.
#[test]
fn password_appears_in_no_log_trace_or_metric() {
    let mut worker = worker::spawn("recorded", &[]);
    while worker.line() != "recorded" {}
    assert!(worker.wait().success());
}

/// The worker of the test above. It reports each step, since all of them take long.
#[tokio::main]
pub(crate) async fn record(me: &worker::Current) {
    let recorder = LogRecorder::install();
    let server = RedisServer::start_with(&["--requirepass", RIGHT.1]);

    for url in hopeless_urls(&server) {
        match Endpoint::parse(&url) {
            Ok(endpoint) => recorder.note(&(endpoint.to_string(), endpoint, ShardConfig::new("a", url.as_str()))),
            Err(error) => recorder.note(&(error.to_string(), error)),
        }
        let builder = LockManager::builder()
            .named_shard("a", url.as_str())
            .store_timeout(Duration::from_millis(300));
        recorder.note(&builder);
        let error = soon("an error", builder.connect()).await.expect_err("connecting fails");
        recorder.note(&(error.to_string(), &error));
        assert_secret_is_kept(
            &format!("an error about {}", url.replace(SECRET, "***")),
            &recorder.recorded(),
        );

        let mut config = Config::default();
        let variable = ("SHARDLOCK_SHARDS".to_owned(), url.clone());
        match apply_variables(&mut config, [variable]) {
            Ok(()) => recorder.note(&(&config, Builder::new().config(config.clone()).build_config())),
            Err(error) => recorder.note(&(error.to_string(), error)),
        }
        for toml in [
            format!("shards = [\"{url}\"]"),
            format!("shards = \"{url}\""),
            format!("shards = [{url}]"),
            format!("[[shards]]\nname = \"a\"\nurl = \"{url}\"\nmore = 1"),
            format!("shards = [\"{url}\"]\nttl = 1"),
        ] {
            match Config::from_toml(&toml) {
                Ok(config) => recorder.note(&config),
                Err(error) => recorder.note(&(error.to_string(), error)),
            }
        }
        me.send("refused");
    }

    // The same beside the URL.
    let file = support::directory("password");
    let file = file.path().join("password");
    std::fs::write(&file, format!("wrong-{SECRET}")).expect("write a password");
    let beside = || {
        LockManager::builder()
            .shard(server.url())
            .username("user")
            .store_timeout(Duration::from_secs(5))
    };
    fn wrong() -> Credentials {
        Credentials::new("user", format!("wrong-{SECRET}"))
    }
    let callback = async |_: CredentialsRequest| Ok::<_, String>(wrong());
    for builder in [
        beside().password(format!("wrong-{SECRET}")),
        beside().password_file(&file),
        LockManager::builder()
            .shard(server.url())
            .store_timeout(Duration::from_secs(5))
            .credentials(callback),
    ] {
        recorder.note(&(&builder, wrong()));
        let error = soon("an error", builder.connect()).await.expect_err("connecting fails");
        recorder.note(&(error.to_string(), &error));
        assert!(error.to_string().contains("check the user and the password"), "{error}");
    }

    // A whole life cycle with the right password, including failures.
    let url = format!("redis://:{}@{}", RIGHT.0, server.address());
    let builder = || {
        LockManager::builder()
            .named_shard("main", &url)
            .ttl(SHORT_TTL)
            .store_timeout(Duration::from_secs(2))
    };
    let (one, other) = (
        builder().connect().await.expect("connect"),
        builder().connect().await.expect("connect"),
    );
    recorder.note(&(&one, one.shard_map(), one.id(), builder()));
    let guard = one.lock("k").timeout(PATIENCE).await.expect("lock");
    recorder.note(&(&guard, one.inspect("k").await, one.lock("k")));
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { other.lock("k").timeout(PATIENCE).await }
    });
    until_queued(&one, "k", 1).await;
    server.client_kill(ClientType::PubSub);
    server.client_kill(ClientType::Normal);
    recorder.note(&guard.release().await);
    if let Ok(guard) = soon("the lock", waiting).await.expect("a task") {
        recorder.note(&guard.release().await);
    }
    me.send("locked");
    // The password is changed, and all clients are disconnected.
    server.command(&["CONFIG", "SET", "requirepass", "another"]);
    server.client_kill(ClientType::PubSub);
    server.client_kill(ClientType::Normal);
    until("a refusal", async || match one.lock("k").timeout(PATIENCE).await {
        Ok(_) => false,
        Err(error) => {
            recorder.note(&(error.to_string(), &error));
            error.to_string().contains("password")
        }
    })
    .await;
    me.send("the password is another");
    until("the refusal of the inbox", async || {
        recorder.recorded().contains("the inbox is refused")
    })
    .await;
    server.kill();
    me.send("the server is gone");
    let error = one.lock("k").timeout(SHORT_TTL).await.expect_err("no server");
    recorder.note(&(error.to_string(), &error));
    one.shutdown().await.ok();
    other.shutdown().await.ok();

    let recorded = recorder.recorded();
    // The recorder has recorded all of these.
    for sign in ["shardlock::", "main", "redis://:***@", "lock.invalid"] {
        assert!(recorded.contains(sign), "{sign}: {recorded}");
    }
    assert_secret_is_kept("in the recorded output", &recorded);
    me.send("recorded");
}

mod tool {
    use super::*;
    use crate::tool::{Ended, bare, run};

    #[track_caller]
    fn is_kept(command: std::process::Command) -> Ended {
        let what = format!("{:?}", command.get_args().collect::<Vec<_>>());
        let ended = run(command);
        assert_secret_is_kept(&what, &ended.stdout);
        assert_secret_is_kept(&what, &ended.stderr);
        ended
    }

    #[test]
    fn tool_shows_no_password_in_any_output_or_log() {
        let server = RedisServer::start_with(&["--requirepass", RIGHT.1]);
        let right = format!("redis://:{}@{}", RIGHT.0, server.address());
        let mut urls = hopeless_urls(&server);
        urls.push(right.clone());
        let commands: [&[&str]; 7] = [
            &["--help"],
            &["inspect", "--help"],
            &["exec", "--help"],
            &["demo", "--help"],
            &["slot", "k"],
            &["inspect", "k"],
            &["exec", "k", "true"],
        ];
        for url in &urls {
            // A busy machine takes its time.
            let store_timeout = if url == &right { "10s" } else { "300ms" };
            for args in commands {
                if url != &right && args != ["inspect", "k"] {
                    continue;
                }
                let mut command = bare(args);
                command.envs([
                    ("SHARDLOCK_SHARDS", url.as_str()),
                    ("SHARDLOCK_LOG", "trace"),
                    ("SHARDLOCK_STORE_TIMEOUT", store_timeout),
                ]);
                let ended = is_kept(command);
                assert_eq!(ended.code == 0, url == &right, "{ended:?}");
            }
            // A password on the command line is the user's own responsibility, as the help says.
            // The tool still does not print it.
            let mut command = bare(&[
                "inspect",
                "k",
                "--set",
                &format!("store_timeout={store_timeout}"),
                "--shard",
                url,
            ]);
            command.env("SHARDLOCK_LOG", "trace");
            assert_eq!(is_kept(command).code == 0, url == &right);
        }
        let help = run(bare(&["exec", "--help"])).stdout;
        assert!(help.contains("can see a password given"), "{help}");
    }

    #[test]
    fn commands_of_all_sorts_log_in_with_a_password_file() {
        let server = RedisServer::start_with(&["--requirepass", RIGHT.1]);
        let dir = support::directory("password");
        let file = dir.path().join("password");
        std::fs::write(&file, format!("{}\n", RIGHT.1)).expect("write a password");
        let with_file = |args: &[&str]| {
            let mut command = bare(args);
            command.envs([
                ("SHARDLOCK_SHARDS", server.url()),
                ("SHARDLOCK_PASSWORD_FILE", file.display().to_string()),
            ]);
            is_kept(command)
        };
        for args in [
            &["exec", "k", "true"][..],
            &["inspect", "k"],
            &["map", "show"],
            &["top", "--once"],
        ] {
            let ended = with_file(args);
            assert_eq!(ended.code, 0, "{args:?}: {ended:?}");
        }
        let doctor = with_file(&["doctor"]);
        assert!(doctor.stdout.contains("as user default with a password"), "{doctor:?}");

        std::fs::remove_file(&file).expect("remove the file");
        for args in [&["exec", "k", "true"][..], &["doctor"]] {
            let ended = with_file(args);
            assert!(
                matches!(ended.code, 64 | 78) && ended.stderr.contains("password_file is "),
                "{ended:?}"
            );
        }
    }
}
