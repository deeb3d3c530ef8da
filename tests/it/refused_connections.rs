//! Servers that can't be used: the error says what is wrong.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::{Duration, Instant};

use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager, LossReason};
use support::filter::{Filter, Verdict};
use support::{Cluster, RedisServer};
use support_locks::{STORE_TIMEOUT, lock, soon, until};

/// The error of connecting to this URL, and whether it was returned before the time limit. It must
/// not contain the password.
async fn attempt(url: &str) -> (LockError, bool) {
    let (started, limit) = (Instant::now(), Duration::from_secs(6));
    let builder = LockManager::builder().shard(url).store_timeout(limit);
    let error = soon("an error", builder.connect()).await.expect_err(url);
    assert!(!error.to_string().contains("hunter2"), "{error}");
    assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    (error, started.elapsed() < limit * 5 / 6)
}

/// The error of connecting to this URL, which must be returned quickly.
async fn refused(url: &str) -> LockError {
    let (error, is_quick) = attempt(url).await;
    assert!(is_quick, "{error}");
    error
}

/// [`refused`] for an error with these words. A manager waits a fifth of a second for the answer to
/// a question about what is at the port, and a second for a node of a cluster. A busy machine may
/// take longer, and then the error says less.
async fn explained(url: &str, words: &str) -> LockError {
    let mut explained = None;
    until("the error is explained", async || {
        let (error, is_quick) = attempt(url).await;
        explained = (is_quick && error.to_string().contains(words)).then_some(error);
        explained.is_some()
    })
    .await;
    explained.expect("just seen")
}

#[tokio::test]
async fn wrong_or_missing_password_is_explained() {
    let server = RedisServer::start_with(&["--requirepass", "right"]);
    let wrong = [
        server.url(),
        format!("redis://:hunter2@{}", server.address()),
        format!("redis://nobody:hunter2@{}", server.address()),
    ];
    for url in wrong {
        let error = refused(&url).await;
        assert!(
            (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
            "{error}"
        );
        assert!(
            !error.is_retryable() && error.to_string().contains("password"),
            "{error}"
        );
        assert!(error.to_string().contains(&server.address()), "{error}");
    }
    let right = format!("redis://:right@{}", server.address());
    let locks = support_locks::connect(&right).await;
    lock(&locks, "k").await.release().await.expect("release");
}

#[tokio::test]
async fn refusing_port_and_unknown_host_are_explained() {
    let server = RedisServer::start();
    let url = server.url();
    server.kill();
    let error = refused(&url).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("refused"), "{error}");
    assert!(error.to_string().contains(&url), "{error}");
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<std::io::Error>());
    let kind = source.map(std::io::Error::kind);
    assert_eq!(kind, Some(std::io::ErrorKind::ConnectionRefused), "{error:?}");

    // A name in a top-level domain that is reserved and never resolves.
    let error = refused("redis://:hunter2@lock.invalid:6379").await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("lock.invalid"), "{error}");
}

#[cfg(not(feature = "tls"))]
#[tokio::test]
async fn tls_is_refused_with_a_reason_without_its_feature() {
    let server = RedisServer::start();
    let error = refused(&format!("rediss://:hunter2@{}", server.address())).await;
    assert!(error.kind() == LockErrorKind::Invalid, "{error}");
    assert!(error.to_string().contains("feature `tls`"), "{error}");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn tls_to_a_plain_port_is_explained() {
    let server = RedisServer::start();
    let error = refused(&format!("rediss://:hunter2@{}", server.address())).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("does not speak TLS"), "{error}");
}

#[tokio::test]
async fn port_of_another_protocol_is_explained() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let mut stream = stream.expect("a connection");
                // The client may have disconnected by then.
                drop(stream.read(&mut [0; 64]));
                drop(stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n"));
            });
        }
    });
    let error = explained(&format!("redis://{address}"), "HTTP/1.1 400 Bad Request").await;
    assert!(error.kind() == LockErrorKind::Refused, "{error}");
    for part in [&address.to_string(), "not a Redis"] {
        assert!(error.to_string().contains(part), "{error}");
    }
}

/// Like an HTTP server, which waits for the end of the headers, and like a server that speaks
/// first.
#[tokio::test]
async fn port_of_another_protocol_is_reported_before_the_time_limit() {
    for (greeting, end, reply) in [
        ("", "\r\n\r\n", "HTTP/1.1 400 Bad Request\r\n\r\n"),
        ("SSH-2.0-OpenSSH_9.2\r\n", "", ""),
    ] {
        let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
        let url = format!("redis://{}", listener.local_addr().expect("an address"));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                std::thread::spawn(move || {
                    let mut stream = stream.expect("a connection");
                    drop(stream.write_all(greeting.as_bytes()));
                    let (mut all, mut some) = (Vec::new(), [0; 64]);
                    while let Ok(count @ 1..) = stream.read(&mut some) {
                        all.extend_from_slice(&some[..count]);
                        if !end.is_empty() && all.ends_with(end.as_bytes()) {
                            drop(stream.write_all(reply.as_bytes()));
                            return;
                        }
                    }
                });
            }
        });
        let said = [greeting, reply].concat();
        let error = explained(&url, said.trim()).await;
        assert!(error.kind() == LockErrorKind::Refused, "{error}");
    }
}

#[tokio::test]
async fn a_proxy_that_hangs_up_on_commands_is_reported_with_all_of_them() {
    let server = RedisServer::start();
    let proxy = Filter::start(server.address(), |command| {
        let lacks: [&[u8]; 4] = [b"CLIENT", b"ROLE", b"TIME", b"SUBSCRIBE"];
        match lacks.contains(&&*command[0].to_ascii_uppercase()) {
            true => Verdict::HangUp,
            false => Verdict::Pass,
        }
    });
    let words = "closes the connection on CLIENT, ROLE, TIME, SUBSCRIBE:";
    let error = explained(&proxy.url(), words).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
}

#[tokio::test]
async fn a_server_too_old_for_waiting_is_refused_at_connect() {
    let server = RedisServer::start_with(&["--rename-command", "ZPOPMIN", ""]);
    let error = refused(&server.url()).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(
        error.to_string().contains("lacks ZPOPMIN") && error.to_string().contains("Redis 5.0"),
        "{error}"
    );
}

#[tokio::test]
async fn server_without_role_is_refused_unless_the_check_is_off() {
    let server = RedisServer::start_with(&["--rename-command", "ROLE", ""]);
    let error = refused(&server.url()).await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("set check_role = false"), "{error}");
    let builder = LockManager::builder().shard(server.url()).ttl(Duration::from_secs(5));
    let builder = builder.store_timeout(STORE_TIMEOUT).check_role(false);
    let locks = builder.connect().await.expect("connect");
    let guard = lock(&locks, "k").await;
    let other = lock(&locks, "other").await;
    // A renewal that finds its lease gone does not send ROLE either.
    server.command(&["DEL", "lock:k"]);
    assert_eq!(soon("the loss", guard.lost()).await, LossReason::Taken);
    other.release().await.expect("release");
}

#[tokio::test]
async fn a_cluster_too_old_for_waiting_is_refused_at_connect() {
    let cluster = Cluster::start(1, 0);
    let node = cluster.nodes()[0].address();
    let proxy = Filter::start(node, |command| match &command[0][..] {
        // Like Redis 6.2.
        b"PUBSUB" => {
            Verdict::Refuse("ERR Unknown subcommand or wrong number of arguments for 'SHARDNUMSUB'. Try PUBSUB HELP.")
        }
        _ => Verdict::Pass,
    });
    // The node announces the proxy's port.
    let port = proxy.address().rsplit_once(':').expect("a port").1.to_owned();
    cluster.nodes()[0].command(&["CONFIG", "SET", "cluster-announce-port", &port]);
    let error = explained(&format!("redis+cluster://{}", proxy.address()), "sharded pub/sub").await;
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Refused, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains("Redis 7.0"), "{error}");
}

#[tokio::test]
async fn silent_port_is_an_error_after_the_store_timeout() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let address = listener.local_addr().expect("an address");
    let limit = Duration::from_millis(200);
    let started = Instant::now();
    let builder = LockManager::builder()
        .shard(format!("redis://{address}"))
        .store_timeout(limit);
    let error = soon("an error", builder.connect())
        .await
        .expect_err("the server does not answer");
    assert!(started.elapsed() >= limit && started.elapsed() < limit + Duration::from_secs(3));
    assert!(
        (error.kind(), error.step()) == (LockErrorKind::Unavailable, Some("connect")),
        "{error}"
    );
    assert!(error.to_string().contains(&address.to_string()), "{error}");
}
