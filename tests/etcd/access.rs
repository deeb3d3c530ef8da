//! Who may use an etcd, and how those are told who may not.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_shard_map_is_refused() {
    let etcd = Etcd::start().await;
    let _first = manager(&etcd).await;
    let error = LockManager::builder()
        .shard(etcd.url())
        .shard("memory://other-shard-of-etcd")
        .store_timeout(STORE_TIMEOUT)
        .connect()
        .await
        .unwrap_err();
    assert!(matches!(error, LockError::ShardMapMismatch { .. }), "{error}");
    assert!(error.to_string().contains("lock:%map"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hosts_and_logins_that_are_wrong_are_told_in_words() {
    let error = LockManager::connect("etcd://127.0.0.1:1,127.0.0.1:2")
        .await
        .unwrap_err();
    let message = error.to_string();
    assert!(matches!(error, LockError::Unavailable { .. }), "{message}");
    for part in ["127.0.0.1:1: ", "127.0.0.1:2: ", "refused"] {
        assert!(message.contains(part), "{message}");
    }

    let etcd = Etcd::start().await;
    let login = |user: &str| LockManager::connect(&format!("etcd://{user}@{}", etcd.hosts()).leak()[..]);
    let refusal = async |user: &str| {
        let error = login(user).await.unwrap_err();
        assert!(matches!(error, LockError::Refused { .. }), "{error:?}");
        let message = format!("{error} {error:?}");
        assert!(!message.contains("s3cret"), "{message}");
        message
    };
    let message = refusal("u:s3cret").await;
    assert!(message.contains("leave the user and the password out"), "{message}");

    let mut client = etcd.client().await;
    for user in ["root", "locker", "reader"] {
        client.user_add(user, "s3cret", None).await.unwrap();
    }
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("locks").await.unwrap();
    let all = etcd_client::Permission::read_write("lock:").with_prefix();
    client.role_grant_permission("locks", all).await.unwrap();
    client.user_grant_role("locker", "locks").await.unwrap();
    client.auth_enable().await.unwrap();

    let message = refusal("root:s3cret-wrong").await;
    assert!(message.contains("check the user and the password"), "{message}");
    let message = refusal("reader:s3cret").await;
    assert!(
        message.contains("needs readwrite on all keys that begin with"),
        "{message}"
    );
    let error = LockManager::connect(&etcd.url()).await.unwrap_err();
    assert!(error.to_string().contains("name a user and its password"), "{error}");

    let locks = login("locker:s3cret").await.unwrap();
    let other = login("locker:s3cret").await.unwrap();
    let guard = lock(&locks, "k").await;
    let waiting = tokio::spawn(async move { lock(&other, "k").await });
    until_queued(&locks, "k", 1).await;
    guard.release().await.unwrap();
    soon("the hand-off", waiting).await.unwrap().release().await.unwrap();
}

#[cfg(feature = "tls")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn encrypted_connections_need_the_right_files() {
    let etcd = Etcd::start_with_tls().await;
    let files = etcd.tls();
    let with_client = |builder: Builder| builder.tls_cert(&files.cert).tls_key(&files.key);
    let locks = with_client(builder(&etcd).tls_ca(&files.ca)).connect().await.unwrap();
    let other = with_client(builder(&etcd).tls_ca(&files.ca)).connect().await.unwrap();
    let guard = lock(&locks, "k").await;
    let waiting = tokio::spawn(async move { lock(&other, "k").await });
    until_queued(&locks, "k", 1).await;
    guard.release().await.unwrap();
    soon("the hand-off", waiting).await.unwrap().release().await.unwrap();
    until_nothing_is_left(&etcd).await;

    // The system does not know this authority; etcd does not know who shows no certificate.
    let cases = [
        (with_client(builder(&etcd)), "set tls_ca to"),
        (builder(&etcd).tls_ca(&files.ca), "set tls_cert and tls_key"),
    ];
    for (refused, advice) in cases {
        let error = refused.connect().await.unwrap_err();
        let message = error.to_string();
        assert!(matches!(error, LockError::Unavailable { .. }), "{message}");
        assert!(message.contains(advice), "{message}");
    }
    let missing = files.ca.with_file_name("missing.pem");
    let error = builder(&etcd).tls_ca(&missing).connect().await.unwrap_err();
    let message = error.to_string();
    assert!(
        message.contains("tls_ca is ") && message.contains("missing.pem"),
        "{message}"
    );
}
