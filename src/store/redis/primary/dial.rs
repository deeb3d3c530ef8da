//! Opens connections to the primary and checks them.

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{Cmd, ConnectionInfo, RedisError, Value, cmd, pipe};

use super::super::client::{Purpose, Target, explained, named, with_reason};
use super::super::connection::{self, Driver, InFlight, InFlightGuard};
use super::super::map;
use super::super::reply::{as_text, role, server_time};
use super::Shared;
use crate::backoff::Backoff;
use crate::clock::Moment;
use crate::endpoint::ServerUrl;
use crate::error::Reason;
use crate::fence::FencingToken;
use crate::store::{MapState, MapStep, StoreError};
use crate::time_limit::within;

/// Opens the connections of one purpose.
pub(super) struct Dialer {
    pub(super) shared: Arc<Shared>,
    in_flight: InFlight,
    purpose: Purpose,
}

/// A connection that was greeted.
pub(super) struct Opened {
    pub(super) connection: MultiplexedConnection,
    pub(super) driver: Driver,
    /// `host:port`
    pub(super) place: String,
    /// How often the primary had changed before it was opened.
    pub(super) switches: u64,
    /// The era in which it was opened, see [`Shared::era`].
    pub(super) era: u64,
}

/// The first and the longest pause before asking for the primary again during a failover.
const FAILOVER_PAUSE_MIN: Duration = Duration::from_millis(10);
const FAILOVER_PAUSE_MAX: Duration = Duration::from_millis(100);

impl Dialer {
    pub(super) fn new(shared: &Arc<Shared>, purpose: Purpose) -> Self {
        Self {
            shared: Arc::clone(shared),
            in_flight: InFlight::default(),
            purpose,
        }
    }

    /// Counts a request as in flight until the returned guard is dropped.
    pub(super) fn enter(&self) -> InFlightGuard {
        self.in_flight.enter()
    }

    /// Connects to the primary. During a failover, asks the sentinels repeatedly for most of a
    /// request's time limit. The failover is usually over by then, and the caller does not notice
    /// it.
    ///
    /// `keep` takes over the connection. If it fails because the primary has changed meanwhile,
    /// the primary is looked for again.
    pub(super) async fn connect<T>(&self, keep: &impl Fn(Opened) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let shared = &*self.shared;
        if !shared.discovery.follows() {
            return self.open(&shared.discovery.locate().await?, keep).await;
        }
        let until = Instant::now() + shared.timeout * 3 / 4;
        let mut backoff = Backoff::new(FAILOVER_PAUSE_MIN, FAILOVER_PAUSE_MAX);
        let mut events = shared.failovers.subscribe();
        // The address of the last attempt, and why it failed.
        let mut last_failure: Option<(String, Reason)> = None;
        loop {
            events.mark_seen();
            let server = shared.discovery.locate().await?;
            let left = until.saturating_duration_since(Instant::now());
            let opened = tokio::select! {
                opened = tokio::time::timeout(left, self.open(&server, keep)) => opened,
                // The primary changed again, so this address may be wrong.
                () = events.changed() => continue,
            };
            let place = server.place();
            let error = match opened {
                Ok(Err(StoreError::Unavailable(error))) => error,
                Ok(Err(StoreError::Refused(reason))) => {
                    return Err(StoreError::Refused(
                        format!("the sentinels name {place} as the primary: {reason}").into(),
                    ));
                }
                Ok(opened) => return opened,
                // The error of the previous attempt is more informative than a timeout.
                Err(_) => match last_failure.take() {
                    Some((known, error)) if known == place => error,
                    _ => format!("{place} does not answer").into(),
                },
            };
            if events.has_changed() {
                continue;
            }
            shared.discovery.report_unreachable();
            let pause = backoff.next_delay();
            if Instant::now() + pause >= until {
                return Err(StoreError::Unavailable(
                    error.map(|error| format!("the sentinels name {place} as the primary: {error}")),
                ));
            }
            last_failure = Some((place.to_owned(), error));
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = events.changed() => {}
            }
        }
    }

    async fn open<T>(
        &self,
        server: &ServerUrl,
        keep: &impl Fn(Opened) -> Result<T, StoreError>,
    ) -> Result<T, StoreError> {
        let shared = &*self.shared;
        let target = Target::new(server, &shared.tls);
        let target = target.map_err(|error| StoreError::Refused(error.to_string().into()))?;
        let target = target.with_login(&shared.login);
        let is_kept = self.purpose != Purpose::Pool;
        let error = match self.open_at(server, &target, None).await {
            Err(error @ StoreError::Refused(_)) if !shared.discovery.follows() => error,
            Ok(opened) => {
                let kept = keep(opened)?;
                if is_kept {
                    *shared.address.lock() = None;
                }
                return Ok(kept);
            }
            Err(error) => return Err(error),
        };
        // A name may resolve to several servers, one of which is the primary.
        let addresses = connection::addresses(&target).await;
        if addresses.len() > 1 {
            for address in addresses {
                let opened = self.open_at(server, &target, Some(address)).await;
                if let Ok(kept) = opened.and_then(keep) {
                    if is_kept {
                        // The inbox must use this address, too.
                        *shared.address.lock() = Some(address);
                    }
                    return Ok(kept);
                }
            }
        }
        Err(error)
    }

    async fn open_at(
        &self,
        server: &ServerUrl,
        target: &Target,
        only: Option<SocketAddr>,
    ) -> Result<Opened, StoreError> {
        let shared = &*self.shared;
        let (switches, era) = (shared.failovers.switches(), shared.era.load(Ordering::Acquire));
        let open = || {
            let (target, timeout, in_flight) = (target.clone(), shared.timeout, self.in_flight.clone());
            async move { connection::open(&target, only, connection::settings(), timeout, &in_flight).await }
        };
        let connecting = async {
            // The driver must run on the same runtime as the tasks that use it. A pool runs on
            // the background thread, whose runtime is the current one then.
            match self.purpose {
                Purpose::Requests => shared.runtimes.open(shared.timeout / 2, open).await,
                _ => open().await,
            }
        };
        let (mut connection, driver) = with_reason(target.info(), shared.timeout, connecting).await?;
        // A server that hangs accepts connections but does not reply.
        let greeted = within(
            Moment::now(),
            shared.timeout,
            pin!(self.greet(&mut connection, server.place(), target.info())),
        )
        .await;
        greeted.unwrap_or_else(|_| Err(no_greeting(shared.timeout)))?;
        Ok(Opened {
            connection,
            driver,
            place: server.place().to_owned(),
            switches,
            era,
        })
    }

    /// Checks each new connection: whether the server is a primary, the minimum for its counters,
    /// and whether all managers have the same map. This is repeated for every connection, since the
    /// server behind the address may be another one or may have lost its data.
    async fn greet(
        &self,
        connection: &mut MultiplexedConnection,
        place: &str,
        info: &ConnectionInfo,
    ) -> Result<(), StoreError> {
        let shared = &*self.shared;
        let mut greeting = pipe();
        // `TIME` is a placeholder: the later replies are read by index.
        greeting.cmd(if shared.check_role { "ROLE" } else { "TIME" });
        greeting.cmd("TIME");
        greeting.add_command(map::read(&shared.map));
        // The connections of a pool carry no locks.
        let is_kept = self.purpose != Purpose::Pool;
        if is_kept && shared.vote.is_some() {
            greeting.cmd("INFO").arg("server");
            // A claim is dropped once the other nodes have decided. If its script were unknown,
            // nobody would send it again with `EVAL`.
            for script in [&shared.scripts.claim, &shared.scripts.modes.claim] {
                greeting.cmd("SCRIPT").arg("LOAD").arg(script.text());
            }
        }
        // The last reply is checked separately.
        greeting.add_command(named(&shared.commands.manager, self.purpose));
        if is_kept {
            greeting.add_command(probe_zpopmin(shared.map.key()));
        }
        let asked_at = Moment::now();
        let replies = connection.send_packed_commands(&greeting, 0, greeting.len()).await;
        let mut replies = match replies {
            Ok(replies) => replies,
            Err(error) => return Err(explained(info, shared.timeout, &error).await),
        };
        let popped = if is_kept { replies.pop() } else { None };
        // Ignored: not every user may set a name.
        replies.pop();
        // Checked first, since a replica answers the rest with errors only.
        match replies.first().cloned().map(Value::extract_error) {
            Some(Ok(answer)) if shared.check_role => shared.discovery.check_role(&role(&answer)?, place)?,
            Some(Err(error)) if shared.check_role && is_unknown_command(&error) => {
                return Err(StoreError::Refused(
                    format!("the server lacks ROLE, which distinguishes a primary from a replica; if this address always leads to a primary, set check_role = false: {error}").into(),
                ));
            }
            _ => {}
        }
        let replies = shared.commands.permissions.without_errors(&greeting, replies);
        let replies = replies.map_err(|error| shared.discovery.to_store_error(&error))?;
        popped.map_or(Ok(()), check_zpopmin)?;
        let (time, stored) = match &replies[..] {
            [_, time, stored, ..] => (server_time(time), stored),
            _ => (None, &Value::Nil),
        };
        let Some((seconds, micros)) = time else {
            return Err(StoreError::Refused(
                format!("unexpected reply to TIME: {replies:?}").into(),
            ));
        };
        let was_set = shared.map.is_set();
        let state = map::check(&shared.map, stored)?;
        if !is_kept {
            return Ok(());
        }
        if state != MapState::Ours && was_set {
            // The server has lost the map, while this manager may hold leases there.
            restore_map(shared, connection).await?;
        }
        if let Some(vote) = &shared.vote {
            let info = replies.get(3).and_then(as_text);
            vote.learn(asked_at, info.as_deref())?;
        }
        let floor = FencingToken::from_server_time(seconds, micros);
        shared.token_floor.note_server_time(floor);
        Ok(())
    }
}

/// The newest command that the scripts need, which they call only if a cycle waits. Pops zero
/// members from a queue that never exists.
fn probe_zpopmin(map_key: &str) -> Cmd {
    let mut pop = cmd("ZPOPMIN");
    pop.arg(format!("{{{map_key}}}:q")).arg(0);
    pop
}

fn no_greeting(timeout: Duration) -> StoreError {
    StoreError::Unavailable(
        format!("the server accepted the connection but sent no reply within store_timeout ({timeout:?})").into(),
    )
}

fn is_unknown_command(error: &RedisError) -> bool {
    error.to_string().to_lowercase().contains("unknown command")
}

/// Fails if the server lacks `ZPOPMIN`, which would otherwise go unnoticed until the first
/// hand-off.
fn check_zpopmin(popped: Value) -> Result<(), StoreError> {
    match popped.extract_error() {
        Err(error) if is_unknown_command(&error) => Err(StoreError::Refused(
            format!("the server lacks ZPOPMIN, which is required to wait for locks; use Redis 5.0 or later, or Valkey: {error}").into(),
        )),
        // Requests get any other error as well.
        _ => Ok(()),
    }
}

/// Stores the map again after the server lost it.
async fn restore_map(shared: &Shared, connection: &MultiplexedConnection) -> Result<(), StoreError> {
    let send = |command: Cmd| {
        let mut connection = connection.clone();
        async move {
            let reply = connection.send_packed_command(&command).await;
            let reply = reply.and_then(Value::extract_error);
            let reply = reply.map_err(|error| shared.commands.permissions.of_command(error, &command));
            reply.map_err(|error| shared.discovery.to_store_error(&error))
        }
    };
    map::step(&shared.map, MapStep::Confirm, &|command| Box::pin(send(command)))
        .await
        .map(drop)
}
