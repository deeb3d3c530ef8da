//! One long-lived connection that is replaced when it breaks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use deadpool_redis::redis::aio::MultiplexedConnection;
use deadpool_redis::redis::{AsyncConnectionConfig, ConnectionInfo, pipe};
use deadpool_redis::{Connection, Manager, Pool};
use parking_lot::Mutex;

use super::super::commands::without_errors;
use super::super::reply::{as_text, error_in_words, server_time};
use super::Shared;
use crate::fence::FencingToken;
use crate::store::StoreError;

/// A connection, checked out of the pool once and kept: a check-out per request would cost a round trip each.
pub(super) struct Link {
    pool: Pool,
    shared: Arc<Shared>,
    current: Mutex<Option<Live>>,
    /// How many connections were opened.
    opened: AtomicU64,
    /// Held while connecting, so that a hundred tasks that find the connection broken make one new one.
    connecting: tokio::sync::Mutex<()>,
}

/// A connection and which one it is.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) connection: MultiplexedConnection,
    pub(super) generation: u64,
}

/// How many requests may wait to be written before senders wait: enough for thousands of tasks that ask at once.
const PIPELINE_BUFFER: usize = 4096;

impl Link {
    pub(super) fn new(info: &ConnectionInfo, shared: &Arc<Shared>) -> Result<Self, StoreError> {
        // No response timeout: the time limit of a request is its sender's, whatever runtime the sender lives on.
        let config = AsyncConnectionConfig::new()
            .set_response_timeout(None)
            .set_connection_timeout(Some(shared.timeout))
            .set_pipeline_buffer_size(PIPELINE_BUFFER);
        let unusable = |error: &dyn std::fmt::Display| StoreError::Refused(error.to_string().into());
        let manager = Manager::new_with_config(info.clone(), config).map_err(|error| unusable(&error))?;
        let pool = Pool::builder(manager)
            .max_size(1)
            .build()
            .map_err(|error| unusable(&error))?;
        Ok(Self {
            pool,
            shared: Arc::clone(shared),
            current: Mutex::new(None),
            opened: AtomicU64::new(0),
            connecting: tokio::sync::Mutex::new(()),
        })
    }

    /// The connection; a new one if there is none.
    pub(super) async fn get(&self) -> Result<Live, StoreError> {
        let live = self.current.lock().clone();
        match live {
            Some(live) => Ok(live),
            // On the heap: connecting is rare and would make the future of every request ten times as large.
            None => Box::pin(self.connect()).await,
        }
    }

    async fn connect(&self) -> Result<Live, StoreError> {
        let _only_one = self.connecting.lock().await;
        if let Some(live) = self.current.lock().clone() {
            return Ok(live);
        }
        let connection = self.pool.get().await.map_err(|error| match error {
            deadpool_redis::PoolError::Backend(error) => error_in_words(&error),
            other => StoreError::Unavailable(other.to_string().into()),
        })?;
        let mut connection = Connection::take(connection);
        self.greet(&mut connection).await?;
        self.shared.metrics.connects.increment(1);
        let generation = self.opened.fetch_add(1, Ordering::Relaxed);
        let live = Live { connection, generation };
        *self.current.lock() = Some(live.clone());
        Ok(live)
    }

    /// That connection is of no more use.
    pub(super) fn broken(&self, broken: &Live) {
        let mut current = self.current.lock();
        if current
            .as_ref()
            .is_some_and(|live| live.generation == broken.generation)
        {
            *current = None;
        }
    }

    /// Once per connection: the floor below which the counters of this server must not be, and whether all managers have
    /// one map. Both are done again for every connection, since the server behind it may be another one, or have lost
    /// its data.
    async fn greet(&self, connection: &mut MultiplexedConnection) -> Result<(), StoreError> {
        let shared = &*self.shared;
        let map_key = shared.commands.names.map();
        let mut greeting = pipe();
        greeting.cmd("TIME");
        greeting.cmd("SET").arg(&map_key).arg(&shared.map).arg("NX");
        greeting.cmd("GET").arg(&map_key);
        let replies = connection.send_packed_commands(&greeting, 0, 3).await;
        let replies = replies.and_then(without_errors);
        let replies = replies.map_err(|error| error_in_words(&error))?;
        let (time, theirs) = match &replies[..] {
            [time, _, map] => (server_time(time), as_text(map)),
            _ => (None, None),
        };
        let (Some((seconds, micros)), Some(theirs)) = (time, theirs) else {
            return Err(StoreError::Refused(
                format!("unexpected replies to TIME and GET {map_key}: {replies:?}").into(),
            ));
        };
        if theirs != shared.map {
            return Err(StoreError::MapMismatch {
                ours: shared.map.clone(),
                theirs,
                map_key,
            });
        }
        shared
            .floor
            .fetch_max(FencingToken::from_server_time(seconds, micros), Ordering::AcqRel);
        Ok(())
    }
}
