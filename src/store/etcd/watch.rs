//! One watch stream: this manager's inbox and, for every waiting cycle, what blocks it.
//!
//! # Implementation details
//!
//! An exclusive cycle is blocked by the key directly before its own, any other by the nearest
//! exclusive one before it. The watch on that key begins right after the revision at which it was
//! seen, so no deletion is missed, whenever the watch is created. When the key disappears, by a
//! release, the end of its lease or by hand, it may be our turn, and the queue asks again; only the
//! reply makes the cycle a holder. So the end of one key wakes one manager, or all that wait to
//! share the lock.
//!
//! If only permits are missing, no single key decides. Then all keys of the lock are watched, and
//! those that disappear are removed from the list of the members before the cycle. The cycle asks
//! again when the rest leaves room for it, so it sends nothing for any other release.
//!
//! A stream that broke is opened again, to another server. So is one whose connection gave no
//! answer to other requests. All waiting cycles are then watched again, and ask again, too: their
//! watches may begin at a revision that etcd has compacted meanwhile.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{EventType, WatchFilterType, WatchOptions, WatchRequestSender, WatchResponse, WatchResponseStream};
use parking_lot::Mutex;
use tokio::sync::mpsc::UnboundedSender;

use super::queue::Blocker;
use super::waits::WaitingCycle;
use super::{Shared, error};
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::key::LockKey;
use crate::protocol::{Cycle, Push};
use crate::store::{StoreError, warn_malformed};

/// The id of the inbox's watch.
const INBOX: i64 = 1;
/// The first and the longest pause before watching is tried again.
const PAUSE_MIN: Duration = Duration::from_millis(5);
const PAUSE_MAX: Duration = Duration::from_secs(1);

/// The watches of one stream. They are numbered here, since etcd's own ids arrive only with its
/// reply.
#[derive(Debug)]
struct Watches {
    by_number: HashMap<i64, Watched>,
    by_cycle: HashMap<Cycle, i64>,
    last: i64,
}

/// A cycle for which something is watched.
#[derive(Debug)]
struct Watched {
    cycle: Cycle,
    key: LockKey,
    blocker: Blocker,
}

/// Why a stream ended.
enum End {
    /// The receiver of pushes is gone.
    Unheard,
    /// The stream broke.
    Broken(String),
    /// Etcd does not permit this user to watch the inbox.
    Refused(String),
}

/// Watches until the receiver is gone.
pub(super) async fn watch(shared: Arc<Shared>, pushes: UnboundedSender<Push>) {
    let mut backoff = Backoff::new(PAUSE_MIN, PAUSE_MAX);
    loop {
        let opened = tokio::time::timeout(shared.timeout, open(&shared)).await;
        let broken = match opened {
            Ok(Ok((live, sender, stream))) => {
                let mut confirmed = false;
                let end = tokio::select! {
                    end = follow(&shared, sender, stream, &pushes, &mut confirmed) => end,
                    () = shared.background.abandoned(&live) => End::Broken("the connection gave no answer".to_owned()),
                };
                shared.waits.unwatch();
                if !matches!(end, End::Refused(_)) {
                    shared.background.broken(&live);
                }
                if confirmed {
                    backoff.reset();
                    if pushes.send(Push::Disconnected).is_err() {
                        return;
                    }
                }
                match end {
                    End::Unheard => return,
                    End::Broken(reason) => reason,
                    End::Refused(reason) => {
                        // The receiver reports it, once.
                        let reason = reason.into();
                        if pushes.send(Push::Refused { reason }).is_err() {
                            return;
                        }
                        backoff.wait().await;
                        continue;
                    }
                }
            }
            Ok(Err(reason)) => reason,
            Err(_) => format!("no answer within {:?}", shared.timeout),
        };
        // An outage of the shard is logged elsewhere, so warn only while the shard is up.
        match shared.ended_watches.admit(Moment::now()) {
            Some(suppressed) if shared.metrics.is_up() => {
                crate::log::warn!(shard = %shared.shard, reason = %broken, suppressed, "the watch of etcd ended and will be reopened");
            }
            _ => {
                crate::log::debug!(shard = %shared.shard, reason = %broken, "the watch of etcd ended and will be reopened")
            }
        }
        tokio::select! {
            () = backoff.wait() => {}
            () = pushes.closed() => return,
        }
    }
}

async fn open(shared: &Shared) -> Result<(super::link::Live, WatchRequestSender, WatchResponseStream), String> {
    let live = shared.background.get().await.map_err(|error| match error {
        StoreError::Unavailable(reason) | StoreError::Refused(reason) => reason.to_string(),
        StoreError::MapMismatch { map_key, .. } => format!("{map_key} has a different shard map"),
    })?;
    let options = WatchOptions::new()
        .with_prefix()
        .with_watch_id(INBOX)
        .with_filters([WatchFilterType::NoDelete]);
    match live.client.clone().watch(shared.names.inbox(), Some(options)).await {
        Ok(stream) => {
            let (sender, stream) = stream.split();
            Ok((live, sender, stream))
        }
        Err(error) => {
            shared.background.broken(&live);
            Err(error.to_string())
        }
    }
}

async fn follow(
    shared: &Shared,
    sender: WatchRequestSender,
    stream: WatchResponseStream,
    pushes: &UnboundedSender<Push>,
    confirmed: &mut bool,
) -> End {
    let watches = Mutex::new(Watches {
        by_number: HashMap::new(),
        by_cycle: HashMap::new(),
        last: INBOX,
    });
    shared.waits.watch();
    // Concurrently: requesting watches may have to wait until etcd's pending messages are received.
    tokio::select! {
        end = send_watches(shared, sender, &watches) => end,
        end = receive(shared, stream, &watches, pushes, confirmed) => end,
        () = pushes.closed() => End::Unheard,
    }
}

/// Requests the watches that are needed, and cancels those that no longer are.
async fn send_watches(shared: &Shared, mut sender: WatchRequestSender, watches: &Mutex<Watches>) -> End {
    loop {
        shared.waits.changed.notified().await;
        for (cycle, wait) in shared.waits.changes() {
            let before = watches.lock().forget(cycle);
            let mut asked = Ok(());
            if let Some(number) = before {
                asked = sender.cancel(number).await;
            }
            if let (Ok(()), Some(wait)) = (&asked, wait) {
                let options = WatchOptions::new()
                    .with_start_revision(wait.seen_at.saturating_add(1))
                    .with_watch_id(watches.lock().number(cycle, &wait))
                    .with_filters([WatchFilterType::NoPut]);
                asked = match wait.blocker {
                    Blocker::Key(name) => sender.watch(name, Some(options)).await,
                    Blocker::Permits(_) => {
                        let all = Some(options.with_prefix());
                        sender.watch(shared.names.prefix(&wait.key), all).await
                    }
                };
            }
            if let Err(error) = asked {
                return End::Broken(error.to_string());
            }
        }
    }
}

async fn receive(
    shared: &Shared,
    mut stream: WatchResponseStream,
    watches: &Mutex<Watches>,
    pushes: &UnboundedSender<Push>,
    confirmed: &mut bool,
) -> End {
    loop {
        let response = match stream.message().await {
            Ok(Some(response)) => response,
            Ok(None) => return End::Broken("etcd closed the stream".to_owned()),
            Err(error) => return End::Broken(error.to_string()),
        };
        let pushed = if response.watch_id() == INBOX || response.watch_id() < 0 {
            if response.canceled() {
                let reason = response.cancel_reason();
                return match error::missing_permission(reason, shared.names.namespace()) {
                    Some(refusal) => End::Refused(refusal),
                    None => End::Broken(format!("etcd ended the watch: {reason}")),
                };
            }
            if response.created() && !*confirmed {
                *confirmed = true;
                shared.metrics.subscriptions.increment(1);
                pushes.send(Push::Resubscribed { slot: None })
            } else {
                notes(shared, &response).try_for_each(|push| pushes.send(push))
            }
        } else {
            match ended(&response, watches) {
                Some(push) => pushes.send(push),
                None => Ok(()),
            }
        };
        if pushed.is_err() {
            return End::Unheard;
        }
    }
}

/// The pushes for notes that were put into the inbox.
fn notes<'a>(shared: &'a Shared, response: &'a WatchResponse) -> impl Iterator<Item = Push> + 'a {
    response.events().iter().filter_map(|event| {
        let name = event.kv()?.key();
        let note = shared.names.read_note(name);
        if note.is_none() {
            warn_malformed(&shared.shard, &String::from_utf8_lossy(name));
        }
        let (key, cycle) = note?;
        Some(Push::RemoteWaiter { key, cycle })
    })
}

/// What blocked the cycle is gone, or etcd ended the watch: the cycle asks again.
fn ended(response: &WatchResponse, watches: &Mutex<Watches>) -> Option<Push> {
    let mut gone = response
        .events()
        .iter()
        .filter(|event| event.event_type() == EventType::Delete)
        .filter_map(etcd_client::Event::kv)
        .peekable();
    if gone.peek().is_none() && !response.canceled() {
        return None;
    }
    let mut watches = watches.lock();
    // A watch that we cancelled is no longer listed.
    let watched = watches.by_number.get_mut(&response.watch_id())?;
    let is_over = match &mut watched.blocker {
        Blocker::Key(_) => true,
        // Each key that is gone is removed, also those after the one that decides.
        Blocker::Permits(permits) => {
            let mut is_over = false;
            for kv in gone {
                is_over |= permits.without(kv.key());
            }
            is_over
        }
    };
    (is_over || response.canceled()).then(|| Push::YourTurn {
        key: watched.key.clone(),
        cycle: watched.cycle,
    })
}

impl Watches {
    /// Assigns a number to a new watch.
    fn number(&mut self, cycle: Cycle, wait: &WaitingCycle) -> i64 {
        self.last += 1;
        let watched = Watched {
            cycle,
            key: wait.key.clone(),
            blocker: wait.blocker.clone(),
        };
        self.by_number.insert(self.last, watched);
        self.by_cycle.insert(cycle, self.last);
        self.last
    }

    /// The number of the watch to cancel, if there is one.
    fn forget(&mut self, cycle: Cycle) -> Option<i64> {
        let number = self.by_cycle.remove(&cycle)?;
        self.by_number.remove(&number);
        Some(number)
    }
}
