//! How each of the two acquires and releases a lock.

use crate::options::Options;
use redis::aio::MultiplexedConnection;
use std::error::Error;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

pub enum Peer {
    Rslock {
        manager: rslock::LockManager,
        ttl: Duration,
    },
    Raw {
        connection: MultiplexedConnection,
        release: Box<redis::Script>,
        ttl: Duration,
        values: AtomicU64,
        process: usize,
    },
}

pub enum Guard {
    Rslock(rslock::LockGuard),
    Raw { key: String, value: String },
}

impl Peer {
    pub async fn open(options: &Options) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let url = format!("redis://{}", options.server);
        match options.peer.as_str() {
            "rslock" => {
                // One manager per process: its tasks share one multiplexed connection.
                let mut manager = rslock::LockManager::new(vec![url]);
                if let Some(delay) = options.retry_max {
                    // Each round of its acquire makes a new value and retries without a pause after
                    // the last try. Many tries per round are therefore the better choice for the
                    // server.
                    manager.set_retry(u32::MAX, delay.max(Duration::from_millis(1)));
                }
                Ok(Self::Rslock {
                    manager,
                    ttl: options.ttl,
                })
            }
            "raw" => {
                // The fastest that the commands themselves can be: one multiplexed connection, as
                // the library recommends for many tasks, with room for the commands of all of them.
                let config = redis::AsyncConnectionConfig::new().set_pipeline_buffer_size(1024);
                let client = redis::Client::open(url)?;
                let connection = client.get_multiplexed_async_connection_with_config(&config).await?;
                let code = "if redis.call('GET',KEYS[1])==ARGV[1] then return redis.call('DEL',KEYS[1]) end return 0";
                let release = Box::new(redis::Script::new(code));
                Ok(Self::Raw {
                    connection,
                    release,
                    ttl: options.ttl,
                    values: AtomicU64::new(0),
                    process: options.process,
                })
            }
            other => Err(format!("no peer is called {other:?}: rslock or raw").into()),
        }
    }

    pub async fn lock(&self, key: &str) -> Result<Guard, Box<dyn Error + Send + Sync>> {
        match self {
            Self::Rslock { manager, ttl } => Ok(Guard::Rslock(manager.acquire(key, *ttl).await?)),
            Self::Raw {
                connection,
                ttl,
                values,
                process,
                ..
            } => {
                let value = format!("{process}:{}", values.fetch_add(1, Ordering::Relaxed));
                let mut connection = connection.clone();
                let mut command = redis::cmd("SET");
                command
                    .arg(key)
                    .arg(&value)
                    .arg("NX")
                    .arg("PX")
                    .arg(ttl.as_millis() as u64);
                let set: Option<String> = command.query_async(&mut connection).await?;
                // This limit is for free keys and has no way to wait.
                set.ok_or_else(|| format!("raw: {key} is held: this baseline is for free keys only"))?;
                Ok(Guard::Raw {
                    key: key.to_owned(),
                    value,
                })
            }
        }
    }

    pub async fn release(&self, guard: Guard) -> Result<(), Box<dyn Error + Send + Sync>> {
        match (self, guard) {
            (_, Guard::Rslock(guard)) => guard.release().await,
            (
                Self::Raw {
                    connection, release, ..
                },
                Guard::Raw { key, value },
            ) => {
                let deleted: u64 = release
                    .key(&key)
                    .arg(&value)
                    .invoke_async(&mut connection.clone())
                    .await?;
                if deleted != 1 {
                    return Err(format!("raw: the lock of {key} was no longer ours at its release").into());
                }
            }
            (Self::Rslock { .. }, Guard::Raw { .. }) => return Err("a raw guard cannot be released by rslock".into()),
        }
        Ok(())
    }
}
