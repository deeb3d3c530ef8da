//! The rules in `config/acl.conf`: with all of them everything works, and without any one of them
//! an error names it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shardlock::config::Builder;
use shardlock::error::LockErrorKind;
use shardlock::{LockError, LockManager};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use support::{PATIENCE, RedisServer};
use support_locks::{SHORT_TTL, STORE_TIMEOUT, Servers, soon, until, until_queued};

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../config/acl.conf");
pub(crate) const USER: &str = "shardlock";
pub(crate) const PASSWORD: &str = "change-me";

/// The words of the file's user line after the user name.
pub(crate) fn rules() -> Vec<String> {
    let text = std::fs::read_to_string(FILE).expect("read the file");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("user "));
    let (line, more) = (lines.next().expect("a user"), lines.next());
    assert_eq!(more, None, "there is one user in the file");
    let mut words = line.split(' ').map(str::to_owned);
    assert_eq!(words.next().as_deref(), Some(USER));
    words.collect()
}

/// The rules that grant a permission.
fn permissions(rules: &[String]) -> Vec<String> {
    let permits = |rule: &&String| rule.starts_with(['+', '~', '&']);
    rules.iter().filter(permits).cloned().collect()
}

pub(crate) fn set_user(server: &RedisServer, rules: &[String]) {
    let mut command = vec!["ACL", "SETUSER", USER, "reset"];
    command.extend(rules.iter().map(String::as_str));
    server.command(&command);
}

fn url(server: &RedisServer) -> String {
    format!("redis://{USER}:{PASSWORD}@{}", server.address())
}

/// The errors of a run.
#[derive(Clone, Default)]
pub(crate) struct Errors(Arc<parking_lot::Mutex<Vec<LockError>>>);

impl Errors {
    fn note<T>(&self, result: Result<T, LockError>) -> Option<T> {
        result.map_err(|error| self.0.lock().push(error)).ok()
    }

    /// The missing rules that the errors name.
    fn named(&self) -> BTreeSet<String> {
        let named = |error: &LockError| {
            let text = error.to_string();
            let (_, rest) = text.split_once("the user lacks the permission ")?;
            Some(rest.split(';').next()?.to_owned())
        };
        self.0.lock().iter().filter_map(named).collect()
    }

    pub(crate) fn all(&self) -> Vec<String> {
        self.0.lock().iter().map(ToString::to_string).collect()
    }
}

/// A time limit that is only reached if the lock can't be acquired any more.
const WAIT: Duration = Duration::from_secs(4);

async fn lock_and_release(locks: LockManager, key: &'static str, errors: Errors) {
    if let Some(guard) = errors.note(locks.lock(key).timeout(WAIT).await) {
        errors.note(guard.release().await);
    }
}

/// Uses every feature as the restricted user.
async fn whole_range(server: &RedisServer, namespace: &str) -> Errors {
    let builder = || LockManager::builder().shard(url(server)).namespace(namespace);
    whole_range_of(builder, server, namespace).await
}

/// [`whole_range`] with managers of any kind of shard.
pub(crate) async fn whole_range_of(
    builder: impl Fn() -> Builder,
    servers: &(impl Servers + ?Sized),
    namespace: &str,
) -> Errors {
    let errors = Errors::default();
    let builder = || {
        builder()
            .ttl(SHORT_TTL)
            .max_burst(1)
            .store_timeout(Duration::from_secs(5))
    };
    let Some(one) = errors.note(builder().connect().await) else {
        return errors;
    };
    let Some(other) = errors.note(builder().connect().await) else {
        return errors;
    };
    // The fast path and its release.
    lock_and_release(one.clone(), "free", errors.clone()).await;
    // Held for several renewals, refused to a try, inspected, and handed off.
    if let Some(guard) = errors.note(one.lock("held").timeout(WAIT).await) {
        errors.note(other.try_lock("held").await);
        let waiting = tokio::spawn(lock_and_release(other.clone(), "held", errors.clone()));
        let lost = tokio::time::timeout(2 * SHORT_TTL, guard.lost()).await.is_ok();
        errors.note(other.inspect("held").await);
        let released = errors.note(guard.release().await);
        assert!(!lost || released.is_none());
        soon("the waiter", waiting).await.expect("a task");
    }
    // Several tasks in each process, and the processes take turns.
    let mut tasks = JoinSet::new();
    for _ in 0..8 {
        for locks in [&one, &other] {
            tasks.spawn(lock_and_release(locks.clone(), "contended", errors.clone()));
        }
    }
    while let Some(ended) = soon("the tasks", tasks.join_next()).await {
        ended.expect("a task");
    }
    // Two processes share a key, and a third request waits for both.
    let shared = [&one, &other].map(|locks| locks.lock("shared").shared().timeout(WAIT));
    let [here, there] = shared;
    let both = [errors.note(here.await), errors.note(there.await)];
    let waiting = tokio::spawn(lock_and_release(one.clone(), "shared", errors.clone()));
    // Long enough for a renewal.
    if let [Some(guard), _] = &both {
        tokio::time::timeout(2 * SHORT_TTL, guard.lost()).await.ok();
    }
    errors.note(other.inspect("shared").await);
    for guard in both.into_iter().flatten() {
        errors.note(guard.release().await);
    }
    soon("the waiter", waiting).await.expect("a task");
    // Permits are refused. A quorum has none.
    let permit = one.permits("permits", 2).timeout(WAIT).await;
    let has_permits = |error: &LockError| error.kind() != LockErrorKind::Unsupported;
    if permit.as_ref().err().is_none_or(has_permits)
        && let Some(guard) = errors.note(permit)
    {
        errors.note(other.try_permits("permits", 2).weight(2).await);
        errors.note(guard.release().await);
    }
    // A client that knows nothing about the queue holds the key for a while.
    servers.overwrite(
        &format!("{namespace}foreign"),
        "somebody else",
        Duration::from_millis(200),
    );
    lock_and_release(one.clone(), "foreign", errors.clone()).await;
    one.shutdown().await.ok();
    other.shutdown().await.ok();
    errors
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_of_the_file_permit_all_that_the_library_does() {
    // Loaded as the file suggests: by including it.
    let server = RedisServer::start_with(&["--include", FILE]);
    let errors = whole_range(&server, "lock:").await;
    assert_eq!(errors.all(), [""; 0]);
    for args in [&["exec", "k", "true"][..], &["inspect", "k"]] {
        let mut command = crate::tool::bare(args);
        command.env("SHARDLOCK_SHARDS", url(&server));
        let ended = crate::tool::run(command);
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{ended:?}");
    }
    let mut denied: Vec<redis::Value> = server.query(&["ACL", "LOG"]);
    // Clients send their library's name to servers from 7.2 on. A denial does not matter, as the
    // file says.
    denied.retain(|entry| !format!("{entry:?}").contains("client|set"));
    assert!(denied.is_empty(), "{denied:?}");
}

/// The additions that the file lists: the lines that consist only of rules.
pub(crate) fn additions() -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(FILE).expect("read the file");
    let (_, more) = text.split_once("---- What to add").expect("the part with additions");
    let lines = more.lines().filter_map(|line| line.strip_prefix("#   "));
    let rules = lines.filter(|line| line.split(' ').all(|word| word.starts_with('+')));
    rules.map(|line| line.split(' ').map(str::to_owned).collect()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn added_rules_are_valid_and_another_database_needs_its_rule() {
    let server = RedisServer::start();
    let additions = additions();
    assert!(additions.len() >= 5, "{additions:?}");
    // Older servers do not know CLIENT SETINFO and reject the rule.
    let is_known = |rule: &String| rule != "+client|setinfo" || server.version() >= (7, 2);
    for rules in &additions {
        set_user(
            &server,
            &rules.iter().filter(|rule| is_known(rule)).cloned().collect::<Vec<_>>(),
        );
    }
    let select = vec!["+select".to_owned()];
    assert!(additions.contains(&select));
    set_user(&server, &rules());
    let other_database = || {
        LockManager::builder()
            .shard(format!("{}/1", url(&server)))
            .store_timeout(STORE_TIMEOUT)
    };
    let error = other_database().connect().await.expect_err("the user may not SELECT");
    assert!(error.kind() == LockErrorKind::Refused, "{error:?}");
    assert!(error.to_string().contains("lacks the permission +select;"), "{error}");
    set_user(&server, &[rules(), select].concat());
    let locks = other_database().connect().await.expect("connect");
    let guard = locks.lock("k").timeout(PATIENCE).await.expect("lock");
    guard.release().await.expect("release");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rules_work_for_another_namespace_if_its_name_is_substituted() {
    let server = RedisServer::start();
    let rules: Vec<String> = rules().iter().map(|rule| rule.replace("lock:", "jobs/")).collect();
    set_user(&server, &rules);
    assert_eq!(whole_range(&server, "jobs/").await.all(), [""; 0]);
    for missing in ["~{jobs/*", "~jobs/*", "&jobs/in:*"] {
        let fewer: Vec<String> = rules.iter().filter(|rule| *rule != missing).cloned().collect();
        assert_eq!(fewer.len() + 1, rules.len());
        set_user(&server, &fewer);
        let errors = whole_range(&server, "jobs/").await;
        assert_eq!(
            errors.named(),
            BTreeSet::from([missing.to_owned()]),
            "{:#?}",
            errors.all()
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn missing_rule_is_named_by_an_error() {
    let rules = rules();
    let permissions = permissions(&rules);
    assert!(permissions.len() > 20, "{permissions:?}");
    let turns = Arc::new(Semaphore::new(4));
    let mut runs = JoinSet::new();
    for missing in permissions {
        let fewer: Vec<String> = rules.iter().filter(|rule| **rule != missing).cloned().collect();
        let turns = Arc::clone(&turns);
        runs.spawn(async move {
            let _turn = turns.acquire().await.expect("turns");
            let server = RedisServer::start();
            set_user(&server, &fewer);
            let errors = tokio::time::timeout(3 * PATIENCE, whole_range(&server, "lock:")).await;
            let errors = errors.unwrap_or_else(|_| panic!("without {missing} something hangs"));
            assert_eq!(
                errors.named(),
                BTreeSet::from([missing.clone()]),
                "without {missing}: {:#?}",
                errors.all()
            );
        });
    }
    while let Some(ended) = runs.join_next().await {
        ended.expect("a run");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refused_subscription_is_reported_at_once() {
    let server = RedisServer::start();
    for missing in ["+subscribe", "&lock:in:*"] {
        let fewer: Vec<String> = rules().into_iter().filter(|rule| rule != missing).collect();
        set_user(&server, &fewer);
        let started = std::time::Instant::now();
        let builder = LockManager::builder()
            .shard(url(&server))
            .store_timeout(Duration::from_secs(30));
        let error = soon("an error", builder.connect())
            .await
            .expect_err("the user may not subscribe");
        assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
        assert!(
            (error.kind(), error.step()) == (LockErrorKind::Refused, Some("subscribe")),
            "{error:?}"
        );
        assert!(error.to_string().contains(missing), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn waiter_is_served_after_a_permission_is_revoked_and_restored() {
    let server = RedisServer::start();
    let all = rules();
    set_user(&server, &all);
    let builder = || {
        LockManager::builder()
            .shard(url(&server))
            .store_timeout(Duration::from_secs(10))
    };
    let (one, other) = (
        builder().connect().await.expect("connect"),
        builder().connect().await.expect("connect"),
    );
    let guard = one.lock("k").timeout(PATIENCE).await.expect("lock");
    let waiting = tokio::spawn({
        let other = other.clone();
        async move { other.lock("k").timeout(PATIENCE).await }
    });
    until_queued(&one, "k", 1).await;
    // The server disconnects subscribers that lose their permission.
    server.command(&["ACL", "SETUSER", USER, "resetchannels"]);
    until("the inboxes are closed", async || server.channels().is_empty()).await;
    assert!(guard.is_valid());
    server.command(&["ACL", "SETUSER", USER, "&lock:in:*"]);
    until("the inboxes are back", async || server.channels().len() == 2).await;
    guard.release().await.expect("release");
    let guard = soon("the lock", waiting).await.expect("a task").expect("lock");
    guard.release().await.expect("release");
}

/// Without permission to read it, no manager can tell whether a lease is lost: it stays valid for
/// as long as it was extended.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn renewal_without_permission_to_read_is_no_loss_yet() {
    let server = RedisServer::start();
    set_user(&server, &rules());
    let ttl = Duration::from_secs(5);
    let builder = LockManager::builder()
        .shard(url(&server))
        .ttl(ttl)
        .renew_fraction(0.02)
        .store_timeout(STORE_TIMEOUT);
    let locks = builder.connect().await.expect("connect");
    let guard = locks.lock("k").timeout(PATIENCE).await.expect("lock");
    server.command(&["ACL", "SETUSER", USER, "-get"]);
    let denied = || {
        let log = format!("{:?}", server.command(&["ACL", "LOG"]));
        log.matches("\"get\"").count() + log.matches("bulk-string('get')").count()
    };
    until("renewals are refused", async || denied() > 0).await;
    assert!(guard.is_valid());
    server.command(&["ACL", "SETUSER", USER, "+get"]);
    let renewed = tokio::time::timeout(2 * ttl, guard.lost()).await;
    assert!(renewed.is_err(), "{renewed:?}");
    guard.release().await.expect("release");
}
