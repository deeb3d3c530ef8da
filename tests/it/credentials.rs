//! Logins beside the URL: settings, a file that is read at each connect, and a callback.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use shardlock::LockManager;
use shardlock::config::{Builder, Credentials, CredentialsRequest};
use shardlock::error::LockErrorKind;
use support::quorum::MAX_TTL;
use support::sentinel::Watched;
use support::{ClientType, Cluster, PATIENCE, Quorum, RedisServer, directory};
use support_locks::{lock_in_time, soon, until, until_queued};
use tempfile::TempDir;

/// A user of the ACL, with a password that has characters that are special in a URL.
const USER: &str = "worker:1";
const PASSWORD: &str = "s3cret/@1";
const NEXT: &str = "n3xt#?";

/// Gives the user this password only, and disables the default user.
fn set_password(server: &RedisServer, password: &str) {
    let password = format!(">{password}");
    server.command(&["ACL", "SETUSER", USER, "reset", "on", &password, "~*", "&*", "+@all"]);
}

/// A server whose default user may not do anything but log in.
fn server_with_user() -> RedisServer {
    let server = RedisServer::start();
    set_password(&server, PASSWORD);
    // The connection of the test stays authenticated.
    server.command(&["CONFIG", "SET", "requirepass", "the default user's"]);
    server
}

struct PasswordFile {
    dir: TempDir,
}

impl PasswordFile {
    fn new(password: &str) -> Self {
        let file = Self {
            dir: directory("password"),
        };
        file.write(password);
        file
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("password")
    }

    /// Replaces the file as a whole, as Kubernetes does.
    fn write(&self, password: &str) {
        let new = self.dir.path().join("new");
        std::fs::write(&new, format!("{password}\n")).unwrap();
        std::fs::rename(new, self.path()).unwrap();
    }
}

fn builder(url: String) -> Builder {
    LockManager::builder().shard(url).store_timeout(Duration::from_secs(5))
}

/// Acquires a lock, hands it to another manager and reads its state, over every sort of connection.
async fn use_all_connections(builder: &Builder) {
    let one = builder.clone().connect().await.expect("connect");
    let other = builder.clone().connect().await.expect("connect");
    let guard = one.lock("k").timeout(PATIENCE).await.expect("lock");
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { other.lock("k").timeout(PATIENCE).await }
    });
    until_queued(&one, "k", 1).await;
    guard.release().await.expect("release");
    let guard = soon("the lock", waiting).await.unwrap().expect("lock");
    assert!(one.inspect("k").await.expect("inspect").holder.is_some());
    guard.release().await.expect("release");
    one.shutdown().await.expect("shutdown");
    other.shutdown().await.expect("shutdown");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn user_and_password_beside_the_url_log_in() {
    let server = server_with_user();
    use_all_connections(&builder(server.url()).username(USER).password(PASSWORD)).await;

    let error = builder(server.url()).connect().await.unwrap_err();
    assert_eq!(error.kind(), LockErrorKind::Refused, "{error}");
    let wrong = builder(server.url()).username(USER).password("wr0ng");
    let error = wrong.connect().await.unwrap_err();
    assert!(error.to_string().contains("check the user and the password"), "{error}");
    assert!(!format!("{error} {error:?}").contains("wr0ng"), "{error:?}");

    // A login in the URL is used for its shard, and the settings for the others.
    let (server, own) = (server_with_user(), RedisServer::start_with(&["--requirepass", "own"]));
    let locks = builder(server.url())
        .shard(own.url().replace("://", "://:own@"))
        .username(USER)
        .password(PASSWORD)
        .connect()
        .await
        .expect("connect");
    for key in ["a", "b", "c", "d", "e"] {
        lock_in_time(&locks, key).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn password_file_is_read_at_each_connect() {
    let (server, file) = (server_with_user(), PasswordFile::new(PASSWORD));
    let builder = builder(server.url()).username(USER).password_file(file.path());
    use_all_connections(&builder).await;
    let locks = builder.clone().connect().await.expect("connect");
    let guard = locks.lock("held").await.expect("lock");

    set_password(&server, NEXT);
    // Open connections stay authenticated.
    lock_in_time(&locks, "k").await;
    file.write(NEXT);
    server.client_kill(ClientType::Normal);
    server.client_kill(ClientType::PubSub);
    lock_in_time(&locks, "k").await;
    use_all_connections(&builder).await;
    assert!(guard.is_valid());
    guard
        .release()
        .await
        .expect("the lease was renewed with the new password");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn password_file_that_is_missing_is_an_error_at_the_start_and_an_outage_later() {
    let (server, file) = (server_with_user(), PasswordFile::new(PASSWORD));
    let builder = builder(server.url()).username(USER).password_file(file.path());
    let locks = builder.clone().connect().await.expect("connect");
    lock_in_time(&locks, "k").await;

    std::fs::remove_file(file.path()).unwrap();
    server.client_kill(ClientType::Normal);
    server.client_kill(ClientType::PubSub);
    let error = builder.clone().connect().await.unwrap_err();
    assert_eq!(error.kind(), LockErrorKind::Invalid, "{error}");
    let path = file.path().display().to_string();
    assert!(
        error
            .to_string()
            .starts_with(&format!("password_file is {path}, which can't be read")),
        "{error}"
    );
    let mut message = String::new();
    until("an error that names the file", async || {
        let outcome = locks.lock("k").fail_fast().await;
        message = outcome.err().map_or_else(String::new, |error| {
            assert!(error.is_retryable(), "{error}");
            error.to_string()
        });
        message.contains(&format!("password_file {path} can't be read"))
    })
    .await;

    // A request outlasts that.
    let waiting = tokio::spawn({
        let locks = locks.clone();
        async move { locks.lock("k").timeout(PATIENCE).await }
    });
    file.write(PASSWORD);
    drop(soon("the lock", waiting).await.unwrap().expect("lock"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn callback_is_called_for_each_connection() {
    let server = server_with_user();
    let (calls, current) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(PASSWORD)));
    let address = server.address();
    let builder = LockManager::builder()
        .named_shard("main", server.url())
        .store_timeout(Duration::from_secs(5))
        .credentials({
            let (calls, current) = (Arc::clone(&calls), Arc::clone(&current));
            move |request: CredentialsRequest| {
                assert_eq!((request.shard(), request.address()), ("main", &address[..]));
                let (calls, current) = (Arc::clone(&calls), Arc::clone(&current));
                async move {
                    calls.fetch_add(1, Ordering::Relaxed);
                    tokio::task::yield_now().await;
                    let password = *current.lock();
                    if password.is_empty() {
                        return Err("the vault is sealed");
                    }
                    Ok(Credentials::new(USER, password))
                }
            }
        });
    use_all_connections(&builder).await;
    let locks = builder.connect().await.expect("connect");
    let before = calls.load(Ordering::Relaxed);
    set_password(&server, NEXT);
    *current.lock() = NEXT;
    server.client_kill(ClientType::Normal);
    lock_in_time(&locks, "k").await;
    assert!(calls.load(Ordering::Relaxed) > before);

    *current.lock() = "";
    server.client_kill(ClientType::Normal);
    until("the error of the callback", async || {
        let Err(error) = locks.lock("k").fail_fast().await else {
            return false;
        };
        error.kind() == LockErrorKind::Unavailable
            && error
                .to_string()
                .contains("the credentials callback failed: the vault is sealed")
    })
    .await;
}

#[tokio::test]
async fn callback_beside_another_login_is_refused() {
    let callback = async |_: CredentialsRequest| Ok::<_, String>(Credentials::password("s3cret"));
    for (builder, message) in [
        (
            builder("redis://127.0.0.1:1".into()).password("s3cret"),
            "password is set, but must be none if there is a credentials callback",
        ),
        (
            builder("redis://:p@127.0.0.1:1".into()),
            "credentials is a callback, but must be none unless a shard with servers has a URL without a login",
        ),
        (
            builder("memory://".into()),
            "credentials is a callback, but must be none unless a shard with servers has a URL without a login",
        ),
    ] {
        let error = builder.credentials(callback).connect().await.unwrap_err();
        assert_eq!(
            (error.kind(), &error.to_string()[..]),
            (LockErrorKind::Invalid, message)
        );
    }
}

/// The settings are for the Redis servers; the sentinels have their own login, in the URL.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn password_file_logs_in_to_the_primary_that_sentinels_name() {
    let lines = [
        "requirepass of-the-sentinels",
        "sentinel sentinel-pass of-the-sentinels",
        "sentinel auth-pass mymaster of-the-primary",
    ];
    let watched = Watched::start_with(0, &["--requirepass", "of-the-primary"], &lines);
    let file = PasswordFile::new("of-the-primary");
    let url = format!("{}?sentinel_password=of-the-sentinels", watched.url());
    let builder = builder(url).password_file(file.path());
    use_all_connections(&builder).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn password_file_logs_in_to_all_nodes_of_a_cluster() {
    let cluster = Cluster::start_with(3, 0, &["--requirepass", "hunter2", "--masterauth", "hunter2"]);
    let file = PasswordFile::new("hunter2");
    let builder = builder(cluster.url()).password_file(file.path());
    use_all_connections(&builder).await;
    let locks = builder.connect().await.expect("connect");
    for key in ["a", "b", "c", "d", "e", "f"] {
        lock_in_time(&locks, key).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn password_file_logs_in_to_the_nodes_of_a_quorum() {
    let quorum = Quorum::start(3);
    for node in quorum.nodes() {
        set_password(node, PASSWORD);
        node.command(&["CONFIG", "SET", "requirepass", "the default user's"]);
    }
    let file = PasswordFile::new(PASSWORD);
    let builder = builder(quorum.url())
        .ttl(MAX_TTL)
        .redlock_max_ttl(MAX_TTL)
        .username(USER)
        .password_file(file.path());
    use_all_connections(&builder).await;
}

#[cfg(feature = "etcd")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn password_of_etcd_can_be_replaced() {
    let etcd = support::etcd::Etcd::start().await;
    let mut client = etcd.client().await;
    for user in ["root", "locker"] {
        client.user_add(user, "s3cret", None).await.unwrap();
    }
    client.role_add("root").await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.role_add("locks").await.unwrap();
    let all = etcd_client::Permission::read_write("lock:").with_prefix();
    client.role_grant_permission("locks", all).await.unwrap();
    client.user_grant_role("locker", "locks").await.unwrap();
    client.auth_enable().await.unwrap();

    let file = PasswordFile::new("s3cret");
    let builder = builder(etcd.url()).username("locker").password_file(file.path());
    use_all_connections(&builder).await;
    let locks = builder.clone().connect().await.expect("connect");
    lock_in_time(&locks, "k").await;

    // Etcd forgets the tokens of a user whose password changes.
    let login = etcd_client::ConnectOptions::new().with_user("root", "s3cret");
    let root = etcd_client::Client::connect([format!("http://{}", etcd.hosts())], Some(login)).await;
    root.unwrap().user_change_password("locker", "n3xt").await.unwrap();
    file.write("n3xt");
    lock_in_time(&locks, "k").await;
    use_all_connections(&builder).await;
}
