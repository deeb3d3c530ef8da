//! At most one process leads, and another one follows it.

use std::future::pending;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardlock::error::LockErrorKind;
use shardlock::{FencingToken, LockError, LockGuard, LockManager};
use support::{Worker, worker};
use support_locks::{MARGIN, TestStore, builder_of, lock, on_each_store, soon, until, until_queued};
use tokio::task::{JoinHandle, JoinSet};

/// Leads until the test ends. Reports the token of each term, each end of one, and each step of the
/// body without a valid lease.
#[tokio::main(flavor = "current_thread")]
pub(crate) async fn campaign(me: &worker::Current) {
    let ttl = Duration::from_millis(me.var("SHARDLOCK_TEST_TTL").parse().expect("milliseconds"));
    let locks = builder_of(me).connect().await.expect("connect");
    let body = async |term: &LockGuard| {
        let _ended = OnDrop(|| me.send("ended"));
        me.send(term.token().to_string());
        loop {
            // Ready again and again, so that the body has something to do after a pause.
            tokio::time::sleep(Duration::from_millis(1)).await;
            if !term.is_valid() {
                me.send("stale");
            }
        }
    };
    let () = locks
        .election("k")
        .ttl(ttl)
        .lead(body)
        .await
        .expect("the test kills this process");
}

struct OnDrop<F: FnMut()>(F);

impl<F: FnMut()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        self.0();
    }
}

fn candidates(store: &TestStore, count: usize, ttl: Duration) -> Vec<Worker> {
    let ttl = ttl.as_millis().to_string();
    (0..count)
        .map(|_| store.worker("candidate", &[("SHARDLOCK_TEST_TTL", &ttl)]))
        .collect()
}

/// What a leader in this process saw.
#[derive(Default)]
struct Seen {
    tokens: Mutex<Vec<FencingToken>>,
    ended: AtomicU32,
}

impl Seen {
    /// Waits until the leader is in its term with this number, counted from one.
    async fn term(&self, number: usize) {
        until("the term began", async || self.tokens.lock().len() >= number).await;
    }
}

/// Leads in a task, without an end.
fn lead(locks: &LockManager) -> (Arc<Seen>, JoinHandle<Result<(), LockError>>) {
    let (locks, seen) = (locks.clone(), Arc::new(Seen::default()));
    let in_body = Arc::clone(&seen);
    let leading = tokio::spawn(async move {
        let body = async move |term: &LockGuard| {
            let _ended = OnDrop(|| {
                in_body.ended.fetch_add(1, Ordering::SeqCst);
            });
            in_body.tokens.lock().push(term.token());
            pending::<()>().await;
        };
        locks.lead("k", body).await
    });
    (seen, leading)
}

on_each_store! {
    on(memory redis);

    async fn one_of_many_managers_leads_at_a_time_and_tokens_grow(store: &TestStore) {
        const TERMS: usize = 25;
        let (inside, tokens) = (Arc::new(AtomicU32::new(0)), Arc::new(Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        for _ in 0..4 {
            let locks = store.manager().await;
            let (inside, tokens) = (Arc::clone(&inside), Arc::clone(&tokens));
            tasks.spawn(async move {
                for number in 0..TERMS {
                    let (inside, tokens) = (Arc::clone(&inside), Arc::clone(&tokens));
                    let body = async move |term: &LockGuard| {
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0, "there is another leader");
                        tokens.lock().push(term.token());
                        tokio::task::yield_now().await;
                        inside.fetch_sub(1, Ordering::SeqCst);
                        number
                    };
                    assert_eq!(locks.lead("k", body).await.expect("lead"), number);
                }
            });
        }
        while let Some(ended) = soon("all terms", tasks.join_next()).await {
            ended.expect("a task");
        }
        let tokens = tokens.lock().clone();
        assert_eq!(tokens.len(), 4 * TERMS);
        assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
    }

    async fn leader_is_visible_to_others_and_succeeded_when_its_body_returns(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let value = one.lead("k", async |term: &LockGuard| {
            let holder = other.inspect("k").await.expect("inspect").holder.expect("a holder");
            assert_eq!(holder.owner, term.owner());
            assert!(other.try_lock("k").await.expect("try").is_none());
            "value"
        });
        assert_eq!(value.await.expect("lead"), "value");
        // The lock was released when the body returned. It is an ordinary lock.
        lock(&other, "k").await.release().await.expect("release");
        store.is_empty(&one, "k").await;
    }

    async fn shutdown_ends_the_leader_and_the_candidates(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let (seen, leading) = lead(&one);
        seen.term(1).await;
        let (unseen, waiting) = lead(&other);
        until_queued(&one, "k", 1).await;
        other.shutdown().await.expect("shut down");
        one.shutdown().await.expect("shut down");
        for ended in [leading, waiting] {
            let error = soon("the end", ended).await.expect("a task").expect_err("the manager was shut down");
            assert!(error.kind() == LockErrorKind::Closed, "{error}");
        }
        assert_eq!(seen.ended.load(Ordering::SeqCst), 1);
        assert!(unseen.tokens.lock().is_empty());
    }

    async fn dropped_leader_and_dropped_candidate_leave_nothing(store: &TestStore) {
        let (one, other) = (store.manager().await, store.manager().await);
        let (seen, leading) = lead(&one);
        seen.term(1).await;
        let (_, waiting) = lead(&other);
        until_queued(&one, "k", 1).await;
        waiting.abort();
        until_queued(&one, "k", 0).await;
        leading.abort();
        store.is_empty(&other, "k").await;
        assert_eq!(seen.ended.load(Ordering::SeqCst), 1);
    }

    /// The limits of the manager are for other locks.
    async fn leadership_ignores_max_hold_and_timeout_of_the_manager(store: &TestStore) {
        let limit = Duration::from_millis(50);
        let builder = store.builder().max_hold(limit).timeout(limit);
        let locks = builder.connect().await.expect("connect");
        let held = lock(&locks, "k").await;
        let (seen, leading) = lead(&locks);
        // `max_hold` ends this lock after the timeout of an ordinary request would have passed.
        soon("the loss", held.lost()).await;
        seen.term(1).await;
        assert!(tokio::time::timeout(5 * limit, leading).await.is_err());
        assert_eq!((seen.tokens.lock().len(), seen.ended.load(Ordering::SeqCst)), (1, 0));
    }
}

on_each_store! {
    on(redis etcd);

    async fn killed_leader_is_succeeded_within_its_ttl(store: &TestStore) {
        let watcher = store.manager().await;
        // Long enough that a leader survives until it is killed.
        let ttl = Duration::from_secs(2);
        let mut candidates = candidates(store, 3, ttl);
        until_queued(&watcher, "k", 2).await;
        let (mut last, mut killed) = (0, None::<Instant>);
        while !candidates.is_empty() {
            let mut leader = None;
            until("one of them leads", async || {
                leader = candidates.iter().position(|candidate| candidate.line_within(Duration::ZERO).is_some_and(|token| {
                    let token: u64 = token.parse().expect("a token");
                    assert!(token > last, "{token} after {last}");
                    last = token;
                    true
                }));
                leader.is_some()
            })
            .await;
            if let Some(took) = killed.map(|killed| killed.elapsed()) {
                let limit = store.kind().dead_within(ttl) + 3 * MARGIN;
                assert!(took < limit, "{took:?}");
            }
            let mut leader = candidates.swap_remove(leader.expect("just seen"));
            let holder = watcher.inspect("k").await.expect("inspect").holder.expect("a holder");
            assert!(holder.owner.contains(&format!("-{}-", leader.pid())), "{holder:?}");
            until_queued(&watcher, "k", candidates.len() as u64).await;
            leader.kill();
            killed = Some(Instant::now());
        }
    }
}

on_each_store! {
    on(redis);

    async fn loss_cancels_the_body_and_campaigns_again(store: &TestStore) {
        let locks = store.builder().ttl(Duration::from_secs(3)).connect().await.expect("connect");
        let (seen, leading) = lead(&locks);
        for terms in 1..4 {
            seen.term(terms).await;
            assert_eq!(seen.ended.load(Ordering::SeqCst) as usize, terms - 1);
            store.servers().delete(&store.lease("k"));
        }
        seen.term(4).await;
        assert!(!leading.is_finished());
        let tokens = seen.tokens.lock().clone();
        assert!(tokens.is_sorted_by(|one, next| one < next), "{tokens:?}");
    }

    /// After a pause for longer than its lease, the body does not even run up to its next await.
    async fn stopped_leader_does_not_continue_its_body(store: &TestStore) {
        let locks = store.short_lived_manager().await;
        let mut stopped = candidates(store, 1, store.short_ttl()).remove(0);
        let token: u64 = stopped.line().parse().expect("a token");
        for _ in 0..5 {
            stopped.stop();
            let (seen, leading) = lead(&locks);
            seen.term(1).await;
            assert!(seen.tokens.lock()[0].get() > token);
            stopped.cont();
            assert_eq!(stopped.line(), "ended");
            until_queued(&locks, "k", 1).await;
            leading.abort();
            let later: u64 = stopped.line().parse().expect("a token");
            assert!(later > seen.tokens.lock()[0].get());
        }
        stopped.kill();
    }
}

on_each_store! {
    on(redis, own);

    async fn unreachable_server_ends_the_term_and_the_campaign_outlasts_it(store: &TestStore) {
        let settings = |builder: shardlock::config::Builder| builder.store_timeout(Duration::from_secs(2));
        let locks = settings(store.builder()).ttl(store.short_ttl()).connect().await.expect("connect");
        let (seen, leading) = lead(&locks);
        seen.term(1).await;
        store.servers().kill();
        until("the body is cancelled", async || seen.ended.load(Ordering::SeqCst) == 1).await;
        // The campaign fails at least once meanwhile.
        let failing = locks.lock("other").await.expect_err("the server is gone");
        assert!(failing.is_retryable(), "{failing}");
        store.servers().restart();
        seen.term(2).await;
        let tokens = seen.tokens.lock().clone();
        assert!(tokens[1] > tokens[0], "{tokens:?}");

        // The manager can be shut down during an outage as well.
        store.servers().kill();
        until("the body is cancelled", async || seen.ended.load(Ordering::SeqCst) == 2).await;
        locks.shutdown().await.ok();
        let error = soon("the end", leading).await.expect("a task").expect_err("the manager was shut down");
        assert!(error.kind() == LockErrorKind::Closed, "{error}");
    }
}

#[tokio::test]
async fn invalid_keys_and_ttls_end_the_election_at_once() {
    let locks = support_locks::connect("memory://").await;
    let body = async |_: &LockGuard| panic!("the body must not run");
    let error = soon("the error", locks.lead("", body))
        .await
        .expect_err("the key is empty");
    assert!(error.kind() == LockErrorKind::Invalid, "{error}");
    let election = locks.election("k").ttl(Duration::ZERO);
    let error = soon("the error", election.lead(body))
        .await
        .expect_err("the TTL is too short");
    assert!(error.to_string().starts_with("ttl is "), "{error}");
}

/// A body that keeps the guard across an await.
async fn named_body(term: &LockGuard) -> u64 {
    tokio::task::yield_now().await;
    term.token().get()
}

/// The kinds of bodies that a task may have: a function, and closures that own and change what they
/// capture and keep it and the guard across an await.
#[tokio::test]
async fn bodies_of_leaders_can_be_spawned() {
    let locks = support_locks::connect("memory://").await;
    let other = locks.clone();
    let named = tokio::spawn(async move { other.lead("k", named_body).await });
    assert!(named.await.expect("a task").expect("lead") > 0);

    let (other, mut terms) = (locks.clone(), Vec::new());
    let changing = tokio::spawn(async move {
        let body = async move |term: &LockGuard| {
            terms.push(term.token());
            tokio::task::yield_now().await;
            (term.is_valid(), terms.len())
        };
        other.election("k").class("class").lead(body).await
    });
    assert_eq!(changing.await.expect("a task").expect("lead"), (true, 1));

    let (other, text) = (locks.clone(), String::from("owned"));
    let owning = tokio::spawn(async move {
        let body = async move |term: &LockGuard| {
            tokio::task::yield_now().await;
            (text.len(), term.is_valid())
        };
        other.lead(String::from("k"), body).await
    });
    assert_eq!(owning.await.expect("a task").expect("lead"), (5, true));
}
