//! `rediss://`: what works, and the errors if it does not.

use std::path::Path;
use std::time::{Duration, Instant};

use shardlock::LockManager;
use shardlock::config::{Builder, Config};
use shardlock::error::LockErrorKind;
use shardlock::tool;

use support::tls::{Authority, Identity, TlsServer, has_tls};
use support::{RedisServer, worker};
use support_locks::{lock, lock_keys, soon, until, until_queued};

const HOSTS: [&str; 2] = ["localhost", "127.0.0.1"];
/// Long enough to distinguish an immediate error from a timeout.
const TIMEOUT: Duration = Duration::from_secs(10);

fn builder(url: &str, ca: &Path) -> Builder {
    LockManager::builder().shard(url).tls_ca(ca).store_timeout(TIMEOUT)
}

fn with_client(builder: Builder, client: &Identity) -> Builder {
    builder.tls_cert(&client.certificate).tls_key(&client.key)
}

/// The error of connecting. It must be returned immediately, contain no password, and not be
/// retryable.
async fn refused(what: &str, builder: Builder) -> String {
    let started = Instant::now();
    let error = soon(what, builder.connect()).await.expect_err(what);
    assert!(
        started.elapsed() < TIMEOUT / 2,
        "{what}: {:?}: {error}",
        started.elapsed()
    );
    assert!(
        matches!(error.kind(), LockErrorKind::Refused | LockErrorKind::Invalid),
        "{what}: {error:?}"
    );
    let text = format!("{error} {error:?}");
    assert!(
        !text.contains("hunter2") && !text.contains("PRIVATE KEY"),
        "{what}: {text}"
    );
    text
}

/// Locks, waits and hands off between two managers with this configuration.
async fn works(server: &TlsServer, make: impl Fn() -> Builder) {
    let (one, other) = (
        make().connect().await.expect("connect"),
        make().connect().await.expect("connect"),
    );
    let guard = lock(&one, "k").await;
    assert!(other.try_lock("k").await.expect("try").is_none());
    let waiting = tokio::spawn(async move { lock(&other, "k").await });
    until_queued(&one, "k", 1).await;
    guard.release().await.expect("release");
    let guard = soon("the hand-off", waiting).await.expect("a task");
    assert!(guard.is_valid());
    guard.release().await.expect("release");
    assert_eq!(lock_keys(&server.server), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_work_through_tls_with_a_private_authority() {
    let authority = Authority::create();
    let server = TlsServer::start(
        &authority,
        &authority.issue("server", &HOSTS),
        false,
        &["--requirepass", "hunter2"],
    );
    for host in HOSTS {
        let url = server.url(&format!(":hunter2@{host}"));
        works(&server, || builder(&url, &authority.ca())).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn client_certificate_is_presented_if_the_server_requires_one() {
    let authority = Authority::create();
    let server = TlsServer::start(&authority, &authority.issue("server", &HOSTS), true, &[]);
    let client = authority.issue("client", &["client"]);
    let url = server.url("localhost");
    works(&server, || with_client(builder(&url, &authority.ca()), &client)).await;

    // The same with the variable names that files and the environment use.
    let mut config = Config::default();
    let file = |path: &Path| path.to_str().expect("UTF-8").to_owned();
    tool::apply_variables(
        &mut config,
        [
            ("SHARDLOCK_SHARDS".to_owned(), url.clone()),
            ("SHARDLOCK_TLS_CA".to_owned(), file(&authority.ca())),
            ("SHARDLOCK_TLS_CERT".to_owned(), file(&client.certificate)),
            ("SHARDLOCK_TLS_KEY".to_owned(), file(&client.key)),
        ],
    )
    .expect("variables");
    works(&server, || Builder::new().config(config.clone()).store_timeout(TIMEOUT)).await;

    let error = refused("no certificate", builder(&url, &authority.ca())).await;
    assert!(error.contains("set tls_cert and tls_key"), "{error}");

    let strange = Authority::create();
    let stranger = strange.issue("client", &["client"]);
    let error = refused(
        "a certificate that the server does not trust",
        with_client(builder(&url, &authority.ca()), &stranger),
    )
    .await;
    assert!(
        error.contains("does not trust the authority of our certificate"),
        "{error}"
    );
    let expired = authority.issue_expired("old-client", &["client"]);
    let error = refused(
        "a certificate of ours that has expired",
        with_client(builder(&url, &authority.ca()), &expired),
    )
    .await;
    assert!(error.contains("renew the one in tls_cert"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn error_of_a_failed_handshake_names_the_remedy() {
    let authority = Authority::create();
    let server = TlsServer::start(&authority, &authority.issue("server", &["localhost"]), false, &[]);

    let stranger = Authority::create();
    let error = refused(
        "an unknown authority",
        builder(&server.url("localhost"), &stranger.ca()),
    )
    .await;
    assert!(error.contains("set tls_ca"), "{error}");
    let by_system = LockManager::builder()
        .shard(server.url("localhost"))
        .store_timeout(TIMEOUT);
    let error = refused("the system's authorities", by_system).await;
    assert!(error.contains("set tls_ca"), "{error}");

    let error = refused("another host", builder(&server.url("127.0.0.1"), &authority.ca())).await;
    assert!(
        error.contains("is for another host") && error.contains("localhost"),
        "{error}"
    );

    let expired = TlsServer::start(&authority, &authority.issue_expired("old", &HOSTS), false, &[]);
    let error = refused(
        "an expired certificate",
        builder(&expired.url("localhost"), &authority.ca()),
    )
    .await;
    assert!(error.contains("has expired"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_kind_of_port_is_explained() {
    let authority = Authority::create();
    let server = TlsServer::start(&authority, &authority.issue("server", &HOSTS), false, &[]);
    let plain = RedisServer::start();
    // Whether a server replies to a TLS handshake depends on the random bytes in it.
    for _ in 0..8 {
        let url = format!("rediss://:hunter2@{}", plain.address());
        let error = refused("TLS to a plain port", builder(&url, &authority.ca())).await;
        assert!(error.contains("does not speak TLS"), "{error}");
        assert!(error.contains(&plain.address()), "{error}");
    }
    let url = format!("redis://:hunter2@127.0.0.1:{}", server.tls_port);
    // The port has a fifth of a second to show that it speaks TLS. On a busy machine it may take
    // longer, and the error only says that there is no connection.
    let mut text = String::new();
    until("the port is known", async || {
        let started = Instant::now();
        let connected = builder(&url, &authority.ca()).connect().await;
        let error = connected.expect_err("plain to a TLS port");
        assert!(started.elapsed() < TIMEOUT / 2, "{:?}: {error}", started.elapsed());
        text = format!("{error} {error:?}");
        error.kind() != LockErrorKind::Unavailable
    })
    .await;
    assert!(text.contains("rediss://") && !text.contains("hunter2"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_or_invalid_files_are_named_with_their_setting() {
    let authority = Authority::create();
    let (client, other) = (
        authority.issue("client", &["client"]),
        authority.issue("other", &["other"]),
    );
    let none = authority.dir().join("none.pem");
    let nonsense = authority.dir().join("nonsense.pem");
    std::fs::write(&nonsense, "nothing of use").expect("write");
    let damaged = authority.dir().join("damaged.pem");
    std::fs::write(
        &damaged,
        "-----BEGIN CERTIFICATE-----\n!!!!\n-----END CERTIFICATE-----\n",
    )
    .expect("write");
    let url = "rediss://:hunter2@localhost:1";
    let with = |certificate: &Path, key: &Path| {
        with_client(
            builder(url, &authority.ca()),
            &Identity {
                certificate: certificate.to_owned(),
                key: key.to_owned(),
            },
        )
    };
    let cases = [
        ("tls_ca", &none, "No such file", builder(url, &none)),
        ("tls_ca", &nonsense, "no `BEGIN CERTIFICATE`", builder(url, &nonsense)),
        ("tls_ca", &damaged, "damaged", builder(url, &damaged)),
        ("tls_cert", &none, "No such file", with(&none, &client.key)),
        (
            "tls_cert",
            &client.key,
            "no `BEGIN CERTIFICATE`",
            with(&client.key, &client.key),
        ),
        ("tls_key", &none, "No such file", with(&client.certificate, &none)),
        (
            "tls_key",
            &client.certificate,
            "no private key",
            with(&client.certificate, &client.certificate),
        ),
        (
            "tls_key",
            &other.key,
            "does not belong to the certificate",
            with(&client.certificate, &other.key),
        ),
    ];
    for (setting, file, why, builder) in cases {
        let error = refused(why, builder).await;
        assert!(
            error.starts_with(&format!("{setting} is {}", file.display())),
            "{error}"
        );
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_broken_connection_is_replaced_through_tls_too() {
    let authority = Authority::create();
    let server = TlsServer::start(&authority, &authority.issue("server", &HOSTS), false, &[]);
    let locks = builder(&server.url("localhost"), &authority.ca())
        .connect()
        .await
        .expect("connect");
    lock(&locks, "k").await.release().await.expect("release");
    server.server.restart();
    until("the manager has reconnected", async || match locks.lock("k").await {
        Ok(guard) => guard.release().await.is_ok(),
        Err(error) => {
            assert!(error.is_retryable(), "{error}");
            false
        }
    })
    .await;
}

#[test]
fn tool_connects_through_tls_with_files_from_the_environment() {
    let authority = Authority::create();
    let server = TlsServer::start(&authority, &authority.issue("server", &HOSTS), true, &[]);
    let client = authority.issue("client", &["client"]);
    for args in [&["exec", "k", "true"][..], &["inspect", "k"]] {
        let mut command = crate::tool::bare(args);
        command
            .env("SHARDLOCK_SHARDS", server.url("localhost"))
            .env("SHARDLOCK_TLS_CA", authority.ca())
            .env("SHARDLOCK_TLS_CERT", &client.certificate)
            .env("SHARDLOCK_TLS_KEY", &client.key);
        let ended = crate::tool::run(command);
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
    }
}

/// The server that tests usually run supports TLS itself. A proxy is used only if the configured
/// server does not.
#[test]
fn server_of_debian_supports_tls() {
    let usual = std::env::var_os("SHARDLOCK_REDIS_SERVER").is_none_or(|path| path == "/usr/bin/redis-server");
    assert!(has_tls() || !usual, "install Debian's redis-server");
}

/// The application's choice of a cryptography provider is kept. Uses its own process, since the
/// choice is process-wide.
#[test]
fn cryptography_provider_of_the_application_is_kept() {
    let authority = Authority::create();
    let server = TlsServer::start(&authority, &authority.issue("server", &HOSTS), false, &[]);
    let ca = authority.ca();
    let vars = [
        ("SHARDLOCK_TEST_URL", server.url("localhost")),
        ("SHARDLOCK_TEST_CA", ca.to_str().expect("UTF-8").to_owned()),
    ];
    let vars = vars.each_ref().map(|(name, value)| (*name, value.as_str()));
    let mut worker = worker::spawn("chooser", &vars);
    assert_eq!(worker.line(), "locked with 1 cipher suite");
    assert!(worker.wait().success());
}

/// The worker of the test above.
pub(crate) fn choose_and_lock(me: &worker::Current) {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.truncate(1);
    provider.install_default().expect("no provider was installed before");
    let lock_once = async {
        let ca = me.var("SHARDLOCK_TEST_CA");
        let locks = builder(&me.var("SHARDLOCK_TEST_URL"), Path::new(&ca))
            .connect()
            .await
            .expect("connect");
        lock(&locks, "k").await.release().await.expect("release");
    };
    tokio::runtime::Runtime::new().expect("a runtime").block_on(lock_once);
    let chosen = rustls::crypto::CryptoProvider::get_default().expect("a choice");
    me.send(format!("locked with {} cipher suite", chosen.cipher_suites.len()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn self_signed_certificate_works_unless_it_claims_to_be_an_authority() {
    let authority = Authority::create();
    let own = authority.self_signed("own", &HOSTS, true);
    let server = TlsServer::start(&authority, &own, false, &[]);
    let text = refused(
        "an authority as a server",
        builder(&server.url("localhost"), &own.certificate),
    )
    .await;
    assert!(text.contains("basicConstraints=critical,CA:FALSE"), "{text}");
    {
        let mut command = crate::tool::bare(&["doctor"]);
        command.env("SHARDLOCK_SHARDS", server.url("localhost"));
        command.env("SHARDLOCK_TLS_CA", &own.certificate);
        let ended = crate::tool::run(command);
        assert!(ended.stdout.contains("basicConstraints=critical,CA:FALSE"), "{ended:?}");
    }

    // The advice in the error works.
    let own = authority.self_signed("alone", &HOSTS, false);
    let server = TlsServer::start(&authority, &own, false, &[]);
    works(&server, || builder(&server.url("localhost"), &own.certificate)).await;
}
