//! Access control in etcd, and the errors of a user without access.

use shardlock::error::LockErrorKind;

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_shard_map_is_refused() {
    let etcd = Etcd::start().await;
    let first = manager(&etcd).await;
    first.lock("k").await.unwrap().release().await.unwrap();
    let error = LockManager::builder()
        .shard(etcd.url())
        .shard("memory://other-shard-of-etcd")
        .store_timeout(STORE_TIMEOUT)
        .connect()
        .await
        .unwrap_err();
    assert!(error.kind() == LockErrorKind::ShardMapMismatch, "{error}");
    assert!(error.to_string().contains("lock:%map"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_hosts_and_logins_are_explained() {
    let connect = |url: String| LockManager::builder().shard(url).store_timeout(STORE_TIMEOUT).connect();
    let error = connect("etcd://127.0.0.1:1,127.0.0.1:2".to_owned()).await.unwrap_err();
    let message = error.to_string();
    assert!(error.kind() == LockErrorKind::Unavailable, "{message}");
    for part in ["127.0.0.1:1: ", "127.0.0.1:2: ", "refused"] {
        assert!(message.contains(part), "{message}");
    }

    let etcd = Etcd::start().await;
    let login = |user: &str| connect(format!("etcd://{user}@{}", etcd.hosts()));
    let refusal = async |user: &str| {
        let error = login(user).await.unwrap_err();
        assert!(error.kind() == LockErrorKind::Refused, "{error:?}");
        let message = format!("{error} {error:?}");
        assert!(!message.contains("s3cret"), "{message}");
        message
    };
    let message = refusal("u:s3cret").await;
    assert!(message.contains("leave the user and the password out"), "{message}");

    let mut client = etcd.client().await;
    for user in ["root", "locker", "reader", "deaf"] {
        client.user_add(user, "s3cret", None).await.unwrap();
    }
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("locks").await.unwrap();
    let all = etcd_client::Permission::read_write("lock:").with_prefix();
    client.role_grant_permission("locks", all).await.unwrap();
    client.user_grant_role("locker", "locks").await.unwrap();
    // Everything that a lock needs, except for the notes in the inbox.
    client.role_add("some").await.unwrap();
    for some in [
        etcd_client::Permission::read_write("lock:%map"),
        etcd_client::Permission::read_write("lock:k").with_prefix(),
    ] {
        client.role_grant_permission("some", some).await.unwrap();
    }
    client.user_grant_role("deaf", "some").await.unwrap();
    client.auth_enable().await.unwrap();

    let message = refusal("root:s3cret-wrong").await;
    assert!(message.contains("check the user and the password"), "{message}");
    for user in ["reader:s3cret", "deaf:s3cret"] {
        let message = refusal(user).await;
        assert!(
            message.contains("needs readwrite on all keys that begin with"),
            "{message}"
        );
    }
    let error = connect(etcd.url()).await.unwrap_err();
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

    // The system does not trust this authority; etcd rejects clients without a certificate.
    let cases = [
        (with_client(builder(&etcd)), "set tls_ca to"),
        (builder(&etcd).tls_ca(&files.ca), "set tls_cert and tls_key"),
    ];
    for (refused, advice) in cases {
        let error = refused.connect().await.unwrap_err();
        let message = error.to_string();
        assert!(error.kind() == LockErrorKind::Unavailable, "{message}");
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn key_without_read_permission_loses_no_other_lock() {
    let etcd = Etcd::start().await;
    let mut client = etcd.client().await;
    for (user, role) in [("root", "root"), ("locker", "locks")] {
        client.user_add(user, "s3cret", None).await.unwrap();
        client.role_add(role).await.unwrap();
        client.user_grant_role(user, role).await.unwrap();
    }
    for prefix in ["lock:%", "lock:a", "lock:b"] {
        let some = etcd_client::Permission::read_write(prefix).with_prefix();
        client.role_grant_permission("locks", some).await.unwrap();
    }
    client.auth_enable().await.unwrap();
    let ttl = 2 * LEASE_MIN;
    let builder = LockManager::builder().shard(format!("etcd://locker:s3cret@{}", etcd.hosts()));
    let locks = builder.ttl(ttl).store_timeout(STORE_TIMEOUT).connect().await.unwrap();
    let mut kept = Vec::new();
    for number in 0..5 {
        kept.push(lock(&locks, &format!("a{number}")).await);
    }
    let forbidden = lock(&locks, "b").await;

    let login = etcd_client::ConnectOptions::new().with_user("root", "s3cret");
    let root = etcd_client::Client::connect([format!("http://{}", etcd.hosts())], Some(login)).await;
    let all_of_it = etcd_client::RoleRevokePermissionOptions::new().with_prefix();
    let revoked = root
        .unwrap()
        .role_revoke_permission("locks", "lock:b", Some(all_of_it))
        .await;
    revoked.unwrap();
    soon("the loss", forbidden.lost()).await;
    let lost = futures_util::future::select_all(kept.iter().map(|guard| Box::pin(guard.lost())));
    let lost = tokio::time::timeout(2 * ttl, lost).await;
    assert_eq!(lost.map(|(reason, number, _)| (reason, number)).ok(), None);
    for guard in kept {
        guard.release().await.unwrap();
    }
}
